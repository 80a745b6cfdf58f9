"""Rows of text from a folder, a file, a zip, the Hugging Face hub or Python's own documentation.

A Source names its splits and gives (split, Block) pairs, one after another, each split in order. A
row is a line of a text file, or a row of .jsonl or .parquet; where documents are asked for, a text
file is one document, and a long one comes in several blocks.
"""

from lab.console import UserError, first_line

import codecs
import contextlib
import errno
import gzip
import io
import itertools
import json
import math
import os
import re
import shlex
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "val", "test")
BLOCK = 1 << 20  # bytes of text that are read, encoded and written at a time
HEAD = 1 << 13  # bytes that decide whether a file is text
FEW = 20  # from so many rows or files on, a text is divided between them and not inside one

# WikiText's own names, the hub's with shard numbers and hashes, and what people write
SPLIT_NAME = re.compile(
    r"(?P<prefix>(?:.*[^a-z0-9])?)(?P<split>training|train|validation|valid|val|dev|testing|test)"
    r"(?:[-_.](?P<shard>\d+)(?:[-_.]of[-_.](?P<shards>\d+))?(?:-[0-9a-f]{6,64})?)?"
)
KINDS = {".raw": "text", ".txt": "text", ".tokens": "text", ".jsonl": "jsonl", ".json": "jsonl",
         ".parquet": "parquet"}

# White space as GPT-2's pattern has it: Python's \s has four control characters more.
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Where GPT-2's pattern splits whatever stands around: before white space between two words, or
# between a letter or digit and punctuation (those that every version of Unicode calls so). The last
# such place of a text; words stand on both sides of it.
CUT = re.compile(
    rf"(?s).*(?:\S(?=[{WHITE}]{{1,99}}\S)"
    r"|[A-Za-z0-9\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3](?=[!-/:-@\[-`{-~。，！？]))"
)
CONTROL = "[\x00-\x08\x0e-\x1a\x1c-\x1f]"  # characters that no text has
CUT_REACH = 100  # characters that CUT looks at around a place


class Reading(NamedTuple):
    """How text is to be read."""

    column: str = "text"  # of .jsonl, .parquet and the hub
    documents: bool = False  # a text file is one document, not a row a line
    val_fraction: float = 0.05  # of a text without a validation split


class Block(NamedTuple):
    """Some rows, or a part of one long document, whose other parts are the blocks around it."""

    rows: list  # of str
    size: int  # bytes read for it, for the progress bar
    begins: bool = True  # the first row begins here
    ends: bool = True  # the last row ends here


@dataclass
class Source:
    """A text: its splits, its (split, Block) pairs, and the files that it is read from."""

    splits: tuple
    blocks: Callable  # () -> iterator of (split, Block)
    total: Callable = lambda: None  # () -> bytes to read, None where that is unknown
    files: list = field(default_factory=list)
    divided: bool = False  # the validation split was split off
    left_out: Counter = field(default_factory=Counter)  # why -> files that are not read


@dataclass
class File:
    """A file on disk or in a zip."""

    name: str  # inside its folder, with forward slashes
    where: str  # for messages
    open_stored: Callable  # () -> its bytes as they are stored
    size: Callable  # () -> how many those are

    @property
    def packed(self):
        """.gz, .zst or nothing."""
        suffix = os.path.splitext(self.name)[1].lower()
        return suffix if suffix in (".gz", ".zst") else ""

    @property
    def stem(self):
        """The name without .gz or .zst, in small letters."""
        return self.name[: len(self.name) - len(self.packed)].lower()

    @property
    def kind(self):
        """text, jsonl or parquet; "" where the name does not say."""
        return KINDS.get(os.path.splitext(self.stem)[1], "")

    @contextlib.contextmanager
    def open(self):
        """The file's bytes, unpacked. Raises UserError where zstandard is wanted and missing."""
        with self.open_stored() as stored:
            if self.packed == ".gz":
                with gzip.GzipFile(fileobj=stored) as stream:
                    yield stream
            elif self.packed == ".zst":
                with open_zstandard(self.where, stored) as stream:
                    yield stream
            else:
                yield stored


