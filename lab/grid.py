"""A sweep's folder: its runs, those that differ by seed alone put together, and what they say.
Needs no torch."""

import math
import re
import statistics

from lab.folder import read_bytes, read_json
from lab.notebook import SavedRun, figure, table

# Student's t, two-sided at 95 %, for 1, 2, ... degrees of freedom; the last stands for all above
STUDENT = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23


class Trial:
    """One run of a sweep, as its folder tells it."""

    def __init__(self, folder, settings, steps=None):
        """settings: those that vary, {name: value}. steps: as many as the sweep asks for; None in a
        sweep.json that does not say."""
        self.folder, self.settings, self.steps = folder, settings, steps
        self.look()

    def look(self):
        """Read the folder anew: the steps done, the state, and the loss once it is finished."""
        run = SavedRun(self.folder)
        self.done = max((line["step"] for line in run.training + run.evaluations), default=0)
        planned = run.metadata.get("steps", 0)
        asked = self.steps or planned
        self.val_text = run.metadata.get("data", {}).get("splits", {}).get("val", {}).get("sha256")
        self.loss = None
        if self.done > asked:
            self.state = f"has {self.done:,} steps, the sweep asks for {asked:,}"
        # one that ended before its own plan did so by patience or max_hours
        elif run.final and run.evaluations and (self.done == asked or self.done < planned):
            self.state, self.loss = "finished", run.best()["val_loss"]
        elif error := last_error(self.folder):
            self.state = f"failed: {error}"
        else:
            self.state = f"not finished, step {self.done:,}" if self.done else "not begun"


def last_error(folder):
    """What ended a run the last time that the sweep started it, as its log says; "" if nothing."""
    _, _, last = read_bytes(f"{folder}/log.txt").decode(errors="replace").rpartition("\n$ ")
    errors = re.findall("(?m)^error: (.*?)(?:; |$)", last)
    return errors[-1] if errors else ""


def is_sweep(folder):
    """Whether sweep.py wrote there."""
    return bool(read_json(f"{folder}/sweep.json").get("runs"))


def read_trials(folder):
    """The Trials of a sweep's folder."""
    sweep = read_json(f"{folder}/sweep.json")
    steps = sweep.get("steps", {})
    return [Trial(f"{folder}/{name}", s, steps.get(name)) for name, s in sweep["runs"].items()]


def label(settings, *without):
    """Settings, but for some, as one word: learning_rate=0.004,seed=0."""
    return ",".join(f"{name}={value}" for name, value in settings.items() if name not in without)


def groups_of(trials):
    """[(settings without the seed, {seed: loss})] of the finished runs, lowest mean loss first."""
    groups = {}
    for trial in trials:
        if trial.loss is not None:
            settings = dict(trial.settings)
            seed = settings.pop("seed", None)
            _, losses = groups.setdefault(label(settings), (settings, {}))
            losses[seed] = trial.loss
    return sorted(groups.values(), key=lambda group: statistics.mean(group[1].values()))


def compare(trials):
    """Whether the losses compare: the finished runs were measured on one validation text."""
    return len({trial.val_text for trial in trials if trial.loss is not None}) < 2


def spread(losses):
    """The standard deviation; None for a single loss."""
    return statistics.stdev(losses) if len(losses) > 1 else None


def difference(losses, best):
    """(how far a group's mean loss is above the best's, the standard error of that, whether it may
    be chance, at 95 %), from their {seed: loss}. It is taken seed by seed; where they share fewer
    than two seeds the error is None."""
    pairs = [losses[seed] - best[seed] for seed in losses if seed in best]
    if len(pairs) < 2:
        return statistics.mean(losses.values()) - statistics.mean(best.values()), None, False
    apart, error = statistics.mean(pairs), spread(pairs) / math.sqrt(len(pairs))
    student = STUDENT[min(len(pairs) - 1, len(STUDENT)) - 1]
    return apart, error, abs(apart) <= student * error


def text(trials):
    """A sweep as Markdown: a row for each group, one for each run that does not count, and what
    they say."""
    groups, rows, names = groups_of(trials), [], list(trials[0].settings)
    for settings, losses in groups:
        seeds = ", ".join(map(str, losses))
        cells = [settings.get(name, seeds) for name in names]
        loss = with_error(statistics.mean(losses.values()), spread(losses.values()))
        apart, error, _ = difference(losses, groups[0][1])
        apart = "best" if losses is groups[0][1] else with_error(apart, error, "+")
        rows.append([*cells, loss, apart if compare(trials) else "-", f"{len(losses)} finished"])
    rows += [[*t.settings.values(), "-", "-", t.state] for t in trials if t.loss is None]
    shown = table([*names, "val loss", "to the best", "runs"], rows)
    return "\n\n".join([shown, *sentences(trials, groups)])


def with_error(value, error, sign=""):
    """A figure and how sure it is: 4.1853 ± 0.0021."""
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")


def sentences(trials, groups):
    """What to know before one believes the table."""
    if not groups:
        return ["No run is finished yet."]
    if not compare(trials):
        return ["The validation texts differ, and losses compare on one text only."]
    said, (best, lowest) = [], groups[0]
    for name, value in best.items():
        values = {trial.settings[name] for trial in trials}
        if is_scale(values) and value in (min(values), max(values)):
            said.append(
                f"The best {name}, {value}, lies at the edge of what was tried, {min(values)} to "
                f"{max(values)}: a better one may lie beyond."
            )
    if near := [label(s) for s, losses in groups[1:] if difference(losses, lowest)[2]]:
        said.append(
            "Within the spread of the seeds (Student's t, 95 %), so not to be told from the best: "
            f"{'; '.join(near)}."
        )
    if any(len(losses) < 2 for _, losses in groups):
        said.append("One run alone does not show how far seeds spread; give --seed 0,1,2.")
    return said


def is_scale(values):
    """Whether values are several numbers."""
    return len(values) > 1 and all(type(value) in (int, float) for value in values)


def draw(trials):
    """A figure of the mean losses, with their standard deviations, against each numeric setting: a
    curve for each combination of the others. None while there is nothing to compare."""
    groups = groups_of(trials)
    names = [name for name in trials[0].settings if name != "seed"]
    names = [name for name in names if is_scale({settings[name] for settings, _ in groups})]
    if not names or not compare(trials):
        return None
    picture, axes = figure(len(names))
    for ax, name in zip(axes, names, strict=True):
        # {the other settings: [(value, mean, deviation)]}, in the order of the runs
        runs = [trial.settings for trial in trials if trial.loss is not None]
        curves = {label(settings, name, "seed"): [] for settings in runs}
        for settings, losses in groups:
            mean, deviation = statistics.mean(losses.values()), spread(losses.values())
            point = settings[name], mean, deviation or math.nan  # nan: no bar
            curves[label(settings, name)].append(point)
        for others, curve in curves.items():
            line = dict(fmt="o-", markersize=4, capsize=3, label=others)
            ax.errorbar(*zip(*sorted(curve), strict=True), **line)
        ticks = sorted({settings[name] for settings, _ in groups})
        ax.set_xscale("log" if 0 < 4 * ticks[0] <= ticks[-1] else "linear")
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
        ax.set_xlabel(name)
        if len(curves) > 1:
            ax.legend(fontsize=8)
    axes[0].set_ylabel("validation loss, nats per token")
    return picture
