"""Whole runs: what they leave, how they end, stop and go on, and what they refuse."""

import copy
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    MODERN,
    MUON,
    RANKS,
    ROOT,
    TOKENS,
    VOCAB,
    assert_near,
    assert_same_curve,
    assert_the_same_run,
    before_each_pass,
    load_tokens,
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
from config import Config, load_config
from lab.console import UserError
from lab.data import batches_of, load_tokenizer
from lab.folder import load_checkpoint, take_lock
from lab.state import State
from lab.weights import new_model
from train import tell_time

# Embeddings of 0.02 make a logit's standard deviation 0.02 * 8**0.5, and in a mean over 96 targets
# a tenth of that: the first loss is within five of those of what the head's bias alone gives.
AT_FIRST = 5 * 0.02 * 8**0.5 / 96**0.5


def losses(out="out/tiny", key="train_loss"):
    """The curve of a run."""
    return [line[key] for line in metrics(out, key.startswith("val"))]


def refused(*words):
    """The message of the UserError that a command line gives."""
    with pytest.raises(UserError) as caught:
        train.main(list(words))
    return str(caught.value)


@pytest.mark.arithmetic
def test_a_head_bias_of_word_frequencies_is_their_logarithm(tiny):
    tokens = load_tokens("tiny", "train")
    config = load_config([tiny, "--unigram_bias"])
    bias = new_model(config, VOCAB, tokens).head_bias.detach().numpy()
    shares = (np.bincount(tokens, minlength=VOCAB) + 1) / (len(tokens) + VOCAB)
    np.testing.assert_allclose(bias, np.log(shares), rtol=near(torch.float32, 1))


# --- whole runs


@pytest.mark.arithmetic
def test_a_run_learns_and_leaves_what_it_should(tiny, capsys):
    assert train.main([tiny, "--dropout", "0", "--expected_ppl", "80,150"]) == 0
    shown = capsys.readouterr().out
    lines, evaluations = metrics(), metrics(evaluations=True)
    windows = 3000 // 16
    epoch, steps = math.ceil(windows / 6), math.ceil(2 * windows / 6)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert [line["step"] for line in evaluations] == [epoch, steps]
    assert lines[0]["train_loss"] == pytest.approx(math.log(VOCAB), abs=AT_FIRST)
    # the text has 400 ids, each as often as any other: to know them is log(400), and less is to
    # know what follows what
    assert lines[-1]["train_loss"] < math.log(400)
    last = evaluations[-1]
    assert last["val_loss"] < evaluations[0]["val_loss"] < math.log(VOCAB)
    mean = np.mean(losses()[:epoch])
    assert evaluations[0]["train_loss"] == pytest.approx(mean, rel=near(torch.float64, steps))
    assert f"{last['val_ppl']:.2f}" in shown
    assert ("not met" in shown) == (last["val_ppl"] > 150)
    best = load_checkpoint("out/tiny/best.pt")
    assert best["metrics"]["val_loss"] == last["val_loss"] and best["tokenizer"] == "gpt2"
    assert same(best["model"], weights("out/tiny/last.pt"))
    assert Path("out/tiny/notebook.md").exists() and Path("out/tiny/curve.png").exists()


