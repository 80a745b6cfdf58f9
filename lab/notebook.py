"""A run's entry in the notebook and its curve, from what the run leaves in its folder: run.json
(what it is), metrics.jsonl (how it went) and final.json (its last figures). Needs no torch.

notebook.md has two parts. The program writes the first anew each time; the second, from the heading
`## Conclusion` on, is the user's. A comment between them, the mark, tells them apart.
"""

import codecs
import hashlib
import json
import math
import os
import re
import warnings

from lab.console import warn
from lab.folder import read_bytes, read_json, read_lines, write_whole

MARK = "<!-- all above is written by the program, all below by you; sha256 {} -->"
MARK_LINE = re.compile(rb"%b[ \t]*\r?\n?" % MARK.format("([0-9a-f]{64})").encode())
# from a fence to one at least as long (CommonMark 4.5)
CODE_BLOCK = re.compile(rb"(?ms)^ {0,3}(`{3,}|~{3,})[^\n`]*$.*?(^ {0,3}\1[`~]*[ \t\r]*$|\Z)")
HEADING = b"## Conclusion"
INVITATION = b"(Yours: what it showed, what comes next. Nothing from this heading on is changed.)"

# --- figures as people read them


def rounded(value, digits):
    """A large number to so many digits: 6.6e10."""
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(power)}"


def perplexity(value):
    """A perplexity: 46.33, and from a million on 6.6e10."""
    return f"{value:,.2f}" if value < 1e6 else rounded(value, 2)


def show(value):
    """Any figure, "-" for none."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if value >= 1e10:  # FLOPs; no count of tokens or parameters is that large
        return rounded(value, 3)
    if isinstance(value, int):
        return f"{value:,}"
    if value >= 1e6:
        return rounded(value, 2)
    return f"{value:,.4f}" if value < 20 else f"{value:,.2f}"


def chinchilla(parameters, tokens):
    """How far a model is from Chinchilla's 20 tokens a parameter, as a phrase."""
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


