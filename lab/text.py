"""Text as rows: of a folder, a file, or a data set of the Hugging Face hub.

A row is a line of a text file, or a row of .jsonl or .parquet. Where documents are asked for, a
text file is one row. A block is (rows, ends): a list of str, and whether the last of them ends
there; amid a long document it does not. docs/data.md says what is read.
"""

import codecs
import contextlib
import gzip
import json
import math
import os
import re
import shlex
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath

from lab.console import UserError, first_line, python
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
SPLIT_WORD = re.compile(r"(?<![a-z])(training|train|validation|valid|val|dev|testing|test)")
# below the top of a folder only these have splits' names: test.py and test/ are often code
ROWS = (".jsonl", ".ndjson", ".parquet")
DATA = (".txt", ".raw", ".tokens", ".md", *ROWS, ".json", ".csv", ".tsv")
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how a text in it begins
# how a file begins that is not text, what it is, and the command that makes text of it
PACKED = (
    (rb"PK\x03\x04.*word/", "docx", "pandoc -t plain -o NEW.txt"),
    (rb"PK\x03\x04", "zip", "unzip"),
    (rb"%PDF", "PDF", "pdftotext"),
    (rb".{257}ustar", "tar", "tar xf"),
    (rb"BZh", "bz2", "bunzip2 -k"),
    (rb"\xfd7zXZ", "xz", "unxz -k"),
    (rb"\x28\xb5/\xfd", "zstd", "unzstd"),
)


@dataclass
class Source:
    """A text that is about to be read."""

    read: Callable  # gives (split, block) pairs, from the start each time
    files: dict = field(default_factory=dict)  # {name: Path}; empty where it is not on disk
    skipped: str = ""  # which files are not read, as a sentence


# --- a file -------------------------------------------------------------------------------------


def suffix_of(path):
    """.jsonl for a.jsonl and for A.JSONL.gz."""
    return os.path.splitext(path.name.lower().removesuffix(".gz"))[1]


@contextlib.contextmanager
def open_file(path):
    """A file's bytes, unpacked, whatever its name. Raises UserError for what is no whole .gz."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else open(path, "rb") as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        why = first_line(error)
        raise UserError(f"{path} is no whole gzip file ({why}); bring a whole one") from None


def other_kind(path):
    """What a file is that is not read as text, as a phrase; "" for text. Raises OSError."""
    if path.exists() and not path.is_file():
        return "no regular file"
    if suffix_of(path) in (".csv", ".tsv"):
        sep = "," if suffix_of(path) == ".csv" else "\t"
        code = f'D.from_csv({json.dumps(str(path))}, sep={json.dumps(sep)}).to_json("NEW.jsonl")'
        code = shlex.quote(f"from datasets import Dataset as D; {code}")
        return f"a table; `{python()} -c {code}` makes rows of it"
    with open_file(path) as stream:
        head = stream.read(8192)
    for beginning, kind, convert in PACKED:
        if re.match(beginning, head, re.DOTALL):
            return f"{kind}, not text; `{convert} {shlex.quote(str(path))}` makes text of it"
    return "binary, not text" if b"\0" in head and not head.startswith(UTF16) else ""


def read_chunks(path, start=0, end=math.inf):
    """The text of a UTF-8 file from byte start to byte end, both between characters, about BLOCK at
    a time. Raises UserError for text in another encoding."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, raw = start, True
    with open_file(path) as stream:
        stream.seek(start)
        while raw:
            raw = stream.read(min(BLOCK, end - position))
            position += len(raw)
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                wrong = error.object[error.start :]
                codec = "UTF-16" if wrong.startswith(UTF16) else "LATIN1"
                get = "gzip -dc" if path.suffix.lower() == ".gz" else "cat"
                fix = f"`{get} {shlex.quote(str(path))} | iconv -f {codec} -t UTF-8 > NEW`"
                where = f"{path} is not UTF-8 at byte {position - len(wrong):,}"
                raise UserError(f"{where}; if it is {codec}, {fix} converts it") from None


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
    """Lists of the texts under a column of a .jsonl or .parquet file. Raises UserError."""
    if suffix_of(path) == ".parquet":
        yield from read_parquet(path, column)
        return
    first = 1  # of a block's lines
    for lines, _ in read_text(path, False):
        rows = ((n, line) for n, line in enumerate(lines, first) if line.strip())
        yield [text_of_json(line, column, f"{path}, line {n}") for n, line in rows]
        first += len(lines)


