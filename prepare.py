"""Text -> token files.

    python prepare.py wikitext-103 | wikitext-2 | demo
    python prepare.py NAME --source FOLDER | ZIP | TEXT FILE

writes data/NAME/{train,val,test}.bin, raw little-endian uint16 as nanoGPT's, and meta.json with what they hold.
"""

from lab.console import UserError, command, first_line, run

import argparse
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
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import HUB_CONFIGS, VOCAB_SIZE, load_meta, load_tokenizer, load_tokens
from lab.files import Lock

SPLITS = ("train", "val", "test")
HUB = "Salesforce/wikitext"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
BLOCK = 1 << 20  # bytes of text that are read, encoded and written at a time
# WikiText's own names, ours, and the hub's with their shard numbers
FILE_NAME = re.compile(
    r"(?:wiki\.)?(train|validation|valid|val|test)(?:-(\d{5})-of-(\d{5}))?\.(raw|tokens|txt|jsonl|parquet)"
)


# --- rows to ids ----------------------------------------------------------------------------------------------------


def encode_rows(encoding, rows, separator):
    """Token ids of rows (a list of str), each encoded by itself, put end to end: (ids uint16, words, bytes).

    separator none: a row is stripped. newline: it is kept as it is and ends in one newline. Blank rows give nothing.
    One call of tiktoken for each row would spend a third of the time between calls, so that rows are joined where
    GPT-2's pattern splits between them in any case: around a newline with no white space on either side (and id 198,
    the newline itself, goes out again), or after a newline that no run of white space follows.
    """
    glue, groups, closed, words, nbytes = "\n" if separator == "none" else "", [], True, 0, 0
    for row in rows:
        if not row.strip():
            continue
        text = row.strip() if glue else row.removesuffix("\n") + "\n"
        words, nbytes = words + len(text.split()), nbytes + len(text.encode())
        apart = "\n" in text if glue else text[:2].isspace()
        if apart or closed:
            groups.append([])
        groups[-1].append(text)
        closed = apart and glue
    ids = [np.empty(0, np.uint32)]
    for group in groups:
        found = encoding.encode_to_numpy(glue.join(group), disallowed_special=())
        ids.append(found[found != 198] if glue and "\n" not in group[0] else found)
    return np.concatenate(ids).astype("<u2"), words, nbytes


# --- the sources: each gives, for a split, its size in bytes and its blocks (rows, bytes read) ----------------------


def read_text(name, open_file, start=0, end=None):
    """Blocks of a UTF-8 file's lines, from byte start to byte end, which are moved on to the next line's start."""
    with open_file() as file:
        position = start
        if start:
            file.seek(start - 1)
            position += len(file.readline()) - 1
        while end is None or position < end:
            raw = file.read(BLOCK if end is None else min(BLOCK, end - position))
            raw += b"" if raw.endswith(b"\n") else file.readline()
            if not raw:
                return
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                where = position + error.start
                raise UserError(f"{name} is not UTF-8 text at byte {where:,}; convert it, as `iconv` does") from None
            text = text.removeprefix("\ufeff") if position == 0 else text
            rows = text.replace("\r\n", "\n").split("\n")
            rows = [row + "\n" for row in rows[:-1]] + rows[-1:] * bool(rows[-1])
            position += len(raw)
            yield rows, len(raw)


def read_jsonl(name, open_file):
    """Blocks of the field "text" of a .jsonl file's lines."""
    number = 0
    for rows, size in read_text(name, open_file):
        texts = []
        for row in rows:
            number += 1
            if not row.strip():
                continue
            try:
                texts.append(json.loads(row)["text"])
                texts[-1].encode()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f'{name}, line {number}: not a JSON object with a "text" in UTF-8; mend it') from None
        yield texts, size


