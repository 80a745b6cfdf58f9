"""Preparing a data set: its token files, what stands beside them, and what goes wrong."""

import errno
import hashlib
import json
import os

import numpy as np
import pytest
from helpers import load_tokens
from test_text import jsonl, slow_ids, write

import prepare
from lab.console import UserError
from lab.data import load_tokenizer
from lab.folder import take_lock

TRAIN = [" \n", " = Title = \n", " \n", " It 's <|endoftext|> 42 . \n", " naïve – Ω 日本語 \n"]
VAL = [" = Other = \n", " A dog . \n"]


@pytest.fixture(scope="module")
def encoding():
    return load_tokenizer()


@pytest.fixture
def source(tmp_path):
    files = {"wiki.train.raw": "".join(TRAIN), "wiki.valid.raw": "".join(VAL)}
    return write(tmp_path / "src", files)


def test_counts_of_the_real_validation_text(shared_data, tmp_path, source):
    (source / "wiki.valid.raw").write_bytes((shared_data / "wiki.valid.raw").read_bytes())
    for separator, counts in ("none", (242_643, 213_886)), ("newline", (247_289, 217_646)):
        dataset = prepare.prepare("wikitext-2", source, separator, tmp_path / separator)
        val = dataset.counts["val"]
        assert (val.tokens, val.words, val.rows) == (*counts, 3760)


def test_token_files_are_raw_uint16_and_meta_tells_the_truth(encoding, tmp_path, source):
    prepare.prepare("wikitext-2", source, data_dir=tmp_path / "data")
    raw = (tmp_path / "data/wikitext-2/train.bin").read_bytes()
    ids = np.frombuffer(raw, "<u2").tolist()
    assert ids == slow_ids(encoding, TRAIN, "none")
    meta = json.loads((tmp_path / "data/wikitext-2/meta.json").read_text())
    words = sum(len(row.split()) for row in TRAIN)
    nbytes = sum(len(row.strip().encode()) for row in TRAIN)
    counts = dict(tokens=len(ids), words=words, bytes=nbytes, rows=5)
    assert meta["splits"]["train"] == counts | {"sha256": hashlib.sha256(raw).hexdigest()}
    assert meta["source"]["name"] == str(source) and meta["separator"] == "none"


def test_what_is_prepared_is_replaced_only_by_force(tmp_path, source, capsys):
    data = tmp_path / "data"
    prepare.prepare("wikitext-2", source, data_dir=data)
    before = (data / "wikitext-2/train.bin").stat().st_ino
    prepare.prepare("wikitext-2", data_dir=data)  # from whatever source
    assert "already prepared" in capsys.readouterr().out
    for more in (dict(separator="newline"), dict(source=source)):
        with pytest.raises(UserError, match="separator none.*--force"):
            prepare.prepare("wikitext-2", data_dir=data, **more)
    assert (data / "wikitext-2/train.bin").stat().st_ino == before
    write(source, {"wiki.valid.raw": "else one\n"})
    dataset = prepare.prepare("wikitext-2", source, data_dir=data, force=True)
    assert dataset.counts["val"].words == 2
    assert sorted(os.listdir(data / "wikitext-2")) == ["meta.json", "train.bin", "val.bin"]
    prepare.prepare("own", source, data_dir=data)
    with pytest.raises(UserError, match="is prepared.*--force"):
        prepare.prepare("own", data_dir=data)


def test_a_user_s_own_files_in_the_target_folder_are_left_alone(tmp_path, source):
    """The text may lie where its token files will; nanoGPT's token files are its own."""
    (tmp_path / "data").mkdir()
    folder = source.rename(tmp_path / "data/own")
    for force in (False, True):
        prepare.prepare("own", folder, "none", tmp_path / "data", force=force)
        assert (folder / "wiki.train.raw").read_text(encoding="utf-8") == "".join(TRAIN)
    (folder / "meta.json").unlink()
    (folder / "train.bin").write_bytes(b"another program's")
    with pytest.raises(UserError, match="nanoGPT"):
        prepare.prepare("own", folder, data_dir=tmp_path / "data")
    assert (folder / "train.bin").read_bytes() == b"another program's"


