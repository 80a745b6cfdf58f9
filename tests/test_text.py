"""Text, from where it lies to token ids: what is read, and what is refused by one line."""

import gzip
import json
import os
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import load_tokens

import prepare
from lab import text
from lab.console import UserError
from lab.data import Dataset, load_tokenizer
from lab.text import encode_rows, read_text

END = 50256
# what GPT-2's pattern looks at, and Python's and Unicode's corners
PIECES = [
    *" \n\t\xa0\u3000\x1c\x00\r7Ω。'!,_🙂\u0301",
    "  ",
    "\n\n",
    "\r\n",
    "word",
    "日本",
    "1234",
]
PIECES += ["'s", "'ll", "<|endoftext|>", "<|endof", "text|>", "x" * 9, " " * 9]


@pytest.fixture(scope="module")
def encoding():
    return load_tokenizer()


def slow_ids(encoding, rows, separator="endoftext"):
    """The reference: tiktoken's encode_ordinary of each row by itself."""
    ids = []
    for row in filter(str.strip, rows):
        if separator == "none":
            row = row.strip()
        elif separator == "newline":
            row = row.removesuffix("\n") + "\n"
        ids += encoding.encode_ordinary(row) + [END] * (separator == "endoftext")
    return ids


def write(folder, files):
    """Write {name: str or bytes} into a folder; the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def jsonl(rows, column="text"):
    return "".join(json.dumps({column: row}) + "\n" for row in rows)


def parquet(path, rows, column="text", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(rows, pa.string())}), path, **options)


def ids_of(tmp_path, source, separator="", **options):
    """{split: ids} of a source, prepared anew."""
    options |= dict(data_dir=tmp_path / "data", force=True)
    dataset = prepare.prepare("own", source, separator, **options)
    return {
        split: load_tokens("own", split, tmp_path / "data").tolist() for split in dataset.counts
    }


def refused(tmp_path, source, **options):
    """The message of the UserError that a source gives; it leaves nothing behind."""
    with pytest.raises(UserError) as caught:
        prepare.prepare("own", source, data_dir=tmp_path / "data", **options)
    assert "\n" not in str(caught.value)
    assert not [name for name in os.listdir(tmp_path / "data") if not name.endswith(".lock")]
    return str(caught.value)


# --- ids


@pytest.mark.parametrize("separator", ["none", "newline"])
def test_joined_rows_encode_as_each_row_by_itself(encoding, separator):
    random = np.random.RandomState(0)
    for _ in range(200):
        rows = ["".join(random.choice(PIECES, random.randint(6))) for _ in range(8)]
        ids, counts = encode_rows(encoding, rows, True, separator)
        assert ids.tolist() == slow_ids(encoding, rows, separator), rows
        assert counts["bytes"] == len(encoding.decode_bytes(ids.tolist()))
        line_ends = len(rows) * (separator == "newline")
        assert counts["words"] == sum(len(row.split()) for row in rows) + line_ends


@pytest.mark.parametrize("separator", ["none", "newline", "endoftext"])
def test_tokens_depend_on_the_rows_alone(encoding, tmp_path, monkeypatch, separator):
    """The same rows as .jsonl and .parquet, in blocks of any size, against each row by itself."""
    random = np.random.RandomState(1)
    monkeypatch.setattr(text, "LONG_RUN", 8)
    for _ in range(8):
        rows = ["".join(random.choice(PIECES, random.randint(12))) for _ in range(40)] + ["end"]
        expected = slow_ids(encoding, rows, separator)
        monkeypatch.setattr(text, "BLOCK", int(random.randint(1, 200)))
        write(tmp_path / "j", {"train.jsonl": jsonl(rows), "val.jsonl": jsonl(["v v"])})
        parquet(tmp_path / "p/train.parquet", rows, row_group_size=int(random.randint(1, 50)))
        parquet(tmp_path / "p/val.parquet", ["v v"])
        for kind in "jp":
            assert ids_of(tmp_path, tmp_path / kind, separator)["train"] == expected
        words = sum(len(row.split()) for row in rows) + len(rows) * (separator == "newline")
        assert Dataset("own", tmp_path / "data").counts["train"].words == words


def test_a_document_s_tokens_do_not_depend_on_blocks(encoding, tmp_path, monkeypatch):
    """A text file, cut into blocks of any size, against tiktoken on the whole of it."""
    random = np.random.RandomState(2)
    monkeypatch.setattr(text, "LONG_RUN", 8)
    for _ in range(40):
        document = "".join(random.choice(PIECES, 300))
        monkeypatch.setattr(text, "BLOCK", int(random.randint(1, 100)))
        write(tmp_path / "src", {"train.txt": document, "val.txt": "v v"})
        expected = [*encoding.encode_ordinary(document), END]
        assert ids_of(tmp_path, tmp_path / "src")["train"] == expected
        counts = Dataset("own", tmp_path / "data").counts["train"]
        shape = len(document.split()), len(document.encode()), 1
        assert (counts.words, counts.bytes, counts.rows) == shape


def test_a_long_document_is_read_in_parts(tmp_path):
    for piece in "word ", "word\n\n    ":
        document = piece * (5 * text.BLOCK // len(piece.encode()))
        write(tmp_path, {"long.txt": document})
        blocks = list(read_text(tmp_path / "long.txt", documents=True))
        assert "".join(rows[0] for rows, _ in blocks) == document
        assert max(len(rows[0]) for rows, _ in blocks) < 2 * text.BLOCK
        assert [ends for _, ends in blocks] == [False] * (len(blocks) - 1) + [True]


def test_runs_of_white_space_that_tiktoken_refuses(encoding, tmp_path):
    """GPT-2's pattern takes a run but for its last character, which stays with the word after
    it."""
    for run, last in ((" " * 1_200_000, " "), ("\n\t" * 600_000, "\n")):
        with pytest.raises(BaseException, match="(?i)stack"):
            encoding.encode_ordinary(f"x{run}{last}y")
        write(tmp_path / "src", {"train.txt": f"x{run}{last}y", "val.txt": "v v"})
        parts = "x", run, f"{last}y"
        expected = [id for part in parts for id in encoding.encode_ordinary(part)] + [END]
        assert ids_of(tmp_path, tmp_path / "src")["train"] == expected


def test_marks_and_halves_and_nulls(encoding, tmp_path):
    half = '{"text": "a\\ud800b"}\n{"text": null}\n{"text": "\\ud83d\\ude42"}\n'
    write(tmp_path / "j", {"train.jsonl": "\ufeff" + half, "val.jsonl": jsonl(["v v"])})
    assert ids_of(tmp_path, tmp_path / "j")["train"] == slow_ids(encoding, ["a\ufffdb", "🙂"])
    parquet(tmp_path / "p/train.parquet", ["a", None, "b"])
    parquet(tmp_path / "p/val.parquet", ["v v"])
    assert ids_of(tmp_path, tmp_path / "p")["train"] == slow_ids(encoding, ["a", "b"])
    write(tmp_path / "t", {"train.txt": "\ufeffa\r\n b\rc", "val.txt": "v v"})
    assert ids_of(tmp_path, tmp_path / "t")["train"] == slow_ids(encoding, ["a\r\n b\rc"])
    # a line ends in "\n" whatever its file has, and a lone "\r" is no end
    assert ids_of(tmp_path, tmp_path / "t", "newline")["train"] == slow_ids(
        encoding, ["a\n", " b\rc"], "newline"
    )


# --- the ways in which people keep text


@pytest.mark.parametrize(
    "train, val",
    [
        ("x-train.txt", "my_valid.txt"),
        ("Train.TXT", "dev.txt"),
        ("ptb.train.raw", "ptb.valid.raw"),
        ("training.md", "validation.md"),
        ("train/a.txt", "val/b.txt"),
        ("Train/deep/a.md", "dev/b.md"),
        ("data/train.txt", "data/valid.txt"),
        ("train.txt.gz", "val.txt.gz"),
    ],
)
def test_splits_by_the_names_that_people_write(encoding, tmp_path, train, val):
    texts = {train: "t t", val: "v v"}
    for name, content in texts.items():
        content = content.encode()
        content = gzip.compress(content) if name.endswith("gz") else content
        write(tmp_path / "src", {name: content, "README.md": "about", "logo.png": b"\0\1"})
    expected = {s: slow_ids(encoding, [t]) for s, t in (("train", "t t"), ("val", "v v"))}
    assert ids_of(tmp_path, tmp_path / "src") == expected


def test_names_that_only_contain_a_split_s_are_none():
    for name in ("latest", "trainer", "contest", "devil", "test1", "restraining"):
        assert not text.SPLIT_NAME.fullmatch(name), name


@pytest.mark.parametrize(
    "names, named",
    [
        ("wiki.train.raw train.txt val.txt", "wiki.train.raw"),
        ("train-00000-of-00002.jsonl val.jsonl", "train-00000-of-00002.jsonl"),
        ("val.txt test.txt", "val.txt"),
        ("train.txt test.txt", "val split"),
        ("train.csv val.csv", "train.csv"),
        ("train/a.txt train.txt val.txt", "train.txt"),
    ],
)
def test_names_of_splits_that_do_not_fit_are_one_line_and_never_one_text(tmp_path, names, named):
    row = jsonl(["a b c"])
    assert named in refused(tmp_path, write(tmp_path / "src", dict.fromkeys(names.split(), row)))


def test_shards_a_column_and_what_save_to_disk_wrote(encoding, tmp_path):
    import datasets

    rows = [f"row {i}" for i in range(30)]
    parquet(tmp_path / "s/data/train-00000-of-00002.parquet", rows[:9], "body")
    parquet(tmp_path / "s/data/train-00001-of-00002.parquet", rows[9:], "body")
    disk = datasets.DatasetDict(train=datasets.Dataset.from_dict({"body": rows}))
    disk.save_to_disk(str(tmp_path / "disk"))
    nested = "".join(json.dumps({"meta": {"body": row}}) + "\n" for row in rows)
    write(tmp_path / "n", {"train.jsonl": nested})
    val = slow_ids(encoding, rows[19:20])  # the twentieth
    train = slow_ids(encoding, rows[:19] + rows[20:])
    for source, column in (("s", "body"), ("disk", "body"), ("n", "meta.body")):
        ids = ids_of(tmp_path, tmp_path / source, column=column)
        assert (ids["train"], ids["val"]) == (train, val)


@pytest.mark.parametrize(
    "files, named",
    [
        ({"a.jsonl": jsonl(["x"], "body")}, "--column takes one of body"),
        ({"a.jsonl": '{"meta": {"body": "x"}, "n": 1}\n'}, "--column takes one of meta.body"),
        ({"a.jsonl": '["x"]\n'}, "line 1"),
        ({"a.jsonl": '{"text": 1}\n'}, "line 1"),
        ({"a.parquet": b"x" * 99}, "a.parquet"),
        ({"train.txt": "t", "val.txt": b"ab\nc\xff\n"}, "at byte 4"),
        ({"train.txt": "t t", "val.txt": " \n \n"}, "val split"),
        ({"a.txt": "caf\xe9".encode("latin-1")}, "iconv"),
        ({"a.csv": "x,y\n1,2\n"}, ".jsonl"),
        ({"a.bin": b"\0\1"}, "no text"),
        ({".hidden": "x"}, "no text"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, files, named):
    assert named in refused(tmp_path, write(tmp_path / "src", files))


def test_a_lone_file_that_is_no_text_is_named(tmp_path):
    write(tmp_path, {"a.txt": "text " * 99})
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.write(tmp_path / "a.txt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.txt")
    write(tmp_path, {"a.pdf": b"%PDF-1.7 \n", "a.u16": "text".encode("utf-16")})
    for name, kind in (("docx", "zip"), ("tar", "tar"), ("pdf", "PDF"), ("u16", "UTF-16")):
        assert kind in refused(tmp_path, tmp_path / f"a.{name}")


def test_links_are_followed_once_and_what_cannot_be_listed_ends_it(encoding, tmp_path, monkeypatch):
    write(tmp_path, {"src/a.txt": "a a " * 9, "elsewhere/b.txt": "b b " * 9})
    (tmp_path / "src/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "src")
    ids = ids_of(tmp_path, tmp_path / "src")
    texts = {encoding.decode(split[:-1]) for split in ids.values()}
    assert texts == {"a a " * 9, "b b " * 9}

    def closed(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match="src"):
        prepare.prepare("two", tmp_path / "src", data_dir=tmp_path / "data")


# --- a validation split for a text that has none


def test_a_folder_without_splits_is_all_its_text(encoding, tmp_path, capsys):
    texts = [f"def f():\n    return {i}\n\n\n" for i in range(24)]
    files = {f"d{i % 3}/{i:02}.py": content for i, content in enumerate(texts)}
    write(tmp_path / "src", files | {"d0/logo.png": b"\x89PNG\0", "empty.txt": "", ".git/x": "y"})
    ids = ids_of(tmp_path, tmp_path / "src")
    assert " 2 files" in capsys.readouterr().out.splitlines()[-1]
    val = encoding.decode(ids["val"][:-1])
    assert val in texts and ids["val"].count(END) == 1
    in_order = [content for _, content in sorted(files.items()) if content != val]
    assert ids["train"] == slow_ids(encoding, in_order)


@pytest.mark.parametrize(
    "rows", [["one two three four"], ["a b c"] * 19, ["字字字字字"], [" x y\n "]]
)
def test_one_text_file_is_divided_near_a_line_end_or_a_blank(encoding, tmp_path, rows):
    document = "\n".join(rows)
    ids = ids_of(tmp_path, write(tmp_path, {"one.txt": document}) / "one.txt")
    parts = [encoding.decode(ids[split][:-1]) for split in ("train", "val")]
    assert "".join(parts) == document and all(part.strip() for part in parts)
    if len(rows) > 1:
        assert parts[0].endswith("\n")
    elif rows[0].isascii():
        assert parts[1].startswith(" ")


def test_one_text_file_is_divided_between_rows(encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 64)  # several blocks, so that their seams are tried too
    rows = [f"row {i} ünd {'x' * (i % 7)}\n" for i in range(100)]
    source = write(tmp_path, {"book.txt": "".join(rows)}) / "book.txt"
    ids = ids_of(tmp_path, source, "none", val_fraction=0.2)
    assert ids["train"] + ids["val"] == slow_ids(encoding, rows, "none")
    counts = Dataset("own", tmp_path / "data").counts
    assert 15 <= counts["val"].rows <= 25 and sum(c.rows for c in counts.values()) == 100
    spoiled = bytearray(source.read_bytes())
    spoiled[-4] = 0xFF  # in the validation part, whose bytes are counted from the file's beginning
    source.write_bytes(spoiled)
    with pytest.raises(UserError, match=f"at byte {len(spoiled) - 4:,};"):
        ids_of(tmp_path, source, "none", val_fraction=0.2)
    assert load_tokens("own", "train", tmp_path / "data").tolist() == ids["train"]  # is untouched


def test_every_twentieth_row_is_for_validation(encoding, tmp_path):
    for count, fraction, val in ((100, 0.05, range(19, 100, 20)), (6, 0.3, [3])):
        rows = [f"a row of it {i}" for i in range(count)]
        source = write(tmp_path, {"rows.jsonl": jsonl(rows)}) / "rows.jsonl"
        ids = ids_of(tmp_path, source, val_fraction=fraction)
        assert ids["val"] == slow_ids(encoding, [rows[i] for i in val])
        assert ids["train"] == slow_ids(encoding, [r for i, r in enumerate(rows) if i not in val])
