"""All runs side by side, or a sweep's, out of what they leave in their folders. Needs no torch.

python report.py [out/NAME ...] [--notebook]
"""

import math
import os
import statistics
import sys
from dataclasses import dataclass
from urllib.parse import quote

from config import Config
from lab import notebook
from lab.console import ROOT, UserError, command, run
from lab.folder import folders_with, read_json
from lab.notebook import UNITS, SavedRun
from lab.settings import command_line, fields_of, setting

FIGURES = (
    "parameters tokens tokens_per_parameter flops val_loss val_ppl recorded_ppl val_ppl_word "
    "val_bits_per_byte hours tokens_per_s"
).split()
# Student's t, two-sided at 95 %, for 1, 2, ... degrees of freedom; the last stands for all above
STUDENT = 12.71, 4.30, 3.18, 2.78, 2.57
SURE = (
    "± is the standard deviation over seeds, and of a difference the standard error, seed by seed. "
    "What may be chance is less than 95 % sure by Student's t: more seeds would tell."
)
PER_BYTE = (
    "The tokenizers differ: the order is by bits per byte, since losses per token do not compare."
)
# the settings that make an experiment another one, or another length of it
LENGTH = "epochs", "max_steps", "max_hours", "patience"
FIELDS = fields_of(Config).items()
SETTINGS = [name for name, field in FIELDS if name in LENGTH or not field.metadata["free"]]


@dataclass
class Options:
    """What to show of the runs."""

    notebook: bool = setting(False, "write notebook.md there: the report and every run's entry")


# --- what compares


def runs_in(tops):
    """The SavedRuns in some folders. Raises OSError."""
    runs = map(SavedRun, folders_with("run.json", tops))
    return [saved for saved in runs if saved.metadata]


def row_of(saved):
    """A SavedRun as a dict: itself, its settings, and the figures of its best evaluation, if it has
    one. A sweep's runs have the sweep's name."""
    metadata, best, c = saved.metadata, saved.best, saved.metadata["config"]
    settings = {name: c.get(name) for name in SETTINGS}
    row = dict(
        saved=saved,
        run=os.path.basename(saved.top) if saved.sweep else saved.name,
        settings=settings | dict(tokenizer=metadata["data"]["tokenizer"]),
        parameters=metadata["parameters"]["total"],
        recorded_ppl=c["recorded_ppl"] or None,
        hours=saved.last["elapsed_s"] / 3600,
        tokens_per_s=saved.speed and round(saved.speed),
    )
    if best:
        row |= {name: best[name] for name in FIGURES if name in best}
        row |= dict(
            tokens_per_parameter=best["tokens"] / row["parameters"],
            flops=best["tokens"] * metadata["flops_per_token"],
        )
    return row


def is_same_text(one, two):
    """Whether two SavedRuns were validated on one text. Another tokenizer makes another file of it,
    with as many words and bytes."""
    one, two = one.metadata["data"], two.metadata["data"]
    names = ["sha256"] if one["tokenizer"] == two["tokenizer"] else ["words", "bytes"]
    return all(one["splits"]["val"][name] == two["splits"]["val"][name] for name in names)


def by_text(runs):
    """The SavedRuns of each validation text, a list of lists: those of two do not compare."""
    texts = []
    for saved in runs:
        same = [text for text in texts if is_same_text(text[0], saved)]
        if same:
            same[0].append(saved)
        else:
            texts.append([saved])
    return texts


def measure_of(runs):
    """The figure by which SavedRuns compare."""
    tokenizers = {saved.metadata["data"]["tokenizer"] for saved in runs}
    return "val_loss" if len(tokenizers) < 2 else "val_bits_per_byte"


