"""Text -> token files.

    python prepare.py wikitext-103 | wikitext-2 | demo
    python prepare.py NAME --source FOLDER | FILE
    python prepare.py NAME --hub OWNER/DATASET

writes data/NAME/{train,val,test}.bin, raw little-endian uint16 as nanoGPT's, and meta.json with
what they hold. docs/data.md says what is read, and how.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import signal
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lab.console import UserError, command, cpu_cores, first_line, progress, run
from lab.data import HUB_CONFIGS, VOCAB_SIZE, Dataset, load_tokenizer
from lab.folder import Lock
from lab.settings import command_line, setting
from lab.text import SPLITS, Reading, demo_source, encode_rows, hub_source, path_source

HUB = "Salesforce/wikitext"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
SEPARATORS = "none", "newline", "endoftext"


@dataclass
class Options:
    """How a data set is prepared."""

    source: str = setting(
        "", "text on disk: a folder or a file; text, .jsonl, .parquet (.gz, too)", path=True
    )
    hub: str = setting("", "OWNER/DATASET of the Hugging Face hub, encoded while it is downloaded")
    config: str = setting("", "--hub: its configuration")
    revision: str = setting("", "--hub: its branch, tag or commit (default: the newest)")
    column: str = setting("text", "the column of .jsonl, .parquet and the hub; a.b is b inside a")
    separator: str = setting(
        "",
        "between rows: endoftext keeps each document as it is and marks its end (default, but none "
        "for WikiText and newline for the demo)",
        choices=SEPARATORS,
    )
    val_fraction: float = setting(
        0.05, "of a text without a validation split that becomes one", low=0, below=1
    )
    data_dir: str = setting("data", "where data sets lie", path=True)
    num_workers: int = setting(0, "threads that encode, 0 for one per core", low=0)
    force: bool = setting(False, "replace what is prepared")

    def problems(self):
        """What options say against each other, as phrases."""
        hub_words = self.config or self.revision
        rules = (
            (not self.val_fraction, "val_fraction must be above 0"),
            (self.source and self.hub, "source cannot be combined with hub"),
            (hub_words and not self.hub, "config and revision belong to --hub OWNER/DATASET"),
        )
        return [phrase for wrong, phrase in rules if wrong]


class SplitFile:
    """A split's token file while it is written, and what meta.json will say of it."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()
        self.counts = dict(tokens=0, words=0, bytes=0, rows=0)

    def add(self, ids, **counts):
        """Append ids (uint16); counts: words, bytes and rows that they are of."""
        self.file.write(ids.tobytes())
        self.digest.update(ids.tobytes())
        for name, more in dict(tokens=len(ids), **counts).items():
            self.counts[name] += more

    def finish(self):
        """Bring it all to the disk; its entry in meta.json."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.counts | {"sha256": self.digest.hexdigest()}


def prepare(name, source="", separator="", data_dir="data", **more):
    """Write a data set's token files and meta.json into data_dir/name, whole or not at all. The
    arguments are the settings of Options. Returns the Dataset. Raises UserError."""
    options = Options(str(source), separator=separator, data_dir=str(data_dir), **more)
    options.separator = separator or {"demo": "newline"}.get(
        name, "none" if name in HUB_CONFIGS else "endoftext"
    )
    folder = Path(data_dir, name)
    if name in ("", ".", "..") or "/" in name:
        raise UserError(f"{name!r} cannot name a folder under {data_dir}/; take a plain word")
    if name not in (*HUB_CONFIGS, "demo") and not options.source and not options.hub:
        if (folder / "meta.json").exists():
            return say_prepared(name, data_dir)
        raise UserError(
            f"unknown data set {name}; there are {', '.join(HUB_CONFIGS)} and demo, or your own "
            f"text: `{command('prepare.py', name)} --source PATH`"
        )

    # what a link stands for; the new files are written where they will stay
    real = folder.resolve()
    part = real / ".partial" if real.is_dir() else real.parent / f".{real.name}.partial"
    with Lock() as lock:
        try:
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            fix = "wait for it, or choose another name or --data_dir"
            lock.take(Path(data_dir, f".{name}.lock"), folder, fix)
            shutil.rmtree(part, ignore_errors=True)
            if write(name, folder, part, options):
                move_in(part, real)
        except (OSError, EOFError, zlib.error) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            fix = "free some space and run it again" if full else "fix that and run it again"
            why = first_line(error)
            raise UserError(f"cannot prepare {name}: {why}; nothing was kept; {fix}") from None
        finally:
            if lock.owned:  # or it is another process's
                shutil.rmtree(part, ignore_errors=True)
    return Dataset(name, data_dir)


def say_prepared(name, data_dir):
    """Check a data set's files, and print what it is. Returns the Dataset. Raises UserError."""
    dataset = Dataset(name, data_dir)
    for split in dataset.counts:
        dataset.split(split)
    print(
        f"{dataset.folder} is already prepared: separator {dataset.separator}, from "
        f"{dataset.source['name']}; train on it with --dataset {name}, or --force prepares it anew"
    )
    return dataset


