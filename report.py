"""The notebook: a run's entry, and all runs side by side, out of what they leave in their folders: run.json (what a run
is), metrics.jsonl (how it went) and final.json (its last figures). Needs no torch.

    python report.py [out/NAME ...] [--format md|csv|json]
"""

from lab.console import ROOT, UserError, command, run

import argparse
import csv
import itertools
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np

# --- a run's entry --------------------------------------------------------------------------------------------------


def read_json(path):
    """A JSON file's dict; {} where there is none or it is torn."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts; lines that a kill or a full disk tore are left out. [] without a file."""
    lines = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    values = json.loads(line)
                except ValueError:
                    continue
                if isinstance(values, dict) and isinstance(values.get("step"), int):
                    lines.append(values)
    return lines


def write_text(path, text):
    """Write a small file whole or not at all."""
    with open(f"{path}.part", "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
    os.replace(f"{path}.part", path)


def name_of(folder):
    """A run's name, its folder's; what is no text in it becomes "?"."""
    return os.path.basename(os.path.abspath(folder)).encode(errors="replace").decode()


def read_run(folder):
    """(run.json, training lines, evaluation lines, final.json) of a run's folder; None if it is no run of ours."""
    about, lines = read_json(f"{folder}/run.json"), read_metrics(f"{folder}/metrics.jsonl")
    if not {"name", "config", "parameters", "flops_per_token", "data"} <= about.keys():
        return None
    evaluations = [line for line in lines if isinstance(line.get("val_loss"), float)]
    return about, [line for line in lines if "lr" in line], evaluations, read_json(f"{folder}/final.json")


def table(head, rows):
    """A Markdown table, numbers to the right."""
    numbers = [all(not str(row[i]).strip("-+,.0123456789e%:") for row in rows) for i in range(len(head))]
    lines = [head, ["---:" if number else "---" for number in numbers], *rows]
    cells = ([" ".join(str(cell).splitlines()).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def rounded(value, digits):
    """A large number to so many digits: 6.6e10."""
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(power)}"


def perplexity(value):
    """A perplexity for people: 46.33, and from a million on 6.6e10."""
    return f"{value:,.2f}" if value < 1e6 else rounded(value, 2)


def verdict(expected, ppl):
    """What a perplexity is to the (low, high) that was expected."""
    return "not met" if ppl > expected[1] else "exceeded" if ppl < expected[0] else "met"


def entry(folder):
    """A run's notebook entry, Markdown, from the files in its folder."""
    about, lines, evaluations, final = read_run(folder)
    c, n, data = about["config"], about["parameters"], about["data"]
    title, _, question = about["doc"].strip().partition("\n")
    N, D = n["total"], data["splits"]["train"]["tokens"]
    planned = about["steps"] * about["step_tokens"]
    seen = max((line["tokens"] for line in lines + evaluations), default=0)
    over = 20 * N / D
    times = f"{over:,.1f} times over" if over > 1 else f"{1 / over:,.1f} times under"
    shape = ("max_seq_len", "d_model", "num_heads", "d_ff", "num_layers", "dropout", "block", "unigram_bias")
    model = [[name, c[name]] for name in shape]
    muon = f"Muon for the blocks' matrices, lr {c['muon_learning_rate']:g}, and " if c["optimizer"] == "muon" else ""
    parts = f"embeddings {n['embeddings']:,}, head bias {n['head_bias']:,}, blocks {n['blocks']:,}"
    sizes = [[split, *(f"{counts[k]:,}" for k in ("tokens", "words", "bytes"))]
             for split, counts in data["splits"].items()]
    ratios = [["one epoch", f"{D:,}", f"{D / N:.2f}"], ["so far", f"{seen:,}", f"{seen / N:.2f}"],
              ["the run as planned", f"{planned:,}", f"{planned / N:.2f}"]]
    text = [
        f"# {title or about['name']} - {about['began'][:10]}",
        "## What we're doing", question.strip() or "(the config says nothing)",
        "## Model", table(["setting", "value"], [["vocab_size", f"{about['vocab_size']:,}"], *model]),
        f"**Parameters: {N:,}** ({parts}), {about['flops_per_token']:,} FLOPs a token of training",
        "## Data",
        f"{c['dataset']}, from {data['source']}, tokenizer {data['tokenizer']}, separator {data['separator']}",
        table(["split", "tokens", "words", "bytes"], sizes),
        table(["", "D, tokens", "D / N"], ratios),
        f"Chinchilla's ratio is 20: for one epoch of this data N = {D / 20:,.0f}, and this model is {times} that.",
        "## Set-up",
        f"- Optimizer: {muon}AdamW, lr {c['learning_rate']:g}, {c['warmup_steps']} steps of warm-up, then "
        f"{c['lr_schedule']} to {c['min_learning_rate']:g}; betas {c['beta1']:g} and {c['beta2']:g}, epsilon "
        f"{c['adam_eps']:g}, weight decay {c['weight_decay']:g}, clipping {c['grad_clip']:g}\n"
        f"- Batch: {c['batch_size']} x {c['max_seq_len']} = {about['step_tokens']:,} tokens a step; {about['steps']:,} "
        f"steps, {planned / D:.2f} epochs; seed {c['seed']}\n"
        f"- Machine: {about['machine']}; {about['versions']}; commit {about['commit']}",
        "## Expected",
        "Validation perplexity {:g} to {:g}".format(*c["expected_ppl"]) if c["expected_ppl"] else "no figure given",
        "## Results", *results(about, lines, evaluations, final),
    ]
    return "\n\n".join(text) + "\n"


def results(about, lines, evaluations, final):
    """The entry's results, as paragraphs."""
    c = about["config"]
    if not evaluations:
        return [f"Not evaluated yet; step {lines[-1]['step']:,} of {about['steps']:,}." if lines else "Not begun."]
    rows, before = [], None
    for line in evaluations:
        change = 0 if before is None else line["val_ppl"] - before
        gain = "-" if before is None else ("-" if change < 0 else "+") + perplexity(abs(change))
        rows.append([f"{line['epoch']:.2f}", f"{line['step']:,}", f"{line['train_loss'] or math.nan:.4f}",
                     f"{line['val_loss']:.4f}", perplexity(line["val_ppl"]), gain])
        before = line["val_ppl"]
    best = min(evaluations, key=lambda line: line["val_loss"])
    last = max(lines + evaluations, key=lambda line: line["step"])
    speeds = sorted(line["tokens_per_s"] for line in lines)
    paragraphs = [
        table(["epoch", "step", "train loss", "val loss", "val perplexity", "change"], rows), "![loss](curve.png)",
        f"**Best: epoch {best['epoch']:.2f}, val loss {best['val_loss']:.4f}, perplexity "
        f"{perplexity(best['val_ppl'])} a token, {perplexity(best['val_ppl_word'])} a word, "
        f"{best['val_bits_per_byte']:.4f} bits a byte.**",
    ]
    if final:
        figures = [[split, *map(show, values.values())]
                   for split, values in final.items()]
        paragraphs.append(table(["at the best", *final["val"]], figures))
    if c["expected_ppl"]:
        low, high = c["expected_ppl"]
        said = verdict(c["expected_ppl"], best["val_ppl"])
        paragraphs.append(f"Expected {low:g} to {high:g}: {said}{'' if final else ' so far'}.")
    if c["recorded_ppl"]:
        paragraphs.append(f"The notebook's earlier result was {c['recorded_ppl']:g}.")
    speed = f", {speeds[len(speeds) // 2]:,.0f} tokens/s in the median" if speeds else ""
    paragraphs.append(f"{'Finished' if final else 'So far'}: {last['step']:,} of {about['steps']:,} steps in "
                      f"{max(line['elapsed_s'] for line in lines + evaluations) / 60:,.1f} minutes{speed}, "
                      f"{last.get('skipped', 0)} steps skipped.")
    if best.get("samples"):
        paragraphs.append("### Samples of the best")
        paragraphs += [f"Prompt: {json.dumps(prompt)}\n```\n{text}\n```" for prompt, text in best["samples"]]
    return paragraphs


def figure(columns):
    """(a matplotlib figure for files, its axes in a row)."""
    from matplotlib.figure import Figure

    # the font has no CJK: what a name in it looks like is not worth a warning
    warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
    picture = Figure(figsize=(6 if columns == 1 else 4.4 * columns, 3.8), layout="constrained")
    return picture, picture.subplots(1, columns, squeeze=False)[0]


def write_entry(folder):
    """Write a run's notebook.md and curve.png anew, each whole or not at all; nothing without a run.json."""
    if not (found := read_run(folder)):
        return
    about, lines, evaluations, _ = found
    picture, (axes,) = figure(1)
    for label, found, key, style in ("train", lines, "train_loss", "-"), ("validation", evaluations, "val_loss", "o-"):
        points = [(line["tokens"], line[key]) for line in found if line[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
    if recorded := about["config"]["recorded_ppl"]:
        label = f"the notebook's {recorded:g}"
        axes.axhline(math.log(recorded), linestyle="--", color="gray", linewidth=1, label=label)
    axes.set(xlabel="training tokens seen", ylabel="loss, nats a token")
    axes.set_title(name_of(folder), parse_math=False)
    axes.legend()
    picture.savefig(f"{folder}/.curve.png")
    os.replace(f"{folder}/.curve.png", f"{folder}/curve.png")
    write_text(f"{folder}/notebook.md", entry(folder))


# --- all runs -------------------------------------------------------------------------------------------------------

# The notebook's own results, by an earlier program: name, parameters, tokens seen, FLOPs a token, loss, perplexity
RECORDED = [
    ("experiment 1", 869_153, 209 * 2_347_038, 4_959_840, 6.1413, 464.64),
    ("experiment 2", 869_153, 10 * 115_716_078, 4_959_840, 5.8991, 364.71),
    ("experiment 3", 7_342_033, 10 * 115_716_078, 44_888_832, 4.1853, 65.71),
    ("experiment 4", 16_206_673, 9 * 115_716_078, 99_214_848, 3.8358, 46.33),
    ("experiment 5", 19_365_713, 0, 121_234_944, None, None),
]


def rows_of(folders, recorded=True):
    """(a dict a run and, if `recorded`, one a result of the notebook's, sorted by validation loss,
    those without one last; the folders left out, each with the reason)."""
    rows, left_out = [], []
    for folder in folders:
        found = read_run(folder)
        if not found or not found[2]:
            why = "no evaluation yet" if found else "no run of this program"
            left_out.append(f"{name_of(folder)} ({why})")
            continue
        about, lines, evaluations, final = found
        best = min(evaluations, key=lambda line: line["val_loss"])
        N, data, speeds = about["parameters"]["total"], about["data"], sorted(line["tokens_per_s"] for line in lines)
        rows.append(dict(
            run=name_of(folder), state="finished" if final else "not finished", parameters=N,
            tokens=best["tokens"], tokens_per_parameter=best["tokens"] / N,
            flops=best["tokens"] * about["flops_per_token"],
            val_loss=best["val_loss"], val_ppl=best["val_ppl"], val_ppl_word=best["val_ppl_word"],
            val_bits_per_byte=best["val_bits_per_byte"], hours=max(x["elapsed_s"] for x in lines + evaluations) / 3600,
            tokens_per_s=speeds[len(speeds) // 2] if speeds else None, split=data["splits"]["val"]["sha256"],
        ))
    for name, N, D, flops, loss, ppl in RECORDED if recorded else ():
        rows.append(dict(run=name, state="recorded" if loss else "not recorded", parameters=N, tokens=D or None,
                         tokens_per_parameter=D / N if D else None, flops=D * flops or None, val_loss=loss,
                         val_ppl=ppl, val_ppl_word=None, val_bits_per_byte=None,
                         hours=None, tokens_per_s=None, split=None))
    return sorted(rows, key=lambda row: row["val_loss"] or math.inf), left_out


def fit(rows):
    """Fit L = E + A / N**alpha + B / D**beta to the runs (Hoffmann et al. 2022), or the form in N or D alone where the
    other does not vary or there are too few runs, by least squares over a grid of exponents, all of E, A, B >= 0.

    Returns a sentence: the fit, what it predicts, and on how little it stands.
    """
    splits = [row["split"] for row in rows if row["split"]]
    runs = [row for row in rows if row["split"] and row["split"] == max(splits, key=splits.count)]
    N, D, L = (np.array([row[key] for row in runs], float) for key in ("parameters", "tokens", "val_loss"))
    terms = [name for name, values in (("N", N), ("D", D)) if len({float(f"{v:.2g}") for v in values}) >= 3]
    if len(runs) < 3 or not terms:
        return (f"No fit: {len(runs)} run{'s' * (len(runs) != 1)} on one validation text, and a fit takes three or "
                "more that differ in size or in tokens.")
    terms = terms if len(runs) > 5 else terms[:1]
    exponents, best = np.arange(0.05, 1.51, 0.01 if len(terms) == 1 else 0.03), None
    for powers in itertools.product(exponents, repeat=len(terms)):
        falling = [(N if term == "N" else D) ** -power for term, power in zip(terms, powers, strict=True)]
        columns = np.stack([np.ones(len(L)), *falling], 1)
        for kept in (list(range(len(terms) + 1)), list(range(1, len(terms) + 1))):  # E >= 0: or without it
            factors = np.linalg.lstsq(columns[:, kept], L, rcond=None)[0]
            error = np.square(columns[:, kept] @ factors - L).sum()
            if (factors >= 0).all() and (best is None or error < best[0] - 1e-12):
                best = error, powers, dict(zip(kept, factors, strict=True))
    if best is None:
        return "No fit: the loss does not fall with size or tokens among these runs."
    error, powers, factors = best
    ahead = {"N": 2 * N.max(), "D": 2 * D.max()}[terms[0]]
    now = {"N": N[L.argmin()], "D": D[L.argmin()]}
    predicted = factors.get(0, 0.0)
    said = f"L = {predicted:.3f}"
    for i, (term, power) in enumerate(zip(terms, powers, strict=True), 1):
        said += f" + {factors[i]:.3g} / {term}^{power:.2f}"
        predicted += factors[i] * (ahead if i == 1 else now[term]) ** -power
    spare = len(runs) - 2 * len(terms) - 1
    return (f"{said}, from {len(runs)} runs with {2 * len(terms) + 1} unknowns; root mean square error "
            f"{math.sqrt(error / len(L)):.4f}. It predicts {predicted:.3f} (perplexity {math.exp(predicted):,.1f}) at "
            f"{terms[0]} = {ahead:,.0f}. "
            + (f"With {spare} more runs than unknowns this is a weak test." if spare > 0 else
               "With no more runs than unknowns the curve passes through them whatever is true: a guess."))


def draw(rows, path):
    """report.png: the loss against parameters, tokens and FLOPs."""
    picture, axes = figure(3)
    for ax, key, label in zip(axes, ("parameters", "tokens", "flops"),
                              ("parameters", "training tokens seen", "training FLOPs"), strict=True):
        for row in rows:
            if row["val_loss"]:
                old = row["state"] == "recorded"
                ax.plot(row[key], row["val_loss"], "x" if old else "o", color="gray" if old else "C0")
                ax.annotate(row["run"], (row[key], row["val_loss"]), fontsize=7, xytext=(4, 3),
                            textcoords="offset points", parse_math=False)
        ax.set(xscale="log", xlabel=label, ylabel="validation loss, nats a token")
        ax.margins(x=0.4)
    axes[0].set_title("o: runs here, x: the notebook's records", fontsize=9)
    picture.savefig(path)


def show(value):
    """A figure for people."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if value >= 1e10:  # FLOPs; no count of tokens or parameters is that large
        return rounded(value, 3)
    if isinstance(value, float) and value >= 1e6:
        return rounded(value, 2)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if value < 20 else f"{value:,.2f}"


def main(argv=None):
    parser = argparse.ArgumentParser(description="All runs side by side, and a picture of them.", allow_abbrev=False)
    parser.add_argument("folders", nargs="*", type=os.path.expanduser, metavar="out/NAME",
                        help="runs' folders (default: all under out/)")
    parser.add_argument("--format", choices=("md", "csv", "json"), default="md", help="of the table (default md)")
    parser.add_argument("--recorded", choices=("yes", "no"), default="yes",
                        help="the notebook's five rows (default yes)")
    parser.add_argument("--picture", type=os.path.expanduser, default="out/report.png",
                        help="where the picture goes (default out/report.png)")
    args = parser.parse_args(argv)
    folders = args.folders or sorted(str(path) for path in Path("out").glob("*") if path.is_dir())
    if missing := [folder for folder in args.folders if not os.path.isdir(folder)]:
        raise UserError(f"there is no folder {', '.join(missing)}; name runs' folders, or none for all under out/")
    rows, left_out = rows_of(folders, args.recorded == "yes")
    if left_out:
        print(f"left out: {', '.join(left_out)}", file=sys.stderr)
    if not rows:
        raise UserError(f"no run to show; train one first: `{command('train.py', ROOT / 'config/demo.py')}`")
    columns = [key for key in rows[0] if key != "split"]
    if args.format == "md":
        print(table(columns, [[show(row[key]) for key in columns] for row in rows]))
        print(f"\n{fit(rows)}")
    elif args.format == "csv":
        writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(json.dumps(dict(date=time.strftime("%Y-%m-%d"), runs=rows, fit=fit(rows)), indent=2))
    try:
        os.makedirs(os.path.dirname(args.picture) or ".", exist_ok=True)
        draw(rows, args.picture)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {args.picture}: {error}; name another --picture") from None
    print(f"the picture is {args.picture}", file=sys.stderr)


if __name__ == "__main__":
    run(main, strict=True)
