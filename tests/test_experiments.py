"""The scripts in docs/experiments, on a tiny data set."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, load_tokens, make_dataset, metrics

import bench
import sweep
import train
from config import Config, load_grid
from docs.experiments import baseline, collect, datasets, draw
from lab.data import Dataset, load_tokenizer
from lab.notebook import SavedRun


@pytest.fixture
def both(tiny):
    """The data sets of 3,000 ids of training and 700 of validation."""
    make_dataset(Path("data"), "articles")
    datasets.main(["articles", "--train", "2000", "--small", "1000", "--val", "500"])


def test_the_data_sets_train_on_the_same_ids_and_validate_on_others(both):
    ids = load_tokens("articles", "train").tolist()
    for name, size in dict(choose=2, wikipedia=2, **{"wikipedia-2": 1}).items():
        assert load_tokens(name, "train").tolist() == ids[: 1000 * size]
        source = Dataset(name).source["name"]
        assert source.startswith(f"{size}.00e3 tokens of English Wikipedia articles, not WikiText-")
        if name != "choose":
            assert Dataset(name).counts["val"] == Dataset("articles").counts["val"]
            assert load_tokens(name, "val").tolist() != ids[-500:]
    assert load_tokens("choose", "val").tolist() == ids[-500:]


def test_words_and_bytes_are_those_of_the_text_however_it_is_cut(monkeypatch):
    text = "The cat – 猫 – sat on\u2003the mat . \n\n" * 50 + "end"
    encoding = load_tokenizer()
    ids = encoding.encode_to_numpy(text).astype("<u2")
    for block in (5, 7, 1000):
        monkeypatch.setattr(datasets, "BLOCK", block)
        counts = datasets.counts_of(ids, encoding)
        assert (counts["words"], counts["bytes"]) == (len(text.split()), len(text.encode()))


def test_a_run_is_collected_and_drawn(both, monkeypatch):
    shutil.move("tiny.py", "exp3.py")  # draw.py knows the experiments by their configs
    train.main(["exp3.py", "--dataset", "wikipedia", "--max_steps", "10", "--eval_interval", "4"])
    monkeypatch.setattr(collect, "LINES", 4)
    collect.main(["out/exp3", "--to", "kept"])

    whole, kept = metrics("out/exp3"), metrics("kept/exp3")
    assert [line["step"] for line in kept] == [3, 6, 9, 10]
    mean = sum(line["train_loss"] for line in whole[:3]) / 3
    assert kept[0] == whole[2] | {name: kept[0][name] for name in collect.MEANS}
    assert kept[0]["train_loss"] == pytest.approx(mean) and kept[3] == whole[9]
    assert metrics("kept/exp3", True) == metrics("out/exp3", True)
    assert SavedRun("kept/exp3").final == SavedRun("out/exp3").final != {}
    assert "articles, not WikiText-103's own" in Path("kept/exp3/notebook.md").read_text()

    draw.draw_runs(["kept/exp3"], "runs.png")
    assert Path("runs.png").read_bytes().startswith(b"\x89PNG")


# stands for Python: writes down what it is asked to do, and has a sweep's runs end
PYTHON = f"""#!/bin/sh
[ "$1" != -c ] || exec {sys.executable} "$@"
echo "$*" >> calls
case "$*" in
    sweep.py*)
        run="out/gpu/long/decay/weight_decay=0.1,seed=0"
        mkdir -p "$run"
        echo '{{"val": {{"bits_per_byte": 1}}}}' > "$run/final.json" ;;
esac
"""
OPTIONS = {"train.py": Config, "sweep.py": sweep.Options, "bench.py": bench.Options}
OPTIONS["baseline.py"] = baseline.Options


@pytest.mark.parametrize("toy", ["", "1"])
def test_all_that_gpu_sh_runs_has_settings_that_there_are(in_tmp, toy):
    shutil.copytree(ROOT / "config", "config")
    Path("docs/experiments").mkdir(parents=True)
    shutil.copy(ROOT / "docs/experiments/gpu.sh", "docs/experiments")
    Path("nanoGPT").mkdir()
    Path("nanoGPT/model.py").touch()
    Path("python").write_text(PYTHON)
    Path("python").chmod(0o755)
    command = ["docs/experiments/gpu.sh", "all", "--grad_clip", "0.5"]
    env = os.environ | {"PYTHON": "./python", "TOY": toy}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "missing" not in done.stdout, done.stdout + done.stderr

    seen = set()
    for script, *words in map(str.split, Path("calls").read_text().splitlines()):
        script = Path(script).name
        if script == "stream.py":
            script, *words = words
        if cls := OPTIONS.get(script):
            lists = [name for name in vars(Config()) if script == "sweep.py"]
            words = [word.replace('"', "") for word in words]
            configs = load_grid(words, script, cls, lists)
            assert all(config.grad_clip == 0.5 for config in configs)
            assert script != "sweep.py" or len(configs) > 1
            seen.add(script)
    assert seen == OPTIONS.keys() and Path("out/gpu.tar.gz").exists()

    # what is done is not done again
    before = Path("calls").read_text()
    assert subprocess.run(command, env=env, capture_output=True, timeout=60).returncode == 0
    assert Path("calls").read_text() == before
