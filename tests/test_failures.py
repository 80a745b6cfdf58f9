"""What goes wrong, on purpose: bad input, damaged checkpoints, full disks, kills, numbers that are none, lost ranks."""

import contextlib
import errno
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bad_inputs import CASES, flipped
from conftest import ROOT, VOCAB, make_dataset
from test_train import MODERN, RANKS, assert_same_curves, assert_the_same_run, metrics, same, weights

import record
import train
from config import UserError, load_config
from model import HeadLoss, load_checkpoint
from record import load_newest


@pytest.fixture
def done(tiny, tmp_path_factory):
    """tiny, with a finished run of six steps in out/done."""
    assert train.main([tiny, "--max_steps", "6", "--save_interval", "3", "--out_dir", "out/done"]) == 0
    return tiny


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(done, name):
    spoil, words, says = CASES[name]
    if spoil:
        spoil()
    with pytest.raises(UserError) as caught:
        train.main(words)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not os.path.exists("executed") and os.listdir("out/done") and not os.path.exists("out/tiny")


# --- checkpoints


@pytest.mark.parametrize("how", ["truncated", "bits flipped", "empty", "another program's", "gone"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(done, capsys, how):
    options = [done, "--max_steps", "9", "--save_interval", "3", "--resume"]
    shutil.copytree("out/done", "out/whole")
    path = Path("out/done/last.pt")
    assert train.main([*options, "--out_dir", "out/whole"]) == 0
    content = path.read_bytes()
    spoiled = dict(zip(["truncated", "bits flipped", "empty", "another program's"],
                       [content[:-9], flipped(content), b"", b"PK\x03\x04" + b"x" * 99], strict=True))
    path.write_bytes(spoiled[how]) if how in spoiled else path.unlink()
    before = load_checkpoint("out/done/prev.pt")["step"]
    assert train.main([*options, "--out_dir", "out/done"]) == 0
    shown = capsys.readouterr()
    assert f"going on from out/done/prev.pt, step {before}" in shown.out
    if how != "gone":
        assert f"which costs {6 - before} of the steps" in shown.err and Path("out/done/last.pt.damaged").exists()
    assert_the_same_run("out/whole", "out/done", curves=False)


def test_every_flipped_bit_is_found_or_harmless(done):
    path = Path("out/done/last.pt")
    content, whole = path.read_bytes(), load_checkpoint(path)
    places = random.Random(0)
    refused = 0
    for _ in range(60):
        at = places.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << places.randrange(8)]) + content[at + 1 :])
        try:
            again = load_checkpoint(path)
        except UserError:
            refused += 1
        else:
            assert same(again["model"], whole["model"]) and again["state"] == whole["state"]
    assert refused > 50


