"""Text from a trained model.

    python sample.py --start "The cat sat on the"

takes the newest best.pt under out/, unless --out_dir or --checkpoint names another. Text goes to
standard output, what is said about it to standard error.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass

from config import Config
from lab.console import ROOT, UserError, command, run
from lab.data import load_tokenizer
from lab.folder import folders_with, read_json
from lab.generate import SamplingOptions, Texts, write_on
from lab.gpt2 import open_weights
from lab.machine import choose_device, ranks_of
from lab.settings import command_line, setting
from model import LanguageModel


@dataclass
class Options(SamplingOptions):
    """What to sample, and how."""

    start: str = setting("", "what the text begins with")
    prompts: str = setting("", "a file: continue each of its lines, as one batch", path=True)
    interactive: bool = setting(False, "continue each line of standard input")
    out_dir: str = setting("", "a run's or a sweep's folder (default: the last run)", path=True)
    checkpoint: str = setting("", "a file, or a folder of transformers", path=True)
    num_samples: int = setting(1, "texts for each prompt, as one batch", low=1, below=10_000)
    max_new_tokens: int = setting(200, "tokens to add to each", low=1, below=10_000_000)
    format: str = setting("text", "jsonl: a line for each text", choices=("text", "jsonl"))
    device: str = setting("auto", "auto: cuda, else cpu", choices=("auto", "cpu", "cuda", "mps"))

    def problems(self):
        """What options say against each other, as phrases."""
        prompts = bool(self.start) + bool(self.prompts) + self.interactive
        rules = (
            (prompts > 1, "start, prompts and interactive cannot be combined with each other"),
            (self.out_dir and self.checkpoint, "out_dir cannot be combined with checkpoint"),
        )
        return [phrase for wrong, phrase in rules if wrong]


def find_checkpoint(out_dir):
    """The best.pt of a run's folder, or of a sweep's best run; without out_dir the newest of all
    under out/. Raises UserError."""
    top = out_dir or "out"
    folders = folders_with("best.pt", [top])
    if not folders:
        there = ", ".join(folders_with("best.pt", ["out"])[:9])
        there = there or f"none; run `{command('train.py', ROOT / 'config/demo.py')}`"
        raise UserError(f"no best.pt (a first evaluation writes it) in {top}; there is {there}")
    if out_dir:
        return min(folders, key=bits_per_byte) + "/best.pt"
    return max((f"{folder}/best.pt" for folder in folders), key=os.path.getmtime)


def bits_per_byte(folder):
    """Those of a run on validation; infinite if the run is not finished."""
    figures = read_json(f"{folder}/final.json")
    return figures.get("val", {}).get("bits_per_byte", math.inf)


def lay_out(model):
    """Store a model's matrices by columns, in place: on a CPU the products of a few rows then read
    memory at more than twice the speed."""
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


def read_prompts(options):
    """The prompts, a list of str. Raises UserError."""
    if not options.prompts:
        return [options.start]
    try:
        with open(options.prompts, encoding="utf-8-sig", newline="\n") as file:
            return [line.rstrip("\r\n") for line in file if line.strip()] or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {options.prompts}: {error}") from None


def sample(texts, encoding, separator, prompts, began):
    """Continue prompts (a list of str) num_samples times each, and print the texts and their speed.
    began: when the waiting for the first token began, seconds."""
    options = texts.options
    prompts = [prompt for prompt in prompts for _ in range(options.num_samples)]
    stream = len(prompts) == 1 and options.format == "text"
    times, shown = [], 0  # when each token came; how many of them are printed
    for rows in write_on(texts, encoding, separator, prompts, options.max_new_tokens):
        times.append(time.perf_counter())
        if stream:
            if len(times) == 1:
                print(prompts[0], end="")
            text = encoding.decode(rows[0][shown:])
            if not text.endswith("\ufffd"):  # which ends inside a character
                print(text, end="", flush=True)
                shown = len(rows[0])

    # the rest, and how fast it was
    pairs = list(zip(prompts, [encoding.decode(row[shown:]) for row in rows], strict=True))
    if stream:
        print(pairs[0][1], flush=True)
    elif options.format == "text":
        print("\n\n---\n".join(prompt + text for prompt, text in pairs), flush=True)
    else:
        for (prompt, text), row in zip(pairs, rows, strict=True):
            print(json.dumps(dict(prompt=prompt, text=text, tokens=row)), flush=True)
    first, seconds = times[0] - began, times[-1] - times[0]
    speed = (len(times) - 1) * len(rows) / seconds if seconds else 0
    print(f"first token after {first:.2f} s, then {speed:,.1f} tokens per second", file=sys.stderr)


def main(argv=None):
    began = time.perf_counter()
    options, words = command_line(Options, argv, "python sample.py [--setting value ...]", None)
    if words:
        raise UserError(f'{words[0]} is no setting; to begin with a text, use --start "..."')
    prompts = read_prompts(options)

    # the model
    path = options.checkpoint or find_checkpoint(options.out_dir)
    checkpoint = open_weights(path)
    model = LanguageModel.from_checkpoint(checkpoint)
    encoding, size = load_tokenizer(checkpoint.get("tokenizer_text")), model.args["vocab_size"]
    print(f"{path}: step {checkpoint['step']:,}", file=sys.stderr)
    if size < encoding.eot_token:
        raise UserError(f"{path} has a vocabulary of {size:,}, and is of another tokenizer")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path} holds weights that are not finite; name another --checkpoint")

    # its device, and the texts
    device = choose_device(Config(device=options.device), ranks_of({}))
    model.to(device)
    if device.type == "cpu":
        lay_out(model)
    B = options.num_samples * len(prompts)
    texts = Texts(model, B, options, graph=device.type == "cuda")
    separator = checkpoint.get("separator")
    if not options.interactive:
        return sample(texts, encoding, separator, prompts, began)
    print("type what to continue; Ctrl-D ends", file=sys.stderr)
    for line in sys.stdin:
        sample(texts, encoding, separator, [line.rstrip("\r\n")], time.perf_counter())


if __name__ == "__main__":
    run(main, strict=True)
