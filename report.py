"""All runs side by side, or a sweep's, out of what they leave in their folders. Needs no torch.

python report.py [out/NAME ...] [--format md|csv|json] [--notebook]
"""

import csv
import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from urllib.parse import quote

from config import Config, load_config
from lab import grid
from lab.console import ROOT, UserError, command, run
from lab.notebook import SavedRun, draw_losses, figure, show, table, write_notebook
from lab.settings import command_line, fields_of, setting

# WikiText's validation text as the recorded experiments read it: GPT-2's tokens, and bytes
WIKITEXT = [242_643, 1_136_862]
FIGURES = (
    "parameters tokens tokens_per_parameter flops val_loss val_ppl val_ppl_word val_bits_per_byte "
    "hours tokens_per_s"
).split()
# the settings that make an experiment another one
SETTINGS = [name for name, field in fields_of(Config).items() if not field.metadata["free"]]


@dataclass
class Options:
    """What to show of the runs."""

    format: str = setting("md", "of the table", choices=("md", "csv", "json"))
    recorded: bool = setting(True, "beside WikiText, the figures that config/exp1 to 5 record")
    picture: str = setting("", "its path (default: report.png beside the runs)", path=True)
    notebook: bool = setting(False, "write notebook.md there: the report and every run's entry")


# --- rows


def row_of(run):
    """A run as a dict: its settings, and the figures of its best evaluation."""
    best, N, data = run.best(), run.metadata["parameters"]["total"], run.metadata["data"]
    sweep, name = os.path.split(os.path.abspath(run.folder))
    counts, c = data["splits"]["val"], run.metadata["config"]
    return dict(
        run=f"{os.path.basename(sweep)}/{name}" if grid.is_sweep(sweep) else run.name,
        state="finished" if run.final else "not finished",
        folder=run.folder,
        settings={key: c.get(key) for key in SETTINGS} | dict(tokenizer=data["tokenizer"]),
        val_text={key: counts[key] for key in ("sha256", "tokens", "words", "bytes")},
        parameters=N,
        tokens=best["tokens"],
        tokens_per_parameter=best["tokens"] / N,
        flops=best["tokens"] * run.metadata["flops_per_token"],
        hours=run.last["elapsed_s"] / 3600,
        tokens_per_s=run.speed(),
    ) | {key: best[key] for key in FIGURES if key.startswith("val_")}


def recorded_rows():
    """What the configs of the experiments record of an earlier program, as dicts like row_of()'s
    that hold less."""
    rows = []
    for path in sorted((ROOT / "config").glob("exp[1-5].py")):
        c = load_config([str(path)])
        if c.recorded_ppl:
            loss = math.log(c.recorded_ppl)
            bits = loss * (WIKITEXT[0] - 1) / math.log(2) / WIKITEXT[1]
            settings = {key: getattr(c, key) for key in SETTINGS}
            row = dict(run=f"{c.name}, recorded", state="recorded", settings=settings)
            row |= dict(parameters=parameters_of(c), val_loss=loss, val_ppl=c.recorded_ppl)
            rows.append(row | dict(val_bits_per_byte=bits))
    return rows


def parameters_of(c):
    """How many parameters a config's model has, as LanguageModel.count() has it: GPT-2's block and
    vocabulary. Here without torch."""
    vocab_size, d = 50257, c.d_model
    attention, mlp, norms = 4 * d * d + 4 * d, 2 * d * c.d_ff + c.d_ff + d, 4 * d
    embeddings = (vocab_size + c.max_seq_len) * d
    return embeddings + c.num_layers * (attention + mlp + norms) + 2 * d + vocab_size


def texts_of(folders, recorded):
    """([the rows of each validation text, the best bits per byte first], what is left out, each run
    with the reason). The figures of two texts do not compare. If `recorded`, WikiText's rows have
    what was recorded among them."""
    texts, left_out = [], []
    for found in map(SavedRun, folders):
        if found.is_ours and found.evaluations:
            row = row_of(found)
            same = (rows for rows in texts if all(is_same_text(row, other) for other in rows))
            rows = next(same, None)
            if rows is None:
                texts.append(rows := [])
            rows.append(row)
        else:
            why = "no evaluation yet" if found.is_ours else "its run.json is not this program's"
            left_out.append(f"{found.name} ({why})")
    for rows in texts:
        sizes = [[row["val_text"]["tokens"], row["val_text"]["bytes"]] for row in rows]
        rows += recorded_rows() if recorded and WIKITEXT in sizes else []
        rows.sort(key=lambda row: row["val_bits_per_byte"] or math.inf)
    return texts, left_out


def is_same_text(one, two):
    """Whether two rows have one validation text. Another tokenizer makes another file of it, with
    as many words and bytes."""
    differ = [key for key in one["val_text"] if one["val_text"][key] != two["val_text"][key]]
    same_tokenizer = one["settings"]["tokenizer"] == two["settings"]["tokenizer"]
    return not differ or (not same_tokenizer and differ == ["sha256", "tokens"])


# --- where runs are, and where their report goes


def runs_in(tops):
    """The folders in and below some that hold a run; links are followed, each is taken once."""
    found, seen = [], set()
    for folder, below, files in itertools.chain(*(os.walk(top, followlinks=True) for top in tops)):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
        elif "run.json" in files:
            found.append(folder)
        seen.add(real)
        below.sort()
    return found


def place_of(folders):
    """(the folder that a report of folders goes to, the end of its files' names). A report of some
    runs has names of its own: notebook.md beside them is the one of all."""
    if not folders:
        return "out", ""
    if len(folders) == 1 and not os.path.exists(f"{folders[0]}/run.json"):
        return folders[0], ""
    return os.path.normpath(f"{folders[0]}/.."), "-selected"


