"""Text as rows: of a folder, a file, or a data set of the Hugging Face hub.

A row is a line of a text file, or a row of .jsonl or .parquet. Where documents are asked for, a
text file is one row. A block is (rows, ends): a list of str, and whether the last of them ends
there; amid a long document it does not. docs/data.md says what is read.
"""

import codecs
import gzip
import json
import math
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lab.console import UserError, first_line
from lab.encode import WHITE

SPLITS = ("train", "val", "test")
BLOCK = 1 << 20  # bytes of text that are read, encoded and written at a time
FEW = 20  # a text of so many lines is divided between them, not inside one
# the last place at which GPT-2's pattern splits a text in any case: between a word and white space
CUT = re.compile(rf"(?s).*\S(?={WHITE}+\S)")
# WikiText's own names, the hub's with shard numbers and hashes, and what people write
SPLIT_NAME = re.compile(
    r"(?:.*[^a-z0-9])?(training|train|validation|valid|val|dev|testing|test)"
    r"(?:[-_.]\d+(?:[-_.]of[-_.](\d+))?(?:-[0-9a-f]{6,64})?)?"
)
# below the top of a folder only these have splits' names: test.py and test/ are often code
DATA = (".txt", ".raw", ".tokens", ".md", ".jsonl", ".json", ".parquet", ".csv", ".tsv")
PACKED = {  # first bytes: what a file is, and the command that makes text of it
    b"PK\3\4": ("zip", "unzip"),
    b"%PDF": ("PDF", "pdftotext"),
    b"BZh": ("bz2", "bunzip2 -k"),
    b"\xfd7zXZ": ("xz", "unxz -k"),
    b"(\xb5/\xfd": ("zstd", "unzstd"),
}


@dataclass
class Source:
    """A text that is about to be read."""

    read: Callable  # gives (split, block) pairs, from the start each time
    files: dict = field(default_factory=dict)  # {name: Path}; empty where it is not on disk
    divided: bool = False  # its validation split is split off
    skipped: str = ""  # which files are not read, as a sentence


# --- a file -------------------------------------------------------------------------------------


def suffix_of(path):
    """.jsonl for a.jsonl and for A.JSONL.gz."""
    return os.path.splitext(path.name.lower().removesuffix(".gz"))[1]