def text_of_json(line, column, where):
    """The text under a column of a line of .jsonl. Raises UserError."""
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except ValueError:
        row = None
    if not isinstance(row, dict):
        fix = "`jq -c '.[]' FILE > NEW.jsonl` makes a row a line of an array"
        raise UserError(f"{where} is no JSON object; {fix}")
    text = text_at(row, column, where)
    # half a character, such as "\\ud800" in JSON, is none in UTF-8
    return text and text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def read_parquet(path, column):
    """read_rows() of a .parquet file."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            first = next(file.iter_batches(batch_size=1), None)
            for row in first.to_pylist() if first else ():
                text_at(row, column, path)  # with all columns, for the message to name
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield [text_at(row, column, path) for row in batch.to_pylist()]
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        why = first_line(error)
        raise UserError(f"{path} is no whole parquet file ({why}); bring a whole one") from None


def text_at(row, column, where):
    """The text of a row, a dict, under a column; None for a null. Raises UserError."""
    text = row.get(column, row)
    if isinstance(text, dict):
        fields = dict(fields_of(row))
        text = fields.get(column, fields)
    if text is not None and not isinstance(text, str):
        names = ", ".join(name for name, value in fields_of(row) if isinstance(value, str))
        fix = f"--column takes one of {names}"
        if not names:
            fix = f"there are only {', '.join(row)}; `jq` lifts a text out of a list"
        raise UserError(f'{where}: no text under "{column}"; {fix}')
    return text


def fields_of(row, above=""):
    """(name, value) pairs of a row, a dict; a.b names the field b of an object a."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from fields_of(value, f"{above}{name}.")
        else:
            yield above + name, value


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


def check_pairs(where, files):
    """Raise UserError for names that differ by a split's word alone, such as train_x and test_x:
    what is to be tested on would be trained on."""
    paths = {PurePath(name.lower()) for name, path in files.items() if suffix_of(path) in DATA}
    paths = {str(path) for found in paths for path in (found, *found.parents)}
    alike = {}
    for path in sorted(paths):
        alike.setdefault(SPLIT_WORD.sub("*", path), []).append(path)
    for first, *others in alike.values():
        for other in others:
            if ("train" in first) != ("train" in other):
                fix = "rename them as splits, train, val and test, or give --source one of them"
                raise UserError(f"{where} holds {first} and {other}; {fix}")


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
        check_pairs(where, files)
        return {}
    names = ", ".join(name for part in found.values() for name in [*part][:3])
    if "train" not in found:
        fix = "name the training text train.txt or train/, or rename what is no split"
        raise UserError(f"{where} has no train split beside {names}; {fix}")
    for split, part in found.items():
        *_, shards = shared = next(iter(part.values()))
        if set(part.values()) != {shared} or (shards and int(shards) != len(part)):
            why = f"{where}: the {split} split must be one file, one folder or all of its shards"
            raise UserError(f"{why}; give --source one folder or file of {names}")
    return {s: {name: files[name] for name in found[s]} for s in SPLITS if s in found}


