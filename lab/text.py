"""Text as rows: of a folder, a file, or a data set of the Hugging Face hub.

A row is a line of a text file, or a row of .jsonl, .parquet or .arrow. Where documents are asked
for, a text file is one row. Rows come in blocks: a list of str, and whether the last of them ends
there; amid a long document it does not. docs/data.md says what is read.
"""

import gzip
import io
import json
import os
import re
import shlex
import sys
import zlib
from functools import partial

from lab.console import UserError, first_line, python
from lab.encode import WHITE

SPLITS = ("train", "val", "test")
BLOCK = 1 << 20  # characters that are read, encoded and written at a time
# the last place at which GPT-2's pattern splits a text in any case: between a word and white space
CUT = re.compile(rf"(?s).*[^\s\ufeff](?={WHITE}+\S)")
# a word of its own: in WikiText's names, in the hub's shards, and as people write it
SPLIT_WORD = re.compile(
    r"(?<![a-z])(training|train|validation|valid|val|dev|testing|test)(set)?(?![a-z])"
)
# hidden files, a program's, token files, and what datasets made of a text that lies there too
NO_SOURCE = re.compile(r"\..*|__pycache__|requirements.*\.txt|.*\.(bin|tiktoken)|cache-.*\.arrow")
ROWS = (".jsonl", ".ndjson", ".parquet", ".arrow")
# below the top of a folder only these have splits' names: test/ is often code
DATA = (".txt", ".raw", ".tokens", ".md", *ROWS)
TABLE = "PYTHON -c 'import sys; from datasets import Dataset as D; %s.to_json(\"NEW.jsonl\")' FILE"
# what is not read, and the command that makes text or rows of it
CONVERT = {
    ".csv": TABLE % "D.from_csv(sys.argv[1])",
    ".tsv": TABLE % 'D.from_csv(sys.argv[1], sep="\\t")',
    ".json": "jq -c '.[]' FILE > NEW.jsonl",
    ".docx": "pandoc -t plain -o NEW.txt FILE",
    ".pdf": "pdftotext FILE",
    ".zip": "unzip FILE",
    ".tar": "tar xf FILE",
    ".bz2": "bunzip2 -k FILE",
}


# --- a file -------------------------------------------------------------------------------------


def suffix_of(path):
    """.jsonl for a.jsonl and for A.JSONL.gz."""
    return os.path.splitext(path.name.lower().removesuffix(".gz"))[1]


def kind_of(path):
    """What a file holds: rows, text, or as a phrase what is not read. Raises OSError."""
    suffix = suffix_of(path)
    if suffix in ROWS:
        return "rows"
    if suffix in CONVERT:
        convert = CONVERT[suffix].replace("PYTHON", python())
        convert = convert.replace("FILE", shlex.quote(str(path)))
        return f"{suffix[1:]}, not text; `{convert}` converts it"
    if not path.stat().st_size:  # a pipe, too
        return "empty"
    with open(path, "rb") as file:
        head = file.read(8192)
    return "binary or UTF-16" if b"\0" in head and path.suffix.lower() != ".gz" else "text"


def read_chunks(path, start=0, end=sys.maxsize):
    """The text of a UTF-8 file from character start to character end, about BLOCK at a time. Raises
    UserError for text in another encoding, and for what is no whole .gz."""
    packed = path.suffix.lower() == ".gz"
    position = 0
    with gzip.open(path) if packed else open(path, "rb") as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        try:
            while chunk := text.read(BLOCK):
                yield chunk[max(0, start - position) : max(0, end - position)]
                position += len(chunk)
        except UnicodeDecodeError as error:
            byte = stream.tell() - len(error.object) + error.start
            get = f"{'gzip -dc' if packed else 'cat'} {shlex.quote(str(path))}"
            fix = f"if it is LATIN1, `{get} | iconv -f LATIN1 -t UTF-8 > NEW` converts it"
            raise UserError(f"{path} is not UTF-8 at byte {byte:,}; {fix}") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is no whole gzip file ({first_line(error)})") from None


def read_text(path, documents, start=0, end=sys.maxsize):
    """Blocks of a text file: its lines, which end in "\\n" also where the file has "\\r\\n", or one
    document, cut only where GPT-2's pattern splits in any case."""
    held = ""
    for text in read_chunks(path, start, end):
        held += text
        if not documents:
            *lines, held = held.split("\n")
            yield [line.removesuffix("\r") + "\n" for line in lines], True
        elif place := CUT.match(held):
            yield [held[: place.end()]], False
            held = held[place.end() :]
    yield [held] if held or documents else [], True