def write(name, folder, part, options):
    """Write a data set into the folder `part`, unless it is prepared. Returns whether it was
    written. Raises UserError, and OSError of the disk."""
    started = time.monotonic()
    source, origin = open_source(name, options)
    known = (folder / "meta.json").exists()
    if known and not options.force:
        check_same(name, origin, options)
        return False
    if not known and any((folder / f"{split}.bin").exists() for split in SPLITS):
        raise UserError(
            f"{folder} holds token files without a meta.json, another program's; choose another "
            "name or --data_dir"
        )
    part.mkdir(parents=True)
    splits = write_splits(source, part, options)
    for split, counts in splits.items():
        if counts["tokens"] == 0:
            raise UserError(
                f"the {split} split of {origin['name']} holds no text; give a --source that does"
            )
    metadata = dict(tokenizer="gpt2", vocab_size=VOCAB_SIZE, separator=options.separator)
    metadata |= dict(source=origin, splits=splits)
    (part / "meta.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")

    # what the user sees of it
    for split, c in splits.items():
        print(
            f"{split:5} {c['tokens']:>13,} tokens {c['words']:>13,} words {c['bytes']:>13,} bytes"
        )
    mb, seconds = sum(c["bytes"] for c in splits.values()) / 1e6, time.monotonic() - started
    print(f"{folder} is prepared: separator {options.separator}, {mb:,.1f} MB in {seconds:.1f} s")
    if source.skipped:
        print(f"skipped {source.skipped:,} files that are not text")
    return True


def open_source(name, options):
    """(the Source of a data set's text, where it is from, as meta.json says it). Raises UserError,
    OSError."""
    reading = Reading(options.column, options.separator == "endoftext", options.val_fraction)
    if options.source:
        path = Path(options.source)
        if not path.exists():
            raise UserError(f"there is nothing at {path}; --source takes a folder or a file")
        clone = path / HUB_CONFIGS.get(name, "none")  # of the hub's repository
        path = clone if name in HUB_CONFIGS and clone.is_dir() else path
        source = path_source(path, reading)
        note = str(options.val_fraction) if source.divided or path.is_file() else ""
        note += "" if options.column == "text" else f" column {options.column}"
        return source, {"name": str(path), "sha256": fingerprint(source, note)}
    if options.hub:
        fix = "check --hub, --config and --revision, and run it again"
        where = options.hub, options.config or None, options.revision or None
        source, revision = hub_source(*where, reading, fix, streaming=True)
        about = dict(column=options.column, val_fraction=options.val_fraction)
        return source, {
            "name": f"{options.hub} {options.config}".strip(),
            "revision": revision,
        } | about
    if name in HUB_CONFIGS:
        again = command("prepare.py", name)
        fix = (
            f"with the text on disk, run `{again} --source FOLDER` (wiki.train.raw, "
            "wiki.valid.raw, wiki.test.raw)"
        )
        source, _ = hub_source(HUB, HUB_CONFIGS[name], REVISION, reading, fix, streaming=False)
        return source, {"name": f"{HUB} {HUB_CONFIGS[name]}", "revision": REVISION}
    return demo_source(reading), {
        "name": f"pydoc_data.topics of Python {platform.python_version()}"
    }


