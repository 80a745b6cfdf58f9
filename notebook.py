"""A run's entry in the notebook, out of the files in its folder: run.json (what it is), metrics.jsonl (how it went) and
final.json (its last figures). Needs no torch."""

import json
import math
import os
from pathlib import Path


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


def read_run(folder):
    """(run.json, training lines, evaluation lines, final.json) of a run's folder; None if it is no run of ours."""
    about, lines = read_json(f"{folder}/run.json"), read_metrics(f"{folder}/metrics.jsonl")
    if not {"name", "config", "parameters", "flops_per_token", "data"} <= about.keys():
        return None
    evaluations = [line for line in lines if isinstance(line.get("val_loss"), float)]
    return about, [line for line in lines if "lr" in line], evaluations, read_json(f"{folder}/final.json")


def table(head, rows):
    """A Markdown table, numbers to the right."""
    lines = [head, ["---:" if rows and row_is_number(rows, i) else "---" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def row_is_number(rows, column):
    return all(not str(row[column]).strip("-+,.0123456789e%:") for row in rows)


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
    model = [[name, c[name]] for name in ("max_seq_len", "d_model", "num_heads", "d_ff", "num_layers", "dropout")]
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
        f"- Optimizer: AdamW, lr {c['learning_rate']:g}, {c['warmup_steps']} steps of warm-up, then {c['lr_schedule']}"
        f" to {c['min_learning_rate']:g}; betas {c['beta1']:g} and {c['beta2']:g}, weight decay {c['weight_decay']:g}, "
        f"clipping {c['grad_clip']:g}\n"
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
        gain = "-" if before is None else f"{line['val_ppl'] - before:+,.2f}"
        rows.append([f"{line['epoch']:.2f}", f"{line['step']:,}", f"{line['train_loss'] or math.nan:.4f}",
                     f"{line['val_loss']:.4f}", f"{line['val_ppl']:,.2f}", gain])
        before = line["val_ppl"]
    best = min(evaluations, key=lambda line: line["val_loss"])
    last = max(lines + evaluations, key=lambda line: line["step"])
    speeds = sorted(line["tokens_per_s"] for line in lines)
    paragraphs = [
        table(["epoch", "step", "train loss", "val loss", "val perplexity", "change"], rows), "![loss](curve.png)",
        f"**Best: epoch {best['epoch']:.2f}, val loss {best['val_loss']:.4f}, perplexity {best['val_ppl']:,.2f} a "
        f"token, {best['val_ppl_word']:,.2f} a word, {best['val_bits_per_byte']:.4f} bits a byte.**",
    ]
    if final:
        names = ("loss", "stderr", "ppl", "ppl_word", "bits_per_byte", "tokens", "words", "bytes", "context", "stride")
        figures = [[split, *(f"{v[k]:,.4f}" if isinstance(v[k], float) else v[k] for k in names)]
                   for split, v in final.items()]
        paragraphs.append(table(["at the best", *names], figures))
    if c["expected_ppl"]:
        low, high = c["expected_ppl"]
        verdict = "met" if low <= best["val_ppl"] <= high else "exceeded" if best["val_ppl"] < low else "not met"
        paragraphs.append(f"Expected {low:g} to {high:g}: {verdict}{'' if final else ' so far'}.")
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6 * columns if columns == 1 else 4.4 * columns, 3.8), layout="constrained")
    FigureCanvasAgg(picture)
    return picture, [picture.add_subplot(1, columns, i + 1) for i in range(columns)]


def write_entry(folder):
    """Write a run's notebook.md and curve.png anew, each whole or not at all."""
    about, lines, evaluations, _ = read_run(folder)
    picture, (axes,) = figure(1)
    for label, found, key, style in ("train", lines, "train_loss", "-"), ("validation", evaluations, "val_loss", "o-"):
        points = [(line["tokens"], line[key]) for line in found if line[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
    if recorded := about["config"]["recorded_ppl"]:
        label = f"the notebook's {recorded:g}"
        axes.axhline(math.log(recorded), linestyle="--", color="gray", linewidth=1, label=label)
    name = os.path.basename(os.path.abspath(folder))
    axes.set(xlabel="training tokens seen", ylabel="loss, nats a token", title=name)
    axes.legend()
    picture.savefig(f"{folder}/.curve.png")
    os.replace(f"{folder}/.curve.png", f"{folder}/curve.png")
    Path(folder, ".notebook.md").write_text(entry(folder), encoding="utf-8")
    os.replace(f"{folder}/.notebook.md", f"{folder}/notebook.md")
