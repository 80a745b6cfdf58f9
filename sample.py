"""Text from a trained model.

    python sample.py --start "The cat sat on the"

takes the best checkpoint of the run trained last under out/, unless --out_dir or --checkpoint names another. Text goes
to stdout, what is said about it to stderr.
"""

from lab.console import BEGAN, ROOT, UserError, command, run

import argparse
import codecs
import json
import os
import sys
import time
from pathlib import Path

import torch

from data import load_tokenizer
from model import Cache, load_model
from report import perplexity


def find_checkpoint(out_dir=None):
    """The checkpoint to sample from: a run's best.pt, or its last.pt where no evaluation has been yet.

    out_dir: the run's folder; None is the run under out/ whose checkpoints are the newest. Raises UserError.
    """
    folders = [Path(out_dir)] if out_dir else list(Path("out").glob("*"))
    found = [path for folder in folders for path in (folder / "best.pt", folder / "last.pt") if path.is_file()]
    if not found:
        raise UserError(f"no checkpoint in {out_dir or 'out/*'}; train one first: "
                        f"`{command('train.py', ROOT / 'config/demo.py')}`")
    folder = max(found, key=lambda path: path.stat().st_mtime_ns).parent
    return next(path for path in found if path.parent == folder)


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """Draw the next ids: logits (B, V) float32, uniform (B,) float64 in [0, 1) -> (B,) int64, on the CPU.

    temperature 0 takes the likeliest. top_k: only the k likeliest, 0 for all. top_p: only the smallest set of likeliest
    ids whose probability reaches top_p (nucleus sampling, Holtzman et al. 2020).
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
    drawn = torch.searchsorted(reached, point[:, None], right=True)  # never an id of probability 0
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


def lay_out_for_one(model):
    """Store a model's matrices by columns, in place: on a CPU a product with one row then reads memory at more than
    twice the speed (the head, on two cores: 24 GB/s against 9). For sampling alone, and for one text at a time."""
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=0.8, top_k=200, top_p=1.0, repetition_penalty=1.0, seed=0,
             vocab_size=None):
    """Continue prompts (B lists of ids, of any lengths) as one batch. Yields max_new_tokens times (ids, logprobs), two
    lists of B: the next id of each row and the log-probability, nats, that the model by itself gives it.

    Row i draws with seed + i, and so does not depend on the rows beside it. A row that has filled the context goes on
    from its last max_seq_len // 2 tokens, as if they were the prompt: learned positions cannot slide by one without
    computing everything anew. repetition_penalty divides the positive logits of ids seen before and multiplies the
    negative ones (CTRL, Keskar et al. 2019). vocab_size: ids from there on are never drawn.
    """
    context, device = model.args["max_seq_len"], model.head_bias.device
    rows = [list(prompt) for prompt in prompts]
    cache = Cache(model, len(rows))
    uniform = torch.stack([
        torch.rand(max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + i))
        for i in range(len(rows))
    ])
    seen = torch.zeros(len(rows), model.args["vocab_size"], dtype=torch.bool)
    for row, prompt in zip(seen, rows, strict=True):
        row[prompt] = True
    x = model.prefill([row[-context:] for row in rows], cache, list(range(len(rows))))
    for step in range(max_new_tokens):
        if len(rows) > 1 and device.type == "cpu":  # for a few rows this order is twice as fast there
            logits = torch.addmm(model.head_bias[:, None], model.token_embedding.weight, x.t()).t().contiguous()
        else:
            logits = model.head(x)
        if vocab_size is not None:
            logits[:, vocab_size:] = -torch.inf
        raw = logits
        if repetition_penalty != 1:
            again = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = torch.where(seen.to(device), again, logits)
        ids = choose(logits, uniform[:, step], temperature, top_k, top_p)
        picked = raw.gather(1, ids.to(device)[:, None]) - raw.logsumexp(1, keepdim=True)
        for row, id in zip(rows, ids.tolist(), strict=True):
            row.append(id)
        yield ids.tolist(), picked[:, 0].tolist()
        if step + 1 < max_new_tokens:
            if repetition_penalty != 1:
                seen.scatter_(1, ids[:, None], True)
            full = [i for i, length in enumerate(cache.lengths.tolist()) if length == context]
            x = model.decode(ids.to(device), cache)
            if full:
                x[full] = model.prefill([rows[i][-max(1, context // 2) :] for i in full], cache, full)


class Printer:
    """Prints the bytes of tokens as text, whole characters at a time: a token may end inside one."""

    def __init__(self, encoding):
        self.encoding, self.decoder = encoding, codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, ids=(), final=False):
        text = self.decoder.decode(b"".join(map(self.encoding.decode_single_token_bytes, ids)), final)
        sys.stdout.write(text + "\n" * final)
        sys.stdout.flush()


def end_of_text(checkpoint, encoding):
    """The id with which a model ends a text, None for one whose data set had no such id."""
    return encoding.eot_token if checkpoint.get("separator") == "endoftext" else None


def prompt_ids(prompt, encoding, end):
    """A prompt's ids. An empty one is the end of the text before, where the model knows that."""
    return encoding.encode_ordinary(prompt) or ([198] if end is None else [end])


def until_end(ids, end):
    """Those of the ids that come before the first end of text."""
    return ids[: ids.index(end)] if end in ids else ids


