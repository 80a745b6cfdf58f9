"""What is read, of the many ways in which people keep text; tokens depend on the text alone."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import load_tokens

import prepare
from lab import encode, text
from lab.console import UserError
from lab.data import Dataset, load_tokenizer

END = 50256
# what GPT-2's pattern looks at, and Python's and Unicode's corners
PIECES = "a word Ω 日本 。 7 1234 's ' 'll ! , <|endoftext|> <|endof text|> _ 🙂 \u0301".split()
PIECES += [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\r", "\xa0", "\u3000", "\x1c", "x" * 9, " " * 9]


@pytest.fixture(scope="module")
def encoding():
    return load_tokenizer()


def slow_ids(encoding, rows, separator="endoftext"):
    """The reference: tiktoken's encode_ordinary of each row by itself."""
    ids = []
    for row in rows:
        if not row.strip():
            continue
        if separator == "none":
            ids += encoding.encode_ordinary(row.strip())
        elif separator == "newline":
            ids += encoding.encode_ordinary(row.removesuffix("\n") + "\n")
        else:
            ids += [*encoding.encode_ordinary(row), END]
    return ids


def write(folder, files):
    """Write {name: str, bytes or rows of .parquet} into a folder; the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            pq.write_table(pa.table({"text": pa.array(content, pa.string())}), path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def jsonl(rows):
    return "".join(json.dumps({"text": row}) + "\n" for row in rows)


def ids_of(tmp_path, source, separator="", **options):
    """{split: ids} of a source, prepared anew."""
    meta = prepare.prepare("own", source, separator, tmp_path / "data", force=True, **options)
    return {split: load_tokens("own", split, tmp_path / "data").tolist() for split in meta.counts}


def refused(tmp_path, source, *named, **options):
    """The error of a source that is refused: one line that names these."""
    with pytest.raises(UserError) as caught:
        prepare.prepare("own", source, data_dir=tmp_path / "data", force=True, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in named), message
    return message


# --- rows and documents -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, separator",
    [("jsonl", "none"), ("jsonl", "newline"), ("parquet", "endoftext"), ("txt", "endoftext")],
)
def test_tokens_depend_on_the_text_alone(encoding, tmp_path, monkeypatch, kind, separator):
    """In blocks of any size, against tiktoken on each row, or on the document, by itself."""
    monkeypatch.setattr(encode, "LONG_RUN", 8)
    random = np.random.RandomState(1)
    for _ in range(20):
        rows = ["".join(random.choice(PIECES, random.randint(12))) for _ in range(40)] + ["end\n\n"]
        rows = ["".join(rows)] if kind == "txt" else rows
        content = dict(jsonl=jsonl(rows), parquet=rows, txt=rows[0])[kind]
        monkeypatch.setattr(text, "BLOCK", int(random.randint(1, 200)))
        write(tmp_path / "src", {f"{split}.{kind}": content for split in ("train", "val")})
        ids = ids_of(tmp_path, tmp_path / "src", separator)
        assert ids["train"] == ids["val"] == slow_ids(encoding, rows, separator)
        counts = Dataset("own", tmp_path / "data").counts["train"]
        words = sum(len(row.split()) for row in rows) + len(rows) * (separator == "newline")
        assert (counts.words, counts.rows) == (words, len(rows))
        nbytes = sum(len(row.encode()) for row in rows if row.strip())
        assert separator != "endoftext" or counts.bytes == nbytes


def test_a_long_document_is_read_in_parts(tmp_path):
    write(tmp_path, {"long.txt": "word\n\n    " * (text.BLOCK // 2)})
    blocks = [*text.read_text(tmp_path / "long.txt", documents=True)]
    assert max(len(rows[0]) for rows, _ in blocks) < 2 * text.BLOCK


def test_marks_halves_nulls_and_line_ends(encoding, tmp_path):
    half = '\ufeff{"text": "a\\ud800b"}\n{"text": null}\n{"text": "\\ud83d\\ude42"}\n'
    write(tmp_path / "j", {"train.jsonl": half, "val.jsonl": jsonl(["v v"])})
    assert ids_of(tmp_path, tmp_path / "j")["train"] == slow_ids(encoding, ["a\ufffdb", "🙂"])
    assert Dataset("own", tmp_path / "data").counts["train"].rows == 2
    write(tmp_path / "p", {"train.parquet": ["a", None, "b"], "val.parquet": ["v v"]})
    assert ids_of(tmp_path, tmp_path / "p")["train"] == slow_ids(encoding, ["a", "b"])
    write(tmp_path / "t", {"train.txt": "\ufeffa\r\n b\rc\u2028d", "val.txt": "v v"})
    assert ids_of(tmp_path, tmp_path / "t")["train"] == slow_ids(encoding, ["a\r\n b\rc\u2028d"])
    lines = slow_ids(encoding, ["a\n", " b\rc\u2028d\n"], "newline")
    assert ids_of(tmp_path, tmp_path / "t", "newline")["train"] == lines


def test_gzip(encoding, tmp_path):
    content = "a text\n\n  of lines\n" * 30
    packed = gzip.compress(content.encode())
    rows = gzip.compress(jsonl(["r"] * 20).encode())
    write(tmp_path, {"one.txt.gz": packed, "rows.jsonl.gz": rows})
    ids = ids_of(tmp_path, tmp_path / "one.txt.gz")
    assert encoding.decode(ids["train"][:-1] + ids["val"][:-1]) == content
    assert ids_of(tmp_path, tmp_path / "rows.jsonl.gz")["val"] == slow_ids(encoding, ["r"])
    write(tmp_path / "g", {"train.txt.gz": packed[:-20], "val.txt": "v"})
    refused(tmp_path, tmp_path / "g", "g/train.txt.gz")
    refused(tmp_path, write(tmp_path, {"plain.gz": content}) / "plain.gz", "plain.gz")


def test_a_column_by_name(encoding, tmp_path):
    rows = [{"meta": {"title": f"t {i}", "n": i}, "story": f"s {i}", "a.b": "c"} for i in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write(tmp_path, {"one.jsonl": lines})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "one.parquet")
    for kind in "jsonl", "parquet":
        source = tmp_path / f"one.{kind}"
        for column, last in (("story", "s 19"), ("a.b", "c"), ("meta.title", "t 19")):
            assert ids_of(tmp_path, source, column=column)["val"] == slow_ids(encoding, [last])
        for column in "text", "meta", "meta.n":
            refused(tmp_path, source, f'"{column}"', "meta.title, story, a.b", column=column)
    write(tmp_path, {"one.jsonl": lines + '{"meta": null}\n'})
    ids = ids_of(tmp_path, tmp_path / "one.jsonl", column="meta.title")
    assert ids["val"] == slow_ids(encoding, ["t 19"])
    write(tmp_path, {"one.jsonl": '[{"text": "t"}]'})
    refused(tmp_path, tmp_path / "one.jsonl", "one.jsonl, line 1", "jq")


def test_another_encoding_is_one_line_with_the_command(tmp_path):
    write(tmp_path, {"x.txt": "ab\nCafé\n".encode("cp1252"), "y.txt": "ab".encode("utf-16")})
    message = refused(tmp_path, tmp_path / "x.txt", "x.txt", "byte 6")
    os.system(message.split("`")[1].replace("NEW", str(tmp_path / "new.txt")))
    assert (tmp_path / "new.txt").read_text(encoding="utf-8") == "ab\nCafé\n"
    refused(tmp_path, tmp_path / "y.txt", "y.txt", "UTF-16")


# --- folders and splits -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train, val",
    [
        ("x-train.txt", "my_valid.TXT"),
        ("ptb.train", "ptb.valid"),
        ("data/train/a.md", "data/dev/a.md"),
        ("train_sft/a.txt", "val_sft/a.txt"),
        ("x.training.en", "x.validation.en"),
        ("trainset.jsonl", "devset.jsonl"),
        ("data/train-00000-of-00001-0123456789abcdef.txt", "data/validation.txt"),
    ],
)
def test_splits_by_the_names_that_people_write(encoding, tmp_path, capsys, train, val):
    texts = jsonl(["t t"]), jsonl(["v v"])
    texts = texts if "jsonl" in train else ("t t", "v v")
    files = {train: texts[0], val: texts[1], "contest.txt": b"\xff not read", "test.py": "x"}
    files["requirements-dev.txt"] = files["test/__pycache__/test.pyc"] = "not seen"
    ids = ids_of(tmp_path, write(tmp_path / "src", files))
    assert ids == {"train": slow_ids(encoding, ["t t"]), "val": slow_ids(encoding, ["v v"])}
    assert "skipped 2 other files" in capsys.readouterr().out


@pytest.mark.parametrize(
    "files, named",
    [
        ({"train.txt": "t", "test.csv": "a,b"}, "test.csv"),
        ({"a.md": "t", "test/a.md": "t"}, "test/a.md"),
        ({"one/wiki.train.raw": "t", "two/wiki.train.tokens": "t", "val.txt": "v"}, "wiki.train"),
        ({"one/train.txt": "t", "two/train.txt": "t", "val.txt": "v"}, "two/train.txt"),
        ({"train-00000-of-00002.jsonl": jsonl(["t"]), "val.jsonl": jsonl(["v"])}, "train-00000"),
        ({".hidden": "t", "x.dat": b"\0"}, "x.dat"),
    ],
)
def test_what_is_no_one_text_is_refused(tmp_path, files, named):
    refused(tmp_path, write(tmp_path / "src", files), named)


def test_a_file_that_is_not_text_is_named_with_the_command_that_converts_it(encoding, in_tmp):
    kinds = {"x.tar.gz": "tar xf", "x.docx": "pandoc", "x.pdf": "pdftotext", "x.json": "jq"}
    for name, kind in (kinds | {"x.zip": "unzip", "x.bin": "binary"}).items():
        refused(in_tmp, write(in_tmp, {name: b"a\0b"}) / name, name, kind)
    for name, separator in ("t.csv", ","), ("t.tsv", "\t"):
        write(in_tmp, {name: f"id{separator}text\n" + f'1{separator}"a\nb"\n' * 20})
        command = refused(in_tmp, Path(name), name).split("`")[1]
        os.system(command)
        assert ids_of(in_tmp, "NEW.jsonl")["val"] == slow_ids(encoding, ["a\nb"])


def test_a_folder_without_splits_is_all_its_text(encoding, tmp_path, capsys):
    texts = [f"def f():\n    return {i}\n\n\n" for i in range(24)]
    source = write(tmp_path / "src", {f"package/m{i:02}.py": t for i, t in enumerate(texts)})
    write(source, {".git/config": "x", "package/.hidden.py": "x", "logo.png": b"\x89PNG\0"})
    write(source, {"a.zip": b"PK\3\4", "package/test/data.py": texts[0]})
    os.mkfifo(source / "pipe")
    ids = ids_of(tmp_path, source)
    assert "skipped 3 other files" in capsys.readouterr().out
    val = encoding.decode(ids["val"][:-1])
    assert val in texts and ids["val"].count(END) == 1 and ids["train"].count(END) == 24


def test_links_are_followed_and_what_cannot_be_read_ends_it(encoding, tmp_path, monkeypatch):
    write(tmp_path / "disk", {"b.txt": "b b", "deep/c.txt": "c c"})
    source = write(tmp_path / "src", {"a.txt": "a a"})
    (source / "link").symlink_to(tmp_path / "disk")
    (source / "second").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(source)
    ids = ids_of(tmp_path, source)
    assert sorted(ids["train"] + ids["val"]) == sorted(slow_ids(encoding, ["a a", "b b", "c c"]))
    (source / "broken.txt").symlink_to(tmp_path / "nowhere")
    refused(tmp_path, source, "broken.txt")
    (source / "broken.txt").unlink()

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    refused(tmp_path, source, "Permission denied")


def test_one_text_file_is_divided_near_a_line_end_or_a_blank(encoding, tmp_path):
    for content, val in (
        ("".join(f"row {i} of a long ünd\n" for i in range(30)), "row 29 "),
        ("paragraph " * 30 + "paragraph-y\n ", " paragraph-y\n "),
        ("字" * 40, "字字"),
    ):
        write(tmp_path, {"one.txt": content})
        ids = ids_of(tmp_path, tmp_path / "one.txt")
        assert encoding.decode(ids["train"][:-1] + ids["val"][:-1]) == content
        assert encoding.decode(ids["val"]).startswith(val)
    refused(tmp_path, write(tmp_path, {"x.txt": "x"}) / "x.txt", "x.txt")
    refused(tmp_path, write(tmp_path, {"x.jsonl": jsonl(["x"] * 9)}) / "x.jsonl", "--val_fraction")


def test_of_few_text_files_that_is_validation_which_is_nearest_to_its_share(encoding, tmp_path):
    files = {"a.txt": "long " * 900, "b.txt": "fair " * 50, "README.md": "short"}
    ids = ids_of(tmp_path, write(tmp_path / "src", files))
    assert encoding.decode(ids["val"][:-1]) == "fair " * 50


def test_rows_are_divided_evenly_wherever_they_lie(encoding, tmp_path):
    import datasets

    rows = [f"row {i}\n  of text" for i in range(60)]
    write(tmp_path / "clone", {"data/train-00000-of-00002-0123456789abcdef.parquet": rows[:20]})
    write(tmp_path / "clone", {"data/train-00001-of-00002-fedcba9876543210.parquet": rows[20:]})
    write(tmp_path / "clone", {"README.md": "# it", ".gitattributes": ""})
    write(tmp_path / "shards", {"0.jsonl": jsonl(rows[:30]), "1.ndjson": jsonl(rows[30:])})
    write(tmp_path / "shards", {"metrics.json": "{}", "b.txt": "t"})  # rows are all that is read
    made = datasets.Dataset.from_dict({"text": rows, "n": [*range(60)]})
    made.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict(train=made).save_to_disk(str(tmp_path / "dict"))
    train = [row for i, row in enumerate(rows) if i % 20 != 19]
    expected = {"train": slow_ids(encoding, train), "val": slow_ids(encoding, rows[19::20])}
    for name in ("clone", "shards", "disk", "dict"):
        assert ids_of(tmp_path, tmp_path / name) == expected, name
    both = datasets.DatasetDict(train=made, validation=made.select([3]))
    both.save_to_disk(str(tmp_path / "both"))
    assert ids_of(tmp_path, tmp_path / "both")["val"] == slow_ids(encoding, rows[3:4])