def read_rows(path, column):
    """Lists of the texts under a column of a file of rows; a null is None. Raises UserError."""
    is_json = suffix_of(path) in (".jsonl", ".ndjson")
    for rows in read_json_rows(path) if is_json else read_arrow_rows(path, column):
        yield [text_at(row, column, path) for row in rows]


def read_json_rows(path):
    """Lists of dicts, the rows of a .jsonl file. Raises UserError."""
    number = 0
    for lines, _ in read_text(path, documents=False):
        rows = []
        for line in lines:
            number += 1
            try:
                row = json.loads(line.removeprefix("\ufeff"))
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                fix = "mend it, or if this is an array, `jq -c '.[]' FILE > NEW.jsonl` makes lines"
                raise UserError(f"{path}, line {number} is no JSON object; {fix}")
        yield rows


def read_arrow_rows(path, column):
    """Lists of dicts, the rows of a .parquet file, or of an .arrow file as datasets writes it: with
    the column asked for if there is one, else with all. Raises UserError."""
    import pyarrow.parquet

    try:
        if suffix_of(path) == ".arrow":
            with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
                yield from (batch.to_pylist() for batch in batches)
            return
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            leaves = [file.schema.column(i) for i in range(len(file.schema))]
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            columns = [column] if column in texts else None
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        kind = suffix_of(path)
        raise UserError(f"{path} is no whole {kind} file ({first_line(error)})") from None


def text_at(row, column, where):
    """The text of a row, a dict, under a column; None for a null. Raises UserError."""
    fields = dict(leaves_of(row))
    text = fields.get(column, fields)
    if fields.get(column.rpartition(".")[0], "") is None:  # the object that would have it
        return None
    if text is not None and not isinstance(text, str):
        names = ", ".join(name for name, value in fields.items() if isinstance(value, str))
        fix = f"--column takes one of {names or 'those that are texts, and there are none'}"
        raise UserError(f'{where}: no text under "{column}"; {fix}')
    # half a character, such as "\\ud800" in JSON, is none in UTF-8
    return text and text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def leaves_of(row, above=""):
    """(name, value) pairs of a row, a dict; a.b names the field b of an object a."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from leaves_of(value, f"{above}{name}.")
        else:
            yield above + name, value


# --- a folder -----------------------------------------------------------------------------------


def find_files(path, seen):
    """The files at a path or below it. Links are followed, each folder once. seen: the folders that
    were there already. Raises OSError."""
    if not path.is_dir():
        yield path
    elif path.resolve() not in seen:
        seen.add(path.resolve())
        for child in sorted(path.iterdir()):
            if not NO_SOURCE.fullmatch(child.name):
                yield from find_files(child, seen)


def split_of(name):
    """The split that a path's name tells, the outermost; "" for none."""
    match = SPLIT_WORD.search(name.lower())
    return match and {"tr": "train", "te": "test"}.get(match[0][:2], "val") or ""


def named_splits(where, paths):
    """{split: paths} of files that have a split's name or lie in a folder that has one; {} where
    none has. Raises UserError where such names do not make one text."""
    found = {}
    at_the_top = []
    for path in paths:
        name = path.relative_to(where)
        split = split_of(str(name))
        is_top = split and split_of(name.parts[0]) and path.suffix != ".py"
        if is_top or (split and suffix_of(path) in DATA):
            found.setdefault(split, []).append(path)
            at_the_top += [str(name)] if is_top else []
    if "train" not in found and not at_the_top:
        return {}
    if "train" not in found:
        fix = "name the training text train.txt or train/, or rename what is no split"
        raise UserError(f"{where} has no train split beside {', '.join(at_the_top[:3])}; {fix}")
    for split, part in found.items():
        shards = [int(number) for number in re.findall(r"-of-(\d{5})", " ".join(map(str, part)))]
        if shards and {len(shards)} != set(shards):
            why = f"{where} has {len(shards)} shards of its {split} split, as {part[0]}"
            raise UserError(f"{why}; bring all shards of one text, or give --source one of them")
        twins = {}  # wiki.train.raw and wiki.train.tokens, or one of them in two folders
        for path in part:
            stem = path.name.lower().removesuffix(".gz").removesuffix(suffix_of(path))
            other = twins.setdefault(stem, path)
            if split_of(stem) and other != path:
                raise UserError(f"{where} holds {other} and {path}; give --source one of them")
    return found


def readable(where, paths):
    """The paths that are read of these: rows, or where there are none texts. Raises UserError."""
    kinds = {path: kind_of(path) for path in paths}
    for kind in ("rows", "text"):
        if chosen := [path for path in paths if kinds[path] == kind]:
            return chosen
    named = "".join([f"; {path} is {kind}" for path, kind in kinds.items()][:1])
    raise UserError(f"{where} holds no text to be read{named}")