def say(model, encoding, prompts, args, end=None):
    """Continue prompts (a list of str) num_samples times each and print what comes; a line about the speed.

    end: the id that ends a text and is not printed. A text's logprob is of the ids before it.
    """
    ids = [prompt_ids(prompt, encoding, end) for prompt in prompts]
    if (largest := max(map(max, ids))) >= model.args["vocab_size"]:
        raise UserError(f"the prompt holds id {largest}, past this model's vocabulary of {model.args['vocab_size']:,}; "
                        "its data set had another tokenizer")
    batch = [prompt for prompt in ids for _ in range(args.num_samples)]
    added, logprobs = [[] for _ in batch], [0.0] * len(batch)
    ended, steps = [False] * len(batch), 0
    stream = Printer(encoding) if len(batch) == 1 and args.format == "text" else None
    if stream:
        stream(until_end(batch[0], end))
    started, first = time.perf_counter(), None
    for new, logprob in generate(model, batch, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                                 args.repetition_penalty, args.seed, encoding.n_vocab):
        first = first or time.perf_counter()
        steps += 1
        for i in range(len(batch)):
            ended[i] = ended[i] or new[i] == end
            if not ended[i]:
                added[i].append(new[i])
                logprobs[i] += logprob[i]
        if all(ended):
            break
        if stream:
            stream(new)
    seconds, steps = time.perf_counter() - first, steps - 1
    if stream:
        stream(final=True)
    for i, (prompt, more, logprob) in enumerate(zip(batch, added, logprobs, strict=True)):
        if args.format == "jsonl":
            prompt_text = prompts[i // args.num_samples]
            print(json.dumps(dict(prompt=prompt_text, text=encoding.decode(more), tokens=more, logprob=logprob)))
        elif not stream:
            print(("\n---\n" if i else "") + encoding.decode(until_end(prompt, end) + more))
    sys.stdout.flush()
    began = started if args.interactive else BEGAN
    speed = f", then {steps * len(batch) / seconds:,.1f} tokens/s" if steps else ""
    print(f"first token after {first - began:.2f} s{speed}", file=sys.stderr)


def read_text(path):
    """A file's text, lines ended by "\\n". Raises UserError."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig", newline="") as file:
            return file.read().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print text from a trained model.", allow_abbrev=False)
    parser.add_argument("--start", default="", help="what the text begins with, or FILE:path to read it from")
    parser.add_argument("--prompts", metavar="FILE", help="a file with a prompt a line, continued as one batch")
    parser.add_argument("--interactive", action="store_true", help="read a prompt a line from standard input")
    parser.add_argument("--out_dir", type=os.path.expanduser,
                        help="the run's folder (default: the run under out/ that was trained last)")
    parser.add_argument("--checkpoint", type=os.path.expanduser, help="a checkpoint file, instead of a run's best")
    parser.add_argument("--num_samples", type=int, default=1, help="texts for each prompt, as one batch (default 1)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to add to each (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top_k", type=int, default=200, help="draw from the k likeliest, 0 for all (default 200)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest that reach p (default 1)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: against repeats (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="text i draws with seed + i (default 0)")
    parser.add_argument("--format", choices=("text", "jsonl"), default="text",
                        help="jsonl: a line a text, with prompt, text, tokens (ids) and logprob (nats); none of them "
                        "has the id that ends a text")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (default: cuda where there is one)")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for wrong, phrase in (
        (args.num_samples < 1, "--num_samples must be at least 1"),
        (args.max_new_tokens < 1, "--max_new_tokens must be at least 1"),
        (not 0 <= args.temperature < float("inf"), "--temperature must be 0 or more"),
        (args.top_k < 0, "--top_k must be 0 or more"),
        (not 0 < args.top_p <= 1, "--top_p must be above 0 and at most 1"),
        (not 0 < args.repetition_penalty < float("inf"), "--repetition_penalty must be above 0"),
        (not 0 <= args.seed < 2**62, "--seed must be 0 or more"),
        (args.prompts and args.interactive, "--prompts and --interactive are two ways; take one"),
        (args.device not in ("cpu", "cuda", "mps"), "--device must be cpu, cuda or mps"),
        (args.device == "cuda" and not torch.cuda.is_available(), "this torch finds no cuda device; use --device cpu"),
        (args.device == "mps" and not torch.backends.mps.is_available(), "there is no mps device; use --device cpu"),
    ):
        if wrong:
            raise UserError(phrase)
    prompts = [read_text(args.start[5:]) if args.start.startswith("FILE:") else args.start]
    if args.prompts:
        prompts = [line for line in read_text(args.prompts).split("\n") if line.strip()]
        if not prompts:
            raise UserError(f"{args.prompts} holds no prompt; write one a line")

    path = args.checkpoint or find_checkpoint(args.out_dir)
    model, checkpoint = load_model(path)
    figures = checkpoint.get("metrics")
    about = f", validation perplexity {perplexity(figures['val_ppl'])}" if figures else ", not evaluated yet"
    print(f"{path}: step {checkpoint['step']:,}{about}", file=sys.stderr)
    model.to(args.device)
    if args.device == "cpu" and args.num_samples * len(prompts) == 1:
        lay_out_for_one(model)
    encoding = load_tokenizer()
    end = end_of_text(checkpoint, encoding)
    if not args.interactive:
        return say(model, encoding, prompts, args, end)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:  # Ctrl-D
            return print(file=sys.stderr)
        say(model, encoding, [line.rstrip("\r\n")], args, end)


if __name__ == "__main__":
    run(main, strict=True)
