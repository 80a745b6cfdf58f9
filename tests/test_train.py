import dataclasses
import itertools
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    MODERN,
    MUON,
    RANKS,
    ROOT,
    TOKENS,
    VOCAB,
    assert_same_curve,
    assert_the_same_run,
    before_each_pass,
    limited,
    make_dataset,
    metrics,
    near,
    rows_of,
    same,
    trainer_of,
    weights,
)

import report
import train
from config import load_config
from lab.checkpoint import load as load_checkpoint
from lab.console import UserError
from lab.data import Batches
from lab.files import Lock
from lab.machine import Ranks, ranks_of
from plan import new_model

# Embeddings of 0.02 make a logit's standard deviation 0.02 * 8**0.5, and in a mean over 96 targets
# a tenth of that: the first loss is within five of those of what the head's bias alone gives.
AT_FIRST = 5 * 0.02 * 8**0.5 / 96**0.5


@pytest.mark.arithmetic
def test_a_head_bias_of_word_frequencies_is_the_unigram_model(tiny):
    tokens, config = (
        np.fromfile("data/tiny/train.bin", dtype="<u2"),
        load_config([tiny, "--unigram_bias"]),
    )
    bias = new_model(config, VOCAB, tokens).head_bias.detach().numpy()
    counts = np.bincount(tokens, minlength=VOCAB)
    np.testing.assert_allclose(
        bias, np.log((counts + 1) / (len(tokens) + VOCAB)), rtol=near(torch.float32, 1)
    )
    assert train.main([tiny, "--unigram_bias", "--max_steps", "6"]) == 0
    targets = rows_of(Batches(tokens, 16, 6, 0), 0)[:, 1:]
    unigram = -bias[targets].mean()  # where such a model begins
    assert (
        metrics()[0]["train_loss"] == pytest.approx(unigram, abs=AT_FIRST)
        and unigram < math.log(VOCAB) - AT_FIRST
    )


# --- whole runs


@pytest.mark.arithmetic
def test_a_run_learns_and_leaves_what_it_should(tiny, capsys):
    options = ["--dropout", "0", "--expected_ppl", "80,150", "--recorded_ppl", "65.71"]
    assert train.main([tiny, *options]) == 0
    shown = capsys.readouterr().out
    lines, evaluations = metrics(), metrics(evaluations=True)
    windows = 3000 // 16
    steps = math.ceil(2 * windows / 6)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert [line["step"] for line in evaluations] == [math.ceil(windows / 6), steps]
    assert lines[0]["train_loss"] == pytest.approx(math.log(VOCAB), abs=AT_FIRST)
    # the text has 400 ids, each as often as any other: to know them is log(400), and less is to
    # know what follows what
    assert lines[-1]["train_loss"] < math.log(400)
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] < math.log(VOCAB)
    assert evaluations[0]["train_loss"] == pytest.approx(
        np.mean([x["train_loss"] for x in lines[: math.ceil(windows / 6)]]),
        rel=near(torch.float64, steps),
    )
    assert {"epoch", "tokens", "lr", "grad_norm", "tokens_per_s", "elapsed_s"} <= lines[0].keys()
    assert (
        "best so far" in shown
        and "finished" in shown
        and f"{evaluations[-1]['val_ppl']:.2f}" in shown
    )
    assert ("not met" in shown) == (
        evaluations[-1]["val_ppl"] > 150
    ) and "expected 80 to 150" in shown
    assert "the notebook recorded 65.71" in shown
    best = load_checkpoint("out/tiny/best.pt")
    assert (
        best["metrics"]["val_loss"] == evaluations[-1]["val_loss"] and best["tokenizer"] == "gpt2"
    )
    assert same(best["model"], weights("out/tiny/last.pt"))


