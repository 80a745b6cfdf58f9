"""What is read, of the many ways in which people keep text; tokens depend on the text alone."""

import functools
import gzip
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, load_tokens

import prepare
from lab import encode, readers, sources
from lab.console import UserError
from lab.data import Dataset, load_tokenizer

END = 50256
# what GPT-2's pattern looks at, and Python's and Unicode's corners
PIECES = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\xa0",
    "\u3000",
    "\x1c",
    "\x00",
    "a",
    "word",
    "Ω",
    "日本",
    "。",
    "7",
    "1234",
    "'s",
    "'",
    "'ll",
    "!",
    ",",
    "<|endoftext|>",
    "<|endof",
    "text|>",
    "_",
    "🙂",
    "\u0301",
    "x" * 9,
    " " * 9,
]


@pytest.fixture(scope="module")
def encoding():
    return load_tokenizer()


def slow_ids(encoding, rows, separator):
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


@pytest.fixture
def read_by(monkeypatch):
    """read_by(n): text is read n bytes at a time. White space is cut from 8 characters on."""
    monkeypatch.setattr(encode, "LONG_RUN", 8)
    return functools.partial(monkeypatch.setattr, readers, "BLOCK")


def ids_of(tmp_path, source, separator=None, **options):
    """{split: ids} of a source, prepared anew."""
    meta = prepare.prepare("own", source, separator, tmp_path / "data", force=True, **options)
    return {split: load_tokens("own", split, tmp_path / "data").tolist() for split in meta.counts}


@pytest.mark.parametrize("separator", ["none", "newline", "endoftext"])
def test_tokens_depend_on_the_rows_alone(encoding, tmp_path, read_by, separator):
    """The same rows as .jsonl and .parquet, in blocks of any size, against each row by itself."""
    random = np.random.RandomState(1)
    for _ in range(12):
        rows = ["".join(random.choice(PIECES, random.randint(12))) for _ in range(40)] + ["end"]
        expected = slow_ids(encoding, rows, separator)
        read_by(int(random.randint(1, 200)))
        write(tmp_path / "j", {"train.jsonl": jsonl(rows), "val.jsonl": jsonl(["v v"])})
        parquet(tmp_path / "p/train.parquet", rows, row_group_size=int(random.randint(1, 50)))
        parquet(tmp_path / "p/val.parquet", ["v v"])
        for kind in "jp":
            assert ids_of(tmp_path, tmp_path / kind, separator)["train"] == expected
        assert Dataset("own", tmp_path / "data").counts["train"].words == sum(
            len(row.split()) for row in rows
        ) + (len(rows) if separator == "newline" else 0)


def test_a_document_s_tokens_do_not_depend_on_blocks(encoding, tmp_path, read_by):
    """A text file, cut into blocks of any size, against tiktoken on the whole of it."""
    random = np.random.RandomState(2)
    for _ in range(60):
        text = "".join(random.choice(PIECES, 300))
        read_by(int(random.randint(1, 100)))
        write(tmp_path / "src", {"train.txt": text, "val.txt": "v v"})
        assert ids_of(tmp_path, tmp_path / "src")["train"] == [*encoding.encode_ordinary(text), END]
        counts = vars(Dataset("own", tmp_path / "data").counts["train"])
        assert (counts["words"], counts["bytes"], counts["rows"]) == (
            len(text.split()),
            len(text.encode()),
            1,
        )


