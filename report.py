"""All runs side by side, or a sweep's, out of what they leave in their folders. Needs no torch.

python report.py [out/NAME ...] [--format md|csv|json] [--notebook] [--html]
"""

import csv
import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from lab import grid
from lab.book import write_book
from lab.console import ROOT, UserError, command, run
from lab.notebook import Run, figure, show, table
from lab.settings import command_line, setting

# The notebook's own results, by an earlier program: name, parameters, tokens seen, FLOPs a token,
# loss, perplexity
RECORDED = [
    ("experiment 1", 869_153, 209 * 2_347_038, 4_959_840, 6.1413, 464.64),
    ("experiment 2", 869_153, 10 * 115_716_078, 4_959_840, 5.8991, 364.71),
    ("experiment 3", 7_342_033, 10 * 115_716_078, 44_888_832, 4.1853, 65.71),
    ("experiment 4", 16_206_673, 9 * 115_716_078, 99_214_848, 3.8358, 46.33),
    ("experiment 5", 19_365_713, 0, 121_234_944, None, None),
]


@dataclass
class Options:
    """What to show of the runs."""

    format: str = setting("md", "of the table", choices=("md", "csv", "json"))
    recorded: bool = setting(True, "the notebook's five rows among them")
    picture: str = setting("", "its path (default: report.png in out/ or the sweep)", path=True)
    notebook: bool = setting(False, "write out/notebook.md: the report and every run's entry")
    html: bool = setting(False, "write out/notebook.html too: the same, its pictures inside")


def row_of(run):
    """A run as a dict of figures, its best evaluation's."""
    best, N = run.best(), run.about["parameters"]["total"]
    sweep, name = os.path.split(os.path.abspath(run.folder))
    return dict(
        run=f"{os.path.basename(sweep)}/{name}" if grid.is_sweep(sweep) else run.name,
        state="finished" if run.final else "not finished",
        parameters=N,
        tokens=best["tokens"],
        tokens_per_parameter=best["tokens"] / N,
        flops=best["tokens"] * run.about["flops_per_token"],
        val_loss=best["val_loss"],
        val_ppl=best["val_ppl"],
        val_ppl_word=best["val_ppl_word"],
        val_bits_per_byte=best["val_bits_per_byte"],
        hours=run.seconds() / 3600,
        tokens_per_s=run.speed(),
        split=run.about["data"]["splits"]["val"]["sha256"],
    )


def recorded_row(name, N, D, flops, loss, ppl):
    """A recorded result as a dict like row_of()'s."""
    return dict(
        run=name,
        state="recorded" if loss else "not recorded",
        parameters=N,
        tokens=D or None,
        tokens_per_parameter=D / N if D else None,
        flops=D * flops or None,
        val_loss=loss,
        val_ppl=ppl,
        val_ppl_word=None,
        val_bits_per_byte=None,
        hours=None,
        tokens_per_s=None,
        split=None,
    )


def rows_of(folders, recorded=True):
    """(a dict a run and, if `recorded`, one a result of the notebook's, sorted by validation loss,
    those without one last; the folders left out, each with the reason)."""
    rows, left_out = [], []
    for found in map(Run, folders):
        if found.is_ours and found.evaluations:
            rows.append(row_of(found))
        else:
            why = "no evaluation yet" if found.is_ours else "no run of this program"
            left_out.append(f"{found.name} ({why})")
    if recorded:
        rows += [recorded_row(*result) for result in RECORDED]
    return sorted(rows, key=lambda row: row["val_loss"] or math.inf), left_out


def fit(rows):
    """Fit L = E + A / N**alpha + B / D**beta to the runs (Hoffmann et al. 2022), or the form in N
    or D alone where the other does not vary or there are too few runs: least squares over a grid of
    exponents, with E, A and B at least 0.

    Returns a sentence: the fit, what it predicts, and on how little it stands.
    """
    splits = [row["split"] for row in rows if row["split"]]
    runs = [row for row in rows if row["split"] and row["split"] == max(splits, key=splits.count)]
    keys = dict(N="parameters", D="tokens")
    sizes = {term: np.array([row[key] for row in runs], float) for term, key in keys.items()}
    L = np.array([row["val_loss"] for row in runs], float)
    terms = [t for t, values in sizes.items() if len({float(f"{v:.2g}") for v in values}) >= 3]
    if len(runs) < 3 or not terms:
        return (
            f"No fit: {len(runs)} run{'s' * (len(runs) != 1)} on one validation text, and a fit "
            "takes three or more that differ in size or in tokens."
        )
    terms = terms if len(runs) > 5 else terms[:1]
    best = search(sizes, terms, L)
    if best is None:
        return "No fit: the loss does not fall with size or tokens among these runs."
    error, powers, factors = best

    # predict twice the largest first term, the others as in the best run
    ahead = 2 * sizes[terms[0]].max()
    predicted = factors.get(0, 0.0)
    text = f"L = {predicted:.3f}"
    for i, (term, power) in enumerate(zip(terms, powers, strict=True), 1):
        text += f" + {factors[i]:.3g} / {term}^{power:.2f}"
        at = ahead if i == 1 else sizes[term][L.argmin()]
        predicted += factors[i] * at**-power
    unknowns = 2 * len(terms) + 1
    spare = len(runs) - unknowns
    doubt = (
        "With no more runs than unknowns the curve passes through them whatever is true: a guess."
    )
    if spare > 0:
        doubt = f"With {spare} more runs than unknowns this is a weak test."
    return (
        f"{text}, from {len(runs)} runs with {unknowns} unknowns; root mean square error "
        f"{math.sqrt(error / len(L)):.4f}. It predicts {predicted:.3f} (perplexity "
        f"{math.exp(predicted):,.1f}) at {terms[0]} = {ahead:,.0f}. {doubt}"
    )


