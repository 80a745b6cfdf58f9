"""Text, from where it lies to token ids.

A row is a line of a text file, or a row of .jsonl, .parquet and the hub. Where documents are asked
for, a text file is one row. Rows come in blocks, and a long document in several of them.
"""

import codecs
import contextlib
import gzip
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.console import UserError, first_line

BLOCK = 1 << 20  # bytes of text that are read, encoded and written at a time
SPLITS = "train", "val", "test"
FEW = 20  # from so many rows or files on, a text is divided between them and not inside one

# What a split is called: WikiText's names, the hub's with numbers and hashes, and what people write
SPLIT_NAME = re.compile(
    r"(?P<prefix>(?:.*[^a-z0-9])?)(?P<split>training|train|validation|valid|val|dev|testing|test)"
    r"(?:[-_.](?P<shard>\d+)(?:[-_.]of[-_.](?P<shards>\d+))?(?:-[0-9a-f]{6,64})?)?"
)
# What may lie beside splits and tables, and says what they are
ABOUT = re.compile(r"readme|license|citation|dataset_infos?\.json|meta\.json|.*\.md$")
# What is no text, by its first bytes
BINARY = {
    b"PK\x03\x04": "a zip archive or .docx",
    b"%PDF": "a PDF",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# White space as GPT-2's pattern has it: Python's \s has four control characters more.
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Where GPT-2's pattern splits whatever stands around: before white space between two words, or
# between a letter or digit and punctuation (those that every version of Unicode calls so). The last
# such place of a text; words stand on both sides of it.
CUT = re.compile(
    rf"(?s).*(?:\S(?=[{WHITE}]{{1,99}}\S)"
    r"|[A-Za-z0-9\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3](?=[!-/:-@\[-`{-~。，！？]))"
)
CUT_REACH = 100  # characters that CUT looks at around a place


class Block(NamedTuple):
    """Some rows, or a part of one long document, whose other parts are the blocks around it."""

    rows: list  # of str
    size: int  # bytes read for it, for the progress bar
    begins: bool = True  # the first row begins here
    ends: bool = True  # the last row ends here


class Reading(NamedTuple):
    """How text is to be read."""

    column: str = "text"  # of .jsonl, .parquet and the hub
    documents: bool = False  # a text file is one row, not a row per line
    val_fraction: float = 0.05  # of a text without a validation split


@dataclass
class Source:
    """A text: its splits, its (split, Block) pairs, and the files that it is read from."""

    splits: tuple
    pairs: Iterable
    total: int | None = None  # bytes to read, where that is known
    files: dict = field(default_factory=dict)  # {name inside the source: Path}
    divided: bool = False  # the validation split was split off
    skipped: int = 0  # files that are not text


# --- files


def kind_of(path):
    """(what a file holds by its name, without .gz: its suffix; its name without that)."""
    stem, suffix = os.path.splitext(path.name.lower().removesuffix(".gz"))
    return suffix, stem


def is_table(path):
    return kind_of(path)[0] in (".jsonl", ".json", ".parquet")


def open_bytes(path):
    """A file's bytes, unpacked."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def not_text(path):
    """What a file holds that is not text, as a phrase; "" for text."""
    with open_bytes(path) as stream:
        head = stream.read(1 << 13)
    if kind_of(path)[0] in (".csv", ".tsv"):
        return "CSV; save its rows as .jsonl, an object per line"
    known = [kind for magic, kind in BINARY.items() if head.startswith(magic)]
    known += ["a tar archive"] * (head[257:262] == b"ustar") + ["binary"] * (b"\0" in head)
    return f"{known[0]}; give the text that it holds, as UTF-8" if known else ""


def files_below(folder):
    """{name inside the folder: Path} of the files at any depth, links followed, each folder once,
    hidden ones left out. Raises OSError for a folder that cannot be listed."""
    files, seen = {}, set()

    def stop(error):
        raise error

    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        is_new = os.path.realpath(root) not in seen
        seen.add(os.path.realpath(root))
        folders[:] = [name for name in folders if is_new and not name.startswith(".")]
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            if is_new and path.is_file():  # no socket or pipe
                files[path.relative_to(folder).as_posix()] = path
    return dict(sorted(files.items()))


# --- rows of one file


def read_chunks(path, start=0, end=None):
    """(text, bytes read) of a UTF-8 file from byte start to byte end, about BLOCK at a time.

    start and end lie between characters. Raises UserError for text in another encoding.
    """
    decoder, position = codecs.getincrementaldecoder("utf-8")(), start
    with open_bytes(path) as stream:
        stream.seek(start)
        while True:
            raw = stream.read(BLOCK if end is None else min(BLOCK, end - position))
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                at, name = position - held + error.start, shlex.quote(str(path))
                raise UserError(
                    f"{path} is not UTF-8 text at byte {at:,}; if it is Latin-1, `iconv -f LATIN1 "
                    f"-t UTF-8 {name} > NEW_FILE` converts it (unpack it first if it is packed)"
                ) from None
            if text:
                yield text, len(raw)
            if not raw:
                return
            position += len(raw)


def read_lines(chunks):
    """Blocks of lines; a line ends in "\\n" also where its file has "\\r\\n"."""
    held = ""
    for text, size in chunks:
        whole, newline, rest = text.rpartition("\n")
        lines = (held + whole).replace("\r\n", "\n").split("\n") if newline else []
        if lines:
            lines[-1] = lines[-1].removesuffix("\r")  # of a "\r\n" that was parted
        held = rest if newline else held + rest
        yield Block([line + "\n" for line in lines], size)
    if held:
        yield Block([held], 0)


def read_document(chunks):
    """Blocks of one document, cut only where GPT-2's pattern splits in any case."""
    held, size, begins = "", 0, True
    for text, more in chunks:
        held += text
        size += more
        if len(held) < BLOCK:
            continue
        place = CUT.match(held, max(0, len(held) - len(text) - CUT_REACH))
        if place:
            yield Block([held[: place.end()]], size, begins, False)
            held, size, begins = held[place.end() :], 0, False
    if held:
        yield Block([held], size, begins)


def read_jsonl(path, column):
    """Blocks of a column of a .jsonl file's lines. A null is no row. Raises UserError."""
    number = 0
    for block in read_lines(read_chunks(path)):
        texts = []
        for line in block.rows:
            number += 1
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix("\ufeff"))
            except ValueError:
                row = None
            text = value_of(row, column)
            if text is ...:
                raise no_column(f"{path}, line {number}", row, column)
            if text is not None:  # a surrogate alone, as "\\ud800" may stand there, is no character
                texts.append(re.sub("[\ud800-\udfff]", "\ufffd", text))
        yield Block(texts, block.size)


