"""A validation split for a text that has none: whole rows, whole files, or a text's end."""

import itertools
import math
import re

from lab.readers import Block, skip

FEW = 20  # from so many rows or files on, a text is divided between them and not inside one


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
        yield from divide_few(
            [row for block in first for row in block.rows if row.strip()], val_fraction
        )
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
        while block := stream.read(1 << 20):
            if filled := block.rstrip():
                end = position + len(filled)
            position += len(block)
            lines += block.count(b"\n")
    return end, lines


def break_in_file(file, wanted, size, lines):
    """The byte at which to divide a text file of `size` bytes and `lines` lines near `wanted`.

    It is looked for within a megabyte on either side.
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
