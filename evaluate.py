"""How well a model predicts a split: sums of nats over counts, over all ranks, with what they are counted over."""

import math

import numpy as np
import torch

from prepare import progress


def spans(predicted, context, stride):
    """Windows (start, end, first): inputs start to end, of which those from first on count. Every one of the first
    `predicted` positions counts once, with at least context - stride before it where there are so many."""
    found, start, first = [], 0, 0
    while first < predicted:
        end = min(start + context, predicted)
        found.append((start, end, first))
        start, first = start + stride, end
    return found


def evaluate(model, tokens, counts, context, machine, rows, stride=0, stopped=lambda: False):
    """The loss over a whole split, in order, every token but the first predicted once.

    tokens (n,) uint16; counts: the split's entry of meta.json; rows: windows a forward pass; stride: how far windows of
    `context` move (0: by their length, without overlap). Returns a dict, None if stopped() on any rank: loss (nats a
    token), its standard error `stderr` (over windows, since a window's tokens are not independent), ppl, ppl_word,
    bits_per_byte, and tokens, words, bytes, context and stride that they are over.
    """
    was_training = model.training
    model.eval()
    stride = stride or context
    windows = spans(len(tokens) - 1, context, stride)
    batches = [windows[i : i + rows] for i in range(0, len(windows), rows)]
    sums, ended = torch.zeros(5, dtype=torch.float64), 0  # over windows: nats, tokens, and their products
    with progress(len(batches), "evaluating", leave=False, disable=machine.rank > 0) as bar, machine.autocast():
        for batch in batches[machine.rank :: machine.world]:
            if stopped():
                ended = 1
                break
            chunk = np.zeros((len(batch), context + 1), dtype=np.int64)  # short windows are filled up, then cut again
            for row, (start, end, _) in zip(chunk, batch, strict=True):
                row[: end - start + 1] = tokens[start : end + 1]
            chunk = torch.from_numpy(chunk).to(machine.device)
            losses = model.token_losses(chunk[:, :-1], chunk[:, 1:]).cpu().double()
            for row, (start, end, first) in zip(losses, batch, strict=True):
                nats, n = row[first - start : end - start].sum().item(), end - first
                sums += torch.tensor([nats, n, nats * nats, nats * n, n * n], dtype=torch.float64)
            bar.update(machine.world)
    model.train(was_training)
    nats, n, squares, products, lengths, ended = machine.total(*sums.tolist(), ended)
    if ended:
        return None
    loss, k = nats / n, len(windows)
    spread = max(0.0, squares - 2 * loss * products + loss * loss * lengths)  # of windows around loss * their length
    return {
        "loss": loss,
        "stderr": math.sqrt(spread * k / (k - 1)) / n if k > 1 else None,
        "ppl": math.exp(min(loss, 700)),
        "ppl_word": math.exp(min(nats / counts["words"], 700)),
        "bits_per_byte": nats / counts["bytes"] / math.log(2),
        "tokens": int(n), "words": counts["words"], "bytes": counts["bytes"], "context": context, "stride": stride,
    }


def describe(split, figures, separator):
    """Figures as the two lines that a user reads, with what they are counted over."""
    error = f" ± {figures['stderr']:.4f}" if figures["stderr"] is not None else ""
    return (
        f"{split:11} loss {figures['loss']:.4f}{error} a token, perplexity {figures['ppl']:,.2f} a token, "
        f"{figures['ppl_word']:,.2f} a word, {figures['bits_per_byte']:.4f} bits a byte\n{'':11} over "
        f"{figures['tokens']:,} tokens, {figures['words']:,} words, {figures['bytes']:,} bytes; context "
        f"{figures['context']}, stride {figures['stride']}, separator {separator}"
    )
