"""Where text comes from: a folder, a file, a zip, the Hugging Face hub, or Python's own
documentation."""

import codecs
import errno
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lab.console import UserError, first_line
from lab.divide import divide_rows, divide_texts
from lab.readers import KINDS, Block, File, guess_encoding, read_all, read_text, size_of, texts_of

SPLITS = ("train", "val", "test")
HEAD = 1 << 13  # bytes that decide whether a file is text

# WikiText's own names, the hub's with shard numbers and hashes, and what people write
SPLIT_NAME = re.compile(
    r"(?P<prefix>(?:.*[^a-z0-9])?)(?P<split>training|train|validation|valid|val|dev|testing|test)"
    r"(?:[-_.](?P<shard>\d+)(?:[-_.]of[-_.](?P<shards>\d+))?(?:-[0-9a-f]{6,64})?)?"
)


@dataclass
class Source:
    """A text: its splits, its (split, Block) pairs, and the files that it is read from."""

    splits: tuple
    blocks: Callable  # () -> iterator of (split, Block)
    total: Callable = lambda: None  # () -> bytes to read, None where that is unknown
    files: list = field(default_factory=list)
    divided: bool = False  # the validation split was split off
    left_out: Counter = field(default_factory=Counter)  # why -> files that are not read


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
        files[name] = File(
            name, f"{path}/{name}", lambda m=member: archive.open(m), lambda m=member: m.file_size
        )
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
        sets = {
            (os.path.dirname(f.name), m["prefix"], m["shards"], f.kind, f.packed) for f, m in parts
        }
        shards = int(parts[0][1]["shards"] or len(parts))
        numbers = {m["shard"] for _, m in parts}
        if len(sets) > 1 or len(parts) != shards or len(numbers) != len(parts):
            names = ", ".join(f.name for f, _ in parts)
            raise UserError(
                f"{where}: the {split} split must be one file or all of its shards, "
                f"not {names}; give the one folder or file that you mean"
            )
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
        raise UserError(
            f"{where} has no val split; it needs wiki.{{train,valid,test}}.raw, or "
            "{train,validation,test} as .txt, .jsonl or .parquet; `--source "
            f"{found['train'][0].where}` divides that one file"
        )

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
        raise UserError(
            f"{path} cannot be loaded by datasets ({first_line(error)}); save it "
            "again with save_to_disk"
        ) from None
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
        raise UserError(
            f"{where} has no train split, only {', '.join(loaded)}; save the one that "
            "you want as train.jsonl, and give that as --source"
        )

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
