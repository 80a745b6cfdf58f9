"""Draw docs/runs.png and docs/vocabularies.png: `python -m docs.experiments.draw`.

The one shows the runs at real size, out of the folders that collect.py has put beside this file.
The other shows what vocabularies of several sizes give in equal time, out of vocabularies.jsonl.
"""

import json
import math
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from lab.notebook import SavedRun

HERE = Path(__file__).parent
CONFIGS = {  # config: (label, colour, line)
    "exp1": ("experiment 1", "C2", "--"),
    "exp2": ("experiment 2", "C2", "--"),
    "exp6_tiny": ("experiment 6 tiny", "C2", "-"),
    "exp3": ("experiment 3", "C0", "--"),
    "exp6_small": ("experiment 6 small", "C0", "-"),
    "exp4": ("experiment 4", "C1", "--"),
    "exp5": ("experiment 5", "C3", "--"),
    "exp6": ("experiment 6", "C3", "-"),
}
RECORDED = {  # label: perplexity
    "experiment 3 after 10 epochs": 65.71,
    "experiment 4 after 9 epochs": 46.33,
}
SECONDS = 80  # that each of the vocabularies trained


def draw_run(axes, run):
    """Draw a run's training losses as a line and its evaluations as dots."""
    label, colour, line = CONFIGS[run.metadata["name"]]
    training = [(x["tokens"], x["train_loss"]) for x in run.training if x["train_loss"]]
    evaluations = [(x["tokens"], x["val_loss"]) for x in run.evaluations]
    last = run.evaluations[-1]
    epochs = f" after {last['epoch']:.0f} epochs" * (last["epoch"] > 1.5)
    label = f"{label}{epochs}: {last['val_ppl']:,.1f}"
    axes.plot(*zip(*training, strict=True), line, color=colour, label=label)
    axes.plot(*zip(*evaluations, strict=True), "o", color=colour, markersize=4)


def draw_recorded(axes):
    """Draw the notebook's results as lines."""
    across = axes.get_yaxis_transform()  # x from 0 to 1 over the picture's width, y a loss
    for label, perplexity in RECORDED.items():
        loss = math.log(perplexity)
        axes.axhline(loss, color="gray", linestyle=":", linewidth=1)
        text = f"the notebook's {label}: {perplexity}"
        axes.text(0.008, loss + 0.03, text, color="gray", fontsize=8, transform=across)


def draw_runs(folders, path):
    """Draw the runs in folders that collect.py has made."""
    runs = [SavedRun(folder) for folder in folders]
    # a loss per token of another tokenizer, experiment 7's, does not compare
    runs = [run for run in runs if run.metadata["name"] in CONFIGS]
    picture = Figure(figsize=(8, 4.6), layout="constrained")
    axes = picture.subplots()
    for run in sorted(runs, key=lambda run: -run.evaluations[-1]["val_loss"]):
        draw_run(axes, run)
    draw_recorded(axes)
    axes.legend(fontsize=9, title="perplexity at the end", title_fontsize=9)
    title = "lines: training; dots: all of WikiText's validation text, with its perplexity"
    axes.set_title(title, fontsize=9)
    about = "training tokens of English Wikipedia articles, not WikiText-103's own training text"
    axes.set(xlabel=about, ylabel="loss, nats per token", xscale="log")
    tokens = [run.evaluations[-1]["tokens"] for run in runs]
    axes.set_xlim(min(tokens) / 50, max(tokens) * 1.5)
    axes.set_ylim(top=7.2)  # all begin at 10.8
    picture.savefig(path, dpi=110)


def draw_vocabularies(file, path):
    """Draw the runs of docs/data.md: each line of the file is a vocabulary, with the training of
    its best rate, [[step, bits per byte]], and the validation of three seeds, bits per byte."""
    vocabularies = [json.loads(line) for line in file.read_text().splitlines()]
    picture = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = picture.subplots(1, 2)
    for number, row in enumerate(vocabularies):
        tokens, values, colour = row["tokens"], row["validation"], f"C{number}"
        steps, bits = zip(*row["training"], strict=True)
        seconds = [SECONDS * step / row["steps"] for step in steps]
        label = f"{tokens:,}{' (GPT-2)' * (tokens == 50257)}"
        left.plot(seconds, bits, color=colour, linewidth=1, label=label)
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        right.errorbar(tokens, mean, deviation, fmt="o", color=colour, capsize=3)
        place = dict(xytext=(0, 8), textcoords="offset points", ha="center")
        right.annotate(f"{mean:.3f}", (tokens, mean), fontsize=8, **place)
    left.set(xlabel="seconds on one core", ylabel="bits per byte", ylim=(1.9, 4.2))
    left.set_title("training", fontsize=9)
    left.legend(fontsize=8, title="tokens in the vocabulary", title_fontsize=8)
    sizes = [row["tokens"] for row in vocabularies]
    right.set(xscale="log", xlabel="tokens in the vocabulary", ylim=(1.97, 2.55))
    right.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    right.minorticks_off()
    right.margins(x=0.1)
    right.set_title("WikiText's validation, three seeds, after 80 s", fontsize=9)
    picture.savefig(path, dpi=110)


def main():
    folders = sorted(file.parent for file in HERE.glob("*/final.json"))
    draw_runs(folders, HERE.parent / "runs.png")
    draw_vocabularies(HERE / "vocabularies.jsonl", HERE.parent / "vocabularies.png")


if __name__ == "__main__":
    main()
