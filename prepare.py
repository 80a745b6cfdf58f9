"""Text -> token files.

    python prepare.py wikitext-103 | wikitext-2 | demo
    python prepare.py NAME --source FOLDER | FILE
    python prepare.py NAME --hub OWNER/DATASET

writes data/NAME/{train,val,test}.bin, raw little-endian uint16 as nanoGPT's, and meta.json with
what they hold; with --vocab_size N also the vocabulary, learned from the training split.
docs/data.md says what is read, and how.
"""

import hashlib
import json
import os
import platform
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from lab.console import UserError, command, first_line, progress, run
from lab.data import (
    HUB_CONFIGS,
    VOCAB_SIZE,
    Dataset,
    load_tokenizer,
    prepare_command,
    vocabulary_of,
)
from lab.encode import encode_rows, learn, texts_of
from lab.folder import take_lock
from lab.settings import command_line, setting
from lab.text import SPLITS, demo_rows, hub_rows, path_source

HUB = "Salesforce/wikitext"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
LEARN_FROM = 200_000_000  # characters of text, at most, that a vocabulary is learned from
SEPARATORS = {"demo": "newline"} | dict.fromkeys(HUB_CONFIGS, "none")  # of all others: endoftext


@dataclass
class Options:
    """How a data set is prepared."""

    source: str = setting("", "a folder or file of text, .jsonl (.gz too) or .parquet", path=True)
    hub: str = setting("", "OWNER/DATASET of the Hugging Face hub, encoded while it is downloaded")
    config: str = setting("", "--hub: its configuration")
    column: str = setting("text", "of .jsonl, .parquet and the hub")
    separator: str = setting(
        "",
        "between rows: endoftext keeps each document as it is and marks its end (default, but none "
        "for WikiText and newline for the demo)",
        choices=("none", "newline", "endoftext"),
    )
    vocab_size: int = setting(
        0, "tokens to learn from the text (0: GPT-2's, for the demo 2048)", low=257, below=65537
    )
    val_fraction: float = setting(
        0.05, "of a text without a validation split, as 1/2, 1/3, 1/4 ...", low=1e-6, below=0.51
    )
    data_dir: str = setting("data", "where data sets lie", path=True)
    force: bool = setting(False, "replace what is prepared")

    def problems(self):
        """What options say against each other, as phrases."""
        if self.source and self.hub:
            return ["source and hub cannot be combined with each other"]
        return ["config belongs to --hub"] if self.config and not self.hub else []


def is_prepared(name, options):
    """Whether a data set is there already, as asked for. Raises UserError where its folder holds
    another, or where the text is one's own, which may have changed."""
    folder = Path(options.data_dir, name)
    if options.force or not (folder / "train.bin").exists():
        return False
    if not (folder / "meta.json").exists():
        why = f"{folder} holds token files without a meta.json, as nanoGPT's"
        raise UserError(f"{why}; choose another name or --data_dir, or replace them by --force")
    dataset = Dataset(name, options.data_dir)
    size = dataset.source.get("vocab_size", VOCAB_SIZE)  # a short text may have given fewer
    how = f"separator {dataset.separator}, vocab_size {size}, from {dataset.source['name']}"
    is_own = options.source or options.hub or vocabulary_of(name)[0] not in SEPARATORS
    if is_own or (dataset.separator, size) != (options.separator, options.vocab_size):
        fix = "--force replaces it, --data_dir DIR puts another elsewhere"
        raise UserError(f"{folder} is prepared already ({how}); {fix}")
    print(f"{folder} is already prepared: {how}")
    return True


def open_source(name, options):
    """(what gives a text's (split, rows, ends) each time it is called, what meta.json says of where
    it is from). Nothing of the hub is read yet. Raises UserError and OSError."""
    text, _ = vocabulary_of(name)
    if options.source:
        return path_source(Path(options.source), options), dict(name=options.source)
    if options.hub:
        where = options.hub, options.config or None
        origin = dict(name=f"{options.hub} {options.config}".strip(), revision=None)
        fix = "check --hub and --config, and run it again"
    elif text == "demo":
        origin = dict(name=f"pydoc_data.topics of Python {platform.python_version()}")
        return partial(demo_rows, options.separator), origin
    elif text in HUB_CONFIGS:
        where = HUB, HUB_CONFIGS[text]
        origin = dict(name=" ".join(where), revision=REVISION)
        again = prepare_command(name, options.data_dir)
        fix = f"with the text on disk, run `{again} --source FOLDER`"
    else:
        own = f"your own text: `{command('prepare.py', name)} --source PATH`"
        raise UserError(f"unknown data set {name}; there are {', '.join(SEPARATORS)}, or {own}")
    return partial(hub_rows, *where, origin, options, fix), origin