def read_parquet(name, open_file):
    """Blocks of the column "text" of a .parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file() as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=2048, columns=["text"]):
                rows = [row or "" for row in batch.column(0).cast(pyarrow.string()).to_pylist()]
                yield rows, sum(map(len, rows))
    except (pyarrow.ArrowException, IndexError, OSError, UnicodeDecodeError) as error:
        raise UserError(f'{name} is not a parquet file with a column "text" ({first_line(error)})') from None


def file_size(name, size, open_file):
    """Bytes of text in a file, for the progress bar; a parquet file is compressed, so that its footer is asked."""
    if not name.endswith(".parquet"):
        return size
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file() as file:
            meta = pyarrow.parquet.read_metadata(file)
            return sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is not a parquet file ({first_line(error)})") from None


READERS = {"jsonl": read_jsonl, "parquet": read_parquet}


def folder_files(path):
    """{name: (size, function that opens it for reading bytes)} of a folder's files, or a zip's at any depth."""
    if path.is_dir():
        return {f.name: (f.stat().st_size, lambda f=f: open(f, "rb")) for f in sorted(path.iterdir())}
    archive = zipfile.ZipFile(path)
    members = [m for m in archive.infolist() if not m.is_dir() and "__MACOSX" not in m.filename]
    return {m.filename: (m.file_size, lambda m=m: archive.open(m)) for m in members}


def source_splits(path, val_fraction):
    """{split: (bytes, iterator of blocks)} of what lies at path: a folder, the zip of one, or one text file."""
    if path.is_file() and not zipfile.is_zipfile(path):
        if path.suffix in (".parquet", ".jsonl"):
            raise UserError(f"{path} is one split; put it into a folder as train{path.suffix} beside a "
                            f"validation{path.suffix}, and give the folder")
        size, name = path.stat().st_size, str(path)
        cut = int(size * (1 - val_fraction))
        return {
            "train": (cut, read_text(name, lambda: open(path, "rb"), 0, cut)),
            "val": (size - cut, read_text(name, lambda: open(path, "rb"), cut, size)),
        }
    files, found = folder_files(path), {}
    for name, (size, open_file) in sorted(files.items()):
        if match := FILE_NAME.fullmatch(os.path.basename(name)):
            split, _, shards, kind = match.groups()
            split = "val" if split.startswith("val") else split
            found.setdefault(split, []).append((name, size, open_file, kind, int(shards or 1)))
    splits = {}
    for split in SPLITS:
        parts = found.get(split, [])
        names = ", ".join(part[0] for part in parts)
        if not parts and split != "test":
            raise UserError(f"{path} has no {split} split; it needs wiki.{{train,valid,test}}.raw, or "
                            "{train,validation,test} as .txt, .jsonl or .parquet")
        if parts and (len({part[3:] for part in parts}) > 1 or len(parts) != parts[0][4]):
            raise UserError(f"{path}: the {split} split must be one file or all of its shards, not {names}")
        if parts:
            total = sum(file_size(name, size, open_file) for name, size, open_file, *_ in parts)
            blocks = (
                block
                for name, _, open_file, kind, _ in parts
                for block in READERS.get(kind, read_text)(f"{path}/{name}", open_file)
            )
            splits[split] = total, blocks
    return splits


def hub_splits(dataset):
    """{split: (bytes, iterator of blocks)} of WikiText from the Hugging Face hub, downloaded once into its cache."""
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_dataset(HUB, HUB_CONFIGS[dataset], revision=REVISION)
    except Exception as error:  # the network, the cache and the hub fail in as many ways as there are libraries below
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise UserError(
            f"cannot get {HUB} from {host} ({first_line(error)}); with the text on disk, run "
            f"`{command('prepare.py', dataset)} --source FOLDER` (wiki.train.raw, wiki.valid.raw, wiki.test.raw)"
        ) from None

    def blocks(split):
        # read, not mapped as datasets itself would: mapped pages count as memory of this process, half a GB of them
        for file in split.cache_files:
            with pyarrow.OSFile(file["filename"]) as stream:
                for batch in pyarrow.ipc.open_stream(stream):
                    rows = batch.column("text").to_pylist()
                    yield rows, sum(map(len, rows))

    names = {"train": "train", "val": "validation", "test": "test"}
    return {ours: (loaded[theirs].data.nbytes, blocks(loaded[theirs])) for ours, theirs in names.items()}


def demo_splits():
    """{split: (bytes, iterator of blocks)} of Python's own documentation as CPython carries it, 90/5/5 by topic."""
    from pydoc_data.topics import topics

    texts, shares = dict.fromkeys(SPLITS, ""), dict(train=0.9, val=0.05, test=0.05)
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):  # the long ones first
        total = sum(map(len, texts.values())) + len(text)
        split = max(SPLITS, key=lambda split: shares[split] * total - len(texts[split]))  # the one most in want
        texts[split] += text + "\n"
    return {split: (len(text), [(text.split("\n"), len(text))]) for split, text in texts.items()}


# --- preparing ------------------------------------------------------------------------------------------------------


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


def write_split(path, total, blocks, separator, encoding, pool, workers):
    """Encode a split's blocks on all workers into a token file; what meta.json says of it, as a dict."""
    counts = dict(tokens=0, words=0, bytes=0, rows=0)
    digest, pending = hashlib.sha256(), deque()
    with open(path, "wb") as file, progress(total, path.stem, unit="B", unit_scale=True) as bar:

        def take():
            size, rows, job = pending.popleft()
            ids, words, nbytes = job.result()
            file.write(ids.tobytes())
            digest.update(ids.tobytes())
            # where a line end is part of the text it counts as a word of its own, as the literature counts
            words += rows if separator == "newline" else 0
            for key, more in dict(tokens=len(ids), words=words, bytes=nbytes, rows=rows).items():
                counts[key] += more
            bar.update(size)

        for rows, size in blocks:
            pending.append((size, len(rows), pool.submit(encode_rows, encoding, rows, separator)))
            if len(pending) > 2 * workers:
                take()
        while pending:
            take()
        file.flush()
        os.fsync(file.fileno())
    return counts | {"sha256": digest.hexdigest()}


