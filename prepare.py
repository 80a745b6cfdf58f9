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
import signal
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lab.console import ROOT, UserError, command, cpu_cores, first_line, progress, run
from lab.data import HUB_CONFIGS, VOCAB_SIZE, Dataset, check_ours, load_tokenizer, vocabulary_of
from lab.encode import encode_rows, learn, texts_of
from lab.folder import take_lock
from lab.settings import command_line, setting
from lab.text import BLOCK, SPLITS, Source, demo_blocks, hub_blocks, path_source

HUB = "Salesforce/wikitext"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
LEARN_FROM = 200_000_000  # bytes of text, at most, that a vocabulary is learned from
SEPARATORS = {"demo": "newline"} | dict.fromkeys(HUB_CONFIGS, "none")  # of all others: endoftext


@dataclass
class Options:
    """How a data set is prepared."""

    source: str = setting("", "a folder or file of text, .jsonl or .parquet (.gz too)", path=True)
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
        0.05, "what a text without a validation split gives to one", low=1e-6, below=1
    )
    data_dir: str = setting("data", "where data sets lie", path=True)
    force: bool = setting(False, "replace what is prepared")

    def problems(self):
        """What options say against each other, as phrases."""
        if self.source and self.hub:
            return ["source and hub cannot be combined with each other"]
        return ["config belongs to --hub"] if self.config and not self.hub else []


def check_name(name, options):
    """Raise UserError for a name that cannot be, or that does not say where its text is."""
    known = ", ".join(SEPARATORS)
    if name in ("", ".", "..") or "/" in name:
        fix = f"there are {known}, or a plain word for your own text with --source PATH"
        raise UserError(f"{name!r} cannot name a data set; {fix}")
    folder = Path(options.data_dir, name)
    check_ours(folder)
    if name in SEPARATORS or options.source or options.hub:
        return
    own = f"`{command('prepare.py', name)} --source PATH"
    if (folder / "meta.json").exists():
        train = command("train.py", ROOT / "config/own.py", "--dataset", name)
        raise UserError(f"{folder} is prepared; `{train}` trains on it, {own} --force` replaces it")
    raise UserError(f"unknown data set {name}; there are {known}, or your own text: {own}`")


def open_source(name, options):
    """(the Source of a data set, what meta.json says of where it is from). Nothing of the hub is
    read yet. Raises UserError and OSError."""
    text, _ = vocabulary_of(name)
    settings = dict(column=options.column, val_fraction=options.val_fraction)
    if options.source:
        path = Path(options.source)
        source = path_source(path, options)
        return source, dict(name=str(path), sha256=fingerprint(source.files)) | settings
    if options.hub:
        where = options.hub, options.config or None
        hub = f"{options.hub} {options.config}".strip()
        origin = dict(name=hub, hub=hub, revision=None) | settings  # the newest
        fix = "check --hub and --config, and run it again"
    elif text == "demo":
        origin = dict(name=f"pydoc_data.topics of Python {platform.python_version()}")
        return Source(partial(demo_blocks, options.separator)), origin
    else:
        where = HUB, HUB_CONFIGS[text]
        origin = dict(name=" ".join(where), revision=REVISION)
        size = [] if options.vocab_size == VOCAB_SIZE else ["--vocab_size", options.vocab_size]
        again = command("prepare.py", text, *size)
        fix = f"with the text on disk, run `{again} --source FOLDER`"
    return Source(partial(hub_blocks, *where, origin, options, fix)), origin


def fingerprint(files):
    """SHA-256 of the names and bytes of a source's files."""
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(name.encode())
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def check_prepared(dataset, origin, options):
    """Check a data set that is prepared already. Raises UserError where it is another."""
    for split in dataset.counts:
        dataset.split(split)
    old = dataset.source
    compared = [key for key in ("hub", "sha256", "column", "val_fraction") if key in origin]
    same = all(old.get(key) == origin[key] for key in compared)
    asked = old.get("vocab_size", VOCAB_SIZE)  # a short text may have given fewer
    how = f"separator {dataset.separator}, vocab_size {asked}, from {old['name']}"
    if not same or (dataset.separator, asked) != (options.separator, options.vocab_size):
        fix = "--force replaces it, --data_dir DIR puts this one elsewhere"
        raise UserError(f"{dataset.folder} was prepared otherwise ({how}); {fix}")
    print(f"{dataset.folder} is already prepared: {how}")


def learn_vocabulary(source, options, total):
    """The file of a vocabulary learned from the training split, as a text. A long text is learned
    from evenly spread blocks of it."""
    kept, size, apart = [], 0, 1  # every so many blocks are kept
    with progress(total, "learning a vocabulary", unit="B", unit_scale=True) as bar:
        train = (rows for split, (rows, _) in source.read() if split == "train")
        for number, rows in enumerate(train):
            nbytes = sum(len(row.encode()) for row in rows)
            bar.update(nbytes)
            if number % apart:
                continue
            kept.append((rows, nbytes))
            size += nbytes
            if size > LEARN_FROM:
                kept, apart = kept[::2], 2 * apart
                size = sum(nbytes for _, nbytes in kept)
    texts = (text for rows, _ in kept for text in texts_of(rows, options.separator))
    return learn(texts, options.vocab_size - (options.separator == "endoftext"))