def main(argv=None):
    usage = "python report.py [out/NAME ...] [--setting value ...]"
    options, words = command_line(Options, argv, usage, words=None)
    paths = [os.path.expanduser(word) for word in words]
    folders = [path for path in paths if os.path.isdir(path)]  # out/* has our pictures in it
    missing = [path for path in paths if not os.path.exists(path)]
    if missing or (paths and not folders):
        raise UserError(
            f"there is no folder {', '.join(missing or paths)}; name runs' folders, or none for "
            "all under out/"
        )
    found = runs_in(folders or ["out"])
    texts, left_out = texts_of(found, options.recorded)
    if left_out:
        print(f"left out: {', '.join(left_out)}", file=sys.stderr)

    # a sweep has a table and a picture of its own
    sweep = len(folders) == 1 and grid.is_sweep(folders[0])
    if not texts and (not sweep or options.format != "md"):
        first = command("train.py", ROOT / "config/demo.py")
        raise UserError(f"no run to show; train one first: `{first}`")
    trials = grid.read_trials(folders[0]) if sweep else []
    text = grid.text(trials) if sweep else markdown(texts)
    picture = grid.draw(trials) if sweep else draw(texts)
    if options.format == "md":
        print(text)
    else:
        print_rows(sum(texts, []), options.format)

    # files beside the runs
    home, end = place_of(folders)
    path = options.picture or f"{home}/report{end}.png"
    pictures = {path: picture, "-curves".join(os.path.splitext(path)): draw_curves(texts)}
    for path, picture in pictures.items():
        if picture:
            write(path, lambda path=path, picture=picture: picture.savefig(path))
            text += f"\n\n![all runs]({quote(os.fsencode(os.path.relpath(path, home)))})"
    if options.notebook:
        path = f"{home}/notebook{end}.md"
        write(path, lambda: write_notebook(path, found, text))


def write(path, function):
    """Call function(), which writes a file in a folder that may be new. Raises UserError."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        function()
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write {path}: {error}; make room there, or use --picture"
        ) from None
    print(f"written: {path}", file=sys.stderr)


# --- what is shown


def flat(rows):
    """(the columns of a table of rows, its rows as dicts of them). Of the settings, the data set,
    the seed and those that differ among the runs."""
    runs = [row["settings"] for row in rows if row["state"] != "recorded"]
    differing = [key for key in runs[0] if len({str(run[key]) for run in runs}) > 1]
    chosen = dict.fromkeys(["dataset", "seed", *differing])
    as_text = [{key: str(value) for key, value in row["settings"].items()} for row in rows]
    columns = ["run", "state", *chosen, *FIGURES]
    return columns, [settings | row for settings, row in zip(as_text, rows, strict=True)]


def title_of(rows):
    """What a validation text is called."""
    row = next(row for row in rows if row["state"] != "recorded")
    name, text = row["settings"]["dataset"], row["val_text"]
    return f"{name}, {text['tokens']:,} validation tokens, SHA-256 {text['sha256'][:8]}"


def markdown(texts):
    """A Markdown table for each validation text, named if there are several."""
    parts = []
    for rows in texts:
        columns, cells = flat(rows)
        parts += [f"### {title_of(rows)}"] if len(texts) > 1 else []
        parts.append(table(columns, [[show(row.get(key)) for key in columns] for row in cells]))
    return "\n\n".join(parts)


def print_rows(rows, format):
    """Print rows as CSV or JSON."""
    if format == "csv":
        columns, rows = flat(rows)
        writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(json.dumps(dict(date=time.strftime("%Y-%m-%d"), runs=rows), indent=2))


def draw(texts):
    """A figure of the loss against parameters, tokens and FLOPs, a colour for each text."""
    picture, axes = figure(3)
    labels = dict(parameters="parameters", tokens="training tokens seen", flops="training FLOPs")
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        named = set()
        for number, row in ((n, row) for n, rows in enumerate(texts) for row in rows if key in row):
            old = row["state"] == "recorded"
            at = row[key], row["val_loss"]
            ax.plot(*at, "x" if old else "o", color="gray" if old else f"C{number}")
            # a sweep's runs lie close, so that one of them bears its name
            name, _, _ = row["run"].partition("/")
            if name not in named:
                named.add(name)
                place = dict(xytext=(4, 3), textcoords="offset points")
                ax.annotate(name, at, fontsize=7, parse_math=False, **place)
        ax.set(xscale="log", xlabel=label, ylabel="validation loss, nats per token")
        ax.margins(x=0.4)
    axes[0].set_title("o: runs here, x: recorded; a colour for each text", fontsize=9)
    return picture


def draw_curves(texts):
    """A figure of all runs' losses over the tokens seen, beside each other for each text; None
    without a run."""
    if not texts:
        return None
    picture, axes = figure(len(texts))
    for ax, rows in zip(axes, texts, strict=True):
        for number, row in enumerate(row for row in rows if row["state"] != "recorded"):
            run, color = SavedRun(row["folder"]), f"C{number}"
            name = row["run"].replace("$", r"\$")  # or it is a formula
            draw_losses(ax, run.training, "train_loss", "-", color=color, alpha=0.4)
            draw_losses(ax, run.evaluations, "val_loss", "o-", color=color, label=name)
        ax.set(xlabel="training tokens seen", ylabel="loss, nats per token")
        ax.set_title(title_of(rows).partition(", SHA")[0], fontsize=9, parse_math=False)
        ax.legend(fontsize=7, title="dots: validation", title_fontsize=7)
    return picture


if __name__ == "__main__":
    run(main, strict=True)
