"""A run's entry in the notebook and its curve; all entries as one notebook. Needs no torch.

An entry is made from what the run leaves in its folder: run.json (what it is), metrics.jsonl (how
it went) and final.json (its last figures). The program writes notebook.md anew each time. The
user's words stand in conclusion.md, which the program creates once and from then on only reads.
"""

import hashlib
import json
import math
import os
import re
import statistics

from lab.console import warn
from lab.folder import read_bytes, read_json, read_lines, write_text, write_whole

# the first line of a page, with the SHA-256 of all that follows
GENERATED = "<!-- Generated: this page is written anew, edit conclusion.md instead. sha256 {} -->"
INVITES = "(Yours: what it showed, what comes next. "  # how a conclusion begins that nobody wrote
UNITS = dict(val_loss="loss, nats per token", val_bits_per_byte="bits per byte")
SHAPE = "max_seq_len d_model num_heads d_ff num_layers dropout block head_bias unigram_bias".split()

# --- figures as people read them


def perplexities(figures, prefix=""):
    """Perplexities and bits per byte as a phrase, the latter first where no words are counted."""
    ppl, word, bits = (figures[prefix + name] for name in ("ppl", "ppl_word", "bits_per_byte"))
    token, bits = f"perplexity {show(ppl)} per token", f"{show(bits)} bits per byte"
    return f"{token}, {show(word)} per word, {bits}" if word else f"{bits}, {token}"


def show(value):
    """Any figure, "-" for none: 4.0598, 46.33, 7,342,033, and larger ones as 1.26e15."""
    if value is None or isinstance(value, (str, bool)):
        return "-" if value is None else str(value)
    if isinstance(value, int):
        # only FLOPs are that many
        return f"{value:,}" if value < 1e10 else f"{value:.2e}".replace("e+", "e")
    if value >= 1e6:
        return re.sub(r"e\+0?", "e", f"{value:.1e}")
    return f"{value:,.4f}" if value < 20 else f"{value:,.2f}"


def facts(metadata):
    """What is trained, on what and for how long, from a run.json's dict, as {name: phrase}."""
    m, c, n, data = metadata, metadata["config"], metadata["parameters"], metadata["data"]
    train, val = (data["splits"][split] for split in ("train", "val"))
    N, D, flops = n["total"], train["tokens"], m["flops_per_token"]
    planned = m["steps"] * m["step_tokens"]
    vocabulary = m["vocab_size"] * c["d_model"] + n["head_bias"]
    return {
        "parameters": f"{N:,} (embeddings {n['embeddings']:,}, head bias {n['head_bias']:,}, "
        f"blocks {n['blocks']:,})",
        "data": f"{c['dataset']}, from {data['source']}, separator {data['separator']}: {D:,} "
        f"training tokens, {val['tokens']:,} of validation",
        "vocabulary": f"{m['vocab_size']:,} tokens ({data['tokenizer']}) of "
        f"{train['bytes'] / D:.2f} bytes, {vocabulary / N:.0%} of the parameters",
        "ratio": f"{D / N:.2f} tokens per parameter in one epoch, {planned / N:.2f} in the run; "
        f"{20 * N / D:,.2f} times the Chinchilla-optimal size for one epoch",
        "steps": f"{m['steps']:,} of {c['batch_size']} x {c['max_seq_len']} = "
        f"{m['step_tokens']:,} tokens, {c['warmup_steps']} of warm-up; {planned / D:.2f} epochs",
        "compute": f"{flops:,} FLOPs per token, {flops * m['step_tokens']:.3g} per step, "
        f"{flops * planned:.3g} in the run",
    }


def verdict(c, ppl):
    """How a perplexity compares with what a config, as a dict, expects; "" if it expects none."""
    if not c["expected_ppl"]:
        return ""
    low, high = c["expected_ppl"]
    ppl = math.inf if ppl is None else ppl
    met = "exceeded" if ppl < low else "met" if ppl <= high else "not met"
    return f"Expected {low:g} to {high:g}: {met}."


