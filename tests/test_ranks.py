"""Several processes: their curve is one process's, and what happens where one of them is lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    MODERN,
    MUON,
    RANKS,
    ROOT,
    TOKENS,
    assert_same_curve,
    assert_same_curves,
    children,
    metrics,
    started,
    step_of,
    until,
)

import train
from lab.folder import newest_checkpoint

linux = pytest.mark.skipif(
    not os.path.exists("/proc/self/task"), reason="looks for processes in /proc"
)


# --- the curve of one process


@pytest.mark.slow
@pytest.mark.arithmetic
@pytest.mark.parametrize("micro, more", [("0", MODERN), ("2", ())])
def test_two_ranks_give_the_curve_of_one_process(tiny, script, micro, more):
    options = [tiny, *"--dropout 0 --max_steps 20 --eval_interval 10 --batch_size 7".split(), *more]
    assert train.main([*options, "--out_dir", "out/one"]) == 0
    options += ["--micro_batch_size", micro, "--out_dir", "out/two"]
    assert "Warning" not in script("train.py", *options, launch=RANKS).stderr
    assert_same_curves("out/one", "out/two", 20, condition=MUON if more else 1)


@pytest.mark.slow
@pytest.mark.arithmetic
def test_a_run_goes_on_with_another_number_of_ranks(tiny, script):
    options = [tiny, *"--dropout 0 --eval_interval 10 --lr_schedule constant".split()]
    options += ["--warmup_steps", "0"]  # which follows from the run's length, too
    assert train.main([*options, "--max_steps", "20", "--out_dir", "out/one"]) == 0
    script("train.py", *options, "--max_steps", "9", launch=RANKS)
    assert train.main([*options, "--max_steps", "20", "--resume"]) == 0
    one, two = ([line["train_loss"] for line in metrics(out)] for out in ("out/one", "out/tiny"))
    assert_same_curve(one, two, TOKENS)


# --- a rank that is lost


def endless(*options):
    """The command of a run on two ranks that only we end."""
    train = [str(ROOT / "train.py"), "tiny.py", "--epochs", "9999"]
    return [sys.executable, *RANKS, *train, *options]


@pytest.mark.slow
def test_sigterm_to_torchrun_is_one_checkpoint_of_all_ranks(tiny):
    with started(endless("--save_interval", "0"), stdout=subprocess.PIPE) as child:
        until(lambda: step_of("out/tiny") > 5, child)
        child.send_signal(signal.SIGTERM)  # as a job scheduler's
        out, _ = child.communicate(timeout=60)
    assert out.count("stopped at step") == 1
    assert "--nproc_per_node=2 " in out and "--resume" in out
    assert newest_checkpoint("out/tiny")[0]["step"] == step_of("out/tiny")


@pytest.mark.slow
@linux
def test_a_rank_that_hangs_is_waited_for_no_longer_than_said(tiny):
    command = endless("--rank_timeout", "0.05")
    with open("errors", "w") as log, started(command, log, stdout=subprocess.DEVNULL) as child:
        until(lambda: step_of("out/tiny") > 5, child)
        os.kill(children(child.pid)[1], signal.SIGSTOP)
        # what is not told rank_timeout waits for ten minutes, longer than until() does
        until(lambda: "error: a rank" in Path("errors").read_text())


def test_ranks_started_otherwise_are_refused_by_name(tiny):
    words = f"exec {sys.executable} {ROOT}/train.py {tiny} --seed $RANK"
    command = [sys.executable, *RANKS, "--no-python", "bash", "-c", words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: ") == 1 and "ranks differ" in done.stderr
    assert not os.path.exists("out")