def test_a_kill_between_a_save_s_two_renames_loses_nothing(done, monkeypatch):
    replace = os.replace

    def dying(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    content = load_checkpoint("out/done/last.pt")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(record.os, "replace", dying)
        record.save_checkpoint(content | {"step": 99}, "out/done/last.pt", keep="out/done/prev.pt")
    assert not os.path.exists("out/done/last.pt") and load_newest("out/done")[0]["step"] == 99
    # and it is last.pt again, since the next save begins by emptying what has the temporary name
    assert load_checkpoint("out/done/last.pt")["step"] == 99 and not os.path.exists("out/done/last.pt.part")


@pytest.mark.parametrize("fails", ["fsync", "write"])
def test_a_full_disk_costs_what_cannot_be_written_and_not_the_run(done, monkeypatch, capsys, fails):
    """The real thing, a small tmpfs, is in torture.py."""
    options = [done, "--max_steps", "20", "--save_interval", "3", "--resume"]
    shutil.copytree("out/done", "out/whole")
    assert train.main([*options, "--out_dir", "out/whole"]) == 0

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(content, file):
        try:
            full()
        except OSError:
            raise RuntimeError("unexpected pos") from None  # as torch.save does

    with monkeypatch.context() as patch:
        if fails == "fsync":
            patch.setattr(record.os, "fsync", full)
        else:
            patch.setattr(record.torch, "save", write)
        assert train.main([*options, "--out_dir", "out/done"]) == 1
    shown = capsys.readouterr()
    assert "cannot write out/done/last.pt (No space left on device); the run goes on" in shown.err
    assert "last.pt is of step 6" in shown.out and not list(Path("out/done").glob("*.part"))
    assert [load_checkpoint(f"out/done/{name}.pt")["step"] for name in ("last", "best")] == [6, 6]
    assert train.main([*options, "--out_dir", "out/done"]) == 0
    assert_the_same_run("out/whole", "out/done")


def test_save_minutes(tiny, monkeypatch):
    saves, save = [], record.save_checkpoint

    def watched(content, path, **kwargs):
        saves.append((path, content["step"]))
        save(content, path, **kwargs)

    monkeypatch.setattr(record, "save_checkpoint", watched)
    train.main([tiny, "--max_steps", "6", "--save_interval", "0", "--save_minutes", "1e-9"])
    assert [step for path, step in saves if "last" in path] == [1, 2, 3, 4, 5, 6, 6]


# --- killed


def kill_at_random(command, folder, chances, times):
    """Start command again and again and kill it (SIGKILL) up to a quarter of a second after its first step, every other
    time when the next save has begun. How many kills hit a save, and the worst count of steps that one cost."""
    amid, worst, reached, part = 0, 0, 0, Path(folder, "last.pt.part")
    for i in range(times):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            line = next(line for line in child.stdout if line.startswith(("going on from", "no checkpoint in")))
            worst = max(worst, reached - int(line.split()[-1].replace(",", "")))
            until(lambda: step_of(folder) > reached, child)  # noqa: B023
            time.sleep(chances.random() / 4)  # no synchronisation: the moment is to be any
            if i % 2:
                while not part.exists() and child.poll() is None:
                    time.sleep(0.0005)  # half of a save's time; without it, the wait takes a core from the run
            assert child.poll() is None, "the run ended before it could be killed"
            child.kill()
        amid += part.exists()
        reached = step_of(folder)
    return amid, worst


def test_killed_at_any_moment_the_run_is_the_same(tiny):
    command = [tiny, "--epochs", "9", "--max_steps", "100", "--eval_interval", "40", "--save_interval", "1"]
    assert train.main([*command, "--out_dir", "out/whole"]) == 0
    command = [*command, "--out_dir", "out/cut", "--resume"]
    amid, worst = kill_at_random([sys.executable, str(ROOT / "train.py"), *command], "out/cut", random.Random(0), 2)
    assert worst <= 1
    assert train.main(command) == 0
    assert_the_same_run("out/whole", "out/cut")


# --- numbers that are none


@pytest.mark.parametrize("more", [(), MODERN])
def test_a_step_that_is_not_finite_never_reaches_the_weights(tiny, monkeypatch, capsys, more):
    real, call = HeadLoss.forward, 0

    def poisoned(ctx, *args):
        nonlocal call
        call += 1
        loss = real(ctx, *args)
        if call in (4, 5, 9):  # a loss alone, with gradients that are finite
            ctx.loss = loss = loss * (math.inf if call == 5 else math.nan)
        return loss

    seen, step = [], train.take_step

    def watched(config, machine, training, batches, number, lr):
        before = [p.detach().clone() for p in training.model.parameters()]
        moments = [v.clone() for o in training.optimizers for s in o.state.values() for v in s.values()]
        result = step(config, machine, training, batches, number, lr)
        now = [v for o in training.optimizers for s in o.state.values() for v in s.values()]
        seen.append(all(map(torch.equal, before, training.model.parameters())) and all(map(torch.equal, moments, now)))
        return result

    monkeypatch.setattr(HeadLoss, "forward", staticmethod(poisoned))
    monkeypatch.setattr(train, "take_step", watched)
    assert train.main([tiny, "--max_steps", "12", *more]) == 0
    assert [i for i, still in enumerate(seen, 1) if still] == [4, 5, 9]
    assert "3 of 12 steps had no finite loss" in capsys.readouterr().out
    assert [line["skipped"] for line in metrics()] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert all(torch.isfinite(p).all() for p in weights("out/tiny/last.pt").values())


def test_after_a_few_such_steps_in_a_row_the_run_stops(tiny, monkeypatch, capsys):
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(train.torch.nn.utils, "clip_grad_norm_", lambda *args: real(*args) * math.nan)
    assert train.main([tiny, "--save_interval", "2"]) == 1
    assert "error: 5 steps in a row, the last at 5" in capsys.readouterr().err
    assert same(weights("out/tiny/last.pt"), train.new_model(load_config([tiny]), VOCAB).state_dict())


def test_a_run_that_stopped_for_such_steps_goes_on_where_they_are_mended(tiny, monkeypatch):
    options = [tiny, "--max_steps", "20", "--log_interval", "10", "--save_interval", "10"]
    real = torch.nn.utils.clip_grad_norm_
    with monkeypatch.context() as patch:
        patch.setattr(train.torch.nn.utils, "clip_grad_norm_", lambda *args: real(*args) * math.nan)
        assert train.main(options) == 1
    assert train.main([*options, "--resume"]) == 0
    assert [line["skipped"] for line in metrics()] == [10, 10]


# --- ranks


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition, process=None, seconds=90):
    """Wait for condition() to hold, and return what it gave."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def started(command, **kwargs):
    """A process with its standard error in a pipe; whatever becomes of the test, it and what it started are killed."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **kwargs) as process:
        everybody = [process.pid]
        try:
            yield process
        finally:
            everybody += children(process.pid) if process.poll() is None else []
            for pid in everybody if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)


