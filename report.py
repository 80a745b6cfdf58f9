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
from urllib.parse import quote

from config import Config, read_config
from lab import grid
from lab.console import ROOT, UserError, command, run
from lab.notebook import Record, figure, show, table, write_notebook
from lab.settings import command_line, setting

WIKITEXT_TOKENS = 242_643  # of the validation text that the original notebook's figures are over


@dataclass
class Options:
    """What to show of the runs."""

    format: str = setting("md", "of the table", choices=("md", "csv", "json"))
    recorded: bool = setting(True, "the original notebook's results beside WikiText's runs")
    picture: str = setting("", "its path (default: report.png beside the runs)", path=True)
    notebook: bool = setting(False, "write notebook.md beside them: this and every run's entry")


def row_of(record):
    """A run as a dict of figures, its best evaluation's."""
    best, N = record.best(), record.metadata["parameters"]["total"]
    sweep, name = os.path.split(os.path.abspath(record.folder))
    return dict(
        run=f"{os.path.basename(sweep)}/{name}" if grid.is_sweep(sweep) else record.name,
        state="finished" if record.final else "not finished",
        dataset=record.metadata["config"]["dataset"],
        parameters=N,
        tokens=best["tokens"],
        tokens_per_parameter=best["tokens"] / N,
        flops=best["tokens"] * record.metadata["flops_per_token"],
        val_loss=best["val_loss"],
        val_ppl=best["val_ppl"],
        val_ppl_word=best["val_ppl_word"],
        val_bits_per_byte=best["val_bits_per_byte"],
        hours=record.seconds() / 3600,
        tokens_per_s=record.speed(),
        split=record.metadata["data"]["splits"]["val"],
    )


def recorded_rows():
    """Dicts as row_of()'s of the results that the original notebook recorded, from the configs."""
    rows = []
    for name in sorted(os.listdir(ROOT / "config")):
        values = read_config(ROOT / "config" / name)[0] if name.startswith("exp") else {}
        if values.get("recorded_ppl"):
            c = Config(**values)
            D, F, V, T = c.d_model, c.d_ff, 50257, c.max_seq_len
            N = (V + T + 2) * D + V + c.num_layers * (4 * D * D + 2 * D * F + 9 * D + F)
            row = dict(run=name.removesuffix(".py"), state="recorded", dataset=c.dataset)
            row |= dict(parameters=N, val_loss=math.log(c.recorded_ppl), val_ppl=c.recorded_ppl)
            rows.append(row)
    return rows


def tables_of(records, recorded):
    """[rows] of the runs, dicts, a list for each validation text, the lowest loss first. recorded:
    the original notebook's results among those on its text."""
    texts = {}
    for record in records:
        row = row_of(record)
        texts.setdefault(row["split"]["sha256"], []).append(row)
    for rows in texts.values():
        if recorded and rows[0].pop("split")["tokens"] == WIKITEXT_TOKENS:
            rows += [dict.fromkeys(rows[0]) | row for row in recorded_rows()]
        for row in rows:
            row.pop("split", None)
        rows.sort(key=lambda row: row["val_loss"])
    return list(texts.values())


def draw(tables):
    """A figure of the loss against parameters, tokens and FLOPs, a color for each text."""
    picture, axes = figure(3)
    labels = dict(parameters="parameters", tokens="training tokens seen", flops="training FLOPs")
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        named = set()
        for number, row in ((i, row) for i, rows in enumerate(tables) for row in rows):
            if row[key] is None:
                continue
            is_old = row["state"] == "recorded"
            at, color = (row[key], row["val_loss"]), "gray" if is_old else f"C{number}"
            ax.plot(*at, "x" if is_old else "o", color=color)
            # a sweep's runs lie close, so that one of them bears its name
            name, _, _ = row["run"].partition("/")
            if name not in named:
                named.add(name)
                place = dict(xytext=(4, 3), textcoords="offset points")
                ax.annotate(name, at, fontsize=7, parse_math=False, **place)
        ax.set(xscale="log", xlabel=label, ylabel="validation loss, nats per token")
        ax.margins(x=0.4)
    axes[0].set_title("o: runs here, x: the original notebook's", fontsize=9)
    return picture


def runs_below(top):
    """The folders of runs below a folder, itself among them; links are followed, each folder
    once."""
    found, seen = [], set()
    for folder, folders, names in os.walk(top, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        found += [folder] if "run.json" in names else []
    return sorted(found)


def main(argv=None):
    usage = "python report.py [out/NAME ...] [--setting value ...]"
    options, names = command_line(Options, argv, usage, words=None)
    names = [os.path.expanduser(name) for name in names]
    if missing := [name for name in names if not os.path.exists(name)]:
        raise UserError(
            f"there is no folder {', '.join(missing)}; name runs' folders, or none for all in out/"
        )

    # which runs, and where what is written of them lies
    named = [name for name in names if os.path.isdir(name)]  # a picture, say, is no run
    folders = [folder for top in named or ["out"] for folder in runs_below(top)]
    once = {os.path.realpath(folder): folder for folder in reversed(folders)}
    records = [Record(folder) for folder in sorted(once.values())]
    shown = [record for record in records if record.is_ours and record.evaluations]
    if left_out := [record.name for record in records if record not in shown]:
        print(f"left out, with no evaluation yet: {', '.join(left_out)}", file=sys.stderr)
    is_sweep = len(named) == 1 and grid.is_sweep(named[0]) and options.format == "md"
    if not shown and not is_sweep:
        fix = command("train.py", ROOT / "config/demo.py")
        raise UserError(f"no run to show; train one first: `{fix}`")
    folder, ending = place_of(named)

    # what they say
    if is_sweep:
        trials = grid.read_trials(named[0])
        text, picture = grid.text(trials), grid.draw(trials)
        print(text)
    else:
        tables = tables_of(shown, options.recorded)
        text, picture = summary(tables), draw(tables)
        print_rows(tables, text, options.format)
    path = options.picture or f"{folder}/report{ending}.png"
    try:
        if picture:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            picture.savefig(path)
            print(f"the picture is {path}", file=sys.stderr)
        if options.notebook:
            link = quote(os.fsencode(os.path.relpath(path, folder)))
            page = f"{folder}/notebook{ending}.md"
            write_notebook(page, shown, f"{text}\n\n![all runs]({link})" if picture else text)
            print(f"the notebook is {page}", file=sys.stderr)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}; name another --picture") from None


def place_of(named):
    """(the folder that a report on the folders `named` is written into, how its files' names end):
    the one folder of several runs, or beside the runs."""
    if not named:
        return "out", ""
    if len(named) == 1 and not os.path.exists(f"{named[0]}/run.json"):
        return named[0], ""
    names = "+".join(os.path.basename(os.path.abspath(name)) for name in named)
    return os.path.dirname(os.path.abspath(named[0])), f"-{names[:100]}"


def summary(tables):
    """The runs as Markdown, a table for each validation text."""
    shown = []
    for rows in tables:
        if len(tables) > 1:
            shown.append(f"On the validation text of {rows[0]['dataset']}:")
        shown.append(
            table(list(rows[0]), [[show(value) for value in row.values()] for row in rows])
        )
    return "\n\n".join(shown)


def print_rows(tables, text, format):
    """Print the runs as Markdown, CSV or JSON."""
    rows = [row for rows in tables for row in rows]
    if format == "md":
        print(text)
    elif format == "csv":
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(json.dumps(dict(date=time.strftime("%Y-%m-%d"), runs=rows), indent=2))


if __name__ == "__main__":
    run(main, strict=True)