@contextlib.contextmanager
def open_zstandard(where, stored):
    """The bytes of a .zst file, unpacked."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{where} needs a package: `pip install zstandard`") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    try:
        with io.BufferedReader(Frames(stored, decompressor.decompressobj), BLOCK) as stream:
            yield stream
    except zstandard.ZstdError as error:
        raise UserError(f"{where} is damaged ({first_line(error)}); bring a whole copy") from None


class Frames(io.RawIOBase):
    """What a .zst file's frames unpack to; zstandard's own reader takes a cut one for whole."""

    def __init__(self, stored, new_frame):
        self.stored = stored
        self.new_frame = new_frame
        self.frame = None
        self.packed = self.ready = b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            self.packed = self.packed or self.stored.read(BLOCK // 8)
            if not self.packed and self.frame and not self.frame.eof:
                raise EOFError("the .zst file ends amid a frame")
            if not self.packed:
                return 0
            if not self.frame or self.frame.eof:
                self.frame = self.new_frame()
            self.ready = self.frame.decompress(self.packed)
            self.packed = self.frame.unused_data
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count


def skip(stream, count):
    """Move a stream that is at its start on by count bytes."""
    if stream.seekable():
        stream.seek(count)
        return
    while count:
        count -= len(stream.read(min(count, BLOCK)))


# --- text ---------------------------------------------------------------------------------------


def guess_encoding(raw):
    """iconv's name of the encoding of bytes that are not UTF-8; "" where they are no text."""
    for mark, name in ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"),
                       (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if raw.startswith(mark):
            return name
    # every other byte of a space or a line end is 0 there, and always the same one
    for name, first in (("UTF-16LE", 1), ("UTF-16BE", 0)):
        text = codecs.getincrementaldecoder(name)("replace").decode(raw)
        if 0 in raw[first::2] and 0 not in raw[1 - first :: 2] and not re.search(CONTROL, text):
            return name
    if re.search(CONTROL, raw.decode("latin-1")):
        return ""
    return "WINDOWS-1252" if re.search(rb"[\x80-\x9f]", raw) else "LATIN1"


def not_utf8(file, position, raw):
    """The error for a file whose byte at position is not UTF-8; raw: bytes of it."""
    guess = guess_encoding(raw)
    why = f"{file.where} is not UTF-8 text at byte {position:,}"
    if not guess:
        return UserError(f"{why}; it looks like no text at all, give a text file")
    name = shlex.quote(file.where)
    get = {".gz": f"gzip -dc {name} | ", ".zst": f"zstd -dc {name} | "}.get(file.packed, "")
    return UserError(f"{why}; it may be {guess}, which `{get}iconv -f {guess} -t UTF-8 "
                     f"{'' if get else name + ' '}> NEW_FILE` converts")


def read_chunks(file, start=0, end=None):
    """(text, bytes read) of a UTF-8 file from byte start to byte end, about BLOCK at a time.

    start and end lie between characters. Raises UserError for text in another encoding.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = start
    with file.open() as stream:
        skip(stream, start)
        while True:
            raw = stream.read(BLOCK if end is None else min(BLOCK, end - position))
            # ASCII in UTF-16 is valid UTF-8, every other character a NUL
            if not position and 5 * raw.count(0) > 2 * len(raw) and guess_encoding(raw):
                raise not_utf8(file, 0, raw)
            kept = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise not_utf8(file, position - kept + error.start, error.object) from None
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
    held = ""
    size = 0
    begins = True
    for text, more in chunks:
        held += text
        size += more
        if len(held) < BLOCK:
            continue
        place = CUT.match(held, max(0, len(held) - len(text) - CUT_REACH))
        if place:
            yield Block([held[: place.end()]], size, begins, False)
            held = held[place.end() :]
            size = 0
            begins = False
    if held:
        yield Block([held], size, begins)


def read_text(file, reading, start=0, end=None):
    """Blocks of a text file from byte start to byte end: one document, or its lines."""
    chunks = read_chunks(file, start, end)
    return read_document(chunks) if reading.documents else read_lines(chunks)


# --- rows ---------------------------------------------------------------------------------------


def whole_characters(text):
    """The text with a U+FFFD for each surrogate that stands alone, as "\\ud800" in JSON may."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def read_jsonl(file, column):
    """Blocks of a column of a .jsonl file's lines. A null is no row. Raises UserError."""
    number = 0
    for block in read_lines(read_chunks(file)):
        texts = []
        for line in block.rows:
            number += 1
            if not line.strip():
                continue
            try:
                text = json.loads(line.removeprefix("\ufeff"))[column]
            except (ValueError, KeyError, TypeError):
                text = line
            if text is None:
                continue
            if text is line or not isinstance(text, str):
                raise not_a_row(f"{file.where}, line {number}", line, column)
            texts.append(whole_characters(text))
        yield Block(texts, block.size)


def not_a_row(where, line, column):
    """The error for a line that is not a JSON object with a text under `column`."""
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except ValueError:
        row = None
    why = f'{where}: not a JSON object with a text under "{column}"'
    if isinstance(row, dict):
        names = ", ".join(name for name, value in row.items() if isinstance(value, str))
        return UserError(f"{why}; --column takes another name, its texts are {names or 'none'}")
    if line.removeprefix("\ufeff").lstrip().startswith("["):
        return UserError(f"{why} but an array; `jq -c '.[]' FILE > NEW.jsonl` makes lines of it")
    return UserError(f"{why}; mend it")


def texts_of(table, column, where):
    """The texts of a column of a pyarrow table or batch, without nulls. Raises UserError."""
    import pyarrow

    names = table.schema.names
    if column not in names:
        raise UserError(f'{where} has no column "{column}"; --column takes one of '
                        f"{', '.join(names)}")
    kind = table.schema.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            or pyarrow.types.is_string_view(kind)):
        raise UserError(f'{where}: the column "{column}" holds {kind}, not text; --column takes '
                        f"another of {', '.join(names)}")
    return [text for text in table.column(column).to_pylist() if text is not None]


