"""The loss over a whole split, and the figures that follow from it."""

import math

import numpy as np
import torch

from lab.console import progress
from lab.notebook import perplexities


def evaluate(model, split, machine, rows):
    """The figures of a whole split, in order, every token but the first predicted once, in windows
    of the model's context without overlap: those of figures_of(), and the context, as a dict.

    rows: windows in a forward pass.
    """
    was_training, context = model.training, model.args["max_seq_len"]
    model.eval()
    predicted = len(split.tokens) - 1
    starts = range(0, predicted, context)
    rows = min(rows, len(starts))
    batches = [starts[i : i + rows] for i in range(0, len(starts), rows)]
    # over windows: nats, tokens, and their products
    sums = np.zeros(5)  # float64, which torch does not have on MPS
    with progress(len(batches), "evaluating", leave=False, disable=machine.rank > 0) as bar:
        for batch in batches[machine.rank :: machine.world]:
            # all forward passes have one shape: short windows and short batches are padded
            chunk = np.zeros((rows, context + 1), dtype=np.int64)
            lengths = [min(context, predicted - start) for start in batch]
            for row, start, n in zip(chunk, batch, lengths, strict=False):
                row[: n + 1] = split.tokens[start : start + n + 1]
            chunk = torch.from_numpy(chunk).to(machine.device)
            with machine.autocast():
                losses = model.token_losses(chunk[:, :-1], chunk[:, 1:]).cpu().numpy()
            for row, n in zip(losses, lengths, strict=False):
                nats = row[:n].sum(dtype=float)
                sums += [nats, n, nats**2, nats * n, n**2]
            bar.update(machine.world)
    model.train(was_training)
    sums = machine.reduce(*sums.tolist())
    return figures_of(sums, len(starts), split) | dict(context=context)


def figures_of(sums, k, split):
    """The figures of k windows: loss (nats per token; nan or inf if the model gives that), its
    standard error (over windows, whose tokens are not independent), perplexities (per word: of
    prose alone), bits per byte, and counts. sums: over windows, of their nats, of their tokens n,
    and of nats * nats, nats * n and n * n."""
    nats, n, squares, products, lengths = sums
    loss = nats / n
    is_prose = split.bytes < 8 * split.words  # a word has 6 in English, 7 in German, 9 in most code
    # the sum of (nats - loss * tokens) ** 2 over windows, which rounding may make negative; max()
    # keeps a nan, since it stands first
    spread = max(squares - 2 * loss * products + loss * loss * lengths, 0.0)
    return {
        "loss": loss,
        "stderr": math.sqrt(spread * k / (k - 1)) / n if k > 1 else None,
        "ppl": math.exp(min(loss, 700)),
        "ppl_word": math.exp(min(nats / split.words, 700)) if is_prose else None,
        "bits_per_byte": nats / split.bytes / math.log(2),
        "tokens": int(n),
        "words": split.words,
        "bytes": split.bytes,
    }


def figures_text(split, figures, separator):
    """Figures as the two lines that a user reads, with the text that they are over."""
    error = f" ± {figures['stderr']:.4f}" if figures["stderr"] is not None else ""
    return (
        f"{split:11} loss {figures['loss']:.4f}{error} nats per token, "
        f"{perplexities(figures)}\n{'':11} over {figures['tokens']:,} tokens, "
        f"{figures['words']:,} words, {figures['bytes']:,} bytes; context {figures['context']}, "
        f"separator {separator}"
    )
