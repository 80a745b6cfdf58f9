"""Text -> token files.

    python prepare.py wikitext-103 | wikitext-2 | demo
    python prepare.py NAME --source FOLDER | ZIP | FILE
    python prepare.py NAME --hub OWNER/DATASET

writes data/NAME/{train,val,test}.bin, raw little-endian uint16 as nanoGPT's, and meta.json with
what they hold. docs/data.md says what is read, and how.
"""

from lab.console import UserError, command, first_line, run

import argparse
import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import HUB_CONFIGS, VOCAB_SIZE, load_meta, load_tokenizer, load_tokens
from lab.files import Lock
from lab.sources import (
    BLOCK,
    SPLITS,
    WHITE,
    Reading,
    demo_source,
    hub_revision,
    hub_source,
    path_source,
)

HUB = "Salesforce/wikitext"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
END = "<|endoftext|>"
END_ID = 50256
IS_SPACE = np.array([chr(i).isspace() for i in range(0x3002)])  # no later character is one
LONG_RUN = 100_000  # white space that is cut; tiktoken refuses runs of a million


# --- rows to ids ---------------------------------------------------------------------------------


def encode_rows(encoding, rows, separator):
    """Token ids of rows (a list of str), put end to end: (ids uint16, words, bytes).

    Each row is encoded by itself. none: it is stripped. newline: it is kept as it is and ends in
    one newline. endoftext: it is kept as it is, and id 50256 follows, which is no word and no byte.
    Rows that are blank give nothing, and a byte-order mark at a row's start is dropped.
    """
    texts = []
    nbytes = 0
    for row in rows:
        text = row.removeprefix("\ufeff")
        if not text.strip():
            continue
        if separator == "none":
            text = text.strip()
        elif separator == "newline":
            text = text.removesuffix("\n") + "\n"
        texts.append(text)
        nbytes += len(text.encode())
    ids = encode_apart(encoding, texts)
    words = count_words(texts)
    if separator != "endoftext":
        ids = ids[ids != END_ID]
    return ids.astype("<u2"), words, nbytes


def count_words(texts):
    """What str.split finds in texts, in half its time and without the interpreter's lock."""
    characters = np.frombuffer("\n".join(["", *texts]).encode("utf-32-le"), np.uint32)
    space = IS_SPACE[np.minimum(characters, len(IS_SPACE) - 1)]
    return int(np.count_nonzero(space[:-1] > space[1:]))


def encode_apart(encoding, texts):
    """tiktoken's ids (uint32) of each text by itself, with END_ID after each.

    One call for each text would spend a third of the time between calls. So they are joined by the
    token that tiktoken splits at before it looks at anything else, unless one of them spells it.
    """
    if not any(END in text or len(cut_long_runs(text)) > 1 for text in texts):
        joined = "".join(text + END for text in texts)
        return encoding.encode_to_numpy(joined, allowed_special={END})
    ids = [np.empty(0, np.uint32)]
    for text in texts:
        ids += [encoding.encode_to_numpy(part, disallowed_special=())
                for part in cut_long_runs(text)]
        ids.append(np.array([END_ID], np.uint32))
    return np.concatenate(ids)


