"""Text from a trained model.

    python sample.py --start "The cat sat on the"

takes the best checkpoint of the run trained last under out/, unless --out_dir or --checkpoint names another.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import load_model
from config import UserError, run
from data import load_tokenizer


def find_checkpoint(out_dir=None):
    """The checkpoint to sample from: a run's best.pt, or its last.pt where no evaluation has been yet.

    out_dir: the run's folder; None is the run under out/ whose checkpoints are the newest. Raises UserError.
    """
    folders = [Path(out_dir)] if out_dir else list(Path("out").glob("*"))
    found = [path for folder in folders for path in (folder / "best.pt", folder / "last.pt") if path.is_file()]
    if not found:
        raise UserError(f"no checkpoint in {out_dir or 'out/*'}; train one first: `python train.py config/demo.py`")
    folder = max(found, key=lambda path: path.stat().st_mtime_ns).parent
    return next(path for path in found if path.parent == folder)


def choose(logits, temperature, top_k, top_p, generator):
    """Draw the next ids: logits (B, V) -> (B, 1) int64. temperature 0 takes the likeliest.

    top_k: only the k likeliest, 0 for all. top_p: only the smallest set of likeliest ids whose probability reaches
    top_p (nucleus sampling, Holtzman et al. 2020). Ties at the border stay in.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered = logits.softmax(-1).sort(descending=True).values
        inside = ordered.cumsum(-1) - ordered < top_p  # the likelier ones alone do not reach top_p
        least = ordered.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits.softmax(-1) < least, -torch.inf)
    return torch.multinomial(F.softmax(logits, -1), 1, generator=generator)


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature=0.8, top_k=200, top_p=1.0, generator=None):
    """Continue tokens (B, T) int64 by max_new_tokens ids: (B, T + max_new_tokens).

    The model sees the last max_seq_len ids, so that text may grow past its context.
    """
    for _ in range(max_new_tokens):
        seen = tokens[:, -model.args["max_seq_len"] :]
        logits = model.head(model.hidden(seen)[:, -1])
        tokens = torch.cat([tokens, choose(logits, temperature, top_k, top_p, generator)], 1)
    return tokens


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print text from a trained model.", allow_abbrev=False)
    parser.add_argument("--start", default="\n", help="what the text begins with, or FILE:path to read it from")
    parser.add_argument("--out_dir", help="the run's folder (default: the run under out/ that was trained last)")
    parser.add_argument("--checkpoint", help="a checkpoint file, instead of a run's best")
    parser.add_argument("--num_samples", type=int, default=1, help="texts to print (default 1)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to add to each (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top_k", type=int, default=200, help="draw from the k likeliest, 0 for all (default 200)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest that reach p (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
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
        (args.device not in ("cpu", "cuda", "mps"), "--device must be cpu, cuda or mps"),
        (args.device == "cuda" and not torch.cuda.is_available(), "this torch finds no cuda device; use --device cpu"),
        (args.device == "mps" and not torch.backends.mps.is_available(), "there is no mps device; use --device cpu"),
    ):
        if wrong:
            raise UserError(phrase)
    start = args.start
    if start.startswith("FILE:"):
        try:
            start = Path(start[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --start {start}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None

    path = args.checkpoint or find_checkpoint(args.out_dir)
    model, checkpoint = load_model(path)
    figures = checkpoint.get("metrics")
    about = f", validation perplexity {figures['val_ppl']:.2f}" if figures else ", not evaluated yet"
    print(f"{path}: step {checkpoint['step']:,}{about}", file=sys.stderr)
    model.to(args.device)
    encoding = load_tokenizer()
    ids = encoding.encode_ordinary(start) or encoding.encode_ordinary("\n")  # nothing to begin with is a new line
    tokens = torch.tensor([ids], device=args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for i in range(args.num_samples):
        text = generate(model, tokens, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator)
        print(("\n---\n" if i else "") + encoding.decode(text[0].tolist()), flush=True)


if __name__ == "__main__":
    run(main)