@pytest.mark.arithmetic
def test_steps_are_those_of_plain_pytorch(tiny):
    """The mean over micro-batches of other sizes, clipping, AdamW's numbers, the rates."""
    words = "--dropout 0 --micro_batch_size 4 --grad_clip 0.1 --weight_decay 0.5 --beta1 0.8"
    trainer = trainer_of([tiny, *words.split(), "--beta2", "0.7", "--adam_eps", "1e-3"], 9)
    plain, begun = copy.deepcopy(trainer.model), copy.deepcopy(trainer.model)
    groups = [dict(params=[p], weight_decay=0.5 * (p.dim() > 1)) for p in plain.parameters()]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.7), eps=1e-3)
    for i in range(9):
        trainer.step(i)
        rows = torch.from_numpy(rows_of(trainer.batches, i)).long()
        plain.zero_grad()
        F.cross_entropy(plain(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        for group in adamw.param_groups:
            group["lr"] = trainer.lr(i)
        adamw.step()
    parameters = (model.parameters() for model in (trainer.model, plain, begun))
    for mine, theirs, start in zip(*parameters, strict=True):
        assert_near(mine - start, theirs - start, near(torch.float32, 9 * TOKENS * VOCAB))


def test_dropout_follows_from_seed_and_step(tiny):
    draws = []
    for seed, step in (0, 0), (0, 1), (1, 0), (0, 0):
        trainer_of([tiny, "--seed", str(seed)], 9).seed(step)
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 3 and draws[0] == draws[-1]


def test_both_optimizers_follow_the_schedule(tiny):
    trainer, rates = trainer_of([tiny, *MODERN], 12), []
    for i in range(12):
        trainer.step(i)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates.append([group["lr"] for group in groups])
    groups = [[lr, lr, 2 * lr] for lr, *_ in rates]  # 0.02 where AdamW's is 0.01
    np.testing.assert_allclose(rates, groups, rtol=near(torch.float64, 2))
    assert rates[0] == rates[4] > rates[-1]  # warm-up is a tenth of the steps at most


def test_own_text_is_seen_a_million_times_and_speaks_for_itself(tiny):
    """epochs and prompts follow from the text; own.py is the config whose data set is anybody's."""
    os.rename("data/tiny", "data/notes")
    config = load_config([str(ROOT / "config/own.py"), "--dataset", "notes"])
    assert config.given == {"dataset": "mine"} and not config.departs
    for tokens, epochs in (3_000, 20), (300_000, 4), (5_000_000, 1):
        split = SimpleNamespace(tokens=np.zeros(tokens, np.uint16))
        batches, steps = batches_of(config, split)
        assert steps == batches.epoch_end(epochs)
    tokens = np.array(load_tokenizer().encode("One two three. " * 50) + [50256], np.uint16)
    assert train.prompts_from(tokens, load_tokenizer())[0].startswith("two three. One")
    assert "<|" not in train.prompts_from(np.full(9, 50256), load_tokenizer())[0]
    make_dataset(Path("data"), vocab_size=50257)
    assert train.main([tiny, "--max_steps", "1", "--sample_prompts", "none"]) == 0
    prompts = [prompt for prompt, _ in metrics(evaluations=True)[0]["samples"]]
    assert prompts == train.prompts_from(load_tokens("tiny", "val"), load_tokenizer())


# --- stopped and resumed


@pytest.mark.arithmetic
@pytest.mark.parametrize("interval, more", [("0", ()), ("7", MODERN)])
def test_a_run_stopped_and_resumed_is_the_same_run_bit_for_bit(tiny, capsys, interval, more):
    """Dropout on; stopped by signals at odd moments, amid an evaluation too: the same weights
    and metrics."""
    options = [tiny, *"--max_steps 40 --eval_interval 10 --save_interval".split(), interval, *more]
    assert train.main([*options, "--out_dir", "out/whole"]) == 0
    for stop_at in 1, 5, 12, 13, 20:  # passes of steps or evaluations, amid which the signal comes
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
    options = [tiny, *"--max_steps 25 --eval_interval 10 --save_interval 4".split()]
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


def test_a_finished_run_has_nothing_to_do_until_it_is_extended(tiny, capsys):
    for steps in 8, 8, 12:
        words = [tiny, "--save_interval", "2", "--max_steps", str(steps), "--resume"]
        assert train.main(words) == 0
        assert losses(key="step") == list(range(1, steps + 1))
        assert Path("out/tiny/last.pt").exists() and not Path("out/tiny/prev.pt").exists()
        assert ("the learning rate goes back up" in capsys.readouterr().out) == (steps == 12)


def test_a_run_is_never_overwritten_and_never_continued_as_another(tiny, capsys):
    assert train.main([tiny, "--max_steps", "6"]) == 0
    before = Path("out/tiny/last.pt").read_bytes()
    assert "train.py tiny.py --max_steps 9 --resume" in refused(tiny, "--max_steps", "9")
    assert "--resume" not in refused(tiny, "--seed", "1")
    message = refused(tiny, *"--max_steps 9 --dropout 0.3 --learning_rate 0.02 --resume".split())
    for named in "dropout", "0.2", "0.3", "learning_rate", "0.01", "0.02", "--out_dir":
        assert named in message
    assert Path("out/tiny/last.pt").read_bytes() == before
    # shortened, it is still what it is
    assert train.main([tiny, "--max_steps", "3", "--resume"]) == 0
    assert "6 of 3 steps are done" in capsys.readouterr().out


def test_a_run_that_is_alive_is_left_alone(tiny):
    assert train.main([tiny, "--max_steps", "6"]) == 0
    with take_lock("out/tiny/.lock", "", ""):
        for more in (), ("--resume", "--max_steps", "9"), ("--dropout", "0.3"):
            message = refused(tiny, "--max_steps", "6", *more)
            assert f"process {os.getpid()} on " in message and "out/tiny" in message
        assert train.main([tiny, "--dry_run"]) == 0 and train.main([tiny, "--eval_only"]) == 0
    assert train.main([tiny, "--max_steps", "9", "--resume"]) == 0


def test_any_name_is_a_run_s_and_a_data_set_s(tiny, capsys):
    name = "cost$5_vs_$6 a|b 日本"
    os.rename("data/tiny", f"data/{name}")
    words = [tiny, "--dataset", name, "--max_steps", "6", "--out_dir", f"out/{name}"]
    assert train.main(words) == 0
    text = Path(f"out/{name}/notebook.md").read_text(encoding="utf-8")
    assert "6 of 6 steps" in text and Path(f"out/{name}/curve.png").exists()
    capsys.readouterr()
    report.main([])
    assert "a\\|b" in capsys.readouterr().out  # in a table


def test_a_new_best_begins_the_counts_anew_and_a_restart_keeps_the_clock():
    state, config = State(Config(), None, 9), Config()
    state.elapsed_s, state.epoch_loss_sum, state.epoch_loss_steps = 50.0, 6.0, 2
    assert state.evaluated({}, best=False) == 3 and state.evaluations_since_best == 1
    assert math.isnan(state.evaluated({}, best=True)) and state.evaluations_since_best == 0
    resumed = State(config, None, 9)
    resumed.load_state_dict(state.state_dict())
    assert resumed.clock() >= 50


def test_patience_and_hours_end_a_run_cleanly(tiny):
    # at a learning rate of 1e-30 nothing gets better
    slow = "--learning_rate 1e-30 --eval_interval 2 --patience 2".split()
    assert train.main([tiny, *slow]) == 0
    assert len(losses()) == 6 and os.path.exists("out/tiny/final.json")
    assert train.main([tiny, "--max_hours", "1e-9", "--out_dir", "out/short"]) == 0
    assert len(losses("out/short")) == len(losses("out/short", "val_loss")) == 1


def test_figures_of_another_data_set_s_run_are_taken_on_that_data_set(tiny, capsys):
    make_dataset(Path("data"), "mine", val=300)
    words = [tiny, "--max_steps", "2", "--out_dir", "out/mine"]
    assert train.main([*words, "--dataset", "mine", "--max_seq_len", "8"]) == 0
    of_run = capsys.readouterr().out.splitlines()[-2:]
    for config in [tiny], []:
        assert train.main([*config, "--eval_only", "--out_dir", "out/mine"]) == 0
        assert capsys.readouterr().out.splitlines()[-2:] == of_run
    assert "299 tokens" in of_run[1] and "context 8" in of_run[1]


# --- the plan, and memory


def test_dry_run_prints_the_plan_and_does_nothing(tiny, capsys, monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count(step=1000).__next__)  # s per look
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "tell_time", tell_time)
    assert train.main([tiny, "--dry_run", "--max_hours", "3"]) == 0
    shown = capsys.readouterr().out
    # 63 steps of one pass each
    assert "about 18 hours of forward and backward passes" in shown and "after 3\n" in shown
    count = VOCAB * 8 + 16 * 8 + VOCAB + 2 * (4 * 72 + 2 * 8 * 16 + 16 + 8 + 4 * 8) + 16
    ratio, steps = f"{3000 / count:.2f} ", "63 of 6 x 16 = 96 "
    for figure in f" {count:,} (", " 3,000 ", ratio, steps, "5 of warm-up":
        assert figure in shown
    # some 60 million parameters at 20 bytes each: weights, gradients, AdamW's two averages, and
    # what a step needs
    make_dataset(Path("data"), "gpt2", vocab_size=50257)
    assert train.main([tiny, "--dataset", "gpt2", "--d_model", "1024", "--dry_run"]) == 0
    assert " 1.2 GB " in capsys.readouterr().out
    # a model that no memory holds has a plan, too
    large = [tiny, "--d_model", "2000000"]
    assert train.main([*large, "--dry_run"]) == 0
    assert "--d_model" in refused(*large) and not os.path.exists("out")


# --- mistakes


def test_mistakes_are_one_line_before_the_first_step(tiny, script):
    assert "d_model" in script("train.py", tiny, "--d_modle", "8", code=2).stderr
    assert "prepare.py wikitext-2" in refused(tiny, "--dataset", "wikitext-2")
    assert "--max_seq_len" in refused(tiny, "--max_seq_len", "3000")
    assert "cuda" in refused(tiny, "--device", "cuda")
    assert not os.path.exists("out")


# --- dtypes, compilation, the terminal


@pytest.mark.arithmetic
def test_half_precision_trains_too(tiny):
    # float16 with a scaler, whose state is part of the checkpoint
    runs = ("float32", ()), ("bfloat16", ()), ("float32", MODERN), ("float16", MODERN)
    for dtype, more in runs:
        out, plain = (f"out/{name}{len(more)}" for name in (dtype, "float32"))
        words = [tiny, "--dtype", dtype, "--max_steps", "12", "--out_dir", out, *more]
        assert train.main(words) == 0
        # some 40 tensors a step are rounded to dtype; Muon stretches small errors of the gradient
        # alone, and to first order these do little to the loss
        assert_same_curve(losses(plain), losses(out), 40, dtype=getattr(torch, dtype))
        assert bool(load_checkpoint(f"{out}/last.pt")["scaler"]) == (dtype == "float16")


def test_a_run_may_go_on_in_another_dtype_and_by_default_keeps_its_own(tiny):
    Path(tiny).write_text(Path(tiny).read_text().replace('dtype = "float32"\n', ""))
    for steps, words in (6, ["--dtype", "float16"]), (12, ["--dtype", "bfloat16"]), (18, []):
        assert train.main([tiny, "--max_steps", str(steps), "--resume", *words]) == 0
    assert load_checkpoint("out/tiny/last.pt")["config"]["dtype"] == "bfloat16"


def test_compile_without_a_compiler_goes_on(tiny, script):
    cache = os.path.abspath("inductor")
    env = {"CXX": "/nowhere/c++", "PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": cache}
    done = script("train.py", tiny, "--max_steps", "6", "--compile", env=env)
    assert done.stdout.count("torch.compile") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.arithmetic
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_blocks_give_the_same_curve(tiny, script):
    """On one process and in micro-batches on two: what GPUs do without being asked."""
    options = [tiny, "--dropout", "0", "--max_steps", "6", "--num_layers", "1", *MODERN]
    # of one shape in all three runs, so that the ranks find most of it compiled
    options += ["--batch_size", "8", "--micro_batch_size", "2"]
    assert train.main([*options, "--out_dir", "out/plain"]) == 0
    assert train.main([*options, "--out_dir", "out/compiled", "--compile"]) == 0
    script("train.py", *options, "--out_dir", "out/ranks", "--compile", launch=RANKS)
    for out in "out/compiled", "out/ranks":
        assert_same_curve(losses("out/plain"), losses(out), TOKENS, condition=MUON)
    # no prefix in the names
    assert weights("out/plain/best.pt").keys() == weights("out/compiled/best.pt").keys()


def test_ctrl_c_in_a_terminal(tiny):
    """The real process and the real signal: a checkpoint, the command that resumes, exit code 1."""
    os.rename(tiny, "a tiny.py")
    command = [sys.executable, str(ROOT / "train.py"), "a tiny.py", "--epochs", "100000"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "best.pt" not in child.stdout.readline():  # it is in the midst of it
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=60)
    assert child.returncode == 1 and "Traceback" not in errors
    assert "train.py 'a tiny.py' --epochs 100000 --resume" in out and "Ctrl-C" in errors
    assert load_checkpoint("out/a tiny/last.pt")["step"] > 30