def value_of(row, column):
    """The text, or None for a null, in a row's column; a.b is b inside a. Ellipsis if it is neither
    or not there."""
    for name in [column] if isinstance(row, dict) and column in row else column.split("."):
        row = row.get(name, ...) if isinstance(row, dict) else ...
    return row if row is None or isinstance(row, str) else ...


def no_column(where, row, column):
    """The UserError for a row without a text in its column; it names those that have one."""
    row = row if isinstance(row, dict) else {}
    inner = [f"{name}.{key}" for name, v in row.items() if isinstance(v, dict) for key in v]
    names = [name for name in [*row, *inner] if isinstance(value_of(row, name), str)]
    fix = f"--column takes {', '.join(names)}" if names else "write an object with a text per line"
    return UserError(f'{where}: no text under "{column}"; {fix}')


def read_table(batches, column, where):
    """Blocks of a column of pyarrow batches. A null is no row. Raises UserError."""
    for batch in batches:
        names = batch.schema.names
        rows = batch.column(column).to_pylist() if column in names else [...]
        texts = [text for text in rows if text is not None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f'{where}: no text under "{column}"; --column takes another of {", ".join(names)}'
            )
        yield Block(texts, sum(map(len, texts)))


def read_parquet(path, column):
    """Blocks of a column of a .parquet file. Raises UserError."""
    import pyarrow
    import pyarrow.parquet

    with open_bytes(path) as stream:
        try:
            parquet = pyarrow.parquet.ParquetFile(stream, buffer_size=BLOCK, pre_buffer=False)
            columns = [column] if column in parquet.schema_arrow.names else None
            batches = parquet.iter_batches(batch_size=1024, columns=columns)
            yield from read_table(batches, column, path)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            why = first_line(error)
            raise UserError(
                f"{path} is damaged or no parquet ({why}); bring a whole copy"
            ) from None


def read(path, reading, start=0, end=None):
    """Blocks of a file; of a text file from byte start to byte end. Raises UserError."""
    if kind_of(path)[0] == ".parquet":
        return read_parquet(path, reading.column)
    if is_table(path):
        return read_jsonl(path, reading.column)
    if why := not_text(path):
        raise UserError(f"{path} is {why}")
    chunks = read_chunks(path, start, end)
    return read_document(chunks) if reading.documents else read_lines(chunks)