def test_a_long_document_is_read_in_parts(tmp_path):
    for piece in "word ", "word\n\n    ", "字字字，", "a,b;":
        text = piece * (5 * readers.BLOCK // len(piece.encode()))
        write(tmp_path, {"long.txt": text})
        file = sources.disk_file(tmp_path / "long.txt", "long.txt")
        blocks = list(sources.read_text(file, readers.Reading(documents=True)))
        assert "".join(block.rows[0] for block in blocks) == text
        assert max(len(block.rows[0]) for block in blocks) < 2 * readers.BLOCK
        assert [block.begins for block in blocks] == [True] + [False] * (len(blocks) - 1)


def test_runs_of_white_space_that_tiktoken_refuses(encoding, tmp_path):
    """GPT-2's pattern takes a run but for its last character, which stays with the word after
    it."""
    for run, last in ((" " * 1_200_000, " "), ("\n\t" * 600_000, "\n"), ("\n" * 1_200_000, "\n")):
        with pytest.raises(BaseException, match="(?i)stack"):
            encoding.encode_ordinary(f"x{run}{last}y")
        write(tmp_path / "src", {"train.txt": f"x{run}{last}y", "val.txt": "v v"})
        expected = [
            *encoding.encode_ordinary("x"),
            *encoding.encode_ordinary(run),
            *encoding.encode_ordinary(f"{last}y"),
            END,
        ]
        assert ids_of(tmp_path, tmp_path / "src")["train"] == expected


def test_marks_and_halves_and_nulls(encoding, tmp_path):
    half = '{"text": "a\\ud800b"}\n{"text": null}\n{"text": "\\ud83d\\ude42"}\n'
    write(tmp_path / "j", {"train.jsonl": "\ufeff" + half, "val.jsonl": jsonl(["v v"])})
    assert ids_of(tmp_path, tmp_path / "j")["train"] == slow_ids(
        encoding, ["a\ufffdb", "🙂"], "endoftext"
    )
    assert Dataset("own", tmp_path / "data").counts["train"].rows == 2
    parquet(tmp_path / "p/train.parquet", ["a", None, "b"])
    parquet(tmp_path / "p/val.parquet", ["v v"])
    assert ids_of(tmp_path, tmp_path / "p")["train"] == slow_ids(encoding, ["a", "b"], "endoftext")
    write(tmp_path / "t", {"train.txt": "\ufeffa\r\n b", "val.txt": "v v"})
    assert ids_of(tmp_path, tmp_path / "t")["train"] == slow_ids(encoding, ["a\r\n b"], "endoftext")


@pytest.mark.parametrize(
    "codec, guess",
    [
        ("latin-1", "LATIN1"),
        ("cp1252", "WINDOWS-1252"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
    ],
)
def test_other_encodings_are_one_line_with_the_command(tmp_path, codec, guess):
    text = "Caf\xe9 and so on" + (" \u201cquoted\u201d" if codec == "cp1252" else "") + "\n"
    for content in (text, text.replace("\xe9", "e")):
        if content.isascii() and not codec.startswith("utf-16"):
            continue
        write(tmp_path / "src", {"train.txt": content.encode(codec) * 9, "val.txt": "v v"})
        with pytest.raises(
            UserError, match=f"train.txt.*`iconv -f {guess} -t UTF-8 .*train.txt > "
        ):
            prepare.prepare("own", tmp_path / "src", data_dir=tmp_path / "data")


# --- the ways in which people keep text


@pytest.mark.parametrize(
    "names",
    [
        ("x-train.txt", "my_valid.txt"),
        ("Train.TXT", "dev.txt"),
        ("ptb.train.txt", "ptb.valid.txt"),
        ("training.txt", "validation.txt"),
    ],
)
def test_splits_by_the_names_that_people_write(encoding, tmp_path, names):
    write(tmp_path / "src", {names[0]: "t t", names[1]: "v v", "notes.txt": b"\xff not read"})
    assert ids_of(tmp_path, tmp_path / "src") == {
        "train": slow_ids(encoding, ["t t"], "endoftext"),
        "val": slow_ids(encoding, ["v v"], "endoftext"),
    }


def test_names_that_only_contain_a_split_s_are_none():
    for name in ("latest", "trainer", "contest", "devil", "test1", "restraining"):
        assert not sources.SPLIT_NAME.fullmatch(name), name


def test_gzip_and_zstandard(encoding, tmp_path, script):
    text = "a text\n\n  of lines\n" * 30
    write(tmp_path / "g", {"train.txt.gz": gzip.compress(text.encode()), "val.txt": "v v"})
    expected = slow_ids(encoding, [text], "endoftext")
    assert ids_of(tmp_path, tmp_path / "g")["train"] == expected
    write(tmp_path, {"one.jsonl.gz": gzip.compress(jsonl(["r r"] * 40).encode())})
    assert len(ids_of(tmp_path, tmp_path / "one.jsonl.gz")["val"]) == 6
    write(tmp_path / "g", {"train.txt.gz": gzip.compress(text.encode())[:-20]})
    with pytest.raises(UserError, match="cannot prepare"):
        prepare.prepare("own", tmp_path / "g", data_dir=tmp_path / "data", force=True)
    write(tmp_path / "z", {"train.txt.zst": b"", "val.txt": "v v"})
    write(tmp_path, {"without/zstandard.py": "raise ImportError"})
    without = {"PYTHONPATH": str(tmp_path / "without")}
    done = script("prepare.py", "own", "--source", "z", "--force", env=without, code=2)
    assert "-m pip install zstandard`" in done.stderr
    zstandard = pytest.importorskip("zstandard")
    frames = zstandard.compress(text[:100].encode()) + zstandard.compress(text[100:].encode())
    write(tmp_path / "z", {"train.txt.zst": frames})
    assert ids_of(tmp_path, tmp_path / "z")["train"] == expected
    write(tmp_path / "z", {"train.txt.zst": frames[:-5]})
    with pytest.raises(UserError, match="ends amid a frame"):
        prepare.prepare("own", tmp_path / "z", data_dir=tmp_path / "data", force=True)
    write(tmp_path / "z", {"train.txt.zst": b"no frame"})
    with pytest.raises(UserError, match="train.txt.zst is damaged"):
        prepare.prepare("own", tmp_path / "z", data_dir=tmp_path / "data", force=True)
    write(tmp_path, {"one.txt.zst": zstandard.compress(text.encode())})
    ids = ids_of(tmp_path, tmp_path / "one.txt.zst")
    assert encoding.decode(ids["train"][:-1] + ids["val"][:-1]) == text


def test_a_zip_made_on_windows(encoding, tmp_path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("wiki-train.txt", "t t")
        archive.writestr("wiki-valid.txt", "v v")
    content = (tmp_path / "w.zip").read_bytes().replace(b"wiki-", b"wiki\\")
    (tmp_path / "w.zip").write_bytes(content)
    assert ids_of(tmp_path, tmp_path / "w.zip")["train"] == slow_ids(encoding, ["t t"], "endoftext")


def test_a_column_by_name(encoding, tmp_path):
    write(
        tmp_path / "src",
        {"train.jsonl": jsonl(["t t"], "story"), "val.jsonl": jsonl(["v v"], "story")},
    )
    assert ids_of(tmp_path, tmp_path / "src", column="story")["val"] == slow_ids(
        encoding, ["v v"], "endoftext"
    )
    with pytest.raises(
        UserError, match="line 1: .*--column takes another name, its texts are story"
    ):
        prepare.prepare("own", tmp_path / "src", data_dir=tmp_path / "other")
    parquet(tmp_path / "p/train.parquet", ["t t"], "story")
    parquet(tmp_path / "p/val.parquet", ["v v"], "story")
    assert ids_of(tmp_path, tmp_path / "p", column="story")["val"] == slow_ids(
        encoding, ["v v"], "endoftext"
    )
    with pytest.raises(UserError, match='no column "text"; --column takes one of story'):
        prepare.prepare("own", tmp_path / "p", data_dir=tmp_path / "other")
    write(tmp_path / "a", {"train.json": '[{"text": "t"}]', "val.jsonl": jsonl(["v"])})
    with pytest.raises(UserError, match="an array; `jq"):
        prepare.prepare("own", tmp_path / "a", data_dir=tmp_path / "other")


def test_a_clone_of_a_hub_data_set_and_what_save_to_disk_wrote(encoding, tmp_path):
    import datasets

    rows = [f"row {i}\n  of text" for i in range(60)]
    parquet(tmp_path / "clone/data/train-00000-of-00002-0123456789abcdef.parquet", rows[:20])
    parquet(tmp_path / "clone/data/train-00001-of-00002-fedcba9876543210.parquet", rows[20:])
    write(tmp_path / "clone", {"README.md": "# it", ".gitattributes": ""})
    for name, kind in (("disk", datasets.Dataset), ("dict", datasets.DatasetDict)):
        made = datasets.Dataset.from_dict({"text": rows})
        (made if kind is datasets.Dataset else kind(train=made)).save_to_disk(str(tmp_path / name))
    parquet(tmp_path / "shards/000_00000.parquet", rows[:30])
    parquet(tmp_path / "shards/000_00001.parquet", rows[30:])
    val = [row for i, row in enumerate(rows) if i % 20 == 19]
    train = [row for i, row in enumerate(rows) if i % 20 != 19]
    expected = {
        "train": slow_ids(encoding, train, "endoftext"),
        "val": slow_ids(encoding, val, "endoftext"),
    }
    for name in ("clone", "disk", "dict", "shards"):
        assert ids_of(tmp_path, tmp_path / name) == expected, name
    made = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": train}),
        validation=datasets.Dataset.from_dict({"text": val}),
    )
    made.save_to_disk(str(tmp_path / "both"))
    assert ids_of(tmp_path, tmp_path / "both") == expected


def tree(folder, files=24):
    """A folder of source code, with what is no text of it."""
    write(folder, {f"package/m{i:02}.py": f"def f():\n    return {i}\n\n\n" for i in range(files)})
    return write(
        folder,
        {
            ".git/config": "[core]",
            "package/.hidden.py": "x",
            "logo.png": b"\x89PNG\r\n\x1a\n\0\0\xff",
            "__init__.py": "",
        },
    )


def test_a_folder_without_splits_is_all_its_text(encoding, tmp_path, capsys):
    texts = [f"def f():\n    return {i}\n\n\n" for i in range(24)]
    ids = ids_of(tmp_path, tree(tmp_path / "src"))
    val = encoding.decode(ids["val"][:-1])
    assert val in texts and ids["val"].count(END) == 1
    assert ids["train"] == slow_ids(encoding, [text for text in texts if text != val], "endoftext")
    left_out = capsys.readouterr().out.splitlines()[-1]
    assert left_out == "left out: 2 hidden, 1 empty, 1 no text"
    (tmp_path / "src/logo.png").write_bytes(b"\0\1\2")  # no part of it
    prepare.prepare("own", tmp_path / "src", data_dir=tmp_path / "data")
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match="prepared otherwise"):
        prepare.prepare("own", tmp_path / "src", data_dir=tmp_path / "data", val_fraction=0.1)
    few = ids_of(tmp_path, tree(tmp_path / "few", 3), val_fraction=0.3)
    text = "".join(
        encoding.decode([id for id in few[split] if id != END]) for split in ("train", "val")
    )
    assert (
        text == "".join(texts[:3]) and few["train"].count(END) == 3 and few["val"].count(END) == 1
    )


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_one_file_is_divided_whatever_it_is(encoding, tmp_path, kind):
    def make(rows):
        path = tmp_path / f"one.{kind}"
        if kind == "parquet":
            parquet(path, rows)
        else:
            write(tmp_path, {path.name: jsonl(rows) if kind == "jsonl" else "\n".join(rows)})
        return path

    for rows in (
        ["one two three four"],
        ["only one"],
        [f"a b c {i}" for i in range(19)],
        ["字字字字字"],
        [" x y\n "],
    ):
        ids = ids_of(tmp_path, make(rows))
        parts = [
            encoding.decode([id for id in ids[split] if id != END]) for split in ("train", "val")
        ]
        assert all(part.strip() for part in parts)
        assert "".join(parts) == ("\n" if kind == "txt" else "").join(rows)
        assert ids["train"][-1] == ids["val"][-1] == END
    ids = ids_of(tmp_path, make([f"a row of it {i}" for i in range(100)]))
    val = encoding.decode(ids["val"]).replace("<|endoftext|>", "\n").strip().split("\n")
    assert val == [
        f"a row of it {i}" for i in (range(95, 100) if kind == "txt" else range(19, 100, 20))
    ]
    with pytest.raises(UserError, match="holds no text"):
        prepare.prepare("own", make(["x"]), data_dir=tmp_path / "other")


def test_the_old_default_is_named_with_the_command_that_keeps_it(tmp_path, script, capsys):
    write(tmp_path / "src", {"train.txt": "t t\n", "val.txt": "v v\n"})
    prepare.prepare("own", tmp_path / "src", "none", tmp_path / "data")
    said = script("prepare.py", "own", "--source", tmp_path / "src", code=2).stderr
    command = said.split("`")[1]
    assert command.endswith(f"prepare.py own --source {tmp_path}/src --separator none")
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "already prepared" in done.stdout
    assert "--force" in said


def test_help_answers_without_the_heavy_imports():
    code = (
        "import sys, prepare; heavy = 'datasets', 'pyarrow', 'zstandard', 'torch'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[]\n"
