"""What of a run is kept in docs/: a folder a run, small enough for the repository.

    python -m docs.experiments.collect out/gpu/long/NAME ... [--to FOLDER]

FOLDER/NAME holds run.json, final.json, notebook.md, curve.png, and metrics.jsonl with all
evaluations and at most 200 lines of training, each the mean over the lines that it stands for.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from lab.console import UserError, run
from lab.folder import read_lines, write_text
from lab.settings import command_line, setting

LINES = 200
MEANS = ("train_loss", "lr", "grad_norm", "tokens_per_s")
COPIED = ("run.json", "final.json", "notebook.md", "curve.png")


@dataclass
class Options:
    """Where the runs go."""

    to: str = setting("docs/experiments", "the folder of the runs' folders", path=True)


def mean_line(lines):
    """One line of training for several in a row: their last one's place, their means."""
    line = dict(lines[-1])
    for key in MEANS:
        values = [one[key] for one in lines if one[key] is not None]
        line[key] = sum(values) / len(values) if values else None
    return line


def thin(lines):
    """The lines of a metrics.jsonl with at most LINES of training."""
    training = [line for line in lines if "lr" in line]
    evaluations = [line for line in lines if "val_loss" in line]
    size = max(1, math.ceil(len(training) / LINES))
    parts = [training[start : start + size] for start in range(0, len(training), size)]
    return sorted([*map(mean_line, parts), *evaluations], key=lambda line: line["step"])


def collect(folder, to):
    """Copy what is kept of the run in `folder` into to/NAME. Raises UserError."""
    lines = thin(read_lines(folder / "metrics.jsonl"))
    if not lines:
        raise UserError(f"there is no run in {folder}, or it has not begun")
    target = to / folder.name
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    for name in COPIED:
        if (folder / name).exists():  # not all are there before a run's end
            shutil.copyfile(folder / name, target / name)
    print(f"{target}: {len(lines)} lines of metrics.jsonl")


def main(argv=None):
    usage = "python -m docs.experiments.collect out/gpu/long/NAME ... [--to FOLDER]"
    options, folders = command_line(Options, argv, usage, words=None)
    if not folders:
        raise UserError(f"no run given: {usage}")
    for folder in folders:
        collect(Path(folder), Path(options.to))


if __name__ == "__main__":
    run(main)