def search(sizes, terms, L):
    """The least squares fit of the losses L (n,) in `terms`, each with an exponent from a grid:
    (sum of squares, exponents, {number of a term, 0 for the constant: factor}); None if no fit has
    factors of at least 0. sizes: {term: (n,)}."""
    step, best = 0.01 if len(terms) == 1 else 0.03, None
    constant_and_all = list(range(len(terms) + 1))
    for powers in itertools.product(np.arange(0.05, 1.51, step), repeat=len(terms)):
        falling = [sizes[term] ** -power for term, power in zip(terms, powers, strict=True)]
        columns = np.stack([np.ones(len(L)), *falling], 1)
        for kept in (constant_and_all, constant_and_all[1:]):
            factors = np.linalg.lstsq(columns[:, kept], L, rcond=None)[0]
            error = np.square(columns[:, kept] @ factors - L).sum()
            if (factors >= 0).all() and (best is None or error < best[0] - 1e-12):
                best = error, powers, dict(zip(kept, factors, strict=True))
    return best


def draw(rows):
    """A figure of the loss against parameters, tokens and FLOPs."""
    picture, axes = figure(3)
    labels = dict(parameters="parameters", tokens="training tokens seen", flops="training FLOPs")
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        named = set()
        for row in rows:
            if row["val_loss"]:
                old = row["state"] == "recorded"
                at = row[key], row["val_loss"]
                ax.plot(*at, "x" if old else "o", color="gray" if old else "C0")
                # a sweep's runs lie close, so that one of them bears its name
                name, _, _ = row["run"].partition("/")
                if name not in named:
                    named.add(name)
                    place = dict(xytext=(4, 3), textcoords="offset points")
                    ax.annotate(name, at, fontsize=7, parse_math=False, **place)
        ax.set(xscale="log", xlabel=label, ylabel="validation loss, nats a token")
        ax.margins(x=0.4)
    axes[0].set_title("o: runs here, x: the notebook's records", fontsize=9)
    return picture


def runs_in(top):
    """The folders below one that hold a run, or no other folder: those can be named as left out."""
    folders = [path for path in Path(top).rglob("*") if path.is_dir()]
    parents = {path.parent for path in folders}
    return sorted(str(p) for p in folders if p not in parents or (p / "run.json").exists())


def main(argv=None):
    usage = "python report.py [out/NAME ...] [--setting value ...]"
    options, folders = command_line(Options, argv, usage, words=None)
    folders = [os.path.expanduser(folder) for folder in folders]
    if missing := [folder for folder in folders if not os.path.isdir(folder)]:
        raise UserError(
            f"there is no folder {', '.join(missing)}; name runs' folders, or none for all under "
            "out/"
        )
    if len(folders) == 1 and grid.is_sweep(folders[0]) and options.format == "md":
        found, trials = runs_in(folders[0]), grid.read_trials(folders[0])
        text, picture, path = grid.text(trials), grid.draw(trials), f"{folders[0]}/report.png"
        print(text)
    else:
        named = [runs_in(folder) if grid.is_sweep(folder) else [folder] for folder in folders]
        found = sum(named, []) or runs_in("out")
        rows, left_out = rows_of(found, options.recorded)
        if left_out:
            print(f"left out: {', '.join(left_out)}", file=sys.stderr)
        if not rows:
            mend = command("train.py", ROOT / "config/demo.py")
            raise UserError(f"no run to show; train one first: `{mend}`")
        text, picture, path = summary(rows), draw(rows), "out/report.png"
        print_rows(rows, options.format)
    path = options.picture or path
    if picture:
        save(picture, path)
    if options.notebook or options.html:
        shown = f"![all runs]({quote(os.fsencode(os.path.relpath(path, 'out')))})"
        top = f"{text}\n\n{shown}" if picture else text
        written = write_book(found, top, options.html)
        print(f"the notebook is {' and '.join(written)}", file=sys.stderr)


def save(picture, path):
    """Write a matplotlib figure. Raises UserError."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        picture.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}; name another --picture") from None
    print(f"the picture is {path}", file=sys.stderr)


def columns_of(rows):
    """The names of a table's columns."""
    return [key for key in rows[0] if key != "split"]


def summary(rows):
    """The runs as Markdown: their table and the fit."""
    columns = columns_of(rows)
    return f"{table(columns, [[show(row[key]) for key in columns] for row in rows])}\n\n{fit(rows)}"


def print_rows(rows, format):
    """Print the runs as Markdown, CSV or JSON."""
    columns = columns_of(rows)
    if format == "md":
        print(summary(rows))
    elif format == "csv":
        writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(json.dumps(dict(date=time.strftime("%Y-%m-%d"), runs=rows, fit=fit(rows)), indent=2))


if __name__ == "__main__":
    run(main, strict=True)