def path_source(path, options):
    """What gives (split, rows, ends) of a folder or a file, each time it is called. options:
    prepare.py's. Raises UserError, OSError."""
    paths = [*find_files(path, set())]
    splits = named_splits(path, paths) or {"train": paths}
    chosen = {split: readable(f"the {split} split of {path}", splits[split]) for split in splits}
    if count := len(paths) - sum(map(len, chosen.values())):
        read = next(iter(chosen.values()))[0]
        print(f"skipped {count:,} other files; files like {read} are read")
    return partial(read_files, chosen, options)


def read_files(chosen, options):
    """(split, rows, ends) of {split: paths}."""
    for split, paths in chosen.items():
        every = 0 if split != "train" or "val" in chosen else round(1 / options.val_fraction)
        if suffix_of(paths[0]) in ROWS:
            rows = (texts for path in paths for texts in read_rows(path, options.column))
            yield from in_splits(split, rows, every)
            continue
        parts = divide_texts(paths, every) if every else [(split, path) for path in paths]
        for part, path, *places in parts:
            for block in read_text(path, options.separator == "endoftext", *places):
                yield part, *block


# --- a validation split for a text that has none ------------------------------------------------


def in_splits(split, rows, every):
    """(split, rows, ends) of a split's rows, given as lists; a null is none. Every so many becomes
    val's, none for 0."""
    number = 0
    for texts in rows:
        parts = {split: [], "val": []}
        for text in texts:
            if text is not None:
                number += 1
                parts["val" if every and number % every == 0 else split].append(text)
        yield from ((part, texts, True) for part, texts in parts.items() if texts)


def divide_texts(paths, every):
    """[(split, path, start, end)] of text files without a validation split, in characters. One is
    cut; of several, from the largest to the smallest, every so many is val's; of fewer than that,
    the one whose size is nearest to val's share."""
    if len(paths) == 1:
        place = place_of_cut(paths[0], every)
        return [("train", paths[0], 0, place), ("val", paths[0], place)]
    sizes = {path: path.stat().st_size for path in paths}
    by_size, share = sorted(paths, key=lambda path: -sizes[path]), sum(sizes.values()) / every
    nearest = min(paths, key=lambda path: abs(sizes[path] - share))
    val = set(by_size[every - 1 :: every] or [nearest])
    return [("val" if path in val else "train", path) for path in paths]


def place_of_cut(path, every):
    """The character at which the last part of so many of a text file begins: with the line that is
    nearest, or where none begins nearby, with a blank."""
    size = sum(map(len, read_chunks(path)))
    wanted = size - size // every
    start = max(0, wanted - min(BLOCK, size - wanted))
    window = "".join(read_chunks(path, start, wanted + BLOCK)).rstrip()
    place = r"(?<=\n)" if "\n" in window else r"(?= )"
    found = [start + match.start() for match in re.finditer(place, window)]
    return min(found, key=lambda at: abs(at - wanted), default=wanted)


# --- not from a disk ----------------------------------------------------------------------------


def hub_rows(repository, config, origin, options, fix):
    """(split, rows, ends) of a data set of the Hugging Face hub. --hub's is read while it is
    downloaded, WikiText is kept by datasets' cache. Where origin has no revision it gets the
    newest. fix: for the message where the hub does not give it. Raises UserError."""
    import datasets
    import huggingface_hub

    try:
        revision = origin["revision"] or huggingface_hub.HfApi().dataset_info(repository).sha
        origin["revision"] = revision
        how = dict(revision=revision, streaming=bool(options.hub))
        loaded = datasets.load_dataset(repository, config, **how)
        found = [(split_of(name), data) for name, data in loaded.items() if split_of(name)]
        splits = {split for split, _ in found}
        if "train" not in splits:
            raise UserError(f"{repository} has no train split, only {', '.join(loaded)}")
        for split, data in found:
            tables = data.with_format("arrow").iter(batch_size=1024)
            rows = (table.to_pylist() for table in tables)
            texts = ([text_at(row, options.column, repository) for row in part] for part in rows)
            every = 0 if split != "train" or "val" in splits else round(1 / options.val_fraction)
            yield from in_splits(split, texts, every)
    except UserError:
        raise
    except Exception as error:  # it fails in as many ways as there are libraries below
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"cannot get {repository} from {host} ({why}); {fix}") from None


def demo_rows(separator):
    """(split, rows, ends) of Python's own documentation as CPython carries it, 90/5/5 by topic."""
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
        yield split, (found if separator == "endoftext" else lines), True