def learn_vocabulary(read, options):
    """The file of a vocabulary learned from the training split, as a text. A long text is learned
    from evenly spread blocks of it."""
    print(f"learning a vocabulary of {options.vocab_size:,} tokens", flush=True)
    size = sum(len(row) for split, rows, _ in read() for row in rows)
    train = (texts_of(rows, options.separator) for split, rows, _ in read() if split == "train")
    some = islice(train, 0, None, 1 + size // LEARN_FROM)
    texts = (text for texts in some for text in texts)
    return learn(texts, options.vocab_size - (options.separator == "endoftext"))


def write_splits(blocks, encoding, separator, part):
    """Encode (split, rows, ends) into part/SPLIT.bin. Returns {split: its entry in meta.json}."""
    counts = {split: Counter(tokens=0, words=0, bytes=0, rows=0) for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    with progress(None, "preparing", unit="B", unit_scale=True) as bar:
        for split, rows, ends in blocks:
            ids, found = encode_rows(encoding, rows, ends, separator)
            with open(part / f"{split}.bin", "ab") as file:
                file.write(ids)
            hashes[split].update(ids)
            counts[split].update(found, tokens=len(ids))
            bar.update(found["bytes"])
    return {split: dict(counts[split], sha256=hashes[split].hexdigest()) for split in SPLITS}


def write_files(read, origin, options, part):
    """Write a data set's files into the folder `part`. Raises UserError, and OSError."""
    # the vocabulary
    meta = dict(tokenizer="gpt2", vocab_size=VOCAB_SIZE, separator=options.separator)
    vocabulary = ""
    if options.vocab_size != VOCAB_SIZE:
        vocabulary = learn_vocabulary(read, options)
        (part / "tokenizer.tiktoken").write_text(vocabulary)
        sha256 = hashlib.sha256(vocabulary.encode()).hexdigest()
        size = len(vocabulary.splitlines()) + (options.separator == "endoftext")
        meta |= dict(tokenizer=f"own-{sha256[:8]}", tokenizer_sha256=sha256, vocab_size=size)
        origin["vocab_size"] = options.vocab_size
        if size < options.vocab_size:
            print(f"the text gives {size:,} tokens, not {options.vocab_size:,}")

    # the text
    splits = write_splits(read(), load_tokenizer(vocabulary), options.separator, part)
    if not splits["test"]["tokens"]:
        del splits["test"]
    for split, counts in splits.items():
        tokens, words, nbytes = (counts[key] for key in ("tokens", "words", "bytes"))
        if tokens < 2:  # nothing to predict
            fix = "give a --source with more, or raise --val_fraction"
            raise UserError(f"{origin['name']} has too little text for the {split} split; {fix}")
        print(f"{split:5} {tokens:>13,} tokens {words:>13,} words {nbytes:>13,} bytes")
    meta |= dict(source=origin, splits=splits)
    (part / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def write_data_set(name, options):
    """Write a data set, whole or not at all. Raises UserError, and OSError."""
    read, origin = open_source(name, options)
    folder = Path(options.data_dir, name)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".partial"
    with take_lock(Path(options.data_dir, f".{name}.lock"), folder, "wait for it"):
        shutil.rmtree(part, ignore_errors=True)  # a killed process's
        part.mkdir()
        try:
            write_files(read, origin, options, part)
            for path in sorted(part.iterdir()):  # meta.json first: stopped midway, its hashes tell
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def prepare(name, source="", separator="", data_dir="data", vocab_size=0, **more):
    """Write a data set's token files and meta.json into data_dir/name, whole or not at all. The
    arguments are the settings of Options. Returns the Dataset. Raises UserError."""
    if name in ("", ".", "..") or "/" in name:
        there = ", ".join(SEPARATORS)
        raise UserError(f"name a data set, not {name!r}: {there}, or a word with --source PATH")
    text, size = vocabulary_of(name)
    separator = separator or SEPARATORS.get(text, "endoftext")
    vocab_size = vocab_size or size
    options = Options(
        str(source), separator=separator, vocab_size=vocab_size, data_dir=str(data_dir), **more
    )
    # WikiText in several vocabularies is several data sets
    named = f"{text}-{vocab_size}" if text in HUB_CONFIGS and vocab_size != VOCAB_SIZE else text
    try:
        if is_prepared(named, options):
            return Dataset(named, data_dir)
        write_data_set(named, options)
    except OSError as error:
        raise UserError(f"cannot prepare {name} ({first_line(error)}); nothing was kept") from None
    dataset = Dataset(named, data_dir)
    train = dataset.counts["train"]
    vocabulary = f"{dataset.vocab_size:,} tokens of {train.bytes / train.tokens:.2f} bytes"
    print(f"{dataset.folder} is prepared: separator {separator}, {vocabulary}")
    if name not in SEPARATORS and dataset.tokenizer == "gpt2" and train.bytes < 50e6:
        print("a small text may do better in its own vocabulary, with --vocab_size 4096 --force")
    return dataset


def main(argv=None):
    usage = "python prepare.py NAME [--source PATH | --hub OWNER/DATASET] [--setting value ...]"
    options, words = command_line(Options, argv, usage, words=1)
    prepare(*words or [""], **vars(options))


if __name__ == "__main__":
    run(main)
