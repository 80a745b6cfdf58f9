"""Files of text, read into blocks of rows: text, .jsonl and .parquet, packed or not.

A row is a line of a text file, or a row of .jsonl or .parquet. Where documents are asked for, a
text file is one document, and a long one comes in several blocks.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lab.console import UserError, first_line, python

BLOCK = 1 << 20  # bytes of text that are read, encoded and written at a time
KINDS = {
    ".raw": "text",
    ".txt": "text",
    ".tokens": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
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
        install = f"{python()} -m pip install zstandard"
        raise UserError(f"{where} needs a package: `{install}`") from None
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
    for mark, name in (
        (b"\xff\xfe\0\0", "UTF-32"),
        (b"\0\0\xfe\xff", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ):
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
    return UserError(
        f"{why}; it may be {guess}, which `{get}iconv -f {guess} -t UTF-8 "
        f"{'' if get else name + ' '}> NEW_FILE` converts"
    )


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
        raise UserError(
            f'{where} has no column "{column}"; --column takes one of {", ".join(names)}'
        )
    kind = table.schema.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (
        pyarrow.types.is_string(kind)
        or pyarrow.types.is_large_string(kind)
        or pyarrow.types.is_string_view(kind)
    ):
        raise UserError(
            f'{where}: the column "{column}" holds {kind}, not text; --column takes '
            f"another of {', '.join(names)}"
        )
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
            raise UserError(
                f'{file.where}: the column "{column}" cannot be read '
                f"({first_line(error)}); bring a whole copy"
            ) from None


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
