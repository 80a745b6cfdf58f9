"""All runs side by side, or a sweep's, out of what they leave in their folders. Needs no torch.

python report.py [out/NAME ...] [--format md|csv|json] [--notebook]
"""

import csv
import json
import math
import os
import sys
import time
from dataclasses import dataclass

from config import Config, load_config
from lab import grid
from lab.console import ROOT, UserError, command, run
from lab.folder import folders_with
from lab.notebook import SavedRun, draw_losses, figure, show, table, write_entry, write_notebook
from lab.settings import command_line, fields_of, setting

# experiments of which the original notebook recorded a figure, with their parameters
RECORDED = dict(exp1=869_153, exp2=869_153, exp3=7_342_033, exp4=16_206_673)
WIKITEXT = dict(tokens=242_643, bytes=1_136_862)  # their validation text, GPT-2's tokens
FIGURES = (
    "parameters tokens tokens_per_parameter flops val_loss val_ppl val_ppl_word val_bits_per_byte "
    "hours tokens_per_s"
).split()
# the settings that make an experiment another one, or another length of it
LENGTH = "epochs", "max_steps", "max_hours", "patience"
FIELDS = fields_of(Config).items()
SETTINGS = [name for name, field in FIELDS if name in LENGTH or not field.metadata["free"]]


@dataclass
class Options:
    """What to show of the runs."""

    format: str = setting("md", "of the table", choices=("md", "csv", "json"))
    recorded: bool = setting(True, "beside WikiText, the figures that config/exp1 to 4 record")
    notebook: bool = setting(False, "write notebook.md there: the report and every run's entry")


# --- rows


def row_of(run):
    """A run as a dict: its settings, and the figures of its best evaluation."""
    best, N, c = run.best(), run.metadata["parameters"]["total"], run.metadata["config"]
    top, text = os.path.dirname(os.path.abspath(run.folder)), grid.text_of(run)
    settings = {name: c.get(name) for name in SETTINGS}
    return dict(
        run=f"{os.path.basename(top)}/{run.name}" if grid.is_sweep(top) else run.name,
        state="finished" if run.final else "not finished",
        folder=run.folder,
        settings=settings | dict(tokenizer=text["tokenizer"]),
        val_text=text,
        parameters=N,
        tokens=best["tokens"],
        tokens_per_parameter=best["tokens"] / N,
        flops=best["tokens"] * run.metadata["flops_per_token"],
        hours=run.last["elapsed_s"] / 3600,
        tokens_per_s=run.speed(),
    ) | {key: best[key] for key in FIGURES if key.startswith("val_")}


def recorded_rows():
    """What the original notebook recorded, as dicts like row_of()'s that hold less."""
    rows, settings = [], dict(dataset="wikitext-103", tokenizer="gpt2")
    for name, parameters in RECORDED.items():
        ppl = load_config([str(ROOT / f"config/{name}.py")]).recorded_ppl
        loss = math.log(ppl)
        bits = loss * (WIKITEXT["tokens"] - 1) / math.log(2) / WIKITEXT["bytes"]
        row = dict(run=f"{name}, recorded", state="recorded", settings=settings)
        row |= dict(parameters=parameters, val_loss=loss, val_ppl=ppl, val_bits_per_byte=bits)
        rows.append(row)
    return rows


def texts_of(runs, recorded):
    """The rows of each validation text, the best bits per byte first: the figures of two texts do
    not compare. If `recorded`, WikiText's rows have what was recorded among them."""
    texts = []
    for row in map(row_of, runs):
        for rows in texts:
            if grid.is_same_text(rows[0]["val_text"], row["val_text"]):
                rows.append(row)
                break
        else:
            texts.append([row])
    for rows in texts:
        is_wikitext = rows[0]["val_text"]["bytes"] == WIKITEXT["bytes"]
        rows += recorded_rows() if recorded and is_wikitext else []
        rows.sort(key=lambda row: row["val_bits_per_byte"] or math.inf)
    return texts


def measure_of(rows):
    """The figure by which rows compare."""
    return grid.measure_of(row["settings"]["tokenizer"] for row in rows)


# --- what is shown


def flat(rows):
    """(the columns of a table of rows, its rows as dicts of them). Of the settings, the data set,
    the seed and those that differ among the rows."""
    cells = [{name: str(value) for name, value in row["settings"].items()} for row in rows]
    chosen = ["dataset", "seed"]
    for name in [*SETTINGS, "tokenizer"]:
        if name not in chosen and len({row[name] for row in cells if name in row}) > 1:
            chosen.append(name)
    columns = ["run", "state", *chosen, *FIGURES]
    return columns, [cell | row for cell, row in zip(cells, rows, strict=True)]


def title_of(rows):
    """What a validation text is called."""
    text, settings = next((row["val_text"], row["settings"]) for row in rows if "val_text" in row)
    return f"{settings['dataset']}, {text['bytes']:,} bytes of validation text"


def markdown(texts):
    """A Markdown table for each validation text, named if there are several."""
    parts = []
    for rows in texts:
        columns, cells = flat(rows)
        parts += [f"### {title_of(rows)}"] if len(texts) > 1 else []
        parts.append(table(columns, [[show(row.get(name)) for name in columns] for row in cells]))
        parts += [grid.PER_BYTE] if measure_of(rows) == "val_bits_per_byte" else []
    return "\n\n".join(parts)