def groups_of(runs):
    """The rows of one validation text's SavedRuns, a list of lists. Those of a sweep's runs that
    count and differ by seed alone are one group. Groups that count stand first, then those of the
    least bits per byte."""
    groups = {}
    for row in map(row_of, runs):
        saved, others = row["saved"], row["settings"] | {"seed": None}
        place = saved.top if saved.sweep and saved.counts else saved.folder
        groups.setdefault((place, str(others)), []).append(row)

    def rank(group):
        bits = [row.get("val_bits_per_byte") or math.inf for row in group]
        return not group[0]["saved"].counts, statistics.mean(bits)

    return sorted(groups.values(), key=rank)


# --- what is shown


def mean_of(figures):
    """(the mean of a group's {seed: figure}, the standard deviation; None for a single one)."""
    figures = figures.values()
    return statistics.mean(figures), statistics.stdev(figures) if len(figures) > 1 else None


def difference(figures, best):
    """How far a group's mean is above the best's, from their {seed: figure}, as a phrase. It is
    taken seed by seed; where they share fewer than two seeds there is no standard error."""
    pairs = [figures[seed] - best[seed] for seed in figures if seed in best]
    if len(pairs) < 2:
        return with_error(mean_of(figures)[0] - mean_of(best)[0], None, "+")
    apart, error = statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
    student = STUDENT[min(len(pairs) - 1, len(STUDENT)) - 1]
    may_be_chance = ", may be chance" if abs(apart) <= student * error else ""
    return with_error(apart, error, "+") + may_be_chance


def with_error(value, error, sign=""):
    """A figure and how sure it is: 4.1853 ± 0.0021."""
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")


def by_seed(group, measure):
    """{seed: figure} of a group, a list of rows."""
    return {row["settings"]["seed"]: row[measure] for row in group}


def title_of(runs):
    """What the validation text of some SavedRuns is called."""
    metadata = runs[0].metadata
    size = metadata["data"]["splits"]["val"]["bytes"]
    return f"{metadata['config']['dataset']}, {size:,} bytes of validation text"


def markdown(texts):
    """A Markdown table for the SavedRuns of each validation text, named if there are several, and
    what to know before one believes it."""
    parts = []
    for runs in texts:
        groups, measure = groups_of(runs), measure_of(runs)
        parts += [f"### {title_of(runs)}"] if len(texts) > 1 else []
        parts.append(table_of(groups, measure))
        parts += [SURE] if any(len(group) > 1 for group in groups) else []
        parts += [PER_BYTE] if measure == "val_bits_per_byte" else []
    return "\n\n".join(parts)


def table_of(groups, measure):
    """A row for each group. Of the settings it has the data set, the seed and those that differ."""
    rows, chosen = sum(groups, []), ["dataset", "seed"]
    for name in rows[0]["settings"]:
        if name not in chosen and len({str(row["settings"].get(name)) for row in rows}) > 1:
            chosen.append(name)
    figures = [name for name in FIGURES if any(row.get(name) is not None for row in rows)]
    columns = ["run", "state", *chosen, measure, "to the best"]
    columns += [name for name in figures if name != measure]
    lines = []
    for group in groups:
        cells = group[0] | {name: str(value) for name, value in group[0]["settings"].items()}
        cells["state"] = ", ".join(dict.fromkeys(row["saved"].state for row in group))
        for name in figures:
            values = [row[name] for row in group if row.get(name) is not None]
            cells[name] = statistics.mean(values) if values else None
        if group[0]["saved"].counts:
            own, best = by_seed(group, measure), by_seed(groups[0], measure)
            cells["seed"] = ", ".join(map(str, own))
            cells[measure] = with_error(*mean_of(own))
            cells["to the best"] = "best" if group is groups[0] else difference(own, best)
        lines.append([notebook.show(cells.get(name)) for name in columns])
    return notebook.table(columns, lines)


