"""A sweep's folder: its runs, those that differ by seed alone put together, what they say, and the
sweep's entry in the notebook. Needs no torch."""

import math
import os
import re
import statistics
from urllib.parse import quote

from lab.folder import read_bytes, read_json, write_whole
from lab.notebook import SavedRun, figure, invite, table, write_page, written

# Student's t, two-sided at 95 %, for 1, 2, ... degrees of freedom; the last stands for all above
STUDENT = 12.71, 4.30, 3.18, 2.78, 2.57
SURE = (
    "± is the standard deviation over seeds, and of a difference the standard error, seed by seed. "
    "What may be chance is less than 95 % sure by Student's t: more seeds would tell."
)
UNITS = dict(val_loss="loss, nats per token", val_bits_per_byte="bits per byte")
PER_BYTE = (
    "The tokenizers differ, so that losses and perplexities per token do not compare: the order is "
    "by bits per byte."
)


class Trial:
    """One run of a sweep, as its folder tells it: how far it is, and its best evaluation within the
    steps that the sweep asks for, None unless it counts."""

    def __init__(self, folder, settings, steps=0):
        """settings: those that vary, {name: value}. steps: as many as the sweep asks for; 0: as the
        run itself says."""
        self.folder, self.settings, self.steps = folder, settings, steps
        run = SavedRun(folder)
        planned = run.metadata.get("steps", 0)
        asked = steps or planned
        evaluations = [line for line in run.evaluations if line["step"] <= asked]
        self.text = text_of(run) if run.is_ours else {}
        self.done = max((line["step"] for line in run.training + run.evaluations), default=0)
        self.is_longer = self.done > asked
        if self.is_longer:
            self.state = f"has {self.done:,} steps, the sweep asks for {asked:,}"
            counts = any(line["step"] == asked for line in evaluations)
        else:
            # one that ended before its own plan did so by patience or max_hours
            counts = run.final and (self.done == asked or self.done < planned)
            self.state = "finished" if counts else unfinished(folder, self.done)
        counts = counts and run.is_ours
        self.best = min(evaluations, key=lambda line: line["val_loss"]) if counts else None


def unfinished(folder, done):
    """The state of a run that is not finished: what ended it the last time that the sweep started
    it, as its log says, or how far it is."""
    _, _, last = read_bytes(f"{folder}/log.txt").decode(errors="replace").rpartition("\n$ ")
    if errors := re.findall("(?m)^error: (.*?)(?:; |$)", last):
        return f"failed: {errors[-1]}"
    return f"not finished, step {done:,}" if done else "not begun"


def is_sweep(folder):
    """Whether sweep.py wrote there."""
    return bool(read_json(f"{folder}/sweep.json").get("runs"))


def read_trials(folder):
    """The Trials of a sweep's folder."""
    sweep = read_json(f"{folder}/sweep.json")
    steps = sweep.get("steps", {})
    return [Trial(f"{folder}/{name}", s, steps.get(name, 0)) for name, s in sweep["runs"].items()]


def label(settings, *without):
    """Settings, but for some, as one word: learning_rate=0.004,seed=0."""
    return ",".join(f"{name}={value}" for name, value in settings.items() if name not in without)


# --- what compares


def text_of(run):
    """What is known of a SavedRun's validation text, and its tokenizer."""
    data = run.metadata["data"]
    names = "sha256", "tokens", "words", "bytes"
    return {name: data["splits"]["val"][name] for name in names} | dict(tokenizer=data["tokenizer"])


def is_same_text(one, two):
    """Whether what text_of() says of two runs is one text. Another tokenizer makes another file of
    it, with as many words and bytes."""
    names = ["sha256"] if one["tokenizer"] == two["tokenizer"] else ["words", "bytes"]
    return all(one[name] == two[name] for name in names)


def measure_of(tokenizers):
    """The figure by which runs with these tokenizers compare."""
    return "val_loss" if len(set(tokenizers)) < 2 else "val_bits_per_byte"


def groups_of(trials):
    """([(settings without the seed, {seed: figure})] of the runs that count, lowest mean first, the
    figure's name, whether they have one validation text)."""
    counted = [trial for trial in trials if trial.best]
    measure = measure_of(trial.text["tokenizer"] for trial in counted)
    one_text = all(is_same_text(counted[0].text, trial.text) for trial in counted)
    groups = {}
    for trial in counted:
        settings = dict(trial.settings)
        seed = settings.pop("seed", None)
        _, figures = groups.setdefault(label(settings), (settings, {}))
        figures[seed] = trial.best[measure]
    groups = sorted(groups.values(), key=lambda group: statistics.mean(group[1].values()))
    return groups, measure, one_text


def mean_of(figures):
    """(the mean of a group's {seed: figure}, the standard deviation; None for a single one)."""
    figures = figures.values()
    return statistics.mean(figures), statistics.stdev(figures) if len(figures) > 1 else None


