"""Tokens from a model: which ones come next, and where a text ends."""

from dataclasses import dataclass

import torch

from lab.graph import captured
from lab.settings import setting


@dataclass
class SamplingOptions:
    """How the next token is drawn."""

    temperature: float = setting(0.8, "0 takes the likeliest token", low=0, below=1e6)
    top_k: int = setting(200, "draw from the k likeliest, 0 for all", low=0)
    top_p: float = setting(1.0, "draw from the likeliest that reach p, 1 for all", low=0)
    repetition_penalty: float = setting(1.0, "above 1: against repeats", low=0.01, below=1e6)
    seed: int = setting(0, "text i draws with seed + i", low=0, below=2**62)


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """Draw the next ids: logits (B, V) float32, uniform (B,) float32 in [0, 1] -> (B,) int64, all
    on one device, and without waiting for it. The rest is as in SamplingOptions; top_p is nucleus
    sampling (Holtzman et al. 2020). Logits that are not finite give any id."""
    if temperature < 1e-30:  # which would be 0 in float32
        return logits.argmax(-1)
    ids, k = None, min(top_k or logits.shape[-1], logits.shape[-1])
    if k < logits.shape[-1] or top_p < 1:
        logits, ids = logits.topk(k)  # in falling order
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    p = torch.softmax(logits, -1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p > top_p, 0)  # the likelier ones alone reach top_p
    reached = p.cumsum(-1)
    total = reached[:, -1:]
    point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(reached, point, right=True)  # never one of probability 0
    drawn = drawn.clamp(max=k - 1)  # a search among nan ends past the last
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


class Texts:
    """B texts that grow together by a token at a time. One more token's work is captured once, and
    serves all prompts that come later."""

    @torch.inference_mode()
    def __init__(self, model, B, options, graph=False):
        """options: what has SamplingOptions' fields. graph: a token's work is one CUDA graph."""
        device = model.head_bias.device
        self.model, self.options = model, options
        self.cache = model.cache(B, fixed=graph)
        self.ids = torch.zeros(B, dtype=torch.int64, device=device)  # each text's last
        self.uniform = torch.zeros(B, device=device)  # what chooses the next
        self.seen = torch.zeros(B, model.args["vocab_size"], dtype=torch.bool, device=device)
        self.step = captured(self.grow, device) if graph else self.grow

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens):
        """Continue prompts (B lists of ids, of any lengths). Yields max_new_tokens times a list of
        B ids, each text's next.

        Row i draws with seed + i, whatever stands beside it. A row that has filled the context goes
        on from its last half, as if that were the prompt: learned positions cannot slide by one.
        """
        context = self.model.args["max_seq_len"]
        rows = [list(prompt) for prompt in prompts]
        lengths = [min(len(row), context) for row in rows]  # of what each goes on from
        unread = list(range(len(rows)))
        self.ids.copy_(torch.tensor([row[-1] for row in rows]))
        self.seen.zero_()
        for seen, row in zip(self.seen, rows, strict=True):
            seen[row] = True
        uniform = draws(len(rows), max_new_tokens, self.options.seed).to(self.uniform.device)
        for step in range(max_new_tokens):
            if unread:  # but for the last ids, which grow() reads
                self.model.prefill([rows[i][-lengths[i] : -1] for i in unread], self.cache, unread)
            self.uniform.copy_(uniform[:, step])
            self.step()
            ids = self.ids.tolist()
            yield ids

            for row, id in zip(rows, ids, strict=True):
                row.append(id)
            unread = [i for i, length in enumerate(lengths) if length == context]
            half = max(1, context // 2)
            lengths = [half if length == context else length + 1 for length in lengths]

    def grow(self):
        """Read each text's last id, and draw the next."""
        options = self.options
        logits = self.model.head(self.model.decode(self.ids, self.cache))
        # ids seen before become less likely (CTRL, Keskar et al. 2019)
        penalty = options.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        allowed = torch.where(self.seen, penalised, logits)
        ids = choose(allowed, self.uniform, options.temperature, options.top_k, options.top_p)
        self.ids.copy_(ids)
        self.seen.scatter_(1, ids[:, None], True)


def draws(B, steps, seed):
    """The random numbers that choose tokens, (B, steps) float32: row i's follow from seed + i."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(B)]
    # the 53 bits of torch.rand in float64, a dtype that MPS does not have
    rows = [torch.randint(2**53, (steps,), generator=each) / 2**53 for each in generators]
    return torch.stack(rows)


# --- where a text ends


def write_on(texts, encoding, separator, prompts, max_new_tokens):
    """Continue prompts (B str). Yields after each step B lists of the ids that continue them, the
    same lists every time.

    A model whose data set has separator endoftext ends a text by that id, which is not among them,
    and takes an empty prompt for the end of the text before; others take it for a newline.
    """
    end = encoding.eot_token if separator == "endoftext" else None
    empty = [end] if end else encoding.encode_ordinary("\n")
    batch = [encoding.encode_ordinary(prompt) or empty for prompt in prompts]
    rows, live = [[] for _ in batch], range(len(batch))
    for ids in texts.generate(batch, max_new_tokens):
        live = [i for i in live if ids[i] != end]
        for i in live:
            rows[i].append(ids[i])
        yield rows
        if not live:
            break


def continue_texts(model, encoding, prompts, separator, max_new_tokens):
    """[[prompt, continuation]] of texts, for the notebook. Draws from generators of its own, so
    that looking changes nothing."""
    was_training = model.training
    model.eval()
    texts = Texts(model, len(prompts), SamplingOptions())
    *_, rows = write_on(texts, encoding, separator, prompts, max_new_tokens)
    model.train(was_training)
    return [[prompt, encoding.decode(row)] for prompt, row in zip(prompts, rows, strict=True)]
