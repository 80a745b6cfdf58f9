"""A sweep's folder: its runs, those that differ by seed alone put together, and what they say.
Needs no torch."""

import hashlib
import math
import statistics
from pathlib import Path
from urllib.parse import quote

from lab.folder import read_json
from lab.notebook import Record, figure, table

# Student's t, two-sided at 95 %, for 1, 2, ... degrees of freedom; the last stands for all above
STUDENT = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23


class Trial:
    """One run of a sweep, as its folder tells it."""

    def __init__(self, folder, settings, steps, config=None):
        """settings: those that vary, {name: value}. steps: as many as the sweep asks for, None
        where it does not say. config: the run's Config, for who starts it."""
        self.folder, self.settings, self.steps, self.config = folder, settings, steps, config
        self.look()

    def look(self, exit_code=None):
        """Read the folder anew: the steps done, the state, and the loss once it is finished.
        exit_code: of the run's process, which has ended."""
        self.record = Record(self.folder)
        lines = self.record.training + self.record.evaluations
        self.done = max((line["step"] for line in lines), default=0)
        self.loss = None
        self.state = f"not finished, step {self.done:,}" if self.done else "not begun"
        if self.record.final and self.record.evaluations:
            planned = self.record.metadata.get("steps")
            if self.steps in (None, planned):
                self.state, self.loss = "finished", self.record.best()["val_loss"]
            else:
                self.state = f"has {planned:,} steps, the sweep asks for {self.steps:,}"
        elif error := last_error(self.folder):
            self.state = f"failed: {error}"
        elif exit_code:
            self.state = f"failed: exit code {exit_code}"

    def is_over(self):
        """Whether there is nothing to run: it is finished, or has taken more steps."""
        return self.loss is not None or (bool(self.record.final) and self.done > self.steps)


def last_error(folder):
    """What ended a run the last time that the sweep started it, as its log says; "" if nothing."""
    log = Path(folder, "log.txt")
    last = log.read_text(errors="replace").rpartition("\n$ ")[2] if log.exists() else ""
    errors = [line for line in last.splitlines() if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ").partition("; ")[0] if errors else ""


def is_sweep(folder):
    """Whether sweep.py wrote there."""
    return bool(read_json(f"{folder}/sweep.json").get("runs"))


def read_trials(folder):
    """The Trials of a sweep's folder."""
    sweep = read_json(f"{folder}/sweep.json")
    steps = sweep.get("steps", {})
    return [Trial(f"{folder}/{name}", s, steps.get(name)) for name, s in sweep["runs"].items()]


def folder_name(settings):
    """The name of a run's folder: what varies, cut where a file system takes no longer one."""
    name = quote(label(settings), safe="=,+")
    return (
        name if len(name) <= 200 else f"{name[:180]}-{hashlib.sha1(name.encode()).hexdigest()[:8]}"
    )


# --- runs that differ by seed alone


def label(settings):
    """Settings as a run's folder and the sentences name them: learning_rate=0.004,seed=0."""
    return ",".join(f"{name}={value}" for name, value in settings.items())


def without(settings, *names):
    """Settings without some of them."""
    return {name: value for name, value in settings.items() if name not in names}


def groups_of(trials):
    """[(settings without the seed, {seed: loss})] of the finished runs, lowest mean loss first."""
    groups = {}
    for trial in trials:
        if trial.loss is not None:
            settings = without(trial.settings, "seed")
            _, losses = groups.setdefault(label(settings), (settings, {}))
            losses[trial.settings.get("seed")] = trial.loss
    return sorted(groups.values(), key=lambda group: statistics.mean(group[1].values()))


def spread(losses):
    """The standard deviation; None of one."""
    return statistics.stdev(losses) if len(losses) > 1 else None


def difference(losses, best):
    """(how far a group's losses are above the best's, the standard error of that, its degrees of
    freedom), from their {seed: loss}. Seed by seed where they share two or more; None for an error
    that too few runs leave unknown."""
    each = [losses[seed] - best[seed] for seed in losses if seed in best]
    if len(each) > 1:
        return statistics.mean(each), spread(each) / math.sqrt(len(each)), len(each) - 1
    both = [list(one.values()) for one in (losses, best)]
    apart, fewest = statistics.mean(both[0]) - statistics.mean(both[1]), min(map(len, both))
    if fewest < 2:
        return apart, None, 0
    return apart, math.hypot(*(spread(one) / math.sqrt(len(one)) for one in both)), fewest - 1


def is_within_spread(apart, error, degrees):
    """Whether a difference may be chance, at 95 %."""
    return error is not None and abs(apart) <= STUDENT[min(degrees, len(STUDENT)) - 1] * error


# --- what they say


def text(trials):
    """A sweep as Markdown: a row a group, one a run that is not finished, and what they say."""
    groups, rows, names = groups_of(trials), [], list(trials[0].settings)
    for settings, losses in groups:
        seeds = ", ".join(map(str, losses))
        cells = [settings.get(name, seeds) for name in names]
        loss = with_error(statistics.mean(losses.values()), spread(losses.values()))
        best = groups[0][1]
        apart = "best" if losses is best else with_error(*difference(losses, best)[:2], "+")
        rows.append([*cells, loss, apart, f"{len(losses)} finished"])
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
    said, (best, lowest) = [], groups[0]
    tried = [t.settings for t in trials if t.loss is not None or t.state.startswith("failed")]
    for name, value in best.items():
        values = {settings[name] for settings in tried}
        if is_scale(values) and value in (min(values), max(values)):
            said.append(
                f"The best {name}, {value}, lies at the edge of what was tried, {min(values)} to "
                f"{max(values)}: a better one may lie beyond."
            )
    near = [label(s) for s, losses in groups[1:] if is_within_spread(*difference(losses, lowest))]
    if near:
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


# --- the picture


def draw(trials):
    """A figure of the loss against each numeric setting (against the seed if there is no other), a
    curve for each combination of the others. None while there is nothing to draw."""
    finished = [trial for trial in trials if trial.loss is not None]
    numeric = [k for k in trials[0].settings if is_scale({t.settings[k] for t in finished})]
    names = [name for name in numeric if name != "seed"] or numeric
    if not names:
        return None
    picture, axes = figure(len(names))
    for ax, name in zip(axes, names, strict=True):
        draw_setting(ax, name, finished)
    axes[0].set_ylabel("validation loss, nats a token")
    return picture


def draw_setting(ax, name, finished):
    """Draw the loss over one setting: means over seeds, with their standard deviations."""
    curves = {}  # {the other settings: {value: losses}}
    for trial in finished:
        curve = curves.setdefault(label(without(trial.settings, name, "seed")), {})
        curve.setdefault(trial.settings[name], []).append(trial.loss)
    for others, curve in curves.items():
        xs = sorted(curve)
        means = [statistics.mean(curve[x]) for x in xs]
        spreads = [spread(curve[x]) or 0 for x in xs]
        ax.errorbar(xs, means, spreads, fmt="o-", markersize=4, capsize=3, label=others)
    ticks = sorted({trial.settings[name] for trial in finished})
    ax.set_xscale("log" if 0 < 4 * ticks[0] <= ticks[-1] else "linear")
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
    ax.minorticks_off()
    ax.set_xlabel(name)
    if len(curves) > 1:
        ax.legend(fontsize=8)
