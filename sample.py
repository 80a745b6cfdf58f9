"""Text from a trained model.

    python sample.py --start "The cat sat on the"

takes the best checkpoint of the run trained last under out/, unless --out_dir or --checkpoint names
another. Text goes to standard output, what is said about it to standard error.
"""

import codecs
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lab.console import ROOT, UserError, command, run
from lab.data import load_tokenizer
from lab.folder import fits_memory, folders_with, read_json
from lab.generate import Texts, end_of_text, prompt_ids
from lab.gpt2 import open_weights, write_folder
from lab.machine import check_compile_cache
from lab.notebook import show
from lab.settings import command_line, setting
from model import LanguageModel


@dataclass
class Options:
    """What to sample, and how."""

    start: str = setting("", "what the text begins with, or FILE:path to read it from")
    prompts: str = setting("", "a file: continue each of its lines, as one batch", path=True)
    interactive: bool = setting(False, "continue each line of standard input")
    out_dir: str = setting("", "a run's or a sweep's folder (default: the last run)", path=True)
    checkpoint: str = setting("", "a file, a folder of transformers, or gpt2", path=True)
    num_samples: int = setting(1, "texts for each prompt, as one batch", low=1, below=10_000)
    max_new_tokens: int = setting(200, "tokens to add to each", low=1, below=10_000_000)
    temperature: float = setting(0.8, "0 takes the likeliest token", low=0, below=1e6)
    top_k: int = setting(200, "draw from the k likeliest, 0 for all", low=0)
    top_p: float = setting(1.0, "draw from the likeliest that reach p", low=0)
    repetition_penalty: float = setting(1.0, "above 1: against repeats", low=0.01, below=1e6)
    seed: int = setting(0, "text i draws with seed + i", low=0, below=2**62)
    format: str = setting("text", "jsonl: a line for each text", choices=("text", "jsonl"))
    export: str = setting("", "write the model for transformers into this folder", path=True)
    drop_head_bias: bool = setting(False, "export without the head's bias")
    device: str = setting("auto", "auto: cuda, else cpu", choices=("auto", "cpu", "cuda", "mps"))

    def problems(self):
        """What options say against each other or the machine, as phrases."""
        there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
        missing = not there.get(self.device, True)
        rules = (
            (not 0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (
                bool(self.start) + bool(self.prompts) + self.interactive > 1,
                "start, prompts and interactive cannot be combined with each other",
            ),
            (self.out_dir and self.checkpoint, "out_dir cannot be combined with checkpoint"),
            (self.drop_head_bias and not self.export, "drop_head_bias belongs to --export"),
            (missing, f"this torch finds no {self.device} device; use cpu"),
        )
        return [phrase for wrong, phrase in rules if wrong]


def find_checkpoint(out_dir=None):
    """The checkpoint to sample from: a run's best.pt, or its last.pt before its first evaluation.

    out_dir: the folder of a run, or of a sweep, whose best run is taken. None is the run anywhere
    under out/ whose checkpoints are the newest. Raises UserError.
    """
    top = Path(out_dir or "out")
    names = "best.pt", "last.pt"
    paths = [Path(folder, name) for name in names for folder in folders_with(name, [top])]
    if not paths:
        there = folders_with("best.pt", ["out"])
        fix = f"train a model first: `{command('train.py', ROOT / 'config/demo.py')}`"
        fix = f"there are {', '.join(there[:9])}" if there else fix
        raise UserError(f"no checkpoint in {top}; {fix}")
    if out_dir:
        return min(paths, key=bits_per_byte)
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns).parent
    return next(path for path in paths if path.parent == newest)


def bits_per_byte(path):
    """Those of a checkpoint's run on validation; infinite if the run is not finished."""
    return read_json(path.with_name("final.json")).get("val", {}).get("bits_per_byte", math.inf)


def lay_out_for_one(model):
    """Store a model's matrices by columns, in place: with one text at a time on a CPU, products
    then read memory at more than twice the speed."""
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


def read_prompts(options):
    """The prompts, a list of str. Raises UserError."""
    path = options.prompts
    if not path and options.start.startswith("FILE:"):
        path = os.path.expanduser(options.start.removeprefix("FILE:"))
    if not path:
        return [options.start]
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not options.prompts:
        return [text]
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one on each line")
    return prompts