def write_splits(blocks, encoding, separator, part, total):
    """Encode (split, block) pairs on all cores into part/SPLIT.bin. Returns {split: what meta.json
    says of it}. total: bytes of text for the progress bar, None where that is unknown."""
    # measured: two threads are a quarter faster where another has used tiktoken before them
    encoding.encode_ordinary(" the" * 250_000)
    counts = {split: Counter(tokens=0, words=0, bytes=0, rows=0) for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    pending = deque()

    def write_first():
        split, job = pending.popleft()
        ids, found = job.result()
        files[split].write(ids)
        hashes[split].update(ids)
        counts[split].update(found, tokens=len(ids))
        bar.update(found["bytes"])

    # threads, since tiktoken lets go of the interpreter's lock
    pool = ThreadPoolExecutor(cpu_cores())
    bar = progress(total, "preparing", unit="B", unit_scale=True)
    with ExitStack() as stack, bar, pool:
        files = {s: stack.enter_context(open(part / f"{s}.bin", "wb")) for s in SPLITS}
        for split, block in blocks:
            pending.append((split, pool.submit(encode_rows, encoding, *block, separator)))
            if len(pending) > 2 * cpu_cores():
                write_first()
        while pending:
            write_first()
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return {s: dict(counts[s], sha256=hashes[s].hexdigest()) for s in SPLITS}


def write_data_set(name, options, folder, part):
    """Write a data set into `part`, then move it to `folder`. Raises UserError, and OSError."""
    started = time.time()
    source, origin = open_source(name, options)
    if (folder / "meta.json").exists() and not options.force:
        check_prepared(Dataset(name, options.data_dir), origin, options)
        return
    shutil.rmtree(part, ignore_errors=True)  # a killed process's
    part.mkdir(parents=True)
    total = sum(path.stat().st_size for path in source.files.values()) or None

    # the vocabulary
    meta = dict(tokenizer="gpt2", vocab_size=VOCAB_SIZE, separator=options.separator)
    vocabulary = ""
    if options.vocab_size != VOCAB_SIZE:
        vocabulary = learn_vocabulary(source, options, total)
        (part / "tokenizer.tiktoken").write_text(vocabulary)
        sha256 = hashlib.sha256(vocabulary.encode()).hexdigest()
        size = len(vocabulary.splitlines()) + (options.separator == "endoftext")
        meta |= dict(tokenizer=f"own-{sha256[:8]}", tokenizer_sha256=sha256, vocab_size=size)
        origin["vocab_size"] = options.vocab_size
        if size < options.vocab_size:
            print(f"the text gives {size:,} tokens, not {options.vocab_size:,}")

    # the text
    encoding = load_tokenizer(vocabulary)
    splits = write_splits(source.read(), encoding, options.separator, part, total)
    if not splits["test"]["rows"]:
        del splits["test"]
        (part / "test.bin").unlink()
    for split, counts in splits.items():
        tokens, words, nbytes = (counts[key] for key in ("tokens", "words", "bytes"))
        if tokens < 2:  # nothing to predict
            fix = "give a --source with more, or raise --val_fraction"
            raise UserError(f"{origin['name']} has too little text for the {split} split; {fix}")
        print(f"{split:5} {tokens:>13,} tokens {words:>13,} words {nbytes:>13,} bytes")
    meta |= dict(source=origin, splits=splits)
    (part / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    move_in(part, folder)
    per_token = splits["train"]["bytes"] / splits["train"]["tokens"]
    print(
        f"{Path(options.data_dir, name)} is prepared in {time.time() - started:.1f} s: separator "
        f"{options.separator}, {meta['vocab_size']:,} tokens of {per_token:.2f} bytes"
    )
    if source.skipped:
        print(source.skipped)
    if name not in SEPARATORS and not vocabulary and splits["train"]["bytes"] < 50e6:
        print("a small text may do better in its own vocabulary, with --vocab_size 4096 --force")


def move_in(part, folder):
    """Put the data set that lies whole in `part`, on the same file system, in the place of the one
    in `folder`. What else lies there is the user's. Stopped midway, meta.json's hashes tell."""
    if not folder.exists():
        os.rename(part, folder)
        return
    for name in (*(f"{split}.bin" for split in SPLITS), "tokenizer.tiktoken"):
        if (part / name).exists():
            os.replace(part / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    os.replace(part / "meta.json", folder / "meta.json")


def prepare(name, source="", separator="", data_dir="data", vocab_size=0, **more):
    """Write a data set's token files and meta.json into data_dir/name, whole or not at all. The
    arguments are the settings of Options. Returns the Dataset. Raises UserError."""
    separator = separator or SEPARATORS.get(name, "endoftext")
    vocab_size = vocab_size or vocabulary_of(name)[1]
    options = Options(
        str(source), separator=separator, vocab_size=vocab_size, data_dir=str(data_dir), **more
    )
    check_name(name, options)
    # WikiText in several vocabularies is several data sets
    named = f"{name}-{vocab_size}" if name in HUB_CONFIGS and vocab_size != VOCAB_SIZE else name
    folder = Path(data_dir, named).resolve()  # what a link stands for
    part = folder / ".partial" if folder.is_dir() else folder.parent / f".{named}.partial"
    fix = "wait for it, or choose another name or --data_dir"
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        with take_lock(Path(data_dir, f".{named}.lock"), Path(data_dir, named), fix):
            try:
                write_data_set(named, options, folder, part)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        why = first_line(error)
        fix = "nothing was kept; put that right and run it again"
        raise UserError(f"cannot prepare {name}: {why}; {fix}") from None
    return Dataset(named, data_dir)


def main(argv=None):
    usage = "python prepare.py NAME [--source PATH | --hub OWNER/DATASET] [--setting value ...]"
    options, words = command_line(Options, argv, usage, words=1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    prepare(*words or [""], **vars(options))


if __name__ == "__main__":
    run(main)
