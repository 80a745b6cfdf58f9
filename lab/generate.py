"""Tokens from a model: which ones come next, and where a text ends."""

from dataclasses import dataclass

import torch


@dataclass
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8  # 0 takes the likeliest
    top_k: int = 200  # only the k likeliest, 0 for all
    top_p: float = 1.0  # only the likeliest whose probability reaches it
    repetition_penalty: float = 1.0
    seed: int = 0


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """Draw the next ids: logits (B, V) float32, uniform (B,) float64 in [0, 1) -> (B,) int64, on
    the CPU.

    temperature 0 takes the likeliest. top_k: only the k likeliest, 0 for all. top_p: only the
    smallest set of likeliest ids whose probability reaches top_p (nucleus sampling, Holtzman et al.
    2020).
    """
    if temperature == 0:
        return logits.argmax(-1).cpu()
    ids, k = None, min(top_k or logits.shape[-1], logits.shape[-1])
    if k < logits.shape[-1] or top_p < 1:
        logits, ids = logits.topk(k)  # in falling order
        ids = ids.cpu()
    logits = logits.cpu().double()
    # the largest is 0, so that no temperature above 0 is too low
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)
    if top_p < 1:
        p[p.cumsum(-1) - p >= top_p] = 0  # the likelier ones alone reach top_p
    reached = p.cumsum(-1)
    total = reached[:, -1]
    point = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(reached, point[:, None], right=True)  # never one of probability 0
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, how=None, vocab_size=None):
    """Continue prompts (B lists of ids, of any lengths) as one batch. Yields max_new_tokens times
    (ids, logprobs), two lists of B: the next id of each row and the log-probability, nats, that the
    model by itself gives it.

    how: a Sampling. Row i draws with seed + i, and so does not depend on the rows beside it. A row
    that has filled the context goes on from its last max_seq_len // 2 tokens, as if they were the
    prompt: learned positions cannot slide by one without computing everything anew. vocab_size: ids
    from there on are never drawn.
    """
    how = how or Sampling()
    context, device = model.args["max_seq_len"], model.head_bias.device
    rows = [list(prompt) for prompt in prompts]
    cache = model.cache(len(rows))
    uniform = draws(len(rows), max_new_tokens, how.seed)
    seen = torch.zeros(len(rows), model.args["vocab_size"], dtype=torch.bool)
    for row, prompt in zip(seen, rows, strict=True):
        row[prompt] = True
    x = model.prefill([row[-context:] for row in rows], cache, list(range(len(rows))))
    for step in range(max_new_tokens):
        raw = next_logits(model, x)
        if vocab_size is not None:
            raw[:, vocab_size:] = -torch.inf
        logits = penalise(raw, seen, how.repetition_penalty)
        ids = choose(logits, uniform[:, step], how.temperature, how.top_k, how.top_p)
        picked = raw.gather(1, ids.to(device)[:, None]) - raw.logsumexp(1, keepdim=True)
        for row, id in zip(rows, ids.tolist(), strict=True):
            row.append(id)
        yield ids.tolist(), picked[:, 0].tolist()
        if step + 1 == max_new_tokens:
            return
        seen.scatter_(1, ids[:, None], True)
        full = [i for i, length in enumerate(cache.lengths.tolist()) if length == context]
        x = model.decode(ids.to(device), cache)
        if full:
            half = max(1, context // 2)
            x[full] = model.prefill([rows[i][-half:] for i in full], cache, full)


def draws(B, steps, seed):
    """The random numbers that choose tokens, (B, steps) float64: row i's follow from seed + i."""
    rows = []
    for i in range(B):
        generator = torch.Generator().manual_seed(seed + i)
        rows.append(torch.rand(steps, dtype=torch.float64, generator=generator))
    return torch.stack(rows)


def next_logits(model, x):
    """x (B, D) -> logits (B, V)."""
    if len(x) == 1 or x.is_cuda:
        return model.head(x)
    # for a few rows this order is twice as fast on a CPU
    logits = torch.addmm(model.head_bias[:, None], model.token_embedding.weight, x.t())
    return logits.t().contiguous()


def penalise(logits, seen, penalty):
    """Divide the positive logits (B, V) of ids seen before by the penalty, and multiply the
    negative ones (CTRL, Keskar et al. 2019). seen: (B, V) bool, on the CPU."""
    if penalty == 1:
        return logits
    again = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen.to(logits.device), again, logits)


# --- where a text ends


def end_of_text(separator, encoding):
    """The id with which a model ends a text, None if its data set had no such id."""
    return encoding.eot_token if separator == "endoftext" else None


def prompt_ids(prompt, encoding, end):
    """A prompt's ids. An empty one is the end of the text before, where the model knows that, and
    else a newline."""
    return encoding.encode_ordinary(prompt) or ([198] if end is None else [end])


def until_end(ids, end):
    """Those of the ids that come before the first end of text."""
    return ids[: ids.index(end)] if end in ids else ids


def continue_texts(model, encoding, prompts, separator, max_new_tokens):
    """[[prompt, continuation]] of texts, for the notebook. Draws from generators of its own, so
    that looking changes nothing."""
    end = end_of_text(separator, encoding)
    ids = [prompt_ids(prompt, encoding, end) for prompt in prompts]
    was_training = model.training
    model.eval()
    steps = [new for new, _ in generate(model, ids, max_new_tokens, vocab_size=encoding.n_vocab)]
    model.train(was_training)
    rows = [until_end(list(row), end) for row in zip(*steps, strict=True)]
    return [[prompt, encoding.decode(row)] for prompt, row in zip(prompts, rows, strict=True)]
