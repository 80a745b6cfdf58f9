import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
if not os.environ.get("TEST_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests' numbers are the CPU's
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")  # two tests run side by side


@pytest.fixture(scope="session")
def shared_data():
    """The folder with WikiText's real validation text, where this checkout has one beside it."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "wiki.valid.raw").exists():
        pytest.skip("no WikiText text beside this checkout")
    return folder


@pytest.fixture
def script(tmp_path):
    """Run one of the project's scripts in tmp_path: script("train.py", "--resume", launch=[...], env={...})."""

    def run(name, *args, launch=(), env=None, code=0):
        done = subprocess.run(
            [sys.executable, *launch, str(ROOT / name), *map(str, args)],
            cwd=tmp_path, env=os.environ | (env or {}), capture_output=True, text=True, timeout=240,
        )
        assert done.returncode == code, done.stdout + done.stderr
        if code == 2:  # a user's mistake: one line, no traceback
            assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, done.stderr
        return done

    return run


VOCAB = 512  # of the tests' data: the head of gpt2's 50,257 words would take most of a small step


def make_dataset(folder, name="tiny", train=3000, val=700, vocab_size=VOCAB, seed=1):
    """A prepared data set of 400 ids that follow from one another, so that there is something to learn."""
    import hashlib

    random = np.random.RandomState(seed)
    splits = {}
    (folder / name).mkdir(parents=True)
    for split, length in dict(train=train, val=val).items():
        ids = (random.randint(0, 50, length).cumsum() % 400).astype("<u2")
        ids.tofile(folder / name / f"{split}.bin")
        splits[split] = dict(
            tokens=length, words=length // 2, bytes=3 * length, rows=10, sha256=hashlib.sha256(ids).hexdigest()
        )
    meta = dict(tokenizer="gpt2", vocab_size=vocab_size, separator="none", source={"name": "a test"}, splits=splits)
    (folder / name / "meta.json").write_text(json.dumps(meta))


TINY = """
dataset = "tiny"
max_seq_len = 16
d_model = 8
num_heads = 2
d_ff = 16
num_layers = 2
dropout = 0.2
batch_size = 6
epochs = 2
learning_rate = 1e-2
warmup_steps = 5
device = "cpu"
dtype = "float32"
log_interval = 1
sample_prompts = ()
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with a small data set and a small config, as the working directory; the config's path."""
    make_dataset(tmp_path / "data")
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return "tiny.py"