# --- where text comes from


def our_split(name):
    """train, val or test, as people write them: training, validation, dev, testing, ..."""
    return {"tr": "train", "te": "test"}.get(name[:2].lower(), "val")


def named_splits(where, files):
    """{split: [Path]} of files that have a split's name, or lie in a folder that has one: those
    nearest to the top. {} where none has. Raises UserError where not everything there fits."""
    entries = {}  # {folder: {a file or folder right below it: [Path]}}
    for name, path in files.items():
        parts = name.split("/")
        for depth, part in enumerate(parts):
            below = entries.setdefault("/".join(parts[:depth]), {})
            below.setdefault(part, []).append(path)
    for folder in sorted(entries, key=lambda name: (len(Path(name).parts), name)):
        splits, others = {}, []
        for entry, paths in entries[folder].items():
            stem = (
                kind_of(Path(entry))[1] if files.get(entry_name(folder, entry)) else entry.lower()
            )
            if match := SPLIT_NAME.fullmatch(stem):
                splits.setdefault(our_split(match["split"]), []).append((entry, match, paths))
            elif not ABOUT.match(entry.lower()):
                others.append(entry)
        # one "test" alone is a word like any other, and so is what lies deeper
        if "train" in splits or (len(splits) > 1 and not folder):
            break
    else:
        return {}
    if "train" not in splits or others or not all(map(is_one, splits.values())):
        names = [entry for parts in splits.values() for entry, *_ in parts] + others
        raise UserError(
            f"{where}: not all of these are one train, one val and one test split, each a file, a "
            f"folder or numbered parts: {', '.join(names[:8])}; give --source what you mean alone"
        )
    kept = {split: splits[split] for split in SPLITS if split in splits}
    return {s: [path for _, _, paths in parts for path in paths] for s, parts in kept.items()}


def entry_name(folder, entry):
    return f"{folder}/{entry}" if folder else entry


def is_one(parts):
    """Whether what has one split's name is one file or folder, or all the numbered parts of it."""
    wanted = int(parts[0][1]["shards"] or len(parts))
    alike = {(match["prefix"], match["shards"], Path(entry).suffix) for entry, match, _ in parts}
    numbers = {match["shard"] for _, match, _ in parts}
    return len(alike) == 1 and len(parts) == len(numbers) == wanted


def path_source(path, reading):
    """The Source of what lies at path: a folder or one file. Raises UserError, OSError."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return disk_source(path, reading)
    files, splits, skipped = {path.name: path}, {}, 0
    if path.is_dir():
        found = files_below(path)
        files = {name: p for name, p in found.items() if is_table(p) or not_binary(p)}
        splits, skipped = named_splits(path, files), len(found) - len(files)
    for p in filter(is_csv, files.values()):
        raise UserError(f"{p} is {not_text(p)}")
    if not bytes_of(files):
        raise UserError(f"{path} holds no text; --source takes a folder or a file of text")
    tables = any(map(is_table, files.values()))
    tables = tables and all(is_table(p) or ABOUT.match(p.name.lower()) for p in files.values())
    if splits and "val" not in splits and not tables:
        train = splits["train"]
        only = train[0] if len(train) == 1 else train[0].parent
        raise UserError(f"{path} has a train split and no val split; --source {only} divides it")

    if not splits and not tables:
        parts = divide_files(list(files.values()), reading.val_fraction)
        pairs = ((split, b) for split, p, *span in parts for b in read(p, reading, *span))
        return Source(("train", "val"), pairs, bytes_of(files), files, True, skipped)
    splits = splits or {"train": [p for p in files.values() if is_table(p)]}
    names = {p: name for name, p in files.items()}
    files = {names[p]: p for paths in splits.values() for p in paths}
    source = split_source(
        {s: read_all(paths, reading) for s, paths in splits.items()}, reading, files
    )
    source.skipped = skipped
    return source


def not_binary(path):
    """Whether a file in a folder is taken for text: it holds some, or is of a kind to refuse."""
    return path.stat().st_size > 0 and (is_csv(path) or not not_text(path))


def is_csv(path):
    return kind_of(path)[0] in (".csv", ".tsv")


def bytes_of(files):
    """The sum of files' sizes, as stored."""
    return sum(path.stat().st_size for path in files.values())


def read_all(paths, reading):
    """Blocks of files, one after another."""
    for path in paths:
        yield from read(path, reading)