def test_two_at_once_do_not_mix(tmp_path, source):
    write(tmp_path / "data/own/.partial", {"train.bin": "the other's"})
    with take_lock(tmp_path / "data/.own.lock", "", ""):
        with pytest.raises(UserError, match=f"process {os.getpid()} on "):
            prepare.prepare("own", source, data_dir=tmp_path / "data")
        assert (tmp_path / "data/own/.partial/train.bin").exists()
    prepare.prepare("own", source, data_dir=tmp_path / "data")  # what a killed one left is removed
    assert sorted(os.listdir(tmp_path / "data/own")) == ["meta.json", "train.bin", "val.bin"]


def test_a_full_disk_leaves_what_was_there_also_behind_a_link(
    encoding, tmp_path, source, monkeypatch
):
    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    data, disk = tmp_path / "data", tmp_path / "disk"
    for folder in data, disk:
        folder.mkdir()
    (data / "own").symlink_to(disk)
    prepare.prepare("own", source, "none", data)
    write(source, {"wiki.valid.raw": "else one\n"})
    monkeypatch.setattr(os, "replace", full)
    for name in "own", "new":
        with pytest.raises(UserError, match="No space left"):
            prepare.prepare(name, source, "none", data, force=True)
    assert load_tokens("own", "val", data).tolist() == slow_ids(encoding, VAL, "none")
    assert (data / "own").is_symlink() and not os.listdir(data / "new")
    assert sorted(os.listdir(disk)) == ["meta.json", "train.bin", "val.bin"]


def test_mistakes_on_the_command_line(tmp_path, script, monkeypatch):
    assert "wikitext-1" in script("prepare.py", "wikitext-1", code=2).stderr
    monkeypatch.chdir(tmp_path)
    for words, named in (
        (["own", "--source", "nowhere"], "nowhere"),
        (["own", "--source", ".", "--hub", "a/b"], "hub"),
        (["../own", "--source", "."], "'../own'"),
        ([], "demo"),
    ):
        with pytest.raises(UserError, match=named):
            prepare.main(words)


def test_the_demo_is_python_s_own_documentation(tmp_path):
    demo = prepare.prepare("demo", data_dir=tmp_path)
    sizes = [demo.counts[split].bytes for split in ("train", "val", "test")]
    assert 0.85 < sizes[0] / sum(sizes) < 0.95 and min(sizes) > 0.03 * sum(sizes)
    assert "statement" in demo.encoding().decode(demo.split("train").tokens.tolist())
    assert (demo.separator, demo.vocab_size) == ("newline", 2048)


# --- the hub ------------------------------------------------------------------------------------


def test_a_data_set_of_the_hub(encoding, tmp_path, monkeypatch):
    """load_dataset() reads a file of tmp_path, and a data set's newest commit is "c"."""
    import datasets
    import huggingface_hub

    def load(name, config, revision, streaming):
        assert (config, revision) in (("two", "c"), ("wikitext-2-raw-v1", prepare.REVISION))
        files = {f"train_{part}": str(tmp_path / f"{part}.jsonl") for part in "ab"}
        cache = str(tmp_path / "cache")
        return real("json", data_files=files, streaming=streaming, cache_dir=cache)

    def info(self, name, revision=None):
        return huggingface_hub.hf_api.DatasetInfo(id=name, sha="c", siblings=[], tags=[])

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    rows = [f"Story {i}.\n\n  It ends." for i in range(50)]
    write(tmp_path, {"a.jsonl": jsonl(rows[:25]), "b.jsonl": jsonl(rows[25:])})
    assert prepare.prepare("wikitext-2", data_dir=tmp_path / "data").source["revision"] != "c"
    options = dict(hub="a/Stories", config="two", data_dir=tmp_path / "data")
    assert prepare.prepare("own", **options).source["revision"] == "c"
    val = load_tokens("own", "val", tmp_path / "data").tolist()
    assert val == slow_ids(encoding, [rows[19], rows[44]])
    with pytest.raises(UserError, match="--column takes one of text"):
        prepare.prepare("own", column="story", force=True, **options)


def test_no_hub_is_one_line_that_names_the_host(tmp_path, script):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = script("prepare.py", "wikitext-103", "--vocab_size", "300", env=env, code=2)
    assert "127.0.0.1:9" in done.stderr and "wikitext-103-300 --source" in done.stderr
    assert not (tmp_path / "data/wikitext-103-300/meta.json").exists()