class Run:
    """A run as its folder tells it."""

    def __init__(self, folder):
        self.folder = folder
        # what is no text in a name becomes "?"
        name = os.path.basename(os.path.abspath(folder))
        self.name = name.encode(errors="replace").decode()
        self.about = read_json(f"{folder}/run.json")
        lines = read_lines(f"{folder}/metrics.jsonl")
        self.training = [line for line in lines if "lr" in line]
        self.evaluations = [line for line in lines if isinstance(line.get("val_loss"), float)]
        self.final = read_json(f"{folder}/final.json")
        needed = {"name", "config", "parameters", "flops_per_token", "data"}
        self.is_ours = needed <= self.about.keys()

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
        """Tokens a second, the median over its lines; None without one."""
        speeds = sorted(line["tokens_per_s"] for line in self.training)
        return speeds[len(speeds) // 2] if speeds else None


# --- the entry


def write_entry(folder):
    """Write a run's curve.png and its part of notebook.md anew, each file whole; nothing without a
    run.json. Raises OSError."""
    run = Run(folder)
    if run.is_ours:
        picture = draw_curve(run)
        write_whole(f"{folder}/curve.png", lambda file: picture.savefig(file, format="png"))
        ours = entry(run).encode(errors="replace") + b"\n"
        mark = MARK.format(digest(ours)).encode() + b"\n"
        path = f"{folder}/notebook.md"
        theirs = take_over(path)
        write_whole(path, lambda file: file.write(ours + mark + theirs))


def entry(run):
    """A run's notebook entry, Markdown."""
    about, c = run.about, run.about["config"]
    title, _, question = about["doc"].strip().partition("\n")
    # indented lines are the arithmetic: blank lines around make them a block of their own
    question = re.sub(r"(?m)^\S.*\n(?=    )|^    .*\n(?=\S)", r"\g<0>\n", question)
    expected = "no figure given"
    if c["expected_ppl"]:
        expected = "Validation perplexity {:g} to {:g}".format(*c["expected_ppl"])
    paragraphs = [
        f"# {title or about['name']} - {about['began'][:10]}",
        "## What we're doing",
        question.strip() or "(the config says nothing)",
        "## Model",
        *model_part(about, c),
        "## Data",
        *data_part(run, about, c),
        "## Set-up",
        set_up_part(about, c),
        "## Expected",
        expected,
        "## Results",
        *results_part(run, c),
    ]
    return "\n\n".join(paragraphs) + "\n"


def model_part(about, c):
    """The entry's paragraphs on the model."""
    n = about["parameters"]
    names = "max_seq_len d_model num_heads d_ff num_layers dropout block unigram_bias".split()
    rows = [["vocab_size", f"{about['vocab_size']:,}"], *([name, c[name]] for name in names)]
    usual = {"head_bias": True, "init_from": ""}  # told where it is another
    rows += [[name, c[name]] for name in usual if c.get(name, usual[name]) != usual[name]]
    parts = f"embeddings {n['embeddings']:,}, head bias {n['head_bias']:,}, blocks {n['blocks']:,}"
    return [
        table(["setting", "value"], rows),
        f"**Parameters: {n['total']:,}** ({parts}), {about['flops_per_token']:,} FLOPs a token of "
        "training",
    ]


def data_part(run, about, c):
    """The entry's paragraphs on the data, and how much of it a parameter gets."""
    data, N = about["data"], about["parameters"]["total"]
    sizes = []
    for split, counts in data["splits"].items():
        sizes.append([split, *(f"{counts[k]:,}" for k in ("tokens", "words", "bytes"))])
    D, planned = data["splits"]["train"]["tokens"], about["steps"] * about["step_tokens"]
    seen = max((line["tokens"] for line in run.training + run.evaluations), default=0)
    spans = ("one epoch", D), ("so far", seen), ("the run as planned", planned)
    ratios = [[name, f"{tokens:,}", f"{tokens / N:.2f}"] for name, tokens in spans]
    return [
        f"{c['dataset']}, from {data['source']}, tokenizer {data['tokenizer']}, separator "
        f"{data['separator']}",
        table(["split", "tokens", "words", "bytes"], sizes),
        table(["", "D, tokens", "D / N"], ratios),
        f"Chinchilla's ratio is 20: {chinchilla(N, D)}.",
    ]


def set_up_part(about, c):
    """The entry's list of optimizer, batch and machine."""
    muon = f"Muon for the blocks' matrices, lr {c['muon_learning_rate']:g}, and "
    muon = muon if c["optimizer"] == "muon" else ""
    steps, step_tokens = about["steps"], about["step_tokens"]
    epochs = steps * step_tokens / about["data"]["splits"]["train"]["tokens"]
    return (
        f"- Optimizer: {muon}AdamW, lr {c['learning_rate']:g}, {c['warmup_steps']} steps of "
        f"warm-up, then {c['lr_schedule']} to {c['min_learning_rate']:g}; betas {c['beta1']:g} and "
        f"{c['beta2']:g}, epsilon {c['adam_eps']:g}, weight decay {c['weight_decay']:g}, clipping "
        f"{c['grad_clip']:g}\n"
        f"- Batch: {c['batch_size']} x {c['max_seq_len']} = {step_tokens:,} tokens a step; "
        f"{steps:,} steps, {epochs:.2f} epochs; seed {c['seed']}\n"
        f"- Machine: {about['machine']}; {about['versions']}; commit {about['commit']}"
    )


def results_part(run, c):
    """The entry's paragraphs on what came of it."""
    steps = run.about["steps"]
    if not run.evaluations:
        if not run.training:
            return ["Not begun."]
        return [f"Not evaluated yet; step {run.training[-1]['step']:,} of {steps:,}."]
    best, last = run.best(), run.last()
    paragraphs = [
        evaluations_table(run.evaluations),
        "![loss](curve.png)",
        f"**Best: epoch {best['epoch']:.2f}, val loss {best['val_loss']:.4f}, perplexity "
        f"{perplexity(best['val_ppl'])} a token, {perplexity(best['val_ppl_word'])} a word, "
        f"{best['val_bits_per_byte']:.4f} bits a byte.**",
    ]
    if run.final:
        rows = [[split, *map(show, values.values())] for split, values in run.final.items()]
        paragraphs.append(table(["at the best", *run.final["val"]], rows))
    if c["expected_ppl"]:
        low, high = c["expected_ppl"]
        met = verdict(c["expected_ppl"], best["val_ppl"])
        paragraphs.append(f"Expected {low:g} to {high:g}: {met}{'' if run.final else ' so far'}.")
    if c["recorded_ppl"]:
        paragraphs.append(f"The notebook's earlier result was {c['recorded_ppl']:g}.")
    speed = f", {run.speed():,.0f} tokens/s in the median" if run.speed() else ""
    paragraphs.append(
        f"{'Finished' if run.final else 'So far'}: {last['step']:,} of {steps:,} steps in "
        f"{run.seconds() / 60:,.1f} minutes{speed}, {last.get('skipped', 0)} steps skipped."
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


# --- the user's part


def digest(ours):
    """The SHA-256 of the program's part. What editors change by themselves does not count: a byte
    order mark, line ends and the space before them."""
    lines = ours.removeprefix(codecs.BOM_UTF8).splitlines()
    plain = b"\n".join(line.rstrip() for line in lines)
    return hashlib.sha256(plain.strip()).hexdigest()


def divide(text):
    """(the program's part, the user's, whether the first is as the program left it) of the bytes of
    a notebook.md.

    A sample may hold any line, so that the mark is the one whose hash fits what stands above it.
    Where none fits, the border is what looks like it outside code blocks.
    """
    for mark in MARK_LINE.finditer(text):
        if digest(text[: mark.start()]).encode() == mark[1]:
            return text[: mark.start()], text[mark.end() :], True
    bare = CODE_BLOCK.sub(lambda block: b" " * len(block[0]), text)
    heading = re.search(rb"(?m)^(?=%b)" % HEADING, bare)
    if border := MARK_LINE.search(bare) or heading or MARK_LINE.search(text):
        return text[: border.start()], text[border.end() :], False
    return text, b"", False


def take_over(path):
    """The user's part of a notebook.md that is about to be written anew. If the rest of it is not
    as the program left it, the whole of it is kept beside it first. Raises OSError."""
    text = read_bytes(path)
    _, theirs, untouched = divide(text)
    if text.strip() and not untouched:
        kept = f"{path}.before"
        earlier = read_bytes(kept)
        if text not in earlier:  # as it is after a kill between the two files
            write_whole(kept, lambda file: file.write(earlier + text))
        warn(f"{path} was changed above its conclusion, or has no mark; it is kept in {kept}")
    return theirs if theirs.strip() else b"\n%b\n\n%b\n" % (HEADING, INVITATION)


# --- pictures


def figure(columns):
    """(a matplotlib figure for files, its axes in a row)."""
    from matplotlib.figure import Figure

    # the font has no CJK: what a name in it looks like is not worth a warning
    warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
    width = 6 if columns == 1 else 4.4 * columns
    picture = Figure(figsize=(width, 3.8), layout="constrained")
    return picture, picture.subplots(1, columns, squeeze=False)[0]


def draw_curve(run):
    """A figure of a run's training and validation loss over the tokens seen."""
    picture, (axes,) = figure(1)
    curves = (
        ("train", run.training, "train_loss", "-"),
        ("validation", run.evaluations, "val_loss", "o-"),
    )
    for label, lines, key, style in curves:
        points = [(line["tokens"], line[key]) for line in lines if line[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
    if recorded := run.about["config"]["recorded_ppl"]:
        label = f"the notebook's {recorded:g}"
        axes.axhline(math.log(recorded), linestyle="--", color="gray", linewidth=1, label=label)
    axes.set(xlabel="training tokens seen", ylabel="loss, nats a token")
    axes.set_title(run.name, parse_math=False)
    axes.legend()
    return picture