class Sampler:
    """A model, its tokenizer and the options: continues prompts, and prints the texts."""

    def __init__(self, model, checkpoint, options, B):
        """checkpoint: the model's. B: how many texts at a time. Raises UserError."""
        self.encoding, self.options = load_tokenizer(checkpoint.get("tokenizer_text")), options
        # what ends a text and is not printed; None if the model knows no such id
        self.end = end_of_text(checkpoint.get("separator"), self.encoding)
        self.vocab_size = model.args["vocab_size"]
        self.texts = Texts(model, B, options, graph=model.head_bias.is_cuda)

    def sample(self, prompts, began):
        """Continue prompts (a list of str) num_samples times each, and print the texts and their
        speed. began: when the waiting for the first token began, seconds. Raises UserError."""
        prompts = [prompt for prompt in prompts for _ in range(self.options.num_samples)]
        batch = self.encode(prompts)
        stream = len(batch) == 1 and self.options.format == "text"
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end in a character
        first, steps, live = None, 0, range(len(batch))
        added, logprobs = [[] for _ in batch], [0.0] * len(batch)
        for ids, more in self.texts.generate(batch, self.options.max_new_tokens):
            if not all(map(math.isfinite, more)):
                raise UserError(
                    "the model's logits are not finite: its weights hold nan, inf or numbers that "
                    "are too large; name another --checkpoint"
                )
            if first is None:
                first = time.perf_counter()
                if stream:
                    print(prompts[0], end="")
            steps += 1
            live = [row for row in live if ids[row] != self.end]
            for row in live:
                added[row].append(ids[row])
                logprobs[row] += more[row]
            if not live:
                break
            if stream:
                content = self.encoding.decode_single_token_bytes(ids[0])
                print(decoder.decode(content), end="", flush=True)
        seconds = time.perf_counter() - first

        if stream:
            print(decoder.decode(b"", final=True), flush=True)
        else:
            self.print_all(prompts, added, logprobs)
        speed = (steps - 1) * len(batch) / seconds
        then = f", then {speed:,.1f} tokens per second" if steps > 1 else ""
        print(f"first token after {first - began:.2f} s{then}", file=sys.stderr)

    def encode(self, prompts):
        """The ids of each prompt. Raises UserError for ids that the model does not have."""
        batch = [prompt_ids(prompt, self.encoding, self.end) for prompt in prompts]
        if (largest := max(map(max, batch))) >= self.vocab_size:
            raise UserError(
                f"the prompt holds id {largest}, past this model's vocabulary of "
                f"{self.vocab_size:,}; its data set had another tokenizer"
            )
        return batch

    def print_all(self, prompts, added, logprobs):
        """Print whole texts, of which each begins with its prompt. added: the ids that continue it;
        logprobs: theirs together, nats."""
        texts = [self.encoding.decode(ids) for ids in added]
        if self.options.format == "text":
            whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
            return print("\n\n---\n".join(whole), flush=True)
        for prompt, text, ids, logprob in zip(prompts, texts, added, logprobs, strict=True):
            line = dict(prompt=prompt, text=text, tokens=ids, logprob=logprob)
            print(json.dumps(line), flush=True)


def export(model, checkpoint, options):
    """Write a model and its tokenizer for transformers. Raises UserError."""
    if model.modern:
        raise UserError("transformers has no block modern; train with --block gpt2 to export")
    if model.head_bias.any() and not options.drop_head_bias:
        raise UserError(
            "transformers' GPT-2 has no place for this model's head bias; leave it out with "
            "--drop_head_bias, or train with --head_bias False"
        )
    write_folder(model, load_tokenizer(checkpoint.get("tokenizer_text")), options.export)
    print(f"{options.export} is written for transformers", file=sys.stderr)


def main(argv=None):
    check_compile_cache()
    began = time.perf_counter()
    options, words = command_line(Options, argv, "python sample.py [--setting value ...]", None)
    if words:
        raise UserError(f'{words[0]} is no setting; to begin with a text, use --start "..."')
    prompts = read_prompts(options)

    # the model
    path = options.checkpoint or find_checkpoint(options.out_dir)
    checkpoint = open_weights(str(path))
    model = LanguageModel.from_checkpoint(checkpoint)
    quality = "not evaluated yet"
    if "metrics" in checkpoint:
        quality = f"validation perplexity {show(checkpoint['metrics']['val_ppl'])}"
    print(f"{path}: step {checkpoint['step']:,}, {quality}", file=sys.stderr)
    if options.export:
        return export(model, checkpoint, options)

    # its device, and the layout of its weights there
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    B = options.num_samples * len(prompts)
    if device == "cpu" and B == 1:
        lay_out_for_one(model)

    # the texts
    with fits_memory(f"memory is full with {B:,} texts; use fewer --num_samples"):
        sampler = Sampler(model, checkpoint, options, B)
        if not options.interactive:
            return sampler.sample(prompts, began)
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:  # Ctrl-D
                return print(file=sys.stderr)
            sampler.sample([line.rstrip("\r\n")], time.perf_counter())


if __name__ == "__main__":
    run(main, strict=True)
