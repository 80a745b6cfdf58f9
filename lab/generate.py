"""Tokens from a model: which ones come next, and where a text ends."""

from dataclasses import dataclass

import torch

from lab.graph import recorded


@dataclass
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8  # 0 takes the likeliest
    top_k: int = 200  # only the k likeliest, 0 for all
    top_p: float = 1.0  # only the likeliest whose probability reaches it
    repetition_penalty: float = 1.0
    seed: int = 0


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """Draw the next ids: logits (B, V) float32, uniform (B,) float64 in [0, 1) -> (B,) int64, all
    on one device, and without waiting for it.

    temperature 0 takes the likeliest. top_k: only the k likeliest, 0 for all. top_p: only the
    smallest set of likeliest ids whose probability reaches top_p (nucleus sampling, Holtzman et al.
    2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    ids, k = None, min(top_k or logits.shape[-1], logits.shape[-1])
    if k < logits.shape[-1] or top_p < 1:
        logits, ids = logits.topk(k)  # in falling order
    logits = logits.double()
    # the largest is 0, so that no temperature above 0 is too low
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the likelier ones alone reach top_p
    reached = p.cumsum(-1)
    total = reached[:, -1]
    point = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(reached, point[:, None], right=True)  # never one of probability 0
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


class Texts:
    """B texts that grow by a token at a time, and what one more token takes on the device."""

    def __init__(self, model, B, how, vocab_size, fixed):
        """how: a Sampling. vocab_size: ids from there on are never drawn. fixed: see Cache."""
        device = model.head_bias.device
        self.model, self.how, self.vocab_size = model, how, vocab_size
        self.cache = model.cache(B, fixed)
        self.ids = torch.zeros(B, dtype=torch.int64, device=device)  # each text's last
        self.logprobs = torch.zeros(B, device=device)  # what the model gave it, nats
        self.uniform = torch.zeros(B, dtype=torch.float64, device=device)  # what chooses the next
        self.seen = torch.zeros(B, model.args["vocab_size"], dtype=torch.bool, device=device)

    def begin(self, prompts):
        """Take the prompts (B lists of ids) in."""
        context = self.model.args["max_seq_len"]
        self.refill([prompt[-context:] for prompt in prompts], list(range(len(prompts))))
        self.ids.copy_(torch.tensor([prompt[-1] for prompt in prompts]))
        self.seen.zero_()
        for row, prompt in zip(self.seen, prompts, strict=True):
            row[prompt] = True

    def refill(self, texts, rows):
        """Read texts into the cache's rows, but for the last id, which grow() reads."""
        self.model.prefill([text[:-1] for text in texts], self.cache, rows)

    def grow(self):
        """Read each text's last id, and draw the next."""
        how = self.how
        logits = next_logits(self.model, self.model.decode(self.ids, self.cache))
        if self.vocab_size is not None:
            logits[:, self.vocab_size :] = -torch.inf
        allowed = penalise(logits, self.seen, how.repetition_penalty)
        ids = choose(allowed, self.uniform, how.temperature, how.top_k, how.top_p)
        picked = logits.gather(1, ids[:, None]) - logits.logsumexp(1, keepdim=True)
        self.ids.copy_(ids)
        self.logprobs.copy_(picked[:, 0])
        self.seen.scatter_(1, ids[:, None], True)


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, how=None, vocab_size=None, graph=False):
    """Continue prompts (B lists of ids, of any lengths) as one batch. Yields max_new_tokens times
    (ids, logprobs), two lists of B: the next id of each row and the log-probability, nats, that the
    model by itself gives it.

    how: a Sampling. Row i draws with seed + i, and so does not depend on the rows beside it. A row
    that has filled the context goes on from its last max_seq_len // 2 tokens, as if they were the
    prompt: learned positions cannot slide by one without computing everything anew. vocab_size: ids
    from there on are never drawn. graph: a token's work is one CUDA graph.
    """
    how = how or Sampling()
    context, half = model.args["max_seq_len"], max(1, model.args["max_seq_len"] // 2)
    rows = [list(prompt) for prompt in prompts]
    lengths = [min(len(row), context) for row in rows]  # of what each goes on from
    texts = Texts(model, len(rows), how, vocab_size, fixed=graph)
    grow = recorded(texts.grow, model.head_bias.device) if graph else texts.grow
    texts.begin(rows)
    uniform = draws(len(rows), max_new_tokens, how.seed).to(model.head_bias.device)
    for step in range(max_new_tokens):
        texts.uniform.copy_(uniform[:, step])
        grow()
        ids, logprobs = torch.stack((texts.ids.double(), texts.logprobs.double())).tolist()
        ids = [int(id) for id in ids]
        yield ids, logprobs

        for row, id in zip(rows, ids, strict=True):
            row.append(id)
        full = [i for i, length in enumerate(lengths) if length == context]
        lengths = [half if length == context else length + 1 for length in lengths]
        if full:
            texts.refill([rows[i][-half:] for i in full], full)


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
    negative ones (CTRL, Keskar et al. 2019). seen: (B, V) bool."""
    if penalty == 1:
        return logits
    again = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, again, logits)


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