def table(head, rows):
    """A Markdown table, all but the first column to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    cells = [[" ".join(str(c).splitlines()).replace("|", "\\|") for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


# --- a run, read back


class SavedRun:
    """A run as its folder tells it, and the sweep.json beside it, if it belongs to a sweep."""

    def __init__(self, folder):
        self.folder = folder
        self.top, self.name = os.path.split(os.path.abspath(folder))
        self.metadata = read_json(f"{folder}/run.json")
        self.final = read_json(f"{folder}/final.json")
        self.sweep = read_json(f"{self.top}/sweep.json")
        lines = read_lines(f"{folder}/metrics.jsonl")
        self.training = [line for line in lines if "lr" in line]
        self.evaluations = [line for line in lines if isinstance(line.get("val_loss"), float)]
        self.last = lines[-1] if lines else dict(step=0, tokens=0, elapsed_s=0)
        speeds = [line["tokens_per_s"] for line in self.training]
        self.speed = statistics.median(speeds) if speeds else None  # tokens per second

        self.best = min(self.evaluations, key=lambda line: line["val_loss"], default=None)
        self.counts = bool(self.final)
        far = f"not finished, step {self.last['step']:,}, {self.last.get('skipped', 0)} skipped"
        self.state = "finished" if self.counts else far


# --- the entry


def write_entry(folder):
    """Write a run's curve.png and notebook.md anew, each file whole. Returns (when it began, its
    entry as Markdown). Raises OSError."""
    run = SavedRun(folder)
    text = entry(run)
    invite(folder)
    if run.evaluations:
        picture, (axes,) = figure(1)
        draw_run(axes, run)
        write_picture(f"{folder}/curve.png", picture)
    write_page(f"{folder}/notebook.md", text)
    return run.metadata["began"], text


def entry(run):
    """A run's notebook entry, Markdown."""
    metadata, c = run.metadata, run.metadata["config"]
    title, question, expected = opening(run, c)

    names, told = ("tokens", "words", "bytes"), facts(metadata)
    settings = [[key, c[key]] for key in [*SHAPE, "init_from"] if c.get(key, "") != ""]
    splits = metadata["data"]["splits"].items()
    sizes = [[split, *(show(counts[name]) for name in names)] for split, counts in splits]
    muon = f"Muon for the blocks' matrices, lr {c['muon_learning_rate']:g}, and "
    so_far = run.last["tokens"] / metadata["parameters"]["total"]

    paragraphs = [
        f"# {title} - {metadata['began'][:10]} ({run.name})",
        "## What we're doing",
        question,
        "## Model",
        table(["setting", "value"], settings),
        f"Parameters: {told['parameters']}",
        "## Data",
        told["data"],
        table(["split", *names], sizes),
        f"Vocabulary: {told['vocabulary']}",
        f"D / N: {told['ratio']}. So far: {so_far:.2f}.",
        "## Set-up",
        *(given_part(metadata, c) if "given" in metadata else []),  # an earlier version's has none
        f"- Optimizer: {muon if c['optimizer'] == 'muon' else ''}AdamW, lr {c['learning_rate']:g}, "
        f"schedule {c['lr_schedule']} to {c['min_learning_rate']:g}; betas {c['beta1']:g} and "
        f"{c['beta2']:g}, epsilon {c['adam_eps']:g}, weight decay {c['weight_decay']:g}, clipping "
        f"{c['grad_clip']:g}\n"
        f"- Steps: {told['steps']}; seed {c['seed']}\n"
        f"- Compute: {told['compute']}\n"
        f"- Machine: {metadata['machine']}; {metadata['versions']}; commit {metadata['commit']}",
        "## Expected",
        expected,
        "## Results",
        *(results_part(run, c) if run.evaluations else ["No evaluation yet."]),
        *conclusion_part(run.folder),
    ]
    return "\n\n".join(paragraphs) + "\n"


def opening(run, c):
    """(an entry's title, its question, what was expected), from the question that was given, else
    from the config's docstring; that is a quotation where the run departs from it."""
    # indented lines are the arithmetic: blank lines around make them a block of their own
    doc = re.sub(r"(?m)^\S.*\n(?=    )|^    .*\n(?=\S)", r"\g<0>\n", run.metadata["doc"].strip())
    file, asked = run.metadata.get("file"), c.get("question")
    if run.metadata.get("departs") and not asked:
        title, expected, quoted = f"After {file}", "", doc.replace("\n", "\n> ")
        text = f"Other settings than those of {file}, which says of itself:\n\n> {quoted}"
    else:
        title, _, text = (asked or doc).strip().partition("\n")
        text, _, expected = text.partition("\nExpected: ")
    if c["expected_ppl"] and (not expected or "expected_ppl" in run.metadata.get("given", ())):
        expected = "Validation perplexity {:g} to {:g}".format(*c["expected_ppl"])
    question = text.strip() or title or "(the config says nothing)"
    return title or run.name, question, expected.strip() or "nothing was said of these settings"


def given_part(metadata, c):
    """The entry's paragraphs on the command line and the settings that it changed."""
    shown = ("out_dir", "resume", "question")  # in the command; the others in a table
    old = metadata["given"].items()
    rows = [[k, value, c[k]] for k, value in old if value != c[k] and k not in shown]
    changed = table(["set otherwise", f"in {metadata['file']}", "here"], rows)
    same = f"Settings as in {metadata['file']}."
    return [fenced(metadata["command"]), changed if rows else same]


