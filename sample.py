"""Text from a trained model.

    python sample.py --start "The cat sat on the"

takes the best checkpoint of the run trained last under out/, unless --out_dir or --checkpoint names
another. Text goes to standard output, what is said about it to standard error.
"""

import codecs
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lab.console import BEGAN, ROOT, UserError, command, run
from lab.data import Dataset, load_tokenizer
from lab.evaluate import evaluate
from lab.generate import Sampling, end_of_text, generate, prompt_ids, until_end
from lab.gpt2 import open_weights, write_folder
from lab.machine import Machine
from lab.notebook import perplexity
from lab.settings import command_line, setting
from model import LanguageModel


@dataclass
class Options:
    """What to sample, and how."""

    start: str = setting("", "what the text begins with, or FILE:path to read it from")
    prompts: str = setting("", "a file with a prompt a line, continued as one batch", path=True)
    interactive: bool = setting(False, "read a prompt a line from standard input")
    out_dir: str = setting("", "the run's folder (default: the one trained last)", path=True)
    checkpoint: str = setting("", "a file, or gpt2, instead of a run's best", path=True)
    num_samples: int = setting(1, "texts for each prompt, as one batch", low=1)
    max_new_tokens: int = setting(200, "tokens to add to each", low=1)
    temperature: float = setting(0.8, "0 takes the likeliest token", low=0)
    top_k: int = setting(200, "draw from the k likeliest, 0 for all", low=0)
    top_p: float = setting(1.0, "draw from the likeliest that reach p", low=0)
    repetition_penalty: float = setting(1.0, "above 1: against repeats", low=0)
    seed: int = setting(0, "text i draws with seed + i", low=0, below=2**62)
    format: str = setting(
        "text",
        "jsonl: a line a text, with prompt, text, tokens (ids) and logprob (nats); none of them "
        "has the id that ends a text",
        choices=("text", "jsonl"),
    )
    cuda_graph: bool = setting(True, "on CUDA: a token's work as one CUDA graph")
    export: str = setting("", "write the model for transformers into this folder", path=True)
    drop_head_bias: bool = setting(False, "export without the head's bias")
    device: str = setting(
        "auto",
        "auto is cuda where there is one, else the CPU",
        choices=("auto", "cpu", "cuda", "mps"),
    )

    def problems(self):
        """What options say against each other or the machine, as phrases."""
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        rules = (
            (not 0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (self.repetition_penalty == 0, "repetition_penalty must be above 0"),
            (self.prompts and self.interactive, "prompts and interactive are two ways; take one"),
            (self.device == "cuda" and not cuda, "this torch finds no cuda device; use cpu"),
            (self.device == "mps" and not mps, "there is no mps device; use cpu"),
        )
        return [phrase for wrong, phrase in rules if wrong]

    def sampling(self):
        """How tokens are drawn."""
        names = "temperature top_k top_p repetition_penalty seed".split()
        return Sampling(**{name: getattr(self, name) for name in names})


def find_checkpoint(out_dir=None):
    """The checkpoint to sample from: a run's best.pt, or its last.pt before its first evaluation.

    out_dir: the run's folder; None is the run under out/, or in a sweep there, whose checkpoints
    are the newest. Raises UserError.
    """
    folders = [Path(out_dir)] if out_dir else list(Path("out").rglob("*"))
    paths = [folder / name for folder in folders for name in ("best.pt", "last.pt")]
    found = [path for path in paths if path.is_file()]
    if not found:
        mend = command("train.py", ROOT / "config/demo.py")
        raise UserError(f"no checkpoint in {out_dir or 'out/'}; train one first: `{mend}`")
    folder = max(found, key=lambda path: path.stat().st_mtime_ns).parent
    return next(path for path in found if path.parent == folder)


def lay_out_for_one(model):
    """Store a model's matrices by columns, in place. On a CPU a product with one row then reads
    memory at more than twice the speed. For sampling alone, and for one text at a time."""
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


def read_text(path):
    """A file's text, lines ended by "\\n". Raises UserError."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig", newline="") as file:
            return file.read().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"cannot read {path}: {why}") from None


def read_prompts(options):
    """The prompts, a list of str. Raises UserError."""
    if options.prompts:
        lines = read_text(options.prompts).split("\n")
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"{options.prompts} holds no prompt; write one a line")
        return prompts
    start = options.start
    return [read_text(start.removeprefix("FILE:")) if start.startswith("FILE:") else start]


class Printer:
    """Prints the bytes of tokens as text, whole characters at a time: a token may end inside
    one."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, ids=(), final=False):
        content = b"".join(map(self.encoding.decode_single_token_bytes, ids))
        text = self.decoder.decode(content, final)
        sys.stdout.write(text + "\n" * final)
        sys.stdout.flush()


class Speaker:
    """A model, its tokenizer and how to sample: prompts in, text out."""

    def __init__(self, model, encoding, end, options):
        """end: the id that ends a text and is not printed, None if the model knows none."""
        self.model, self.encoding, self.end, self.options = model, encoding, end, options

    def speak(self, prompts):
        """Continue prompts (a list of str) num_samples times each and print what comes, and a line
        about the speed. Raises UserError."""
        options = self.options
        ids = [prompt_ids(prompt, self.encoding, self.end) for prompt in prompts]
        self.check(ids)
        batch = [prompt for prompt in ids for _ in range(options.num_samples)]
        alone = len(batch) == 1 and options.format == "text"
        printer = Printer(self.encoding) if alone else None
        if printer:
            printer(until_end(batch[0], self.end))

        began = time.perf_counter() if options.interactive else BEGAN
        first, steps = None, 0
        added, logprobs = [[] for _ in batch], [0.0] * len(batch)
        for new, more in self.tokens(batch):
            first = first or time.perf_counter()
            steps += 1
            for row, i in enumerate(new):
                if i is not None:
                    added[row].append(i)
                    logprobs[row] += more[row]
            if printer:
                printer([i for i in new if i is not None])
        seconds = time.perf_counter() - first

        if printer:
            printer(final=True)
        elif options.format == "jsonl":
            self.print_lines(prompts, added, logprobs)
        else:
            texts = [until_end(p, self.end) + m for p, m in zip(batch, added, strict=True)]
            print("\n\n---\n".join(map(self.encoding.decode, texts)))
        sys.stdout.flush()
        speed = (steps - 1) * len(batch) / seconds
        then = f", then {speed:,.1f} tokens/s" if steps > 1 else ""
        print(f"first token after {first - began:.2f} s{then}", file=sys.stderr)

    def check(self, ids):
        """Raise UserError for ids past the model's vocabulary."""
        largest, size = max(map(max, ids)), self.model.args["vocab_size"]
        if largest >= size:
            raise UserError(
                f"the prompt holds id {largest}, past this model's vocabulary of {size:,}; its "
                "data set had another tokenizer"
            )

    def tokens(self, batch):
        """generate(), with None in place of the ids of rows that have ended; until all have."""
        options, ended = self.options, [False] * len(batch)
        size = self.encoding.n_vocab
        how, graph = options.sampling(), options.cuda_graph and self.model.head_bias.is_cuda
        for new, logprobs in generate(self.model, batch, options.max_new_tokens, how, size, graph):
            ended = [over or i == self.end for over, i in zip(ended, new, strict=True)]
            yield [None if over else i for over, i in zip(ended, new, strict=True)], logprobs
            if all(ended):
                return

    def print_lines(self, prompts, added, logprobs):
        """Print a line of JSON a text."""
        for i, (more, logprob) in enumerate(zip(added, logprobs, strict=True)):
            prompt, text = prompts[i // self.options.num_samples], self.encoding.decode(more)
            print(json.dumps(dict(prompt=prompt, text=text, tokens=more, logprob=logprob)))


def export(model, config, options):
    """Write a model for transformers, and say what leaving its head's bias out costs. config: its
    run's settings, a dict or None. Raises UserError."""
    if model.modern:
        raise UserError("transformers has no block modern; train with --block gpt2 to export")
    biased = bool(model.head_bias.any())
    if biased and not options.drop_head_bias:
        raise UserError(
            "transformers' GPT-2 has no place for this model's head bias; --drop_head_bias leaves "
            "it out and says what that costs, and a run with --head_bias False has none"
        )
    write_folder(model, options.export)
    print(f"{options.export} is written for transformers", file=sys.stderr)
    if biased:
        print(bias_cost(model, config), file=sys.stderr)


def bias_cost(model, config):
    """What leaving the head's bias out costs on the run's validation split, as a phrase. The model
    is without it then."""
    try:
        split = Dataset(config["dataset"], config["data_dir"]).split("val")
    except (UserError, TypeError):
        return "what the head's bias was worth is unknown: its data set is not prepared here"
    machine = Machine(model.head_bias.device, torch.float32)
    before = evaluate(model, split, machine, rows=8)["loss"]
    model.head_bias.data.zero_()
    after = evaluate(model, split, machine, rows=8)["loss"]
    return f"validation loss {before:.4f} with the head's bias, {after:.4f} without, as exported"


def main(argv=None):
    options, _ = command_line(Options, argv, "python sample.py [--setting value ...]")
    prompts = read_prompts(options)
    path = options.checkpoint or find_checkpoint(options.out_dir)
    found = open_weights(str(path))
    model = LanguageModel.from_checkpoint(found)
    figures = found.get("metrics")
    about = ", not evaluated yet"
    if figures:
        about = f", validation perplexity {perplexity(figures['val_ppl'])}"
    print(f"{path}: step {found['step']:,}{about}", file=sys.stderr)

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    if options.export:
        return export(model, found.get("config"), options)
    if device == "cpu" and options.num_samples * len(prompts) == 1:
        lay_out_for_one(model)
    encoding = load_tokenizer()
    end = end_of_text(found.get("separator"), encoding)
    speaker = Speaker(model, encoding, end, options)
    if not options.interactive:
        return speaker.speak(prompts)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:  # Ctrl-D
            return print(file=sys.stderr)
        speaker.speak([line.rstrip("\r\n")])


if __name__ == "__main__":
    run(main, strict=True)
