"""A run's entry in the notebook and its curve, from what the run leaves in its folder: run.json
(what it is), metrics.jsonl (how it went) and final.json (its last figures); and all entries as one
page. Needs no torch.

The pages, notebook.md, are the program's, and written anew each time. What the user writes lies in
conclusion.md, which the program lays there once and then only reads.
"""

import hashlib
import json
import math
import os
import re
import warnings
from urllib.parse import quote

from lab.console import warn
from lab.folder import read_bytes, read_json, read_lines, write_text, write_whole

INVITATION = "(What it showed, and what comes next: write it here, in conclusion.md.)\n"
HEAD = "<!-- generated, and written anew; write into conclusion.md instead. sha256 {} -->\n"

# --- figures as people read them


def rounded(value, digits):
    """A large number to so many digits: 6.6e10. What is not finite stays a word."""
    mantissa, e, power = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(power)}" if e else mantissa


def perplexity(value):
    """A perplexity: 46.33, and from a million on 6.6e10."""
    return f"{value:,.2f}" if value < 1e6 else rounded(value, 2)


def show(value):
    """Any figure, "-" for none."""
    if value is None:
        return "-"
    if isinstance(value, (str, bool)):
        return str(value)
    if value >= 1e10:  # FLOPs; no count of tokens or parameters is that large
        return rounded(value, 3)
    if isinstance(value, int):
        return f"{value:,}"
    if value >= 1e6:
        return rounded(value, 2)
    return f"{value:,.4f}" if value < 20 else f"{value:,.2f}"


def chinchilla(parameters, tokens):
    """How far a model is from Chinchilla's 20 tokens per parameter, as a phrase."""
    times = 20 * parameters / tokens
    where = f"{times:,.1f} times over" if times > 1 else f"{1 / times:,.1f} times under"
    return f"{tokens / 20:,.0f} parameters for one epoch of this data; this model is {where} that"


def verdict(expected, ppl):
    """What a perplexity is to the (low, high) that was expected."""
    return "not met" if ppl > expected[1] else "exceeded" if ppl < expected[0] else "met"


def table(head, rows):
    """A Markdown table, numbers to the right."""

    def is_number(column):
        return all(not str(row[column]).strip("-+,.0123456789e%: ±") for row in rows)

    line = ["---:" if is_number(i) else "---" for i in range(len(head))]
    shown = []
    for cells in [head, line, *rows]:
        cells = [" ".join(str(cell).splitlines()).replace("|", "\\|") for cell in cells]
        shown.append(f"| {' | '.join(cells)} |")
    return "\n".join(shown)


# --- a run, read back