def split_source(blocks, reading, files=None, total=None):
    """The Source of {split: Blocks}; without a val split it is split off train."""

    def pairs():
        for split, found in blocks.items():
            if split == "train" and "val" not in blocks:
                yield from divide_rows(found, reading.val_fraction)
            else:
                yield from ((split, block) for block in found)

    splits = tuple(split for split in SPLITS if split in blocks or split == "val")
    total = bytes_of(files) if files else total
    return Source(splits, pairs(), total, files or {}, "val" not in blocks)


def disk_source(path, reading):
    """The Source of a folder that datasets' save_to_disk wrote. Raises UserError."""
    import datasets

    with one_line(path, "save it again with save_to_disk"):
        loaded = datasets.load_from_disk(str(path))
    loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
    files = {f.relative_to(path).as_posix(): f for f in sorted(path.rglob("*.arrow"))}
    return loaded_source(path, loaded, reading, files)


def hub_source(repository, config, revision, reading, fix, streaming):
    """(the Source of a data set of the Hugging Face hub, the commit that it is of). fix: what to do
    where it cannot be had. Raises UserError."""
    with one_line(repository, fix):
        import datasets
        import huggingface_hub

        if streaming:  # a branch may move
            info = huggingface_hub.HfApi().dataset_info(repository, revision=revision)
            revision = info.sha
        loaded = datasets.load_dataset(repository, config, revision=revision, streaming=streaming)
    source = loaded_source(repository, loaded, reading)
    source.pairs = guarded(source.pairs, repository, fix)
    return source, revision


def guarded(pairs, what, fix):
    with one_line(what, fix):
        yield from pairs


@contextlib.contextmanager
def one_line(what, fix):
    """Make one line of whatever the hub's libraries raise. The disk's own errors pass through."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # as many ways to fail as there are libraries below
        if getattr(error, "errno", None):
            raise
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"cannot load {what} (hub: {host}; {why}); {fix}") from None


def loaded_source(where, loaded, reading, files=None):
    """The Source of {split: what datasets loaded for it}. Raises UserError."""
    blocks = {}
    for name, rows in loaded.items():
        if match := SPLIT_NAME.fullmatch(name.lower()):
            batches = rows.with_format("arrow").iter(batch_size=1024)
            found = read_table(batches, reading.column, where)
            blocks.setdefault(our_split(match["split"]), found)
    if "train" not in blocks:
        raise UserError(
            f"{where} has no train split, only {', '.join(loaded)}; save the one that you want as "
            "train.jsonl, and give that as --source"
        )
    return split_source({s: blocks[s] for s in SPLITS if s in blocks}, reading, files)


def demo_source(reading):
    """The Source of Python's own documentation as CPython carries it, 90/5/5 by topic."""
    from pydoc_data.topics import topics

    texts, sizes = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0)
    shares = dict(train=0.9, val=0.05, test=0.05)
    # the long ones first, each to the split that is most in want
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        total = sum(sizes.values()) + len(text)
        split = max(SPLITS, key=lambda split: shares[split] * total - sizes[split])
        texts[split].append(text)
        sizes[split] += len(text) + 1
    blocks = {}
    for split, found in texts.items():
        lines = "".join(text + "\n" for text in found).split("\n")
        blocks[split] = [Block(found if reading.documents else lines, sizes[split])]
    return split_source(blocks, reading, total=sum(sizes.values()))


# --- a validation split for a text that has none


def divide_rows(blocks, val_fraction):
    """(split, Block) pairs of rows: every so many-th is val's (of 0.05 every twentieth), and where
    there are fewer the last one."""
    number, last, val = 0, None, False
    for block in blocks:
        if last:
            yield "train", Block([last], 0)
            last = None
        rows = {"train": [], "val": []}
        for row in filter(str.strip, block.rows):
            number += 1
            to_val = math.floor(number * val_fraction) > math.floor((number - 1) * val_fraction)
            rows["val" if to_val else "train"].append(row)
        val = val or bool(rows["val"])
        if not val and rows["train"]:
            last = rows["train"].pop()
        yield "train", Block(rows["train"], block.size)
        yield "val", Block(rows["val"], 0)
    if last:
        yield "val", Block([last], 0)