def open_file(path):
    """A file's bytes, unpacked."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def other_kind(path):
    """What a file is that is not read as text, as a phrase; "" for text. Raises OSError."""
    if path.exists() and not path.is_file():
        return "no regular file"
    if suffix_of(path) in (".csv", ".tsv"):
        return "a table, which is read as .jsonl or .parquet"
    with open_file(path) as stream:
        head = stream.read(8192)
    found = [pair for magic, pair in PACKED.items() if head.startswith(magic)]
    if b"word/" in head and found:
        found = [("docx", "pandoc -t plain -o NEW.txt")]
    if head[257:262] == b"ustar":
        found = [("tar", "tar xf")]
    for kind, convert in found:
        return f"{kind}, not text; `{convert} {shlex.quote(str(path))}` makes text of it"
    utf16 = head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # text, for iconv
    return "binary, not text" if b"\0" in head and not utf16 else ""


def read_chunks(path, start=0, end=math.inf):
    """The text of a UTF-8 file from byte start to byte end, about BLOCK at a time. Both lie between
    characters. Raises UserError for text in another encoding."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = start
    with open_file(path) as stream:
        stream.seek(start)
        while True:
            raw = stream.read(min(BLOCK, end - position))
            position += len(raw)
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                wrong = error.object[error.start :]
                codec = "UTF-16" if wrong[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
                name = shlex.quote(str(path))
                get = "gzip -dc" if path.suffix.lower() == ".gz" else "cat"
                raise UserError(
                    f"{path} is not UTF-8 at byte {position - len(wrong):,}; if it is {codec}, "
                    f"`{get} {name} | iconv -f {codec} -t UTF-8 > NEW` converts it"
                ) from None
            if not raw:
                return


def read_text(path, documents, start=0, end=math.inf):
    """Blocks of a text file: its lines, which end in "\\n" also where the file has "\\r\\n", or one
    document, cut only where GPT-2's pattern splits in any case."""
    held = ""
    for text in read_chunks(path, start, end):
        if not documents:
            *lines, held = (held + text).split("\n")
            yield [line.removesuffix("\r") + "\n" for line in lines], True
            continue
        held += text
        if len(held) >= BLOCK and (place := CUT.match(held, max(0, len(held) - len(text) - 100))):
            yield [held[: place.end()]], False
            held = held[place.end() :]
    yield [held] if held or documents else [], True


def read_rows(path, column):
    """Blocks of a column of a .jsonl or .parquet file. Raises UserError."""
    if suffix_of(path) == ".parquet":
        yield from read_parquet(path, column)
        return
    number = 0
    for lines, _ in read_text(path, documents=False):
        texts = []
        for line in lines:
            number += 1
            if line.strip():
                texts.append(text_of_json(line, column, f"{path}, line {number}"))
        yield texts, True


def text_of_json(line, column, where):
    """The text under a column of a line of .jsonl. Raises UserError."""
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(
            f"{where} is no JSON object; a row a line is wanted, which "
            "`jq -c '.[]' FILE > NEW.jsonl` makes of an array"
        )
    text = text_at(row, column, where)
    # half a character, such as "\\ud800" in JSON, is none in UTF-8
    return text and text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def read_parquet(path, column):
    """Blocks of a column of a .parquet file. Raises UserError."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            first = next(file.iter_batches(batch_size=1), None)
            for row in first.to_pylist() if first else ():
                text_at(row, column, path)  # with all columns, for the message to name
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield [text_at(row, column, path) for row in batch.to_pylist()], True
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        why = first_line(error)
        raise UserError(f"{path} is no whole parquet file ({why}); bring a whole one") from None


def text_at(row, column, where):
    """The text of a row, a dict, under a column; None for a null. Raises UserError."""
    text = row.get(column, row)
    if text is not None and not isinstance(text, str):
        names = ", ".join(name for name, value in row.items() if isinstance(value, str))
        fix = f"--column takes one of {names}" if names else "`jq` lifts one out of an object"
        raise UserError(f'{where}: no text under "{column}"; {fix}')
    return text


# --- a folder -----------------------------------------------------------------------------------


def find_files(folder):
    """{name: Path} of the files below a folder, in order, none that is hidden. Links are
    followed, each folder once. Raises OSError for a folder that cannot be listed."""

    def fail(error):
        raise error

    files, seen = {}, set()
    for where, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(where) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        paths = [Path(where, name) for name in names if name[0] != "."]
        files |= {path.relative_to(folder).as_posix(): path for path in paths}
    return dict(sorted(files.items()))


def split_of(name):
    """(split, what all of its files share) for a name that is a split's as people write it, such as
    dev, x-valid.txt or test-00000-of-00002.txt; else ("", None)."""
    stem = name.removesuffix(".gz")
    match = SPLIT_NAME.fullmatch(stem) or SPLIT_NAME.fullmatch(os.path.splitext(stem)[0])
    if not match:
        return "", None
    split = {"tr": "train", "te": "test"}.get(match[1][:2], "val")
    return split, (name[: match.end(1)], name[match.end() :], match[2])


def named_splits(where, files):
    """{split: {name: Path}} of files that have a split's name or lie in a folder that has one; {}
    where none has. Raises UserError where such names do not make one text."""
    found = {}  # {split: {name: what the files of one split share}}
    at_the_top = False
    for name, path in files.items():
        parts = name.lower().split("/")
        for depth, part in enumerate(parts):
            split, shared = split_of(part)
            if split and (suffix_of(path) in DATA or depth == 0 and path.suffix != ".bin"):
                found.setdefault(split, {})[name] = (*parts[:depth], *shared)
                at_the_top |= depth == 0
                break
    if "train" not in found and not at_the_top:
        return {}
    names = ", ".join(name for part in found.values() for name in [*part][:3])
    if "train" not in found:
        raise UserError(
            f"{where} has no train split beside {names}; name the training text train.txt or "
            "train/, or rename what is no split"
        )
    for split, part in found.items():
        *_, shards = shared = next(iter(part.values()))
        if set(part.values()) != {shared} or (shards and int(shards) != len(part)):
            raise UserError(
                f"{where}: the {split} split must be one file, one folder or all of its shards; "
                f"give --source one folder or file of {names}"
            )
    return {s: {name: files[name] for name in found[s]} for s in SPLITS if s in found}


def choose(where, files):
    """({name: Path} of the files that are read, whether they hold rows). Raises UserError where
    rows lie beside text, and where there is no text."""
    kinds = (".jsonl", ".parquet") + (".json",) * (len(files) == 1)
    rows = {name: path for name, path in files.items() if suffix_of(path) in kinds}
    # a README, LICENSE or dataset_infos.json is no text of theirs
    others = [n for n, path in files.items() if suffix_of(path) not in (*kinds, "", ".md", ".json")]
    if rows and not others:
        return rows, True
    if rows:
        first = next(iter(rows))
        raise UserError(f"{where} holds rows and text, {first} and {others[0]}; give --source one")
    why = {name: other_kind(path) for name, path in files.items()}
    texts = {name: path for name, path in files.items() if not why[name] and path.stat().st_size}
    if not texts:
        named = "".join([f"; {name} is {kind}" for name, kind in why.items() if kind][:1])
        raise UserError(f"{where} holds no text to be read{named}")
    return texts, False


def path_source(path, options):
    """The Source of what lies at path, a folder or a file. Raises UserError, OSError.

    options: prepare.py's, of which column, separator and val_fraction are looked at.
    """
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return disk_source(path, options)
    files = find_files(path) if path.is_dir() else {path.name: path}
    splits = named_splits(path, files) if path.is_dir() else {}
    chosen = {}
    for split, part in (splits or {"": files}).items():
        chosen[split] = choose(f"the {split} split of {path}" if split else path, part)
    if "train" in chosen and "val" not in chosen:
        if not chosen["train"][1]:
            name = next(iter(chosen["train"][0]))
            raise UserError(
                f"{path} has no val split beside {name}; name one val.txt or val/, or rename what "
                f"is no split, or give that alone: --source {shlex.quote(str(path / name))}"
            )
        chosen = {"": chosen.pop("train"), **chosen}
    texts = {name: file for found, _ in chosen.values() for name, file in found.items()}
    skipped = ""
    if count := len(files) - len(texts):
        all_text = not splits and not chosen[""][1]
        skipped = f"skipped {count:,} {'files that are not text' if all_text else 'other files'}"
    return Source(partial(read_files, chosen, options), texts, "" in chosen, skipped)


def read_files(chosen, options):
    """(split, block) pairs of {split: what choose() gave}; split "" is divided into train and
    val."""
    for split, (files, are_rows) in chosen.items():
        paths = [*files.values()]
        if are_rows:
            blocks = (block for path in paths for block in read_rows(path, options.column))
            yield from in_split(split, blocks, options.val_fraction)
            continue
        documents = options.separator == "endoftext"
        whole = [(split, path, 0, math.inf) for path in paths]
        for part, path, *ends in whole if split else divide_texts(paths, options.val_fraction):
            for block in read_text(path, documents, *ends):
                yield part, block


# --- a validation split for a text that has none ------------------------------------------------


def in_split(split, blocks, val_fraction):
    """(split, block) pairs of rows; a null is none. Those of split "" are divided: for a
    val_fraction of 0.05 every 20th is val's."""
    number = 0
    for texts, _ in blocks:
        texts = [text for text in texts if text is not None]
        if split:
            yield split, (texts, True)
            continue
        parts = {"train": [], "val": []}
        for text in texts:
            before, number = number, number + bool(text.strip())
            to_val = math.floor(number * val_fraction) > math.floor(before * val_fraction)
            parts["val" if to_val else "train"].append(text)
        yield from ((part, (rows, True)) for part, rows in parts.items())


def divide_texts(paths, val_fraction):
    """[(split, path, start, end)] of text files without a validation split, in bytes.

    Each of several files goes to one split, so that val_fraction of the bytes are val's; a single
    one is cut.
    """
    if len(paths) == 1:
        place = place_of_cut(paths[0], val_fraction)
        return [("train", paths[0], 0, place), ("val", paths[0], place, math.inf)]
    sizes = [path.stat().st_size for path in paths]
    seen = val = 0
    splits = []
    for size in sizes:
        seen += size
        splits.append("val" if val + size / 2 <= val_fraction * seen else "train")
        val += size * (splits[-1] == "val")
    if not val:
        splits[sizes.index(min(sizes))] = "val"
    return [(split, path, 0, math.inf) for split, path in zip(splits, paths, strict=True)]


def place_of_cut(path, val_fraction):
    """The byte to cut a text file at, with text on both sides: after a line end, or before a blank
    where there are few lines, or between any two characters."""
    position = size = lines = 0
    with open_file(path) as stream:
        while block := stream.read(BLOCK):
            size = position + len(block.rstrip()) if block.strip() else size
            position += len(block)
            lines += block.count(b"\n")
        wanted = int(size * (1 - val_fraction))
        start = max(0, wanted - BLOCK)
        stream.seek(start)
        window = stream.read(min(wanted + BLOCK, size) - start)
    low = 0 if start else len(window) - len(window.lstrip())
    for breaks in (rb"(?<=\n)",) * (lines >= FEW) + (rb"(?<=\n)|(?= )",):
        places = [match.start() for match in re.finditer(breaks, window)]
        if places := [place for place in places if low < place < len(window)]:
            return start + min(places, key=lambda place: abs(place - (wanted - start)))
    place = max(0, min(max(wanted - start, low + 1), len(window) - 1))
    while place > 1 and 0x80 <= window[place] < 0xC0:  # amid a character of UTF-8
        place -= 1
    return start + place


# --- datasets -----------------------------------------------------------------------------------


def disk_source(path, options):
    """The Source of a folder that datasets' save_to_disk wrote. Raises UserError."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever is wrong with its files
        why = first_line(error)
        raise UserError(f"datasets cannot load {path} ({why}); save it again") from None
    loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*.arrow"))}
    divided = not any(split_of(name)[0] == "val" for name in loaded)
    return Source(partial(read_loaded, path, loaded, options), files, divided)


def hub_blocks(repository, config, origin, options, fix, streaming=False):
    """(split, block) pairs of a data set of the Hugging Face hub at origin["revision"].

    streaming: it is read while it is downloaded, and origin["revision"] becomes the commit that it
    names. fix: what to do where the hub does not give it, for the message. Raises UserError.
    """
    import datasets
    import huggingface_hub

    try:
        revision = origin["revision"]
        if streaming:
            revision = huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha
        origin["revision"] = revision
        loaded = datasets.load_dataset(repository, config, revision=revision, streaming=streaming)
        yield from read_loaded(repository, loaded, options)
    except Exception as error:
        raise no_hub(repository, error, fix) from None


def no_hub(repository, error, fix):
    """The error for what the hub does not give: it fails in as many ways as there are libraries
    below."""
    if isinstance(error, UserError):
        return error
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return UserError(f"cannot get {repository} from {host} ({why}); {fix}")


def read_loaded(where, loaded, options):
    """(split, block) pairs of {name: what datasets loaded for it}. Raises UserError."""
    found = {split_of(name.lower())[0]: rows for name, rows in loaded.items()}
    if "train" not in found:
        names = ", ".join(loaded)
        raise UserError(f"{where} has no train split, only {names}; save one as train.jsonl")
    found = {split: found[split] for split in SPLITS if split in found}
    for split, rows in found.items():
        if options.column in (rows.column_names or ()):
            rows = rows.select_columns([options.column])
        tables = rows.with_format("arrow").iter(batch_size=1024)
        texts = ([text_at(row, options.column, where) for row in t.to_pylist()] for t in tables)
        divided = split == "train" and "val" not in found
        blocks = ((part, True) for part in texts)
        yield from in_split("" if divided else split, blocks, options.val_fraction)


def demo_blocks(separator):
    """(split, block) pairs of Python's own documentation as CPython carries it, 90/5/5 by topic."""
    from pydoc_data.topics import topics

    texts = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    shares = dict(train=0.9, val=0.05, test=0.05)
    # the long ones first, each to the split that is most in want
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        total = sum(sizes.values()) + len(text)
        split = max(SPLITS, key=lambda split: shares[split] * total - sizes[split])
        texts[split].append(text)
        sizes[split] += len(text) + 1
    for split, found in texts.items():
        lines = "".join(text + "\n" for text in found).split("\n")
        yield split, (found if separator == "endoftext" else lines, True)