class Record:
    """A run as its folder tells it."""

    def __init__(self, folder):
        self.folder = folder
        # what is no text in a name becomes "?"
        name = os.path.basename(os.path.abspath(folder))
        self.name = name.encode(errors="replace").decode()
        self.metadata = read_json(f"{folder}/run.json")
        lines = read_lines(f"{folder}/metrics.jsonl")
        self.training = [line for line in lines if "lr" in line]
        self.evaluations = [line for line in lines if isinstance(line.get("val_loss"), float)]
        self.final = read_json(f"{folder}/final.json")
        needed = {"name", "config", "parameters", "flops_per_token", "data"}
        self.is_ours = needed <= self.metadata.keys()

    def best(self):
        """The best evaluation."""
        return min(self.evaluations, key=lambda line: line["val_loss"])

    def last(self):
        """The last line, training or evaluation."""
        return max(self.training + self.evaluations, key=lambda line: line["step"])

    def seconds(self):
        """How long it has run."""
        return max(line["elapsed_s"] for line in self.training + self.evaluations)

    def speed(self):
        """Tokens per second, the median over its lines; None without one."""
        speeds = sorted(line["tokens_per_s"] for line in self.training)
        return speeds[len(speeds) // 2] if speeds else None


# --- pages that the program writes


def write_entry(folder):
    """Write a run's curve.png and notebook.md anew, each file whole, and conclusion.md where there
    is none; nothing without a run.json. Raises OSError."""
    record = Record(folder)
    if record.is_ours:
        picture = draw_curve(record)
        write_whole(f"{folder}/curve.png", lambda file: picture.savefig(file, format="png"))
        write_page(f"{folder}/notebook.md", entry(record, conclusion_of(folder)))


def conclusion_of(folder):
    """What the user concludes of a run, "" while nothing is written. The first time it is laid
    there, from the end of an entry of before where there is one. Raises OSError."""
    path = f"{folder}/conclusion.md"
    if not os.path.exists(path):
        old = read_bytes(f"{folder}/notebook.md").decode(errors="replace")
        _, heading, theirs = old.partition("\n## Conclusion")
        is_written = heading and not theirs.strip().startswith("(Yours:")
        write_text(path, theirs.strip() + "\n" if is_written else INVITATION)
    text = read_bytes(path).decode(errors="replace").strip()
    return "" if text == INVITATION.strip() else text


def write_page(path, text):
    """Write a generated page whole, under a line that says so. A page that somebody has written in
    is kept in PATH.before, with a warning. Raises OSError."""
    old = read_bytes(path)
    head, _, rest = old.partition(b"\n")
    if old and hashlib.sha256(rest).hexdigest().encode() not in head:
        kept = f"{path}.before"
        earlier = read_bytes(kept)
        if old not in earlier:  # as it is after a kill between the two files
            write_whole(kept, lambda file: file.write(earlier + old))
        warn(f"{path} is not as the program left it; it is kept in {kept}, and written anew")
    text = text.encode(errors="replace").decode()
    write_text(path, HEAD.format(hashlib.sha256(text.encode()).hexdigest()) + text)


def write_notebook(path, records, report):
    """Write one page of runs: `report`, Markdown, and their entries below a table of contents, in
    the order in which they began. Raises OSError."""
    records = sorted(records, key=lambda record: record.metadata.get("began", ""))
    contents, sections = [], []
    for number, record in enumerate(records, 1):
        write_entry(record.folder)
        title, _, rest = entry(record, conclusion_of(record.folder)).partition("\n")
        title = f"{title.removeprefix('# ')} ({escaped(record.name)})"
        contents.append(f"{number}. [{title}](#run-{number})")
        there = os.path.relpath(record.folder, os.path.dirname(path))
        sections += [f'<a id="run-{number}"></a>', f"## {title}", lowered(rest, there)]
    write_page(path, "\n\n".join(["# Notebook", "\n".join(contents), report, *sections]) + "\n")


def lowered(text, folder):
    """A page's text as it stands in a page above: headings a level down, links from there to
    `folder`. Code blocks stay as they are, and none is left open."""
    lines, fence, there = [], "", quote(os.fsencode(folder))
    for line in text.splitlines():
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if fence and line.strip() == fence:
            fence = ""
        elif mark and not fence:
            fence = mark[1]
        elif not fence:
            line = f"#{line}" if re.match(r"#{1,5} ", line) else line
            line = re.sub(r"(\]\(<?)(?!(?i:[a-z]+:)|[/#<)])", rf"\1{there}/", line)
        lines.append(line)
    return "\n".join([*lines, fence]).strip()


def escaped(text):
    """Text as a line of Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>&~$#|!])", r"\\\1", " ".join(text.split()))


# --- the entry


def entry(record, conclusion):
    """A run's notebook entry, Markdown. conclusion: the user's words, "" for none."""
    metadata, c = record.metadata, record.metadata["config"]
    title, _, question = metadata["doc"].strip().partition("\n")
    # indented lines are the arithmetic: blank lines around make them a block of their own
    question = re.sub(r"(?m)^\S.*\n(?=    )|^    .*\n(?=\S)", r"\g<0>\n", question)
    expected = "no figure given"
    if c["expected_ppl"]:
        expected = "Validation perplexity {:g} to {:g}".format(*c["expected_ppl"])
    paragraphs = [
        f"# {title or metadata['name']} - {metadata['began'][:10]}",
        "## What we're doing",
        question.strip() or "(the config says nothing)",
        "## Model",
        *model_part(metadata, c),
        "## Data",
        *data_part(record, metadata, c),
        "## Set-up",
        set_up_part(metadata, c),
        "## Expected",
        expected,
        "## Results",
        *results_part(record, c),
    ]
    if conclusion:
        paragraphs += ["## Conclusion", conclusion]
    return "\n\n".join(paragraphs) + "\n"


def model_part(metadata, c):
    """The entry's paragraphs on the model."""
    n = metadata["parameters"]
    names = "max_seq_len d_model num_heads d_ff num_layers dropout block unigram_bias".split()
    rows = [["vocab_size", f"{metadata['vocab_size']:,}"], *([name, c[name]] for name in names)]
    usual = {"head_bias": True, "init_from": ""}  # told where it is another
    rows += [[name, c[name]] for name in usual if c.get(name, usual[name]) != usual[name]]
    parts = f"embeddings {n['embeddings']:,}, head bias {n['head_bias']:,}, blocks {n['blocks']:,}"
    return [
        table(["setting", "value"], rows),
        f"**Parameters: {n['total']:,}** ({parts}), {metadata['flops_per_token']:,} FLOPs per "
        "token of training",
    ]


def data_part(record, metadata, c):
    """The entry's paragraphs on the data, and how much of it a parameter gets."""
    data, N = metadata["data"], metadata["parameters"]["total"]
    sizes = []
    for split, counts in data["splits"].items():
        sizes.append([split, *(f"{counts[k]:,}" for k in ("tokens", "words", "bytes"))])
    D, planned = data["splits"]["train"]["tokens"], metadata["steps"] * metadata["step_tokens"]
    seen = max((line["tokens"] for line in record.training + record.evaluations), default=0)
    spans = ("one epoch", D), ("so far", seen), ("the run as planned", planned)
    ratios = [[name, f"{tokens:,}", f"{tokens / N:.2f}"] for name, tokens in spans]
    return [
        f"{c['dataset']}, from {data['source']}, tokenizer {data['tokenizer']}, separator "
        f"{data['separator']}",
        table(["split", "tokens", "words", "bytes"], sizes),
        table(["", "D, tokens", "D / N"], ratios),
        f"Chinchilla's ratio is 20: {chinchilla(N, D)}.",
    ]


def set_up_part(metadata, c):
    """The entry's list of optimizer, batch and machine."""
    muon = f"Muon for the blocks' matrices, lr {c['muon_learning_rate']:g}, and "
    muon = muon if c["optimizer"] == "muon" else ""
    steps, step_tokens = metadata["steps"], metadata["step_tokens"]
    epochs = steps * step_tokens / metadata["data"]["splits"]["train"]["tokens"]
    return (
        f"- Optimizer: {muon}AdamW, lr {c['learning_rate']:g}, {c['warmup_steps']} steps of "
        f"warm-up, then {c['lr_schedule']} to {c['min_learning_rate']:g}; betas {c['beta1']:g} and "
        f"{c['beta2']:g}, epsilon {c['adam_eps']:g}, weight decay {c['weight_decay']:g}, clipping "
        f"{c['grad_clip']:g}\n"
        f"- Batch: {c['batch_size']} x {c['max_seq_len']} = {step_tokens:,} tokens per step; "
        f"{steps:,} steps, {epochs:.2f} epochs; seed {c['seed']}\n"
        f"- Machine: {metadata['machine']}; {metadata['versions']}; commit {metadata['commit']}"
    )


def results_part(record, c):
    """The entry's paragraphs on what came of it."""
    steps = record.metadata["steps"]
    if not record.evaluations:
        if not record.training:
            return ["Not begun."]
        return [f"Not evaluated yet; step {record.training[-1]['step']:,} of {steps:,}."]
    best, last = record.best(), record.last()
    paragraphs = [
        evaluations_table(record.evaluations),
        "![loss](curve.png)",
        f"**Best: epoch {best['epoch']:.2f}, val loss {best['val_loss']:.4f}, perplexity "
        f"{perplexity(best['val_ppl'])} per token, {perplexity(best['val_ppl_word'])} per word, "
        f"{best['val_bits_per_byte']:.4f} bits per byte.**",
    ]
    if record.final:
        rows = [[split, *map(show, values.values())] for split, values in record.final.items()]
        paragraphs.append(table(["at the best", *record.final["val"]], rows))
    if c["expected_ppl"]:
        low, high = c["expected_ppl"]
        met = verdict(c["expected_ppl"], best["val_ppl"])
        paragraphs.append(
            f"Expected {low:g} to {high:g}: {met}{'' if record.final else ' so far'}."
        )
    if c["recorded_ppl"]:
        paragraphs.append(f"The original notebook recorded {c['recorded_ppl']:g}.")
    speed = f", {record.speed():,.0f} tokens/s in the median" if record.speed() else ""
    paragraphs.append(
        f"{'Finished' if record.final else 'So far'}: {last['step']:,} of {steps:,} steps in "
        f"{record.seconds() / 60:,.1f} minutes{speed}, {last.get('skipped', 0)} steps skipped."
    )
    if best.get("samples"):
        paragraphs.append("### Samples of the best")
        for prompt, text in best["samples"]:
            paragraphs.append(f"Prompt: {json.dumps(prompt)}\n{fenced(text)}")
    return paragraphs


def fenced(text):
    """Text as a Markdown code block, with a fence longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def evaluations_table(evaluations):
    """A row an evaluation, with the change of the perplexity."""
    rows, before = [], None
    for line in evaluations:
        change = "-"
        if before is not None:
            sign = "-" if line["val_ppl"] < before else "+"
            change = sign + perplexity(abs(line["val_ppl"] - before))
        before = line["val_ppl"]
        rows.append(
            [
                f"{line['epoch']:.2f}",
                f"{line['step']:,}",
                f"{line['train_loss'] or math.nan:.4f}",
                f"{line['val_loss']:.4f}",
                perplexity(line["val_ppl"]),
                change,
            ]
        )
    head = ["epoch", "step", "train loss", "val loss", "val perplexity", "change"]
    return table(head, rows)


# --- pictures


def figure(columns):
    """(a matplotlib figure for files, its axes in a row)."""
    from matplotlib.figure import Figure

    # the font has no CJK: what a name in it looks like is not worth a warning
    warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
    width = 6 if columns == 1 else 4.4 * columns
    picture = Figure(figsize=(width, 3.8), layout="constrained")
    return picture, picture.subplots(1, columns, squeeze=False)[0]


def draw_curve(record):
    """A figure of a run's training and validation loss over the tokens seen."""
    picture, (axes,) = figure(1)
    curves = (
        ("train", record.training, "train_loss", "-"),
        ("validation", record.evaluations, "val_loss", "o-"),
    )
    for label, lines, key, style in curves:
        points = [(line["tokens"], line[key]) for line in lines if line[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
    if recorded := record.metadata["config"]["recorded_ppl"]:
        label = f"recorded: {recorded:g}"
        axes.axhline(math.log(recorded), linestyle="--", color="gray", linewidth=1, label=label)
    axes.set(xlabel="training tokens seen", ylabel="loss, nats per token")
    axes.set_title(record.name, parse_math=False)
    axes.legend()
    return picture
