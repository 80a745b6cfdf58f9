"""Text -> token files.

    python prepare.py wikitext-103 | wikitext-2 | demo
    python prepare.py NAME --source FOLDER | ZIP | FILE
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
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lab.console import UserError, command, cpu_cores, first_line, progress, run
from lab.data import HUB_CONFIGS, VOCAB_SIZE, Dataset, load_tokenizer
from lab.encode import encode_rows
from lab.folder import Lock
from lab.readers import BLOCK, Reading
from lab.settings import command_line, setting
from lab.sources import SPLITS, demo_source, hub_revision, hub_source, path_source

HUB = "Salesforce/wikitext"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"


@dataclass
class Options:
    """How a data set is prepared."""

    source: str = setting(
        "",
        "text on disk: a folder, a zip, or one file of text, .jsonl or .parquet (.gz, .zst, too)",
        path=True,
    )
    hub: str = setting("", "OWNER/DATASET of the Hugging Face hub, encoded while it is downloaded")
    config: str = setting("", "--hub: its configuration")
    revision: str = setting("", "--hub: its branch, tag or commit (default: the newest)")
    column: str = setting("text", "the column of .jsonl, .parquet and the hub")
    separator: str = setting(
        "",
        "between rows: endoftext keeps each document as it is and marks its end (default, but none "
        "for WikiText and newline for the demo)",
        choices=("none", "newline", "endoftext"),
    )
    val_fraction: float = setting(
        0.05,
        "of a text without a validation split: the end of a text, every 20th row, or whole files "
        "where there are 20",
        low=0,
        below=1,
    )
    data_dir: str = setting("data", "where data sets lie", path=True)
    num_workers: int = setting(0, "threads that encode, 0 for one a core", low=0)
    force: bool = setting(False, "replace what is prepared")

    def problems(self):
        """What options say against each other, as phrases."""
        hub_words = self.config or self.revision
        rules = (
            (not self.val_fraction, "val_fraction must be above 0"),
            (self.source and self.hub, "source and hub are two places; give one of them"),
            (hub_words and not self.hub, "config and revision belong to --hub OWNER/DATASET"),
        )
        return [phrase for wrong, phrase in rules if wrong]


class SplitFile:
    """A split's token file while it is written, and what meta.json will say of it."""

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()
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


def default_separator(name):
    """What stands between the rows of a data set where --separator is not given."""
    if name == "demo":
        return "newline"
    return "none" if name in HUB_CONFIGS else "endoftext"


def fingerprint(source, note):
    """SHA-256 over a source's files and a note, so that an unchanged source is known again."""
    digest = hashlib.sha256()
    for file in source.files:
        digest.update(f"{file.name} {note}".encode())
        with file.open_stored() as stored:
            while block := stored.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