def fingerprint(source, note):
    """SHA-256 over a source's files and a note, so that an unchanged source is known again."""
    digest = hashlib.sha256()
    for name, path in source.files.items():
        digest.update(f"{name} {note}".encode())
        with open(path, "rb") as stored:
            while block := stored.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_same(name, origin, options):
    """Say that a data set is prepared already. Raises UserError where it is another."""
    dataset = Dataset(name, options.data_dir)
    known = "sha256" if "sha256" in origin else "revision"
    same = origin.get(known) == dataset.source.get(known)
    if same and dataset.separator == options.separator:
        say_prepared(name, options.data_dir)
        return
    about = f"separator {dataset.separator}, from {dataset.source['name']}"
    raise UserError(
        f"{dataset.folder} was prepared otherwise ({about}); if the text is the same, `--separator "
        f"{dataset.separator}` keeps it, --force replaces it, --data_dir DIR puts this elsewhere"
    )


def write_splits(source, part, options):
    """Encode a source on all workers into part/SPLIT.bin. Returns {split: what meta.json says of
    it}."""
    encoding = load_tokenizer()
    # measured: two threads are a quarter faster where another has used tiktoken before them
    encoding.encode_ordinary(" the" * 250_000)
    workers = options.num_workers or cpu_cores()
    pool = ThreadPoolExecutor(workers)  # tiktoken lets go of the interpreter's lock
    pending, splits = deque(), {}

    def take():
        """Write the first of the pending blocks."""
        split, block, job = pending.popleft()
        ids, words, nbytes = job.result()
        rows = len(block.rows)
        if not block.begins:  # a document goes on, perhaps amid a word
            rows -= 1
            words -= not block.rows[0][0].isspace()
        if not block.ends and options.separator == "endoftext":
            ids = ids[:-1]
        # where a line end is part of the text it counts as a word, as the literature counts
        words += rows if options.separator == "newline" else 0
        splits[split].add(ids, words=words, bytes=nbytes, rows=rows)
        bar.update(block.size)

    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        for split in source.splits:
            splits[split] = SplitFile(stack.enter_context(open(part / f"{split}.bin", "wb")))
        bar = stack.enter_context(progress(source.total, "preparing", unit="B", unit_scale=True))
        for split, block in source.pairs:
            job = pool.submit(encode_rows, encoding, block.rows, options.separator)
            pending.append((split, block, job))
            if len(pending) > 2 * workers:
                take()
        while pending:
            take()
        return {split: file.finish() for split, file in splits.items()}


def move_in(part, folder):
    """Put the data set that lies whole in `part`, on the same file system, in the place of the one
    in `folder`. What else lies there is the user's. Stopped midway, the sums in meta.json tell."""
    if not folder.exists():
        os.rename(part, folder)
        return
    for split in SPLITS:
        if (part / f"{split}.bin").exists():
            os.replace(part / f"{split}.bin", folder / f"{split}.bin")
        else:
            (folder / f"{split}.bin").unlink(missing_ok=True)
    os.replace(part / "meta.json", folder / "meta.json")


def main(argv=None):
    usage = "python prepare.py NAME [--source PATH | --hub OWNER/DATASET] [--setting value ...]"
    options, words = command_line(Options, argv, usage, words=1)
    if not words:
        raise UserError(
            f"no data set given; `{command('prepare.py', 'demo')}` prepares the small one, and "
            f"there are {', '.join(HUB_CONFIGS)}, or your own text with --source"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    prepare(*words, **vars(options))


if __name__ == "__main__":
    run(main)