def open_parquet(file, stream):
    """A pyarrow ParquetFile that reads a column bit by bit. Raises UserError."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(stream, buffer_size=BLOCK, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.where} is not a parquet file ({first_line(error)})") from None


def read_parquet(file, column):
    """Blocks of a column of a .parquet file. A null is no row. Raises UserError."""
    import pyarrow

    with file.open() as stream:
        parquet = open_parquet(file, stream)
        if column not in parquet.schema_arrow.names:
            texts_of(parquet.schema_arrow.empty_table(), column, file.where)
        try:
            for batch in parquet.iter_batches(batch_size=1024, columns=[column]):
                texts = texts_of(batch, column, file.where)
                yield Block(texts, sum(map(len, texts)))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f'{file.where}: the column "{column}" cannot be read '
                            f"({first_line(error)}); bring a whole copy") from None


def read(file, reading):
    """Blocks of a file of any kind."""
    if file.kind == "jsonl":
        return read_jsonl(file, reading.column)
    if file.kind == "parquet":
        return read_parquet(file, reading.column)
    return read_text(file, reading)


def read_all(files, reading):
    """Blocks of files, one after another."""
    return itertools.chain.from_iterable(read(file, reading) for file in files)


def size_of(files):
    """Bytes of text in files, for the progress bar; None where they are packed."""
    if any(file.packed for file in files):
        return None
    total = 0
    for file in files:
        if file.kind == "parquet":  # compressed inside, so that its footer is asked
            with file.open() as stream:
                meta = open_parquet(file, stream).metadata
                total += sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        else:
            total += file.size()
    return total


# --- a validation split for a text without one --------------------------------------------------


def belongs_to_val(number, val_fraction):
    """Whether row `number`, from 0, is a validation row: every twentieth for 0.05."""
    return math.floor((number + 1) * val_fraction) > math.floor(number * val_fraction)


def nearest_break(text, wanted, lines_only=False):
    """Where to divide a text nearest to `wanted`: after a line end or before a blank.

    Text remains on both sides, as long as it has two characters. Where there is neither line end
    nor blank, it is divided at `wanted`.
    """
    low = len(text) - len(text.lstrip(" \t\r\n"))
    high = len(text.rstrip(" \t\r\n"))
    for pattern in (r"(?<=\n)",) * lines_only + (r"(?<=\n)|(?= )",):
        places = [m.start() for m in re.finditer(pattern, text) if low < m.start() < high]
        if places:
            return min(places, key=lambda place: abs(place - wanted))
    return min(max(wanted, low + 1), high - 1)


def divide_rows(blocks, val_fraction):
    """(split, Block) pairs of rows without a validation split: each row goes to one by its number.

    Of fewer than FEW rows, the text is divided inside the row that the cut falls into.
    """
    enough = max(FEW, math.ceil(1 / val_fraction))
    first = []
    rows = 0
    for block in blocks:
        first.append(block)
        rows += sum(bool(row.strip()) for row in block.rows)
        if rows >= enough:
            break
    else:
        yield from divide_few([row for block in first for row in block.rows if row.strip()],
                              val_fraction)
        return
    number = 0
    for block in itertools.chain(first, blocks):
        parts = {"train": [], "val": []}
        for row in block.rows:
            blank = not row.strip()
            to_val = not blank and belongs_to_val(number, val_fraction)
            number += not blank
            parts["val" if to_val else "train"].append(row)
        yield "train", Block(parts["train"], block.size)
        yield "val", Block(parts["val"], 0)


def divide_few(rows, val_fraction):
    """(split, Block) pairs of a few rows: the last is val's, or the end of the text in them."""
    if len(rows) >= FEW:
        yield "train", Block(rows[:-1], 0)
        yield "val", Block(rows[-1:], 0)
        return
    left = int(sum(map(len, rows)) * (1 - val_fraction))
    for number, row in enumerate(rows):
        if left < len(row):
            place = nearest_break(row, left)
            yield "train", Block([*rows[:number], row[:place]], 0)
            yield "val", Block([row[place:], *rows[number + 1 :]], 0)
            return
        left -= len(row)


