"""Draw the runs at real size: `python -m docs.experiments.draw`.

docs/first-look.png is made from first-look.jsonl, and docs/runs.png from the folders that
collect.py has put beside this file, once there are any.
"""

import json
import math
from pathlib import Path

from matplotlib.figure import Figure

from lab.notebook import Run

HERE = Path(__file__).parent
CONFIGS = {  # config: (label, colour, line)
    "exp1": ("experiment 1, 0.9 M", "C2", "--"),
    "exp2": ("experiment 2, 0.9 M", "C2", "--"),
    "exp6_tiny": ("experiment 6 tiny, 0.9 M", "C2", "-"),
    "exp3": ("experiment 3, 7.3 M", "C0", "--"),
    "exp6_small": ("experiment 6 small, 7.3 M", "C0", "-"),
    "exp4": ("experiment 4, 16.2 M", "C1", "--"),
    "exp5": ("experiment 5, 19.4 M", "C3", "--"),
    "exp6": ("experiment 6, 19.3 M", "C3", "-"),
}
RECORDED = {
    "experiment 1 (WikiText-2) after 209 epochs": 464.64,
    "experiment 2 after 10 epochs": 364.71,
    "experiment 3 after 10 epochs": 65.71,
    "experiment 4 after 9 epochs": 46.33,
}


def new_picture(xlabel):
    """(a figure, its axes)."""
    picture = Figure(figsize=(8, 4.2), layout="constrained")
    axes = picture.subplots()
    title = "lines: training; dots: all of WikiText's validation text, with its perplexity"
    axes.set_title(title, fontsize=9)
    axes.set(xlabel=xlabel, ylabel="loss, nats a token")
    return picture, axes


def draw_run(axes, style, training, evaluations, text):
    """Draw a run. style: (label, colour, line). training, evaluations: [(tokens, loss)]. text:
    what stands beside the last evaluation."""
    label, colour, line = style
    axes.plot([x for x, _ in training], [y for _, y in training], line, color=colour, label=label)
    axes.plot([x for x, _ in evaluations], [y for _, y in evaluations], "o", color=colour)
    place = dict(xytext=(7, -3), textcoords="offset points")
    axes.annotate(text, evaluations[-1], color=colour, **place)


def draw_recorded(axes, label):
    """Draw a result of the notebook's as a line."""
    loss = math.log(RECORDED[label])
    axes.axhline(loss, color="gray", linestyle=":", linewidth=1)
    text = f"the notebook's {label}: {RECORDED[label]}"
    across = axes.get_yaxis_transform()  # x from 0 to 1 over the picture's width, y a loss
    axes.text(0.008, loss + 0.03, text, color="gray", fontsize=8, transform=across)


def draw_first_look(path):
    """Draw the runs of first-look.jsonl."""
    lines = [json.loads(line) for line in open(HERE / "first-look.jsonl", encoding="utf-8")]
    picture, axes = new_picture("training tokens, millions")
    for config in ("exp3", "exp6_small", "exp5", "exp6"):
        mine = [line for line in lines if line["config"] == config]
        training = [(x["tokens"] / 1e6, x["train_loss"]) for x in mine if "train_loss" in x]
        (end,) = (x for x in mine if "val_loss" in x)
        evaluations = [(end["tokens"] / 1e6, end["val_loss"])]
        text = f"{end['val_ppl']:.1f} in {end['seconds']:.0f} s"
        draw_run(axes, CONFIGS[config], training, evaluations, text)
    draw_recorded(axes, "experiment 3 after 10 epochs")
    draw_recorded(axes, "experiment 4 after 9 epochs")
    axes.set(xlim=(0, 122), ylim=(3.6, 7.6))
    axes.legend(loc="upper right", fontsize=8)
    picture.savefig(path, dpi=110)


def draw_runs(folders, path):
    """Draw the runs in folders that collect.py has made."""
    picture, axes = new_picture(
        "training tokens of English Wikipedia articles, not WikiText-103's own training text"
    )
    for run in map(Run, folders):
        label, colour, line = CONFIGS[run.about["name"]]
        training = [(x["tokens"], x["train_loss"]) for x in run.training if x["train_loss"]]
        evaluations = [(x["tokens"], x["val_loss"]) for x in run.evaluations]
        # the seconds are those of the whole run, compilation and evaluations among them
        text = f"{run.evaluations[-1]['val_ppl']:,.1f} in {run.seconds():,.0f} s"
        draw_run(axes, (f"{label}: {run.name}", colour, line), training, evaluations, text)
    for label in RECORDED:
        draw_recorded(axes, label)
    axes.set(xscale="log")
    axes.margins(x=0.2)  # beside the last dots stand their texts
    axes.legend(loc="upper right", fontsize=8)
    picture.savefig(path, dpi=110)


def main():
    draw_first_look(HERE.parent / "first-look.png")
    if folders := sorted(file.parent for file in HERE.glob("*/final.json")):
        draw_runs(folders, HERE.parent / "runs.png")


if __name__ == "__main__":
    main()