def choose(where, files):
    """({name: Path} of the files that are read, whether they hold rows). Raises UserError where
    rows lie beside text, and where there is no text."""
    all_json = all(suffix_of(path) == ".json" for path in files.values())
    kinds = (*ROWS, ".json") if all_json else ROWS
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
    """The Source of what lies at path, a folder or a file. options: prepare.py's. Raises UserError,
    OSError."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return disk_source(path, options)
    files = find_files(path) if path.is_dir() else {path.name: path}
    splits = named_splits(path, files) if path.is_dir() else {}
    chosen = {s: choose(f"the {s} split of {path}", part) for s, part in splits.items()}
    chosen = chosen or {"train": choose(path, files)}
    texts, are_rows = chosen["train"]
    if splits and "val" not in splits and not are_rows:
        name = next(iter(texts))
        alone = f"--source {shlex.quote(str(path / name))}"
        fix = f"name one val.txt or val/, or rename what is no split, or give that alone: {alone}"
        raise UserError(f"{path} has no val split beside {name}; {fix}")
    kept = {name: file for found, _ in chosen.values() for name, file in found.items()}
    other = "other files" if splits or are_rows else "files that are not text"
    count = len(files) - len(kept)
    skipped = f"skipped {count:,} {other}" if count else ""
    return Source(partial(read_files, chosen, options), kept, skipped)


def read_files(chosen, options):
    """(split, block) pairs of {split: what choose() gave}."""
    for split, (files, are_rows) in chosen.items():
        paths = [*files.values()]
        to_val = options.val_fraction if split == "train" and "val" not in chosen else 0
        if are_rows:
            rows = (texts for path in paths for texts in read_rows(path, options.column))
            yield from in_splits(split, rows, to_val)
            continue
        parts = divide_texts(paths, to_val) if to_val else [(split, p, 0, math.inf) for p in paths]
        for part, path, *ends in parts:
            for block in read_text(path, options.separator == "endoftext", *ends):
                yield part, block


# --- a validation split for a text that has none ------------------------------------------------


def in_splits(split, rows, to_val):
    """(split, block) pairs of a split's rows, given as lists; a null is none. to_val of them become
    val's, evenly spaced: every 20th for 0.05."""
    number = 0
    for texts in rows:
        parts = {split: [], "val": []}
        for text in texts:
            if text is None:
                continue
            before, number = number, number + bool(text.strip())
            is_val = math.floor(number * to_val) > math.floor(before * to_val)
            parts["val" if is_val else split].append(text)
        yield from ((part, (texts, True)) for part, texts in parts.items() if texts)


def divide_texts(paths, val_fraction):
    """[(split, path, start, end)] of text files without a validation split, in bytes: one is cut,
    of several whole files are val's."""
    if len(paths) == 1:
        place = place_of_cut(paths[0], val_fraction)
        return [("train", paths[0], 0, place), ("val", paths[0], place, math.inf)]
    val, taken, seen = set(), 0, 0
    for path in paths:
        size = path.stat().st_size
        seen += size
        if taken + size / 2 <= val_fraction * seen:
            val.add(path)
            taken += size
    val = val or {min(paths, key=lambda path: path.stat().st_size)}
    return [("val" if path in val else "train", path, 0, math.inf) for path in paths]


def place_of_cut(path, to_val):
    """The byte to cut a text file at: after a line end, or before a blank where there are few
    lines, or between any two characters."""
    size = lines = 0
    with open_file(path) as stream:
        while block := stream.read(BLOCK):
            size += len(block)
            lines += block.count(b"\n")
        wanted = int(size * (1 - to_val))
        start = max(0, wanted - BLOCK)
        stream.seek(start)
        window = stream.read(2 * BLOCK).rstrip()
    low = 0 if start else len(window) - len(window.lstrip())
    places = (rb"(?<=\n)", rb"(?<=\n)|(?= )", rb"(?=[^\x80-\xbf])")
    for place in places[1:] if lines < FEW else places:
        found = [match.start() for match in re.finditer(place, window)]
        if found := [at for at in found if low < at < len(window)]:
            return start + min(found, key=lambda at: abs(at - (wanted - start)))
    return size


# --- datasets -----------------------------------------------------------------------------------


def disk_source(path, options):
    """The Source of a folder that datasets' save_to_disk wrote. Raises UserError."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever is wrong with its files
        why = f"datasets cannot load {path} ({first_line(error)})"
        raise UserError(f"{why}; save it again") from None
    loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*.arrow"))}
    return Source(partial(read_loaded, path, loaded, options), files)


def hub_blocks(repository, config, origin, options, fix):
    """(split, block) pairs of a data set of the Hugging Face hub, with --hub read while it is
    downloaded. Where origin has no revision it gets the newest. fix: for the message where the hub
    does not give it. Raises UserError."""
    import datasets
    import huggingface_hub

    try:
        if not origin["revision"]:
            origin["revision"] = huggingface_hub.HfApi().dataset_info(repository).sha
        how = dict(revision=origin["revision"], streaming=bool(options.hub))
        loaded = datasets.load_dataset(repository, config, **how)
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
        to_val = options.val_fraction if split == "train" and "val" not in found else 0
        if options.column in (rows.column_names or ()):
            rows = rows.select_columns([options.column])
        tables = rows.with_format("arrow").iter(batch_size=1024)
        texts = ([text_at(row, options.column, where) for row in t.to_pylist()] for t in tables)
        yield from in_splits(split, texts, to_val)


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