def fingerprint(path, val_fraction):
    """SHA-256 over the names and contents of a source's files, so that an unchanged source is known again."""
    digest, files = hashlib.sha256(), [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if FILE_NAME.fullmatch(file.name))
    for file in files:
        digest.update(f"{file.name} {val_fraction if file is path else ''}".encode())
        with open(file, "rb") as f:
            while block := f.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def move_in(part, folder):
    """Put the data set that lies whole in `part`, on the same file system, in the place of the one in
    `folder`. What else lies there is the user's. Stopped midway, the sums in meta.json tell."""
    if not folder.exists():
        os.rename(part, folder)
        return
    for split in SPLITS:
        if (part / f"{split}.bin").exists():
            os.replace(part / f"{split}.bin", folder / f"{split}.bin")
        else:
            (folder / f"{split}.bin").unlink(missing_ok=True)
    os.replace(part / "meta.json", folder / "meta.json")


def prepare(dataset, source=None, separator=None, data_dir="data", num_workers=0, val_fraction=0.05, force=False):
    """Write a data set's token files and meta.json into data_dir/dataset, whole or not at all.

    source: None for the hub or the demo's own text, else a path. separator: None is newline for demo, else none.
    num_workers: threads that encode, 0 for one a core. Raises UserError; returns meta.
    """
    if dataset not in (*HUB_CONFIGS, "demo") and not source:
        raise UserError(f"unknown data set {dataset}; there are {', '.join(HUB_CONFIGS)} and demo, or your own text: "
                        f"`{command('prepare.py', dataset)} --source PATH`")
    if dataset in ("", ".", "..") or "/" in dataset:
        raise UserError(f"{dataset!r} cannot name a folder under {data_dir}/; take a plain word")
    if not 0 < val_fraction < 1 or num_workers < 0:
        raise UserError("--val_fraction must be between 0 and 1, and --num_workers 0 or more")
    separator = separator or ("newline" if dataset == "demo" else "none")
    folder, path = Path(data_dir, dataset), Path(source) if source else None
    real = folder.resolve()  # what a link stands for; the new files are written where they will stay
    part = real / ".partial" if real.is_dir() else real.parent / f".{real.name}.partial"
    if path and not path.exists():
        raise UserError(f"there is nothing at {path}; --source takes a folder, a zip or a text file")
    if path and dataset in HUB_CONFIGS and (path / HUB_CONFIGS[dataset]).is_dir():  # a clone of the hub's repository
        path = path / HUB_CONFIGS[dataset]
    workers = num_workers or cpu_cores()
    pool = ThreadPoolExecutor(workers)  # tiktoken lets go of the interpreter's lock
    started, lock = time.time(), Lock()
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        lock.take(Path(data_dir, f".{dataset}.lock"), folder, "wait for it, or choose another name or --data_dir")
        if path:
            origin = {"name": str(path), "sha256": fingerprint(path, val_fraction)}
        elif dataset in HUB_CONFIGS:
            origin = {"name": f"{HUB} {HUB_CONFIGS[dataset]}", "revision": REVISION}
        else:
            origin = {"name": f"pydoc_data.topics of Python {platform.python_version()}"}
        if (folder / "meta.json").exists() and not force:
            meta = load_meta(dataset, data_dir)
            for split in meta["splits"]:
                load_tokens(dataset, split, data_dir)
            was = f"separator {meta['separator']}, from {meta['source']['name']}"
            same = not path or meta["source"].get("sha256") == origin["sha256"]
            if not same or meta["separator"] != separator:
                raise UserError(f"{folder} was prepared otherwise ({was}); --force replaces it, --data_dir DIR "
                                "puts this one elsewhere")
            print(f"{folder} is already prepared: {was}")
            return meta
        if not (folder / "meta.json").exists() and any((folder / f"{split}.bin").exists() for split in SPLITS):
            raise UserError(f"{folder} holds token files without a meta.json, another program's, such as nanoGPT's; "
                            "choose another name or --data_dir")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        encoding = load_tokenizer()
        if path:
            splits = source_splits(path, val_fraction)
        else:
            splits = hub_splits(dataset) if dataset in HUB_CONFIGS else demo_splits()
        meta = dict(tokenizer="gpt2", vocab_size=VOCAB_SIZE, separator=separator, source=origin, splits={})
        for split, (total, blocks) in splits.items():
            counts = write_split(part / f"{split}.bin", total, blocks, separator, encoding, pool, workers)
            if counts["tokens"] == 0:
                raise UserError(f"the {split} split of {origin['name']} holds no text; give a --source that does")
            meta["splits"][split] = counts
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
    return meta


def main(argv=None):
    parser = argparse.ArgumentParser(description="Turn text into token files under data/.", allow_abbrev=False)
    parser.add_argument("dataset", metavar="NAME", help="wikitext-103, wikitext-2, demo, or a name for your own text")
    parser.add_argument("--source", type=os.path.expanduser,
                        help="text on disk: a folder of splits, the zip of one, or one text file")
    parser.add_argument("--separator", choices=("none", "newline"), help="between rows (default none; demo: newline)")
    parser.add_argument("--data_dir", type=os.path.expanduser, default="data",
                        help="where data sets lie (default data)")
    parser.add_argument("--num_workers", type=int, default=0, help="threads that encode (default: one a core)")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="of one text file, its end (default 0.05)")
    parser.add_argument("--force", action="store_true", help="replace what is prepared")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    prepare(**vars(args))


if __name__ == "__main__":
    run(main)