def step_of(out):
    return record.last_step(f"{out}/metrics.jsonl")


linux = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="looks for processes in /proc")


@linux
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tiny, script):
    options = [tiny, "--epochs", "3", "--eval_interval", "50", "--save_interval", "5"]
    command = [sys.executable, *RANKS, "--max-restarts=3", str(ROOT / "train.py"), *options]
    with started([*command, "--out_dir", "out/cut"], stdout=subprocess.PIPE) as child:
        until(lambda: step_of("out/cut") > 20, child)
        os.kill(children(child.pid)[1], signal.SIGKILL)
        out, errors = child.communicate(timeout=120)
    assert child.returncode == 0 and out.count("going on from out/cut/last.pt") == 1, out + errors
    script("train.py", *options, "--out_dir", "out/whole", launch=RANKS)
    assert_same_curves("out/whole", "out/cut", 94)


def test_sigterm_to_torchrun_is_one_checkpoint_of_all_ranks(tiny):
    command = [sys.executable, *RANKS, str(ROOT / "train.py"), tiny, "--epochs", "9999", "--save_interval", "0"]
    with started(command, stdout=subprocess.PIPE) as child:
        until(lambda: step_of("out/tiny") > 5, child)
        child.send_signal(signal.SIGTERM)  # as a job scheduler's
        out, _ = child.communicate(timeout=60)
    assert out.count("stopped at step") == 1 and "--resume" in out
    assert load_newest("out/tiny")[0]["step"] == step_of("out/tiny")


@linux
def test_a_rank_that_hangs_is_named_and_waited_for_no_longer_than_said(tiny):
    command = [sys.executable, *RANKS, str(ROOT / "train.py"), tiny, "--epochs", "9999", "--rank_timeout", "0.05"]
    with started(command, stdout=subprocess.DEVNULL) as child:
        until(lambda: step_of("out/tiny") > 5, child)
        os.kill(children(child.pid)[1], signal.SIGSTOP)
        error = next(line for line in child.stderr if line.startswith("error: "))
        assert "rank 0 of 2 lost another rank" in error and "Ranks 1 failed" in error and "in 3000 ms" in error