def cut_long_runs(text):
    """The text in parts whose ids are those of the whole, none with a long run of white space
    before a word: GPT-2's pattern leaves the last character of such a run to what follows."""
    half = LONG_RUN // 2
    if len(text) < half or not any(text[i : i + half].isspace() for i in range(0, len(text), half)):
        return [text]
    runs = re.finditer(rf"[{WHITE}]{{{half},}}", text)
    cuts = [0, *(run.end() - 1 for run in runs if run.end() < len(text)), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


# --- preparing -----------------------------------------------------------------------------------


def cpu_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def progress(total, description, **kwargs):
    """A tqdm bar on a terminal; in a log file, a line every 30 seconds."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=description, dynamic_ncols=True, **kwargs)
    lines = dict(file=Lines(), mininterval=30, miniters=1, delay=30, position=0, ncols=100)
    return tqdm(total=total, desc=description, **lines, **kwargs)


class Lines:
    """Standard error for tqdm where it is no terminal: a line instead of a carriage return."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        sys.stderr.flush()


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


def write_splits(folder, source, separator, pool, workers):
    """Encode a source on all workers into folder/SPLIT.bin; {split: what meta.json says of it}."""
    encoding = load_tokenizer()
    # measured: two threads are a quarter faster where another has used tiktoken before them
    encoding.encode_ordinary(" the" * 250_000)
    pending = deque()
    with contextlib.ExitStack() as stack:
        splits = {}
        for split in source.splits:
            file = stack.enter_context(open(folder / f"{split}.bin", "wb"))
            splits[split] = SplitFile(file)
        bar = stack.enter_context(progress(source.total(), "preparing", unit="B", unit_scale=True))

        def take():
            split, block, job = pending.popleft()
            ids, words, nbytes = job.result()
            rows = len(block.rows)
            if not block.begins:  # a document goes on, perhaps amid a word
                rows -= 1
                words -= not block.rows[0][0].isspace()
            if not block.ends and separator == "endoftext":
                ids = ids[:-1]
            # where a line end is part of the text it counts as a word, as the literature counts
            words += rows if separator == "newline" else 0
            splits[split].add(ids, words=words, bytes=nbytes, rows=rows)
            bar.update(block.size)

        for split, block in source.blocks():
            job = pool.submit(encode_rows, encoding, block.rows, separator)
            pending.append((split, block, job))
            if len(pending) > 2 * workers:
                take()
        while pending:
            take()
        return {split: file.finish() for split, file in splits.items()}


@dataclass
class Options:
    """How a data set is prepared."""

    num_workers: int = 0  # threads that encode, 0 for one a core
    val_fraction: float = 0.05  # of a text without a validation split
    column: str = "text"  # of .jsonl, .parquet and the hub
    hub: str | None = None  # a data set of the hub
    config: str | None = None  # its configuration
    revision: str | None = None  # its branch, tag or commit
    force: bool = False  # replace what is prepared


def fingerprint(source, note):
    """SHA-256 over a source's files and a note, so that an unchanged source is known again."""
    digest = hashlib.sha256()
    for file in source.files:
        digest.update(f"{file.name} {note}".encode())
        with file.open_stored() as stored:
            while block := stored.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def open_source(dataset, reading, origin, options):
    """The Source of a data set that is not on disk; its revision goes into origin."""
    if options.hub:
        mend = "check --hub, --config and --revision, and run it again"
        origin["revision"] = hub_revision(options.hub, options.revision, mend)
        return hub_source(options.hub, options.config, origin["revision"], reading, mend)
    if dataset in HUB_CONFIGS:
        mend = (f"with the text on disk, run `{command('prepare.py', dataset)} --source FOLDER` "
                "(wiki.train.raw, wiki.valid.raw, wiki.test.raw)")
        return hub_source(HUB, HUB_CONFIGS[dataset], REVISION, reading, mend, streaming=False)
    return demo_source(reading)


def origin_of(dataset, path, source, options):
    """What meta.json says of where a data set is from. source: the Source at path, or None."""
    if path:
        note = str(options.val_fraction) if source.divided or path.is_file() else ""
        note += "" if options.column == "text" else f" column {options.column}"
        return {"name": str(path), "sha256": fingerprint(source, note)}
    if options.hub:
        name = f"{options.hub} {options.config or ''}".strip()
        return {"name": name, "revision": options.revision, "column": options.column,
                "val_fraction": options.val_fraction}
    if dataset in HUB_CONFIGS:
        return {"name": f"{HUB} {HUB_CONFIGS[dataset]}", "revision": REVISION}
    return {"name": f"pydoc_data.topics of Python {platform.python_version()}"}


def check_prepared(dataset, given, origin, options, data_dir):
    """meta.json of a data set that is prepared already. Raises UserError where it is another.

    given: the separator that is asked for, None for the default.
    """
    meta = load_meta(dataset, data_dir)
    for split in meta["splits"]:
        load_tokens(dataset, split, data_dir)
    was = meta["source"]
    same = True
    if "sha256" in origin:
        same = was.get("sha256") == origin["sha256"]
    elif options.hub:  # without --revision, the one that there was then
        same = was == origin | {"revision": options.revision or was.get("revision")}
    about = f"separator {meta['separator']}, from {was['name']}"
    folder = Path(data_dir, dataset)
    if same and meta["separator"] == (given or default_separator(dataset)):
        print(f"{folder} is already prepared: {about}")
        return meta
    keep = ""
    if same and not given and "sha256" in origin:
        more = () if str(data_dir) == "data" else ("--data_dir", data_dir)
        words = dataset, "--source", origin["name"], *more, "--separator", meta["separator"]
        keep = f"`{command('prepare.py', *words)}` keeps it, "
    raise UserError(f"{folder} was prepared otherwise ({about}); {keep}--force replaces it, "
                    "--data_dir DIR puts this one elsewhere")


def default_separator(dataset):
    """What stands between the rows of a data set where --separator is not given."""
    if dataset == "demo":
        return "newline"
    return "none" if dataset in HUB_CONFIGS else "endoftext"


def check_request(dataset, source, options, data_dir):
    """The path of the text, None where it is not on disk. Raises UserError for what cannot be."""
    if dataset not in (*HUB_CONFIGS, "demo") and not source and not options.hub:
        raise UserError(f"unknown data set {dataset}; there are {', '.join(HUB_CONFIGS)} and demo, "
                        f"or your own text: `{command('prepare.py', dataset)} --source PATH`")
    if dataset in ("", ".", "..") or "/" in dataset:
        raise UserError(f"{dataset!r} cannot name a folder under {data_dir}/; take a plain word")
    if not 0 < options.val_fraction < 1 or options.num_workers < 0:
        raise UserError("--val_fraction must be between 0 and 1, and --num_workers 0 or more")
    if source and options.hub:
        raise UserError("--source and --hub are two places; give one of them")
    if (options.config or options.revision) and not options.hub:
        raise UserError("--config and --revision belong to --hub OWNER/DATASET; give that, too")
    path = Path(source) if source else None
    if path and not path.exists():
        raise UserError(f"there is nothing at {path}; --source takes a folder, a zip or a file")
    if path and dataset in HUB_CONFIGS and (path / HUB_CONFIGS[dataset]).is_dir():
        return path / HUB_CONFIGS[dataset]  # a clone of the hub's repository
    return path


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


def prepare(dataset, source=None, separator=None, data_dir="data", **options):
    """Write a data set's token files and meta.json into data_dir/dataset, whole or not at all.

    source: a path, None for the hub or the demo's own text. separator: None for default_separator.
    options: see Options. Raises UserError; returns meta.
    """
    options = Options(**options)
    path = check_request(dataset, source, options, data_dir)
    folder = Path(data_dir, dataset)
    real = folder.resolve()  # what a link stands for; the new files are written where they will stay
    part = real / ".partial" if real.is_dir() else real.parent / f".{real.name}.partial"
    workers = options.num_workers or cpu_cores()
    pool = ThreadPoolExecutor(workers)  # tiktoken lets go of the interpreter's lock
    started, lock = time.time(), Lock()
    given, separator = separator, separator or default_separator(dataset)
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        mend = "wait for it, or choose another name or --data_dir"
        lock.take(Path(data_dir, f".{dataset}.lock"), folder, mend)
        reading = Reading(options.column, separator == "endoftext", options.val_fraction)
        text = path_source(path, reading) if path else None
        origin = origin_of(dataset, path, text, options)
        if (folder / "meta.json").exists() and not options.force:
            return check_prepared(dataset, given, origin, options, data_dir)
        files = any((folder / f"{split}.bin").exists() for split in SPLITS)
        if files and not (folder / "meta.json").exists():
            raise UserError(f"{folder} holds token files without a meta.json, another program's, "
                            "such as nanoGPT's; choose another name or --data_dir")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        text = text or open_source(dataset, reading, origin, options)
        splits = write_splits(part, text, separator, pool, workers)
        for split, counts in splits.items():
            if counts["tokens"] == 0:
                raise UserError(f"the {split} split of {origin['name']} holds no text; give a "
                                "--source that does")
        meta = dict(tokenizer="gpt2", vocab_size=VOCAB_SIZE, separator=separator, source=origin,
                    splits=splits)
        (part / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        move_in(part, real)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # RuntimeError: encrypted
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        mend = "free some space and run it again" if full else "mend that and run it again"
        raise UserError(f"cannot prepare {dataset}: {first_line(error)}; nothing was kept; {mend}") from None
    finally:
        pool.shutdown(cancel_futures=True)
        if lock.owned:  # or it is another process's
            shutil.rmtree(part, ignore_errors=True)
        lock.release()
    for split, counts in meta["splits"].items():
        print(f"{split:5} {counts['tokens']:>13,} tokens {counts['words']:>13,} words {counts['bytes']:>13,} bytes")
    mb = sum(counts["bytes"] for counts in meta["splits"].values()) / 1e6
    print(f"{folder} is prepared: separator {separator}, {mb:,.1f} MB in {time.time() - started:.1f} s")
    if left_out := +text.left_out:
        print(f"left out: {', '.join(f'{count:,} {why}' for why, count in left_out.items())}")
    return meta


def main(argv=None):
    parser = argparse.ArgumentParser(description="Turn text into token files under data/.", allow_abbrev=False)
    parser.add_argument("dataset", metavar="NAME", help="wikitext-103, wikitext-2, demo, or a name for your own text")
    parser.add_argument("--source", type=os.path.expanduser, metavar="PATH",
                        help="text on disk: a folder, a zip, or one file of text, .jsonl or "
                        ".parquet (.gz and .zst, too)")
    parser.add_argument("--hub", metavar="OWNER/DATASET",
                        help="a data set of the Hugging Face hub, encoded while it is downloaded")
    parser.add_argument("--config", help="its configuration")
    parser.add_argument("--revision", help="its branch, tag or commit (default: the newest)")
    parser.add_argument("--column", default="text",
                        help="of .jsonl, .parquet and the hub (default text)")
    parser.add_argument("--separator", choices=("none", "newline", "endoftext"),
                        help="between rows: endoftext keeps each document as it is and marks its "
                        "end (default, but none for WikiText and newline for the demo)")
    parser.add_argument("--data_dir", type=os.path.expanduser, default="data",
                        help="where data sets lie (default data)")
    parser.add_argument("--num_workers", type=int, default=0, help="threads that encode (default: one a core)")
    parser.add_argument("--val_fraction", type=float, default=0.05,
                        help="of a text without a validation split (default 0.05: the end of a "
                        "text, every 20th row, or whole files where there are 20)")
    parser.add_argument("--force", action="store_true", help="replace what is prepared")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    prepare(**vars(args))


if __name__ == "__main__":
    run(main)