def divide_texts(files, val_fraction):
    """[(split, file, start, end)] of text files without a validation split, in bytes.

    Of FEW files or more each goes to one split, so that val_fraction of the bytes are val's; else
    the text is divided inside the file that the cut falls into, between lines if it has FEW.
    """
    if len(files) >= FEW:
        parts = []
        seen = val = 0
        for file in files:
            size = file.size()
            seen += size
            to_val = val + size / 2 <= val_fraction * seen
            val += size * to_val
            parts.append(("val" if to_val else "train", file, 0, None))
        if not val:
            parts[-1] = ("val", *parts[-1][1:])
        return parts
    sizes = [measure(file) for file in files]
    left = int(sum(size for size, _ in sizes) * (1 - val_fraction))
    number = 0
    while number < len(files) - 1 and left >= sizes[number][0]:
        left -= sizes[number][0]
        number += 1
    place = break_in_file(files[number], left, *sizes[number])
    cut = [("train", files[number], 0, place), ("val", files[number], place, None)]
    return [
        *(("train", file, 0, None) for file in files[:number]),
        *cut,
        *(("val", file, 0, None) for file in files[number + 1 :]),
    ]


def measure(file):
    """(bytes without the blank ones at the end, line ends) of a text file."""
    position = end = lines = 0
    with file.open() as stream:
        while block := stream.read(BLOCK):
            if filled := block.rstrip():
                end = position + len(filled)
            position += len(block)
            lines += block.count(b"\n")
    return end, lines


def break_in_file(file, wanted, size, lines):
    """The byte at which to divide a text file of `size` bytes and `lines` lines near `wanted`.

    It is looked for within a megabyte on either side, whatever BLOCK is.
    """
    reach = 1 << 20
    start = max(0, wanted - reach)
    with file.open() as stream:
        skip(stream, start)
        window = stream.read(min(wanted + reach, size) - start)
    text = window.decode("latin-1")  # a character a byte
    if start:
        text = text.lstrip(" \t\r\n").rjust(len(text), "x")  # what is before it is text, too
    place = nearest_break(text, wanted - start, lines >= FEW)
    while place > 1 and "\x80" <= text[place] < "\xc0":  # inside a character of UTF-8
        place -= 1
    return start + place


# --- files, folders and zips --------------------------------------------------------------------


def disk_file(path, name):
    return File(name, str(path), lambda: open(path, "rb"), lambda: path.stat().st_size)


def zip_files(path):
    """{name: File} of a zip's members, at any depth."""
    archive = zipfile.ZipFile(path)
    files = {}
    for member in archive.infolist():
        name = member.filename.replace("\\", "/")
        if name.endswith("/") or hidden(name) or "__MACOSX" in name:
            continue
        files[name] = File(name, f"{path}/{name}", lambda m=member: archive.open(m),
                           lambda m=member: m.file_size)
    return dict(sorted(files.items()))


def hidden(name):
    return any(part.startswith(".") for part in name.split("/"))


def folder_files(path, left_out):
    """{name: File} of a folder's files at any depth; hidden ones are counted in left_out."""
    files = {}
    for root, folders, names in os.walk(path):
        left_out["hidden"] += sum(map(hidden, folders + names))
        folders[:] = [folder for folder in folders if not hidden(folder)]
        # a folder that is called train.txt is no text, and is refused when it is opened
        for name in names + [folder for folder in folders if Path(folder).suffix in KINDS]:
            if not hidden(name):
                file = Path(root, name)
                relative = file.relative_to(path).as_posix()
                files[relative] = disk_file(file, relative)
    return dict(sorted(files.items()))


