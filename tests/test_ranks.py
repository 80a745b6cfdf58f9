"""Several processes: their curve is one process's, and what happens where one of them is lost."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    CPU,
    MODERN,
    MUON,
    RANKS,
    ROOT,
    TOKENS,
    assert_same_curve,
    assert_same_curves,
    children,
    error_lines,
    make_dataset,
    metrics,
    started,
    step_of,
    until,
)

import train
from config import Config
from lab.console import UserError
from lab.folder import load_checkpoint, newest_checkpoint
from lab.machine import Machine, Ranks, ranks_of
from model import LanguageModel

linux = pytest.mark.skipif(
    not os.path.exists("/proc/self/task"), reason="looks for processes in /proc"
)


# --- the curve of one process


@pytest.mark.parametrize(
    "batch_size, context, rows", [(8, 512, 2), (3, 512, 2), (5, 256, 3), (8, 2048, 1)]
)
def test_a_forward_pass_on_a_cpu_takes_1024_tokens_at_most_in_equal_parts(
    batch_size, context, rows
):
    config = Config(batch_size=batch_size, max_seq_len=context)
    model = LanguageModel(100, context, 16, 2, 64, 2)
    assert train.micro_batch_size(config, model, CPU) == rows
    elsewhere = dataclasses.replace(CPU, device=torch.device("mps"))
    assert train.micro_batch_size(config, model, elsewhere) == batch_size


def test_ranks_whose_memory_differs_cut_an_evaluation_alike():
    class Uneven(Machine):
        def smallest(self, fits):
            return [min(fits, 1.0)]  # the other rank holds one sequence

    machine = Uneven(CPU.device, CPU.dtype, world=2)
    assert (
        train.micro_batch_size(Config(batch_size=8), LanguageModel(100, 512, 16, 2, 64, 2), machine)
        == 1
    )


@pytest.mark.slow
@pytest.mark.arithmetic
@pytest.mark.parametrize("micro, more", [("0", MODERN), ("2", ())])
def test_two_ranks_give_the_curve_of_one_process(tiny, script, micro, more):
    options = [tiny, *"--dropout 0 --max_steps 20 --eval_interval 10 --batch_size 7".split(), *more]
    assert train.main([*options, "--out_dir", "out/one"]) == 0
    done = script(
        "train.py", *options, "--micro_batch_size", micro, "--out_dir", "out/two", launch=RANKS
    )
    assert "Warning" not in done.stderr
    assert_same_curves("out/one", "out/two", 20, condition=MUON if more else 1)
    assert len(metrics("out/two")) == 20 and len(metrics("out/two", evaluations=True)) == 2


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


def test_more_ranks_than_sequences_is_refused_by_one_line(tiny, script):
    done = script("train.py", tiny, "--batch_size", "1", launch=RANKS, code=1)
    assert done.stderr.count("error: batch_size 1 ") == 1


@pytest.mark.parametrize(
    "variables",
    [
        "WORLD_SIZE=2",
        "RANK=x",
        "WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost",
        "WORLD_SIZE=2 RANK=2 MASTER_ADDR=localhost MASTER_PORT=1",
        "LOCAL_RANK=1",
    ],
)
def test_rank_variables_that_torchrun_did_not_set_are_one_line(variables):
    with pytest.raises(UserError, match="unset .*" + variables.partition("=")[0]):
        ranks_of(dict(variable.split("=") for variable in variables.split()))


def test_rank_variables():
    alone = Ranks(0, 1, 0, 1)
    assert ranks_of({"WORLD_SIZE": "", "HOME": "/"}) == ranks_of({"RANK": "0"}) == alone
    words = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1"
    assert ranks_of(dict(word.split("=") for word in words.split())) == Ranks(3, 4, 1, 2)


# --- a rank that is lost


@pytest.mark.slow
@pytest.mark.arithmetic
@linux
def test_a_killed_rank_ends_the_run_and_costs_the_steps_since_the_last_checkpoint(tiny, script):
    options = [tiny, *"--epochs 3 --eval_interval 50 --save_interval 5".split()]
    command = [sys.executable, *RANKS, str(ROOT / "train.py"), *options, "--out_dir", "out/cut"]
    with started(command, stdout=subprocess.PIPE) as child:
        until(lambda: step_of("out/cut") > 20, child)
        os.kill(children(child.pid)[1], signal.SIGKILL)
        out, errors = child.communicate(timeout=120)
    assert child.returncode == 1, out + errors
    script("train.py", *options, "--out_dir", "out/cut", "--resume", launch=RANKS)
    script("train.py", *options, "--out_dir", "out/whole", launch=RANKS)
    assert_same_curves("out/whole", "out/cut", 94)


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
    assert out.count("stopped at step") == 1 and "--resume" in out
    assert newest_checkpoint("out/tiny")[0]["step"] == step_of("out/tiny")


@pytest.mark.slow
@linux
def test_a_rank_that_hangs_is_waited_for_no_longer_than_said(tiny):
    command = endless("--rank_timeout", "0.05")
    with open("errors", "w") as log, started(command, log, stdout=subprocess.DEVNULL) as child:
        until(lambda: step_of("out/tiny") > 5, child)
        os.kill(children(child.pid)[1], signal.SIGSTOP)
        # what is not told rank_timeout waits for ten minutes, longer than until() does
        assert "rank 0 of 2" in until(lambda: error_lines("errors"))[0]


def test_ranks_started_otherwise_are_refused_by_name(tiny):
    words = f"exec {sys.executable} {ROOT}/train.py {tiny} --seed $RANK"
    command = [sys.executable, *RANKS, "--no-python", "bash", "-c", words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: ") == 1 and "rank 1" in done.stderr and "seed 1" in done.stderr
    assert not os.path.exists("out")


def test_a_rank_s_own_error_ends_it_at_once(tiny):
    """Leaving the group would wait for the other ranks, on a GPU for ever."""
    words = (
        "import sys, threading, torch.distributed as dist, train; dist.destroy_process_group = "
        "lambda: threading.Event().wait(); step = train.Trainer.step\n"
        "def broken(trainer, i):\n"
        "    if trainer.machine.rank: raise RuntimeError('CUDA out of memory')\n"
        "    return step(trainer, i)\n"
        "train.Trainer.step = broken; train.main(sys.argv[1:])"
    )
    command = [sys.executable, *RANKS, "--no-python", sys.executable, "-c", words, tiny]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": ROOT}
    )
    assert done.returncode == 1 and done.stderr.count("RuntimeError: CUDA out of memory") == 1, (
        done.stderr
    )


@pytest.mark.slow
@pytest.mark.arithmetic
def test_more_ranks_than_windows(tmp_path, tiny, script):
    make_dataset(tmp_path / "data", "short", train=40, val=9)
    options = [tiny, "--dataset", "short", "--epochs", "20", "--dropout", "0"]
    assert train.main([*options, "--out_dir", "out/one"]) == 0
    script("train.py", *options, "--out_dir", "out/two", launch=RANKS)
    assert_same_curves("out/one", "out/two", len(metrics("out/one")))


# --- two hosts: network namespaces with a cable between them


@pytest.fixture
def hosts():
    """Commands that run a command on either of two hosts, ("ip", "netns", "exec", ...) each, and
    one that cuts them off from each other."""
    ip = shutil.which("ip") or "/usr/sbin/ip"
    names = [f"t{os.getpid()}{side}" for side in "ab"]

    def do(words):
        return subprocess.run([ip, *words.split()], capture_output=True).returncode == 0

    if not os.path.exists(ip) or not do(f"netns add {names[0]}"):
        pytest.skip("may not make network namespaces here")
    try:
        ok = do(f"netns add {names[1]}")
        ok = ok and do(
            f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}"
        )
        for i, name in enumerate(names, 1):
            for words in (
                f"addr add 10.77.0.{i}/24 dev {name}",
                f"link set {name} up",
                "link set lo up",
            ):
                ok = ok and do(f"-n {name} {words}")
        if not ok:
            pytest.skip("may not make network namespaces here")
        runs = [(ip, "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={name}") for name in names]
        yield runs, lambda: do(f"-n {names[1]} link set {names[1]} down")
    finally:
        for name in names:
            do(f"netns del {name}")


def start_on(hosts, *options):
    """train.py by torchrun on both hosts, as docs/running.md says; the two processes, their output
    in a.log and b.log."""
    processes = []
    for i, host in enumerate(hosts):
        launch = (
            "-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv-backend=c10d "
            "--rdzv-id=test --rdzv-endpoint=10.77.0.1:29511 "
            f"--rdzv-conf=is_host={int(i == 0)} --local-addr=10.77.0.{i + 1}"
        ).split()
        with open("ab"[i] + ".log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [*host, sys.executable, *launch, str(ROOT / "train.py"), *options],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return processes


@pytest.mark.slow
def test_two_hosts_give_the_curve_of_one_process_and_a_host_cut_off_ends_the_run(tiny, hosts):
    commands, cut = hosts
    options = [tiny, "--dropout", "0", "--eval_interval", "10"]
    assert train.main([*options, "--max_steps", "20", "--out_dir", "out/one"]) == 0
    processes = start_on(commands, *options, "--max_steps", "20", "--out_dir", "out/two")
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0], Path(
            "a.log"
        ).read_text()
        assert_same_curves("out/one", "out/two", 20)
        processes += start_on(commands, *options, "--epochs", "9999", "--rank_timeout", "0.05")
        until(lambda: step_of("out/tiny") > 5, processes[2])
        cut()
        line = until(lambda: error_lines("a.log"))[0]
        assert "rank 0 of 2" in line
        assert processes[2].wait(timeout=60) == 1
        until(lambda: any(line.startswith("error: rank 1") for line in error_lines("b.log")))
        assert not os.path.exists("out/tiny/last.pt") or load_checkpoint("out/tiny/last.pt")
    finally:
        for process in processes:
            if process.poll() is None:
                for pid in [*children(process.pid), process.pid]:
                    os.kill(pid, signal.SIGKILL)