def divide_files(paths, val_fraction):
    """[(split, path, start, end)] of text files, in bytes. Of FEW or more each goes to one split,
    so that val_fraction of the bytes are val's; else the end of the text is."""
    sizes = [size_of(path) for path in paths]
    if len(paths) >= FEW:
        parts, seen, val = [], 0, 0
        for path, size in zip(paths, sizes, strict=True):
            seen += size
            to_val = val + size / 2 <= val_fraction * seen
            val += size * to_val
            parts.append(("val" if to_val else "train", path, 0, None))
        return parts if val else [*parts[:-1], ("val", *parts[-1][1:])]
    left, number = int(sum(sizes) * (1 - val_fraction)), 0
    while number < len(paths) - 1 and left >= sizes[number]:
        left -= sizes[number]
        number += 1
    place = nearest_break(paths[number], left, sizes[number])
    train = [("train", path, 0, None) for path in paths[:number]]
    val = [("val", path, 0, None) for path in paths[number + 1 :]]
    cut = paths[number]
    return [*train, ("train", cut, 0, place), ("val", cut, place, None), *val]


def size_of(path):
    """Bytes of a text file, unpacked, without the blank ones at its end."""
    position = end = 0
    with open_bytes(path) as stream:
        while block := stream.read(BLOCK):
            filled = len(block.rstrip())
            end = position + filled if filled else end
            position += len(block)
    return end


def nearest_break(path, wanted, size):
    """The byte nearest to `wanted` at which to divide a text file: after a line end, or before a
    blank where no line ends near, or between two characters."""
    reach = max(200, min(BLOCK, (size - wanted) // 2))
    start = max(0, wanted - reach)
    with open_bytes(path) as stream:
        stream.seek(start)
        window = stream.read(min(2 * reach, size - start))
    for pattern in rb"(?<=\n)(?=.)", rb"(?<=\S)(?= )":
        if places := [start + m.start() for m in re.finditer(pattern, window) if m.start()]:
            return min(places, key=lambda place: abs(place - wanted))
    while wanted > 1 and 0x80 <= window[wanted - start] < 0xC0:  # inside a character of UTF-8
        wanted -= 1
    return max(1, wanted)


# --- token ids

END = "<|endoftext|>"
END_ID = 50256
IS_SPACE = np.array([chr(i).isspace() for i in range(0x3002)])  # no later character is one
LONG_RUN = 50_000  # white space that is cut; tiktoken refuses runs of a million


def encode_rows(encoding, rows, separator):
    """Token ids of rows (a list of str), put end to end: (ids uint16, words, bytes).

    Each row is encoded by itself. none: it is stripped. newline: it is kept as it is and ends in
    one newline. endoftext: it is kept as it is, and id 50256 follows, which is no word and no byte.
    Rows that are blank give nothing, and a byte-order mark at a row's start is dropped.
    """
    texts = [text for row in rows if (text := row.removeprefix("\ufeff")).strip()]
    if separator == "none":
        texts = [text.strip() for text in texts]
    elif separator == "newline":
        texts = [text.removesuffix("\n") + "\n" for text in texts]

    # One call for each text would spend a third of the time between calls. So they are joined by
    # the token that tiktoken splits at before it looks at anything else, unless a text spells it.
    parts = [cut_long_runs(text) for text in texts]
    if not any(len(part) > 1 or END in part[0] for part in parts):
        joined = "".join(text + END for text in texts)
        ids = encoding.encode_to_numpy(joined, allowed_special={END})
    else:
        ids = [np.empty(0, np.uint32)]
        for part in parts:
            ids += [encoding.encode_to_numpy(text, disallowed_special=()) for text in part]
            ids.append(np.array([END_ID], np.uint32))
        ids = np.concatenate(ids)
    if separator != "endoftext":
        ids = ids[ids != END_ID]
    return ids.astype("<u2"), count_words(texts), sum(len(text.encode()) for text in texts)


def count_words(texts):
    """What str.split finds in texts, in half its time and without the interpreter's lock."""
    characters = np.frombuffer("\n".join(["", *texts]).encode("utf-32-le"), np.uint32)
    space = IS_SPACE[np.minimum(characters, len(IS_SPACE) - 1)]
    return int(np.count_nonzero(space[:-1] > space[1:]))


def cut_long_runs(text):
    """The text in parts whose ids are those of the whole, none with a long run of white space
    before a word: GPT-2's pattern leaves the last character of such a run to what follows."""
    starts = range(0, len(text), LONG_RUN)
    if len(text) < LONG_RUN or not any(text[i : i + LONG_RUN].isspace() for i in starts):
        return [text]
    runs = re.finditer(rf"[{WHITE}]{{{LONG_RUN},}}", text)
    cuts = [0, *(run.end() - 1 for run in runs if run.end() < len(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]