def our_split(name):
    """train, val or test, as people write them: training, validation, dev, testing, ..."""
    return {"tr": "train", "te": "test"}.get(name[:2].lower(), "val")


def split_files(where, files):
    """{split: [File]} of the files that have a split's name; {} where none has. Raises UserError.

    Those at the top come first; those further down count where one of them is a train split.
    """
    found = {}
    for depth in ("top", "below"):
        for name, file in files.items():
            stem = os.path.splitext(os.path.basename(file.stem))[0]
            match = SPLIT_NAME.fullmatch(stem) if file.kind else None
            if match and (depth == "below" or "/" not in name):
                found.setdefault(our_split(match["split"]), []).append((file, match))
        if found:
            break
    else:
        return {}
    if depth == "below" and "train" not in found:
        return {}
    for split, parts in found.items():
        sets = {(os.path.dirname(f.name), m["prefix"], m["shards"], f.kind, f.packed)
                for f, m in parts}
        shards = int(parts[0][1]["shards"] or len(parts))
        numbers = {m["shard"] for _, m in parts}
        if len(sets) > 1 or len(parts) != shards or len(numbers) != len(parts):
            names = ", ".join(f.name for f, _ in parts)
            raise UserError(f"{where}: the {split} split must be one file or all of its shards, "
                            f"not {names}; give the one folder or file that you mean")
    return {split: [f for f, _ in found[split]] for split in SPLITS if split in found}


def text_files(files, left_out):
    """Those of the Files that hold text; the others are counted in left_out."""
    kept = []
    for file in files:
        if os.path.lexists(file.where) and not os.path.isfile(file.where):
            left_out["no regular file"] += 1
            continue
        with file.open() as stream:
            head = stream.read(HEAD)
        if not head:
            left_out["empty"] += 1
        elif is_text(head):
            kept.append(file)
        else:
            left_out["no text"] += 1
    return kept


def is_text(head):
    """Whether a file that begins with these bytes is text, UTF-8 or what iconv converts."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return bool(guess_encoding(head))
    return b"\0" not in head or guess_encoding(head).startswith("UTF-16")


def split_source(where, found, reading):
    """The Source of files with splits' names, {split: [File]}. Raises UserError."""
    files = [file for parts in found.values() for file in parts]
    if "train" not in found:
        raise UserError(f"{where} has no train split beside {', '.join(f.name for f in files)}")
    if "val" not in found and found["train"][0].kind == "text":
        raise UserError(f"{where} has no val split; it needs wiki.{{train,valid,test}}.raw, or "
                        "{train,validation,test} as .txt, .jsonl or .parquet; `--source "
                        f"{found['train'][0].where}` divides that one file")

    def blocks():
        for split, parts in found.items():
            if split == "train" and "val" not in found:
                yield from divide_rows(read_all(parts, reading), reading.val_fraction)
            else:
                yield from ((split, block) for block in read_all(parts, reading))

    splits = tuple(split for split in SPLITS if split in found or split == "val")
    return Source(splits, blocks, lambda: size_of(files), files, divided="val" not in found)


def divided_source(files, rows, reading, left_out):
    """The Source of files whose validation split is split off. rows: they hold rows, not text."""

    def blocks():
        if rows:
            yield from divide_rows(read_all(files, reading), reading.val_fraction)
            return
        for split, file, start, end in divide_texts(files, reading.val_fraction):
            for block in read_text(file, reading, start, end):
                yield split, block

    return Source(("train", "val"), blocks, lambda: size_of(files), files, True, left_out)


def unnamed_source(path, files, reading, left_out):
    """The Source of a folder or zip in which no file has a split's name. Raises UserError.

    It is all rows where .jsonl or .parquet files lie there, and at most what describes them beside
    them; otherwise all the files that are text.
    """
    tables = [f for f in files if f.stem.endswith((".jsonl", ".parquet"))]
    others = [f for f in files if f not in tables]
    about = [f for f in others if re.search(r"(^|/)(readme|license)|\.(md|json)$", f.stem)]
    if tables and len(about) == len(others):
        return divided_source(tables, True, reading, left_out)
    texts = text_files(files, left_out)
    if not texts:
        raise UserError(f"{path} holds no text; --source takes a folder, a zip or a text file")
    return divided_source(texts, False, reading, left_out)