def results_part(run, c):
    """The entry's paragraphs on what came of it."""
    best, last, rows = run.best, run.last, []
    for line in run.evaluations:
        losses = [f"{line[key] or math.nan:.4f}" for key in ("train_loss", "val_loss")]
        perplexity = show(line["val_ppl"])
        rows.append([f"{line['epoch']:.2f}", show(line["step"]), *losses, perplexity])
    final = [[split, *map(show, values.values())] for split, values in run.final.items()]
    speed = f", {run.speed:,.0f} tokens per second in the median" if run.speed else ""
    samples = [f"Prompt: {json.dumps(start)}\n{fenced(t)}" for start, t in best.get("samples", ())]
    paragraphs = [
        table(["epoch", "step", "train loss", "val loss", "val perplexity"], rows),
        "![loss](curve.png)",
        f"**Best: epoch {best['epoch']:.2f}, val loss {best['val_loss']:.4f}, "
        f"{perplexities(best, 'val_')}.**",
        final and table(["at the best", *run.final["val"]], final),
        verdict(c, best["val_ppl"]),
        f"{'Finished' if run.final else 'So far'}: {last['step']:,} of {run.metadata['steps']:,} "
        f"steps in {last['elapsed_s'] / 60:,.1f} minutes{speed}, {last.get('skipped', 0)} steps "
        "skipped.",
        samples and "### Samples of the best",
        *samples,
    ]
    return filter(None, paragraphs)


def fenced(text):
    """Text as a Markdown code block, with a fence longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


# --- the user's words, and pages that are the program's


def invite(folder):
    """Lay conclusion.md into a run's folder if there is none. Raises OSError."""
    path = f"{folder}/conclusion.md"
    if not os.path.lexists(path):
        write_text(path, f"{INVITES}The entry shows this file at its end.)\n")


def conclusion_part(folder):
    """An entry's paragraphs on what the user wrote in conclusion.md, none if nothing."""
    lines = read_bytes(f"{folder}/conclusion.md").decode("utf-8-sig", "replace").splitlines()
    words = "\n".join(line for line in lines if not line.startswith(INVITES)).strip("\n")
    return ["## Conclusion", words] if words else []


def write_page(path, text):
    """Write a page of the program's anew. One in which somebody else wrote is first added to
    PATH.before. Raises OSError."""
    page = read_bytes(path)
    if page and page != signed(page.partition(b"\n")[2]):
        with open(f"{path}.before", "ab") as file:
            file.write(page)
        warn(f"{path} was not as this program had left it; it is kept in {path}.before")
    write_whole(path, lambda file: file.write(signed(text.encode(errors="replace"))))


def signed(body):
    """The bytes of a page: the line that tells whether it was changed, then the body."""
    return GENERATED.format(hashlib.sha256(body).hexdigest()).encode() + b"\n" + body


def write_notebook(path, report, entries):
    """Join entries to one page, in the order in which they began. report: the Markdown above them.
    entries: [(when it began, Markdown, its folder as links have it)]. Raises OSError."""
    parts = [f"# All runs\n\n{report}\n"]
    block, link = r"^(`{3,}|~{3,}).*?(?:^\1|\Z)", r"\]\(<?(?!(?i:[a-z]+:)|[/#<])"
    for _, text, folder in sorted(entries):
        # relative links then begin at the folder, but for what is code

        def moved(found, folder=folder):
            return found[0] if found[1] else f"{found[0]}{folder}/"

        parts.append(re.sub(rf"(?ms){block}|{link}", moved, text))
    contents, whole = "# Notebook\n", ""
    for i, part in enumerate(parts):
        title, _, _ = part.partition("\n")
        # anchors of our own, since each reader of Markdown makes others
        contents += f"\n1. [{title.removeprefix('# ')}](#part-{i})"
        whole += f'\n\n<a id="part-{i}"></a>\n\n{part.rstrip()}'
    write_page(path, f"{contents}{whole}\n")


# --- pictures


def figure(columns):
    """(a matplotlib figure for files, its axes in a row)."""
    from matplotlib.figure import Figure

    width = 6 if columns == 1 else 4.4 * columns
    picture = Figure(figsize=(width, 3.8), layout="constrained")
    return picture, picture.subplots(1, columns, squeeze=False)[0]


def write_picture(path, picture):
    """Write a figure as a PNG, whole. Raises OSError."""
    write_whole(path, lambda file: picture.savefig(file, format="png"))


def draw_run(axes, run, measure="val_loss", color="C0"):
    """Draw a run's validation over the tokens seen, and its training where the measure is a loss
    per token."""
    label = run.name.replace("$", r"\$")  # or it is a formula
    curves = [(run.evaluations, measure, "o-", dict(label=label))]
    if measure == "val_loss":
        curves.append((run.training, "train_loss", "-", dict(alpha=0.4)))
    for lines, key, style, options in curves:
        points = [(line["tokens"], line[key]) for line in lines if line[key] is not None]
        if points:
            points = zip(*points, strict=True)
            axes.plot(*points, style, color=color, markersize=3, linewidth=1, **options)
    axes.set(xlabel="training tokens seen", ylabel=UNITS[measure])
    axes.locator_params("x", nbins=5)  # or long numbers would meet
    legend = axes.legend(fontsize=7, title="dots: validation", title_fontsize=7)
    legend.set_visible(len(axes.lines) <= 30)  # more names would leave the curves no room