def test_both_optimizers_follow_the_schedule(tiny):
    trainer, seen = trainer_of([tiny, *MODERN], 12), []
    for i in range(12):
        trainer.step(i)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        seen.append([group["lr"] for group in groups])
    assert train.main([tiny, "--max_steps", "12", *MODERN]) == 0
    rates = [line["lr"] for line in metrics()]
    groups = [[lr, lr, 2 * lr] for lr in rates]  # 0.02 where AdamW's is 0.01
    np.testing.assert_allclose(seen, groups, rtol=near(torch.float64, 2))
    assert rates[0] < rates[4] > rates[-1] > 0


@pytest.mark.arithmetic
@pytest.mark.parametrize("interval, more", [("0", ()), ("7", ()), ("7", MODERN)])
def test_a_run_stopped_and_resumed_is_the_same_run_bit_for_bit(tiny, capsys, interval, more):
    """Dropout on; stopped by signals at odd moments, amid an evaluation too: the same weights
    and metrics."""
    options = [
        tiny,
        "--max_steps",
        "40",
        "--eval_interval",
        "10",
        "--save_interval",
        interval,
        *more,
    ]
    assert train.main([*options, "--out_dir", "out/whole"]) == 0
    for stop_at in 1, 5, 12, 13, 29:  # passes of steps or evaluations, amid which the signal comes
        passes = itertools.count(1)

        def stop(training, stop_at=stop_at, passes=passes):
            if next(passes) == stop_at:
                os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[stop_at % 3])

        with before_each_pass(stop):
            assert train.main([*options, "--out_dir", "out/cut", "--resume"]) == 1
        assert f"train.py {' '.join(options)} --out_dir out/cut --resume" in capsys.readouterr().out
    assert train.main([*options, "--out_dir", "out/cut", "--resume"]) == 0
    assert_the_same_run("out/whole", "out/cut")


class Killed(BaseException):
    pass


@pytest.mark.arithmetic
def test_a_killed_run_loses_the_steps_since_its_last_checkpoint_and_nothing_else(tiny):
    options = [tiny, "--max_steps", "25", "--eval_interval", "10", "--save_interval", "4"]
    assert train.main([*options, "--out_dir", "out/whole"]) == 0
    # amid steps before and after an evaluation, amid two evaluations
    for steps, alive in (True, 7), (True, 7), (False, 3), (False, 8):
        passes = itertools.count()

        def die(training, steps=steps, alive=alive, passes=passes):
            if training == steps and next(passes) == alive:
                raise Killed

        with before_each_pass(die), pytest.raises(Killed):
            train.main([*options, "--out_dir", "out/cut", "--resume"])
        with open("out/cut/metrics.jsonl", "a") as file:
            file.write('{"step": 9')  # half a line, as a kill leaves it
    assert train.main([*options, "--out_dir", "out/cut", "--resume"]) == 0
    assert_the_same_run("out/whole", "out/cut")


def test_a_signal_amid_the_last_evaluation_leaves_it_owed(tiny, capsys):
    with before_each_pass(lambda training: training or os.kill(os.getpid(), signal.SIGTERM)):
        assert train.main([tiny, "--max_steps", "6"]) == 1
    assert "finished" not in capsys.readouterr().out and not os.path.exists("out/tiny/best.pt")
    assert train.main([tiny, "--max_steps", "6", "--resume"]) == 0
    assert len(metrics(evaluations=True)) == 1 and os.path.exists("out/tiny/best.pt")