def print_rows(rows, format):
    """Print rows as CSV or JSON."""
    if format == "json":
        print(json.dumps(dict(date=time.strftime("%Y-%m-%d"), runs=rows), indent=2))
        return
    columns, rows = flat(rows)
    writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def draw(texts):
    """A figure of the best evaluations against parameters, tokens and FLOPs, a colour for each
    text."""
    picture, axes = figure(3)
    measure = measure_of(sum(texts, []))
    labels = dict(parameters="parameters", tokens="training tokens seen", flops="training FLOPs")
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        named = set()
        for number, row in ((n, row) for n, rows in enumerate(texts) for row in rows if key in row):
            old = row["state"] == "recorded"
            at = row[key], row[measure]
            ax.plot(*at, "x" if old else "o", color="gray" if old else f"C{number}")
            # a sweep's runs lie close, so that one of them bears its name
            name, _, _ = row["run"].partition("/")
            if name not in named:
                named.add(name)
                place = dict(xytext=(4, 3), textcoords="offset points")
                ax.annotate(name, at, fontsize=7, parse_math=False, **place)
        ax.set(xscale="log", xlabel=label, ylabel=f"validation {grid.UNITS[measure]}")
        # or they would lie on one another
        ax.tick_params("x", which="minor", labelsize=6, labelrotation=45)
        ax.margins(x=0.4)
    axes[0].set_title("o: runs here, x: recorded; a colour for each text", fontsize=9)
    return picture


def draw_curves(texts):
    """A figure of all runs' curves over the tokens seen, beside each other for each text."""
    picture, axes = figure(len(texts))
    for ax, rows in zip(axes, texts, strict=True):
        measure = measure_of(rows)
        for number, row in enumerate(row for row in rows if "folder" in row):
            run, color = SavedRun(row["folder"]), f"C{number}"
            name = row["run"].replace("$", r"\$")  # or it is a formula
            draw_losses(ax, run.evaluations, measure, "o-", color=color, label=name)
            if measure == "val_loss":
                draw_losses(ax, run.training, "train_loss", "-", color=color, alpha=0.4)
        ax.set(xlabel="training tokens seen", ylabel=grid.UNITS[measure])
        ax.set_title(title_of(rows), fontsize=9, parse_math=False)
        ax.legend(fontsize=7, title="dots: validation", title_fontsize=7)
    return picture


# --- the command


def write_pages(path, folders, tops, text):
    """Write the entries of runs and sweeps anew, and join them at `path` below a report's text. A
    sweep's entry stands for its runs; that of one which was asked for alone lies at `path`."""
    sweeps = [folder for folder in folders_with("sweep.json", tops) if grid.is_sweep(folder)]
    entries = [grid.write_entry(folder) for folder in sweeps]
    members = [folder for folder in folders if os.path.dirname(folder) in sweeps]
    for folder in members:
        write_entry(folder)
    if sweeps != tops or len(tops) > 1:
        alone = [folder for folder in folders if folder not in members]
        write_notebook(path, alone, text, entries)


def main(argv=None):
    usage = "python report.py [out/NAME ...] [--setting value ...]"
    options, words = command_line(Options, argv, usage, words=None)
    # files among the words, our pictures in out/*, hold no run
    tops = [os.path.normpath(word) for word in words or ["out"]]
    folders = folders_with("run.json", tops)
    try:
        show_runs(options, tops, folders)
    except OSError as error:
        raise UserError(f"cannot make the report: {error}; put that right") from None


def show_runs(options, tops, folders):
    """Print the table of the runs in some folders, and lay its files beside them. tops: the folders
    that were asked for. Raises UserError, and OSError."""
    is_sweep = len(tops) == 1 and grid.is_sweep(tops[0])
    runs = [run for run in map(SavedRun, folders) if run.is_ours and run.evaluations]
    texts = texts_of(runs, options.recorded)
    missing = [top for top in tops if not os.path.exists(top)]
    if missing or not (texts or is_sweep):
        first = command("train.py", ROOT / "config/demo.py")
        where = " ".join(missing or tops)
        raise UserError(f"there is no run to show in {where}; train one first: `{first}`")
    shown = {run.folder for run in runs}
    if left_out := [folder for folder in folders if folder not in shown]:
        print(f"left out, without an evaluation: {', '.join(left_out)}", file=sys.stderr)
    text = grid.text(grid.read_trials(tops[0])) if is_sweep else markdown(texts)
    if options.format == "md":
        print(text)
    else:
        print_rows(sum(texts, []), options.format)

    # files beside the runs; those of some runs are named so, since the others are of all
    of_all = len(tops) == 1 and not os.path.exists(f"{tops[0]}/run.json")
    home, end = (tops[0], "") if of_all else (os.path.normpath(f"{tops[0]}/.."), "-selected")
    pictures = {f"report{end}.png": draw, f"report{end}-curves.png": draw_curves} if texts else {}
    pages = [f"notebook{end}.md"] if options.notebook or is_sweep else []
    for name, drawn in pictures.items():
        drawn(texts).savefig(f"{home}/{name}")
        text += f"\n\n![all runs]({name})"
    if options.notebook:
        write_pages(f"{home}/{pages[0]}", folders, tops, text)
    elif is_sweep:
        grid.write_entry(home)
    print(f"written in {home}: {', '.join([*pictures, *pages])}", file=sys.stderr)


if __name__ == "__main__":
    run(main, strict=True)