def difference(figures, best):
    """(how far a group's mean is above the best's, the standard error of that, whether it may be
    chance, at 95 %), from their {seed: figure}. It is taken seed by seed; where they share fewer
    than two seeds the error is None."""
    pairs = [figures[seed] - best[seed] for seed in figures if seed in best]
    if len(pairs) < 2:
        return mean_of(figures)[0] - mean_of(best)[0], None, False
    apart, error = statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
    student = STUDENT[min(len(pairs) - 1, len(STUDENT)) - 1]
    return apart, error, abs(apart) <= student * error


# --- what is shown


def text(trials):
    """A sweep as Markdown: a row for each group, one for each run that does not count, and what to
    know before one believes them."""
    (groups, measure, one_text), names, rows = groups_of(trials), list(trials[0].settings), []
    for settings, figures in groups:
        seeds = ", ".join(map(str, figures))
        cells = [settings.get(name, seeds) for name in names]
        apart, error, may_be_chance = difference(figures, groups[0][1])
        to_best = with_error(apart, error, "+") + (", may be chance" if may_be_chance else "")
        if not one_text or figures is groups[0][1]:
            to_best = "best" if one_text else "-"
        rows.append([*cells, with_error(*mean_of(figures)), to_best, f"{len(figures)} finished"])
    rest = [trial for trial in trials if not trial.best]
    rows += [[*trial.settings.values(), "-", "-", trial.state] for trial in rest]
    parts = [table([*names, measure.replace("_", " "), "to the best", "runs"], rows)]
    if any(len(figures) > 1 for _, figures in groups):
        parts.append(SURE)
    if not groups:
        parts.append("No run is finished yet.")
    if not one_text:
        parts.append("The validation texts differ, and runs compare on one text only.")
    if measure == "val_bits_per_byte":
        parts.append(PER_BYTE)
    for trial in trials:
        if trial.best and trial.is_longer:
            parts.append(f"{label(trial.settings)} {trial.state}, and counts as it was then.")
    return "\n\n".join(parts)


def with_error(value, error, sign=""):
    """A figure and how sure it is: 4.1853 ± 0.0021."""
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")


def draw(trials):
    """A figure of the means, with their standard deviations, against each numeric setting: a curve
    for each combination of the others. None while there is nothing to compare."""
    groups, measure, one_text = groups_of(trials)
    scales = {}  # {name: the values that it has, if they are several numbers}
    for name in trials[0].settings:
        values = {settings.get(name) for settings, _ in groups}
        if len(values) > 1 and all(type(value) in (int, float) for value in values):
            scales[name] = sorted(values)
    if not scales or not one_text:
        return None
    picture, axes = figure(len(scales))
    for ax, (name, ticks) in zip(axes, scales.items(), strict=True):
        # {the other settings: [(value, mean, deviation)]}, in the order of the runs
        curves = {label(t.settings, name, "seed"): [] for t in trials if t.best}
        for settings, figures in sorted(groups, key=lambda group: group[0][name]):
            mean, deviation = mean_of(figures)
            point = settings[name], mean, deviation or math.nan  # nan: no bar
            curves[label(settings, name)].append(point)
        for others, curve in curves.items():
            points = zip(*curve, strict=True)
            ax.errorbar(*points, fmt="o-", markersize=4, capsize=3, label=others)
        ax.set_xscale("log" if 0 < 4 * ticks[0] <= ticks[-1] else "linear")
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
        ax.set_xlabel(name)
        if len(curves) > 1:
            ax.legend(fontsize=8)
    axes[0].set_ylabel(f"validation {UNITS[measure]}")
    return picture


# --- its entry in the notebook


def write_entry(folder):
    """Write a sweep's report.png and notebook.md anew, each file whole. Returns (when its first run
    began, its SavedRun, the entry as Markdown). Raises OSError."""
    sweep, trials = read_json(f"{folder}/sweep.json"), read_trials(folder)
    began = SavedRun(trials[0].folder).metadata.get("began", "not begun")
    picture = draw(trials)
    if picture:
        write_whole(f"{folder}/report.png", lambda file: picture.savefig(file, format="png"))
    invite(folder)
    words = written(read_bytes(f"{folder}/conclusion.md"))
    links = ""
    for trial in trials:
        page = f"{quote(os.path.basename(trial.folder))}/notebook.md"
        links += f"- [{label(trial.settings)}]({page}): {trial.state}\n"
    paragraphs = [
        f"# Sweep of {', '.join(trials[0].settings)} - {began[:10]}",
        f"`{sweep['command']}`",
        text(trials),
        picture and "![the runs' figures](report.png)",
        f"## Runs\n\n{links.strip()}",
        words and f"## Conclusion\n\n{words}",
    ]
    page = "\n\n".join(filter(None, paragraphs)) + "\n"
    write_page(f"{folder}/notebook.md", page)
    return began, SavedRun(folder), page