def test_resume_says_when_there_is_nothing_to_do_and_goes_on_when_extended(tiny, capsys):
    assert train.main([tiny, "--max_steps", "8", "--resume"]) == 0
    assert "beginning at step 0" in capsys.readouterr().out
    assert train.main([tiny, "--max_steps", "8", "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert train.main([tiny, "--max_steps", "12", "--resume"]) == 0
    assert [line["step"] for line in metrics()] == list(range(1, 13))


def test_a_run_is_never_overwritten_and_never_continued_as_another(tiny):
    assert train.main([tiny, "--max_steps", "6"]) == 0
    before = open("out/tiny/last.pt", "rb").read()
    with pytest.raises(
        UserError,
        match=r"holds a run already; `.*train.py tiny.py --max_steps 6 --resume` continues",
    ):
        train.main([tiny, "--max_steps", "6"])
    with pytest.raises(
        UserError, match=r"dropout was 0.2, now 0.3; learning_rate was 0.01, now 0.02"
    ):
        train.main(
            [tiny, "--max_steps", "9", "--dropout", "0.3", "--learning_rate", "0.02", "--resume"]
        )
    assert open("out/tiny/last.pt", "rb").read() == before


def test_a_taken_folder_and_another_config_give_one_hint(tiny):
    assert train.main([tiny, "--max_steps", "6"]) == 0
    with pytest.raises(UserError) as caught:
        train.main([tiny, "--max_steps", "6", "--dropout", "0.3"])
    assert "holds another experiment: dropout was 0.2, now 0.3; choose another --out_dir" in str(
        caught.value
    )
    assert "--resume" not in str(caught.value)


def test_a_run_that_is_alive_is_left_alone(tiny):
    assert train.main([tiny, "--max_steps", "6"]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in Path("out/tiny").iterdir()}
    with Lock() as lock:
        lock.take("out/tiny/.lock", "", "")
        for more in (), ("--resume",), ("--resume", "--max_steps", "9"), ("--dropout", "0.3"):
            with pytest.raises(
                UserError, match=f"out/tiny is in use by process {os.getpid()} on .+; wait for it"
            ):
                train.main([tiny, "--max_steps", "6", *more])
        assert train.main([tiny, "--dry_run"]) == 0 and train.main([tiny, "--eval_only"]) == 0
        assert {path.name: path.stat().st_mtime_ns for path in Path("out/tiny").iterdir()} | {
            ".lock": 0
        } == before | {".lock": 0}
    assert train.main([tiny, "--max_steps", "9", "--resume"]) == 0


@pytest.mark.parametrize(
    "name", ["cost$5_vs_$6", "a|b", "two words", "日本", "line\nbreak", "back\\slash"]
)
def test_any_name_is_a_run_s_and_a_data_set_s(tiny, name, capsys):
    os.rename("data/tiny", f"data/{name}")
    assert (
        train.main([tiny, "--dataset", name, "--max_steps", "6", "--out_dir", f"out/{name}"]) == 0
    )
    text = Path(f"out/{name}/notebook.md").read_text(encoding="utf-8")
    assert "Finished: 6 of 6 steps" in text and Path(f"out/{name}/curve.png").exists()
    capsys.readouterr()
    report.main(["--recorded", "no"])
    shown = capsys.readouterr().out.splitlines()
    assert len({line.replace("\\|", "").count("|") for line in shown[:3]}) == 1 and not shown[3]
    with pytest.raises(UserError, match="run `.*prepare.py .*`"):
        train.main([tiny, "--dataset", name + "2"])


def test_a_name_that_is_no_text_is_a_run_s(tiny, script):
    script("train.py", tiny, "--max_steps", "6", "--out_dir", "out/\udcff")
    assert "\n| ? | finished |" in script("report.py", "--recorded", "no").stdout


def test_patience_and_hours_end_a_run_cleanly(tiny, capsys):
    # at a learning rate of 1e-30 nothing gets better
    slow = ["--learning_rate", "1e-30", "--eval_interval", "2", "--patience", "2"]
    assert train.main([tiny, *slow]) == 0
    assert "2 evaluations brought no new best" in capsys.readouterr().out and len(metrics()) == 6
    assert train.main([tiny, "--max_hours", "1e-9", "--out_dir", "out/short"]) == 0
    assert len(metrics("out/short")) == 1 and len(metrics("out/short", evaluations=True)) == 1


def test_the_last_figures_are_the_best_checkpoint_s(tiny, capsys):
    words = ["--learning_rate", "3", "--lr_schedule", "constant", "--eval_interval", "2"]
    assert train.main([tiny, *words, "--max_steps", "8"]) == 0
    losses = [line["val_loss"] for line in metrics(evaluations=True)]
    assert min(losses) < losses[-1]
    out = capsys.readouterr().out
    assert train.main([tiny, "--eval_only"]) == 0
    assert capsys.readouterr().out.splitlines()[1] in out


def test_dry_run_prints_the_plan_and_does_nothing(tiny, capsys):
    assert train.main([tiny, "--dry_run"]) == 0
    plan = capsys.readouterr().out
    count = VOCAB * 8 + 16 * 8 + VOCAB + 2 * (4 * 72 + 2 * 8 * 16 + 16 + 8 + 4 * 8) + 16
    for phrase in (
        f"{count:,}",
        "3,000 training tokens",
        f"{3000 / count:.2f} tokens a parameter",
        "20: 150 parameters",
        "63 of 6 x 16 = 96 tokens",
        "FLOPs",
        "GB",
    ):
        assert phrase in plan
    # some 60 million parameters at 20 bytes each: weights, gradients, AdamW's two averages, and
    # what a step needs
    make_dataset(Path("data"), "gpt2", vocab_size=50257)
    assert train.main([tiny, "--dataset", "gpt2", "--d_model", "1024", "--dry_run"]) == 0
    assert "about 1.2 GB a rank" in capsys.readouterr().out
    assert not os.path.exists("out")


def test_the_plan_comes_before_the_model(tiny, capsys):
    """A model that no memory holds."""
    large = [tiny, "--d_model", "2000000"]
    assert train.main([*large, "--dry_run"]) == 0
    assert "GB a rank" in capsys.readouterr().out
    with pytest.raises(UserError, match="to train this model takes about [0-9,.]+ GB, and cpu has"):
        train.main(large)
    assert not os.path.exists("out")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads its size in /proc")
def test_memory_that_is_not_there_after_all_is_one_line(tiny):
    """The first block's matrix takes 108 MB of the 64 MB that the kernel gives."""
    assert train.main([tiny, "--d_model", "3072", "--dry_run"]) == 0  # all is imported now
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + (64 << 20)
    with limited(resource.RLIMIT_AS, size), pytest.raises(UserError) as caught:
        train.main([tiny, "--d_model", "3072"])
    says = r"to train this model takes about ([\d.]+) GB, and cpu has ([\d.]+) GB a rank"
    wanted, there = map(float, re.search(says, str(caught.value)).groups())
    assert wanted < there and not os.path.exists("out")  # the plan alone would have let it


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"RANK": "x"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"},
        {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        {"LOCAL_RANK": "1"},
    ],
)
def test_rank_variables_that_torchrun_did_not_set_are_one_line(environment):
    with pytest.raises(UserError, match="torchrun did not start this process; `unset "):
        ranks_of(environment)


def test_rank_variables():
    assert (
        ranks_of({"WORLD_SIZE": "", "HOME": "/"})
        == ranks_of({"RANK": "0", "WORLD_SIZE": "1"})
        == Ranks(0, 1, 0, 1)
    )
    torchrun = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert ranks_of(torchrun) == Ranks(3, 4, 1, 2)


def test_mistakes_are_one_line_before_the_first_step(tiny, script):
    assert "did you mean d_model" in script("train.py", tiny, "--d_modle", "8", code=2).stderr
    with pytest.raises(UserError, match="is not prepared in data/; run `.*prepare.py wikitext-2`"):
        train.main([tiny, "--dataset", "wikitext-2"])
    with pytest.raises(UserError, match="not one window of 3000"):
        train.main([tiny, "--max_seq_len", "3000"])
    with pytest.raises(UserError, match="--warmup_steps 6"):
        train.main([tiny, "--warmup_steps", "63"])
    with pytest.raises(UserError, match="no cuda device"):
        train.main([tiny, "--device", "cuda"])
    assert not os.path.exists("out")


@pytest.mark.arithmetic
def test_half_precision_trains_too(tiny):
    # float16 with a scaler, whose state is part of the checkpoint
    for dtype, more in (
        ("float32", ()),
        ("bfloat16", ()),
        ("float16", ()),
        ("float32", MODERN),
        ("float16", MODERN),
    ):
        out = f"out/{dtype}{len(more)}"
        assert (
            train.main([tiny, "--dtype", dtype, "--max_steps", "12", "--out_dir", out, *more]) == 0
        )
        one, two = (
            [line["train_loss"] for line in metrics(folder)]
            for folder in (f"out/float32{len(more)}", out)
        )
        # some 40 tensors a step are rounded to dtype; Muon stretches small errors of the gradient
        # alone, and to first
        # order these do little to the loss
        assert_same_curve(one, two, 40, dtype=getattr(torch, dtype))
        assert bool(load_checkpoint(f"{out}/last.pt")["scaler"]) == (dtype == "float16")
    for dtype in (
        "float32",
        "float16",
        "bfloat16",
    ):  # a run may go on in another: the machine's, not the experiment's
        steps = str(len(metrics()) + 6 if os.path.exists("out/tiny") else 6)
        assert train.main([tiny, "--dtype", dtype, "--max_steps", steps, "--resume"]) == 0


def test_compile_without_a_compiler_goes_on(tiny, script):
    env = {
        "CXX": "/nowhere/c++",
        "PATH": "/nowhere",
        "TORCHINDUCTOR_CACHE_DIR": os.path.abspath("inductor"),
    }
    done = script("train.py", tiny, "--max_steps", "6", "--compile", env=env)
    assert done.stdout.count("torch.compile does not work here") == 1 and "finished" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.arithmetic
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize("more", [(), MODERN])
def test_compiled_blocks_give_the_same_curve(tiny, script, more):
    """On one process and (one block will do) in micro-batches on two: what GPUs do without being
    asked."""
    options = [tiny, "--dropout", "0", "--max_steps", "6", "--num_layers", "1", *more]
    if more:  # of one shape in all three runs, so that the ranks find most of it compiled
        options += ["--batch_size", "8", "--micro_batch_size", "2"]
    assert train.main([*options, "--out_dir", "out/plain"]) == 0
    assert train.main([*options, "--out_dir", "out/compiled", "--compile"]) == 0
    runs = ["out/plain", "out/compiled"]
    if more:
        runs.append("out/ranks")
        script("train.py", *options, "--out_dir", runs[-1], "--compile", launch=RANKS)
    plain, *others = ([line["train_loss"] for line in metrics(out)] for out in runs)
    for compiled in others:
        assert_same_curve(plain, compiled, TOKENS, condition=MUON if more else 1)
    assert same_shapes(
        weights("out/plain/best.pt"), weights("out/compiled/best.pt")
    )  # no prefix in the names


def same_shapes(a, b):
    return {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_the_command_that_resumes_is_the_shell_s():
    words = ["exp 5.py", "--sample_prompts", "()", "--resume", "--seed", "1"]
    assert train.resume_command(words, CPU).endswith(
        "train.py 'exp 5.py' --sample_prompts '()' --seed 1 --resume"
    )
    two = train.resume_command([], dataclasses.replace(CPU, world=4, local_world=2))
    assert "torch" in two and "--nproc_per_node=2 " in two and two.endswith("train.py --resume")


def test_ctrl_c_in_a_terminal(tiny):
    """The real process and the real signal: a checkpoint, the command that resumes, exit code 1."""
    command = [sys.executable, str(ROOT / "train.py"), tiny, "--epochs", "100000"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "best so far" not in child.stdout.readline():  # it is in the midst of it
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=60)
    assert child.returncode == 1 and "Traceback" not in errors
    assert (
        f"go on with: {shlex.join(command)} --resume" in out
        and "Ctrl-C again ends at once" in errors
    )
    assert load_checkpoint("out/tiny/last.pt")["step"] > 30