def path_source(path, reading):
    """The Source of what lies at path: a folder, the zip of one, or one file. Raises UserError."""
    left_out = Counter()
    if path.is_file() and not zipfile.is_zipfile(path):
        file = disk_file(path, path.name)
        return divided_source([file], file.kind in ("jsonl", "parquet"), reading, left_out)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return disk_source(path, reading)
    files = zip_files(path) if path.is_file() else folder_files(path, left_out)
    if found := split_files(path, files):
        source = split_source(path, found, reading)
    else:
        source = unnamed_source(path, list(files.values()), reading, left_out)
    if path.is_file():
        source.files = [disk_file(path, path.name)]  # the zip as a whole
    return source


# --- datasets -----------------------------------------------------------------------------------


def disk_source(path, reading):
    """The Source of a folder that datasets' save_to_disk wrote. Raises UserError."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever is wrong with its files
        raise UserError(f"{path} cannot be loaded by datasets ({first_line(error)}); save it "
                        "again with save_to_disk") from None
    loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
    files = [disk_file(f, f.relative_to(path).as_posix()) for f in sorted(path.rglob("*.arrow"))]
    return loaded_source(path, loaded, reading, files)


def hub_revision(repository, revision, mend):
    """The commit that a revision of a data set of the hub is (None: the newest). UserError."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha
    except Exception as error:
        raise no_hub(repository, error, mend) from None


def hub_source(repository, config, revision, reading, mend, streaming=True):
    """The Source of a data set of the Hugging Face hub, by default read while it is downloaded.

    mend: what to do where it cannot be had, for the message. Raises UserError.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(repository, config, revision=revision, streaming=streaming)
    except Exception as error:
        raise no_hub(repository, error, mend) from None
    source = loaded_source(repository, loaded, reading)
    blocks = source.blocks

    def guarded():
        try:
            yield from blocks()
        except Exception as error:
            raise no_hub(repository, error, mend) from None

    source.blocks = guarded
    return source


def no_hub(repository, error, mend):
    """The error for a data set that the hub does not give: it fails in as many ways as there are
    libraries below. The disk's own errors and ours stay what they are."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or isinstance(error, UserError):
        return error
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return UserError(f"cannot get {repository} from {host} ({what}); {mend}")


def loaded_source(where, loaded, reading, files=()):
    """The Source of {split: what datasets loaded for it}. Raises UserError."""
    found = {}
    for name, rows in loaded.items():
        if SPLIT_NAME.fullmatch(name.lower()):
            found.setdefault(our_split(SPLIT_NAME.fullmatch(name.lower())["split"]), rows)
    if "train" not in found:
        raise UserError(f"{where} has no train split, only {', '.join(loaded)}; save the one that "
                        "you want as train.jsonl, and give that as --source")

    def blocks():
        for split in SPLITS:
            if split not in found:
                continue
            of_split = read_loaded(found[split], reading.column, where)
            if split == "train" and "val" not in found:
                yield from divide_rows(of_split, reading.val_fraction)
            else:
                yield from ((split, block) for block in of_split)

    splits = tuple(split for split in SPLITS if split in found or split == "val")
    sizes = [getattr(getattr(rows, "data", None), "nbytes", None) for rows in found.values()]
    total = None if None in sizes else sum(sizes)
    return Source(splits, blocks, lambda: total, list(files), "val" not in found)


def read_loaded(rows, column, where):
    """Blocks of a column of datasets' Dataset or IterableDataset."""
    import pyarrow

    files = getattr(rows, "cache_files", None)
    if files and rows._indices is None:
        # read, not mapped as datasets itself would: mapped pages count as memory of this process
        for file in files:
            with pyarrow.OSFile(file["filename"]) as stream:
                for batch in pyarrow.ipc.open_stream(stream):
                    texts = texts_of(batch, column, where)
                    yield Block(texts, sum(map(len, texts)))
        return
    for table in rows.with_format("arrow").iter(batch_size=1024):
        texts = texts_of(table, column, where)
        yield Block(texts, sum(map(len, texts)))


def demo_source(reading):
    """The Source of Python's own documentation as CPython carries it, 90/5/5 by topic."""
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

    def blocks():
        for split, found in texts.items():
            lines = "".join(text + "\n" for text in found).split("\n")
            yield split, Block(found if reading.documents else lines, sizes[split])

    return Source(SPLITS, blocks, lambda: sum(sizes.values()))