def test_ranks_started_otherwise_are_refused_by_name(tiny):
    words = f"exec {sys.executable} {ROOT}/train.py {tiny} --seed $RANK"
    command = [sys.executable, *RANKS, "--no-python", "bash", "-c", words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: rank 1 was started otherwise than rank 0: seed 1 there") == 1
    assert not os.path.exists("out")


def test_a_rank_s_own_error_ends_it_at_once(tiny):
    """Leaving the group would wait for the other ranks, on a GPU for ever."""
    words = ("import sys, threading, torch.distributed as dist, train; dist.destroy_process_group = "
             "lambda: threading.Event().wait(); step = train.take_step\n"
             "def broken(config, machine, *args):\n"
             "    if machine.rank: raise RuntimeError('CUDA out of memory')\n"
             "    return step(config, machine, *args)\n"
             "train.take_step = broken; train.main(sys.argv[1:])")
    command = [sys.executable, *RANKS, "--no-python", sys.executable, "-c", words, tiny]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": ROOT})
    assert done.returncode == 1 and done.stderr.count("RuntimeError: CUDA out of memory") == 1, done.stderr


def test_more_ranks_than_windows(tmp_path, monkeypatch, tiny, script):
    make_dataset(tmp_path / "data", "short", train=40, val=9)
    options = [tiny, "--dataset", "short", "--epochs", "20", "--dropout", "0"]
    assert train.main([*options, "--out_dir", "out/one"]) == 0
    script("train.py", *options, "--out_dir", "out/two", launch=RANKS)
    assert_same_curves("out/one", "out/two", len(metrics("out/one")))


# --- two hosts: network namespaces with a cable between them


@pytest.fixture
def hosts():
    """Commands that run a command on either of two hosts, ("ip", "netns", "exec", ...) each, and one that cuts them off
    from each other."""
    ip = shutil.which("ip") or "/usr/sbin/ip"
    names = [f"t{os.getpid()}{side}" for side in "ab"]

    def do(words):
        return subprocess.run([ip, *words.split()], capture_output=True).returncode == 0

    if not os.path.exists(ip) or not do(f"netns add {names[0]}"):
        pytest.skip("may not make network namespaces here")
    try:
        ok = do(f"netns add {names[1]}")
        ok = ok and do(f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}")
        for i, name in enumerate(names, 1):
            for words in (f"addr add 10.77.0.{i}/24 dev {name}", f"link set {name} up", "link set lo up"):
                ok = ok and do(f"-n {name} {words}")
        if not ok:
            pytest.skip("may not make network namespaces here")
        runs = [(ip, "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={name}") for name in names]
        yield runs, lambda: do(f"-n {names[1]} link set {names[1]} down")
    finally:
        for name in names:
            do(f"netns del {name}")


def start_on(hosts, *options):
    """train.py by torchrun on both hosts, as the README says it; the two processes, their output in a.log and b.log."""
    processes = []
    for i, host in enumerate(hosts):
        launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d",
                  "--rdzv-id=test", "--rdzv-endpoint=10.77.0.1:29511", f"--rdzv-conf=is_host={int(i == 0)}",
                  f"--local-addr=10.77.0.{i + 1}"]
        with open("ab"[i] + ".log", "w") as log:
            processes.append(subprocess.Popen([*host, sys.executable, *launch, str(ROOT / "train.py"), *options],
                                              stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
    return processes


def test_two_hosts_give_the_curve_of_one_process_and_a_host_cut_off_ends_the_run(tiny, hosts):
    commands, cut = hosts
    options = [tiny, "--dropout", "0", "--eval_interval", "10"]
    assert train.main([*options, "--max_steps", "20", "--out_dir", "out/one"]) == 0
    processes = start_on(commands, *options, "--max_steps", "20", "--out_dir", "out/two")
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0], Path("a.log").read_text()
        assert_same_curves("out/one", "out/two", 20)
        processes += start_on(commands, *options, "--epochs", "9999", "--rank_timeout", "0.05")
        until(lambda: step_of("out/tiny") > 5, processes[2])
        cut()
        line = until(lambda: [line for line in Path("a.log").read_text().splitlines() if line.startswith("error: ")])[0]
        assert "rank 0 of 2 lost another rank" in line
        assert processes[2].wait(timeout=60) == 1
        until(lambda: any(line.startswith("error: rank 1") for line in Path("b.log").read_text().splitlines()))
        assert not os.path.exists("out/tiny/last.pt") or load_checkpoint("out/tiny/last.pt")
    finally:
        for process in processes:
            if process.poll() is None:
                for pid in [*children(process.pid), process.pid]:
                    os.kill(pid, signal.SIGKILL)
