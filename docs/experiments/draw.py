"""Draw docs/first-look.png from first-look.jsonl: `python docs/experiments/draw.py`."""

import json
import math
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
RUNS = {  # config: (label, colour, line)
    "exp3": ("experiment 3, 7.3 M", "C0", "--"),
    "exp6_small": ("experiment 6 small, 7.3 M", "C0", "-"),
    "exp5": ("experiment 5, 19.4 M", "C3", "--"),
    "exp6": ("experiment 6, 19.3 M", "C3", "-"),
}
RECORDED = {"experiment 3 after 10 epochs": 65.71, "experiment 4 after 9 epochs": 46.33}


def main():
    lines = [json.loads(line) for line in open(HERE / "first-look.jsonl", encoding="utf-8")]
    picture = Figure(figsize=(8, 4.2), layout="constrained")
    axes = picture.subplots()
    for config, (label, colour, style) in RUNS.items():
        mine = [line for line in lines if line["config"] == config]
        curve = [(x["tokens"] / 1e6, x["train_loss"]) for x in mine if "train_loss" in x]
        (end,) = (x for x in mine if "val_loss" in x)
        axes.plot(*zip(*curve, strict=True), style, color=colour, label=label)
        at = end["tokens"] / 1e6, end["val_loss"]
        axes.plot(*at, "o", color=colour)
        axes.annotate(
            f"{end['val_ppl']:.1f} in {end['seconds']:.0f} s",
            at,
            xytext=(7, -3),
            textcoords="offset points",
            color=colour,
        )
    for label, perplexity in RECORDED.items():
        loss = math.log(perplexity)
        axes.axhline(loss, color="gray", linestyle=":", linewidth=1)
        text = f"the notebook's {label}: {perplexity}"
        axes.text(1, loss + 0.03, text, color="gray", fontsize=8)
    axes.set(
        xlabel="training tokens, millions",
        ylabel="loss, nats a token",
        xlim=(0, 122),
        ylim=(3.6, 7.6),
        title="lines: training; dots: all of WikiText's validation text, with its perplexity",
    )
    axes.title.set_fontsize(9)
    axes.legend(loc="upper right", fontsize=8)
    picture.savefig(HERE.parent / "first-look.png", dpi=110)


if __name__ == "__main__":
    main()
