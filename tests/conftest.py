import os
import signal
import subprocess
import sys
import tempfile

import pytest

if not os.environ.get("TEST_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests' numbers are the CPU's
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")  # two tests run side by side

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or it starts processes of its own
# torch takes code from its cache that was compiled for another instruction set: losses of nan
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    f"{tempfile.gettempdir()}/daybook-tests-{os.environ.get('ATEN_CPU_CAPABILITY', 'own')}",
)

from helpers import ROOT, TINY, make_dataset

import train


@pytest.fixture(scope="session")
def shared_data():
    """The folder with WikiText's real validation text, where this checkout has one beside it."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "wiki.valid.raw").exists():
        pytest.skip("no WikiText text beside this checkout")
    return folder


@pytest.fixture
def script(tmp_path):
    """Run one of the project's scripts in tmp_path: script("train.py", "--resume", launch=[...],
    env={...})."""

    def run(name, *args, launch=(), env=None, code=0):
        done = subprocess.run(
            [sys.executable, *launch, str(ROOT / name), *map(str, args)],
            cwd=tmp_path,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == code, done.stdout + done.stderr
        if code == 2:  # a user's mistake: one line, no traceback
            assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, done.stderr
        return done

    return run


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """tmp_path, as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(in_tmp):
    """A folder with a small data set and a small config, as the working directory; the config's
    path."""
    make_dataset(in_tmp / "data")
    (in_tmp / "tiny.py").write_text(TINY)
    return "tiny.py"


@pytest.fixture(autouse=True)
def own_signals():
    """A run takes signals until its process ends; here, until the test does."""
    old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """The plan takes no forward passes, so that those which a test counts are the run's."""
    monkeypatch.setattr(train, "tell_time", lambda *args: None)


@pytest.fixture
def done(tiny):
    """tiny, with a finished run of six steps in out/done."""
    words = [tiny, *"--max_steps 6 --save_interval 3 --out_dir out/done".split()]
    assert train.main(words) == 0
    return tiny