class Preparation:
    """One data set on its way from a source to its folder."""

    def __init__(self, name, options):
        """Raises UserError for what cannot be."""
        self.name, self.options = name, options
        if name not in (*HUB_CONFIGS, "demo") and not options.source and not options.hub:
            mend = f"{command('prepare.py', name)} --source PATH"
            raise UserError(
                f"unknown data set {name}; there are {', '.join(HUB_CONFIGS)} and demo, or your "
                f"own text: `{mend}`"
            )
        if name in ("", ".", "..") or "/" in name:
            raise UserError(
                f"{name!r} cannot name a folder under {options.data_dir}/; take a plain word"
            )
        self.path = self.text_path()
        self.separator = options.separator or default_separator(name)
        self.folder = Path(options.data_dir, name)
        # what a link stands for; the new files are written where they will stay
        real = self.folder.resolve()
        inside, beside = real / ".partial", real.parent / f".{real.name}.partial"
        self.real, self.part = real, inside if real.is_dir() else beside

    def text_path(self):
        """The path of the text, None where it is not on disk."""
        if not self.options.source:
            return None
        path = Path(self.options.source)
        if not path.exists():
            raise UserError(f"there is nothing at {path}; --source takes a folder, a zip or a file")
        clone = path / HUB_CONFIGS.get(self.name, "none")  # of the hub's repository
        return clone if self.name in HUB_CONFIGS and clone.is_dir() else path

    def origin(self, source):
        """What meta.json says of where the text is from. source: the Source at path, or None."""
        options = self.options
        if self.path:
            note = str(options.val_fraction) if source.divided or self.path.is_file() else ""
            note += "" if options.column == "text" else f" column {options.column}"
            return {"name": str(self.path), "sha256": fingerprint(source, note)}
        if options.hub:
            return {
                "name": f"{options.hub} {options.config}".strip(),
                "revision": options.revision or None,
                "column": options.column,
                "val_fraction": options.val_fraction,
            }
        if self.name in HUB_CONFIGS:
            return {"name": f"{HUB} {HUB_CONFIGS[self.name]}", "revision": REVISION}
        return {"name": f"pydoc_data.topics of Python {platform.python_version()}"}

    def open_source(self, reading, origin):
        """The Source of a text that is not on disk; its revision goes into origin."""
        options = self.options
        if options.hub:
            mend = "check --hub, --config and --revision, and run it again"
            origin["revision"] = hub_revision(options.hub, options.revision or None, mend)
            config = options.config or None
            return hub_source(options.hub, config, origin["revision"], reading, mend)
        if self.name in HUB_CONFIGS:
            mend = (
                f"with the text on disk, run `{command('prepare.py', self.name)} --source FOLDER` "
                "(wiki.train.raw, wiki.valid.raw, wiki.test.raw)"
            )
            config = HUB_CONFIGS[self.name]
            return hub_source(HUB, config, REVISION, reading, mend, streaming=False)
        return demo_source(reading)

    def check_prepared(self, origin):
        """Check a data set that is prepared already. Raises UserError where it is another."""
        options, dataset = self.options, Dataset(self.name, self.options.data_dir)
        for split in dataset.counts:
            dataset.split(split)
        same = True
        if "sha256" in origin:
            same = dataset.source.get("sha256") == origin["sha256"]
        elif options.hub:  # without --revision, the one that there was then
            revision = options.revision or dataset.source.get("revision")
            same = dataset.source == origin | {"revision": revision}
        about = f"separator {dataset.separator}, from {dataset.source['name']}"
        if same and dataset.separator == self.separator:
            print(f"{self.folder} is already prepared: {about}")
            return
        keep = ""
        if same and not options.separator and "sha256" in origin:
            more = () if str(options.data_dir) == "data" else ("--data_dir", options.data_dir)
            words = "--source", origin["name"], *more, "--separator", dataset.separator
            keep = f"`{command('prepare.py', self.name, *words)}` keeps it, "
        raise UserError(
            f"{self.folder} was prepared otherwise ({about}); {keep}--force replaces it, "
            "--data_dir DIR puts this one elsewhere"
        )

    def go(self):
        """Prepare the data set, or say that it is prepared. Raises UserError, and OSError of the
        disk."""
        started, options = time.time(), self.options
        documents = self.separator == "endoftext"
        reading = Reading(options.column, documents, options.val_fraction)
        source = path_source(self.path, reading) if self.path else None
        origin = self.origin(source)
        known = (self.folder / "meta.json").exists()
        if known and not options.force:
            return self.check_prepared(origin)
        if not known and any((self.folder / f"{split}.bin").exists() for split in SPLITS):
            raise UserError(
                f"{self.folder} holds token files without a meta.json, another program's, such as "
                "nanoGPT's; choose another name or --data_dir"
            )
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        source = source or self.open_source(reading, origin)
        splits = self.write_splits(source)
        for split, counts in splits.items():
            if counts["tokens"] == 0:
                raise UserError(
                    f"the {split} split of {origin['name']} holds no text; give a --source that "
                    "does"
                )
        meta = dict(tokenizer="gpt2", vocab_size=VOCAB_SIZE, separator=self.separator)
        meta |= dict(source=origin, splits=splits)
        text = json.dumps(meta, indent=2) + "\n"
        (self.part / "meta.json").write_text(text, encoding="utf-8")
        move_in(self.part, self.real)
        self.tell(splits, source.left_out, time.time() - started)

    def write_splits(self, source):
        """Encode a source on all workers into part/SPLIT.bin. Returns {split: what meta.json says
        of it}."""
        encoding = load_tokenizer()
        # measured: two threads are a quarter faster where another has used tiktoken before them
        encoding.encode_ordinary(" the" * 250_000)
        workers = self.options.num_workers or cpu_cores()
        pool = ThreadPoolExecutor(workers)  # tiktoken lets go of the interpreter's lock
        pending, splits = deque(), {}
        with contextlib.ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)
            for split in source.splits:
                file = stack.enter_context(open(self.part / f"{split}.bin", "wb"))
                splits[split] = SplitFile(file)
            bar = progress(source.total(), "preparing", unit="B", unit_scale=True)
            stack.enter_context(bar)
            for split, block in source.blocks():
                job = pool.submit(encode_rows, encoding, block.rows, self.separator)
                pending.append((split, block, job))
                if len(pending) > 2 * workers:
                    self.take(pending, splits, bar)
            while pending:
                self.take(pending, splits, bar)
            return {split: file.finish() for split, file in splits.items()}

    def take(self, pending, splits, bar):
        """Write the first of the pending blocks."""
        split, block, job = pending.popleft()
        ids, words, nbytes = job.result()
        rows = len(block.rows)
        if not block.begins:  # a document goes on, perhaps amid a word
            rows -= 1
            words -= not block.rows[0][0].isspace()
        if not block.ends and self.separator == "endoftext":
            ids = ids[:-1]
        # where a line end is part of the text it counts as a word, as the literature counts
        words += rows if self.separator == "newline" else 0
        splits[split].add(ids, words=words, bytes=nbytes, rows=rows)
        bar.update(block.size)

    def tell(self, splits, left_out, seconds):
        """Print what was prepared. left_out: {why: files}."""
        for split, counts in splits.items():
            tokens, words, nbytes = (counts[key] for key in ("tokens", "words", "bytes"))
            print(f"{split:5} {tokens:>13,} tokens {words:>13,} words {nbytes:>13,} bytes")
        mb = sum(counts["bytes"] for counts in splits.values()) / 1e6
        print(
            f"{self.folder} is prepared: separator {self.separator}, {mb:,.1f} MB in "
            f"{seconds:.1f} s"
        )
        if found := +left_out:
            print(f"left out: {', '.join(f'{count:,} {why}' for why, count in found.items())}")


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


def prepare(name, source="", separator="", data_dir="data", **more):
    """Write a data set's token files and meta.json into data_dir/name, whole or not at all. The
    arguments are the settings of Options. Returns the Dataset. Raises UserError."""
    options = Options(str(source), separator=separator, data_dir=str(data_dir), **more)
    preparation = Preparation(name, options)
    mend = "wait for it, or choose another name or --data_dir"
    with Lock() as lock:
        try:
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            lock.take(Path(data_dir, f".{name}.lock"), preparation.folder, mend)
            preparation.go()
        # RuntimeError: a zip that is encrypted
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            mend = "free some space and run it again" if full else "mend that and run it again"
            why = first_line(error)
            raise UserError(f"cannot prepare {name}: {why}; nothing was kept; {mend}") from None
        finally:
            if lock.owned:  # or it is another process's
                shutil.rmtree(preparation.part, ignore_errors=True)
    return Dataset(name, data_dir)


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