def draw(texts):
    """A figure: the best evaluations against parameters, then the curves of each validation text's
    SavedRuns over one another. A run has one colour."""
    picture, (sizes, *curves) = notebook.figure(1 + len(texts))
    measure, number = measure_of(sum(texts, [])), 0
    for axes, runs in zip(curves, texts, strict=True):
        axes.set_title(title_of(runs), fontsize=9, parse_math=False)
        for row in map(row_of, runs):
            if row["saved"].best:
                color, number = f"C{number}", number + 1
                sizes.plot(row["parameters"], row[measure], "o", color=color)
                notebook.draw_run(axes, row["saved"], measure_of(runs), color)
    sizes.set(xscale="log", xlabel="parameters", ylabel=f"validation {UNITS[measure]}")
    sizes.tick_params("x", which="minor", labelsize=6, labelrotation=45)  # or they would overlap
    return picture


# --- a sweep's entry in the notebook


def write_sweep(folder):
    """Write a sweep's notebook.md anew, whole. Returns (when its first run began, its entry as
    Markdown). Raises OSError."""
    notebook.invite(folder)
    sweep, runs = read_json(f"{folder}/sweep.json"), runs_in([folder])
    name = os.path.basename(os.path.abspath(folder))
    has_picture = os.path.exists(f"{folder}/report.png")
    began = min(saved.metadata["began"] for saved in runs)
    pages = [f"- [{r.name}]({quote(r.name)}/notebook.md): {r.state}" for r in runs]
    paragraphs = [
        f"# Sweep of {', '.join(sweep['vary'])} - {began[:10]} ({name})",
        f"`{sweep['command']}`",
        markdown(by_text(runs)),
        *(["![all runs](report.png)"] if has_picture else []),
        "## Runs",
        "\n".join(pages),
        *notebook.conclusion_part(folder),
    ]
    text = "\n\n".join(paragraphs) + "\n"
    notebook.write_page(f"{folder}/notebook.md", text)
    return began, text


# --- the command


def write_pages(path, runs, sweeps, text):
    """Write the entries of SavedRuns and of sweeps' folders, and join them at `path` below a
    report's text. A sweep's entry stands for its runs, and that of one alone lies at `path`. Raises
    OSError."""
    entries, home = [], os.path.dirname(path)
    for saved in runs:
        written = notebook.write_entry(saved.folder)
        if not saved.sweep:
            entries.append((*written, quote(os.path.relpath(saved.folder, home))))
    for folder in sweeps:
        entries.append((*write_sweep(folder), quote(os.path.relpath(folder, home))))
    if path not in [f"{folder}/notebook.md" for folder in sweeps]:
        notebook.write_notebook(path, text, entries)


def main(argv=None):
    usage = "python report.py [out/NAME ...] [--setting value ...]"
    options, words = command_line(Options, argv, usage, words=None)
    # files among the words, our pictures in out/*, hold no run
    tops = [os.path.normpath(word) for word in words or ["out"]]
    runs = runs_in(tops)
    missing = [top for top in tops if not os.path.exists(top)]
    if missing or not runs:
        first = f"train one first: `{command('train.py', ROOT / 'config/demo.py')}`"
        where, fix = " ".join(missing or tops), "name the folders of runs" if words else first
        raise UserError(f"there is no run to show in {where}; {fix}")
    texts = by_text(runs)
    text = markdown(texts)
    print(text)

    # files beside the runs; those of some runs are named so, since the others are of all
    of_all = len(tops) == 1 and not os.path.exists(f"{tops[0]}/run.json")
    home, end = (tops[0], "") if of_all else (os.path.normpath(f"{tops[0]}/.."), "-selected")
    sweeps = sorted({os.path.dirname(saved.folder) for saved in runs if saved.sweep})
    written = [f"report{end}.png"]
    notebook.write_picture(f"{home}/{written[0]}", draw(texts))
    if options.notebook or sweeps == tops == [home]:
        written.append(f"notebook{end}.md")
        write_pages(f"{home}/{written[1]}", runs, sweeps, f"{text}\n\n![all runs]({written[0]})")
    print(f"written in {home}: {', '.join(written)}", file=sys.stderr)


if __name__ == "__main__":
    run(main, strict=True)
