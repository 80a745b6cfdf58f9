import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, children, metrics, started, step_of, until

import report
import sample
import sweep
import train
from lab import grid, weights
from lab.console import UserError
from lab.grid import Trial, difference, groups_of, is_within_spread, sentences

SHORT = ["--max_steps", "6"]


def jobs_of(*words):
    return sweep.jobs_of(["tiny.py", *SHORT, *words])[2]


def trial(loss, state=None, **settings):
    """A run of a sweep with this loss, as read_trials() gives it."""
    made = Trial("nowhere", settings, None)
    made.loss, made.state = loss, state or ("finished" if loss is not None else "not begun")
    return made


# --- the grid


def test_the_grid_is_every_combination_in_a_folder_of_its_own(tiny):
    words = "--learning_rate 1e-2,4e-3 --block=gpt2,modern --compile none,false --seed 0,1"
    jobs = jobs_of(*words.split(), "--expected_ppl", "35,42")
    names = [Path(job.trial.folder).name for job in jobs]
    assert len(set(names)) == 16 and all(job.trial.steps == 6 for job in jobs)
    # the last word's values stand next to each other; names follow the settings' own order
    assert names[:2] == [
        f"block=gpt2,learning_rate=0.01,compile=None,seed={seed}" for seed in (0, 1)
    ]
    assert names[-1] == "block=modern,learning_rate=0.004,compile=False,seed=1"
    assert jobs[0].trial.folder == f"out/tiny-sweep/{names[0]}"
    assert jobs[0].words == [
        "tiny.py",
        "--max_steps=6",
        "--learning_rate=0.01",
        "--block=gpt2",
        "--compile=None",
        "--seed=0",
        "--expected_ppl=(35, 42)",
        "--dtype=float32",
        f"--out_dir=out/tiny-sweep/{names[0]}",
        "--resume",
    ]
    again = jobs_of("--seed", "1,0,1", "--learning_rate", "0.004,1e-2", "--out_dir", "~/x")
    assert len(again) == 4  # a value given twice is one
    assert len(jobs_of("--compile", "none,false")) == len(jobs_of("--compile=none,false")) == 2
    assert again[0].trial.folder == str(Path("~/x/learning_rate=0.004,seed=1").expanduser())


def test_a_value_with_a_slash_is_one_folder(tiny):
    Path("data/a").mkdir()
    Path("data/tiny").rename("data/a/b")
    first, _ = jobs_of("--dataset", "a/b", "--data_dir", "data,./data")
    assert first.trial.folder == "out/tiny-sweep/data_dir=data"
    first, _ = jobs_of("--dataset", "a/b,../data/a/b")
    assert first.trial.folder == "out/tiny-sweep/dataset=a%2Fb"


def test_all_problems_are_one_line_before_the_first_run(tiny, capsys):
    words = "--learning_rate=-1,1e-2,x --num_heads 2,3 --sed 0,1 --jobs 0"
    with pytest.raises(UserError) as error:
        sweep.main([tiny, *words.split()])
    for named in "learning_rate", "-1", "'x'", "num_heads 3", "seed", "jobs":
        assert named in str(error.value)
    for words, named in (
        ("--dataset none,nor --seed 0,1", "prepare.py nor"),
        ("--seed 3", "--seed 0,1,2"),
        ("--seed 0,1 --eval_only", "eval_only"),
    ):
        with pytest.raises(UserError) as error:
            sweep.main([tiny, *SHORT, *words.split()])
        assert str(error.value).count(named) == 1
    assert not Path("out").exists()


def test_dtype_is_chosen_once_and_kept(tiny, monkeypatch):
    chosen = iter([torch.bfloat16, torch.float32])
    monkeypatch.setattr(weights, "choose_dtype", lambda *args: (next(chosen), ""))
    words = "--dtype", "auto", "--seed", "0,1"
    assert [job.words[-3] for job in jobs_of(*words)] == ["--dtype=bfloat16"] * 2
    Path("out/tiny-sweep").mkdir(parents=True)
    Path("out/tiny-sweep/sweep.json").write_text(json.dumps(dict(config=dict(dtype="float16"))))
    assert [job.words[-3] for job in jobs_of(*words)] == ["--dtype=float16"] * 2


def test_another_sweep_s_folder_is_refused_and_a_larger_grid_is_not(tiny):
    one = [tiny, *SHORT, "--print", "--seed", "0,1"]
    assert sweep.main(one) is None
    with pytest.raises(UserError, match="d_model.*--seed 0,1"):
        sweep.main([*one, "--d_model", "4"])
    assert sweep.main([tiny, "--max_steps", "9", "--print", "--seed", "2,1", "--jobs", "3"]) is None
    runs = json.loads(Path("out/tiny-sweep/sweep.json").read_text())["runs"]
    assert runs == {f"seed={seed}": {"seed": seed} for seed in (0, 1, 2)}


def test_seeds_that_come_later_adopt_the_runs_that_are_there(tiny, capsys):
    rates = [tiny, *SHORT, "--print", "--learning_rate", "1e-2,4e-3"]
    assert sweep.main(rates) is None
    assert sweep.main([*rates, "--seed", "0,1"]) is None
    about = json.loads(Path("out/tiny-sweep/sweep.json").read_text())
    assert about["runs"] == {
        "learning_rate=0.01": {"learning_rate": 0.01, "seed": 0},
        "learning_rate=0.004": {"learning_rate": 0.004, "seed": 0},
        "learning_rate=0.01,seed=1": {"learning_rate": 0.01, "seed": 1},
        "learning_rate=0.004,seed=1": {"learning_rate": 0.004, "seed": 1},
    }
    # and once more without seeds, it still knows them
    assert sweep.main([*rates, "--seed", "0,1"]) is None and sweep.main(rates) is None
    assert json.loads(Path("out/tiny-sweep/sweep.json").read_text())["runs"] == about["runs"]


def test_a_long_name_is_cut_and_its_values_stay(tiny):
    prompts = "x" * 300
    Path(f"data/{'y' * 250}").symlink_to(Path("data/tiny").resolve())
    jobs = jobs_of("--dataset", f"tiny,{'y' * 250}", "--init_from", "", "--seed", "0,1")
    names = [Path(job.trial.folder).name for job in jobs]
    assert len(set(names)) == 4 and max(map(len, names)) < 255 and prompts not in names
    assert jobs[-1].trial.settings == {"dataset": "y" * 250, "seed": 1}


@pytest.mark.parametrize("steps, later", [(6, 3), (3, 6)])
def test_runs_of_another_length_are_named_and_not_averaged(tiny, steps, later, capsys):
    out = "out/tiny-sweep/seed=0"
    assert train.main([tiny, "--max_steps", "6", "--out_dir", out]) == 0
    assert sweep.main([tiny, "--max_steps", str(later), "--seed", "0,1", "--print"]) is None
    capsys.readouterr()
    report.main(["out/tiny-sweep"])
    row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("| 0 |"))
    if later == 6:
        assert "1 finished" in row
    else:
        assert " 6 steps" in row and " 3" in row and "finished" not in row


# --- the figures, by hand


def paired():
    """Three seeds at 0.01, at 0.02 seed by seed a little worse, and two at 0.04."""
    losses = {0.02: (4.25, 4.5, 4.75), 0.01: (4.0, 4.5, 4.5), 0.04: (5.0, 6.0)}
    return [
        trial(loss, learning_rate=lr, seed=seed)
        for lr, those in losses.items()
        for seed, loss in enumerate(those)
    ]


def test_means_deviations_and_paired_errors_are_those_worked_out_by_hand():
    groups = groups_of(paired())
    assert [settings for settings, _ in groups] == [
        {"learning_rate": lr} for lr in (0.01, 0.02, 0.04)
    ]
    (_, best), (_, second), (_, third) = groups
    # 4.25 4.5 4.75: mean 4.5, squares 0.0625 + 0 + 0.0625 over 2
    assert grid.spread(second.values()) == pytest.approx(0.25)
    # seed by seed 0.25 0 0.25: mean 1/6; squares 1/144 + 1/36 + 1/144 = 1/24, over 2 is 1/48, and
    # over 3 again 1/144
    assert difference(second, best) == pytest.approx((1 / 6, 1 / 12, 2))
    # the two seeds that both have, 1 and 1.5: mean 1.25, squares 1/8, over 2 1/16
    assert difference(third, best) == pytest.approx((1.25, 1 / 4, 1))
    # other seeds: 5.5 - 4.5; variances 1/2 over 2 and 1/16 over 3
    apart = difference(third, {7: 4.25, 8: 4.5, 9: 4.75})
    assert apart == pytest.approx((1.0, math.sqrt(1 / 4 + 1 / 48), 1))
    assert difference({0: 5.0}, best) == (pytest.approx(5 - 13 / 3), None, 0)
    text = grid.text(paired())
    assert "| 0.02 | 0, 1, 2 | 4.5000 ± 0.2500 | +0.1667 ± 0.0833 | 3 finished |" in text
    assert "| 0.01 | 0, 1, 2 | 4.3333 ± 0.2887 | best | 3 finished |" in text
    assert text.index("| 0.01 |") < text.index("| 0.02 |") < text.index("| 0.04 |")


def test_a_difference_within_the_spread_is_said():
    # Student's t at 95 % with two degrees of freedom is 4.30, with very many 2
    assert is_within_spread(0.42, 0.1, 2) and not is_within_spread(0.44, 0.1, 2)
    assert is_within_spread(-0.42, 0.1, 2) and not is_within_spread(-0.44, 0.1, 2)
    assert is_within_spread(0.2, 0.1, 99) and not is_within_spread(0.3, 0.1, 99)
    assert not is_within_spread(0.0, None, 0)
    said = " ".join(sentences(paired(), groups_of(paired())))
    assert "learning_rate=0.02; learning_rate=0.04" in said
    apart = [
        trial(4 + lr + seed / 100, learning_rate=lr, seed=seed) for lr in (1, 2) for seed in (0, 1)
    ]
    assert "spread" not in " ".join(sentences(apart, groups_of(apart)))


def edge(*trials):
    said = " ".join(sentences(trials, groups_of(trials)))
    return re.findall(r"The best (\w+), (\S+), lies at the edge of what was tried, (.*?):", said)


def test_a_best_value_at_the_edge_is_said():
    low, middle, high = (trial(loss, d_model=d) for d, loss in ((8, 4.0), (16, 3.0), (32, 2.0)))
    assert edge(low, middle, high) == [("d_model", "32", "8 to 32")]
    assert edge(low, middle) == [("d_model", "16", "8 to 16")]
    assert edge(low, middle, trial(5.0, d_model=32)) == []
    assert edge(trial(1.0, d_model=4), low, middle) == [("d_model", "4", "4 to 16")]
    assert edge(low, middle, trial(None, "failed: no memory", d_model=32)) == []  # that was tried
    assert edge(low, middle, trial(None, d_model=32)) == [("d_model", "16", "8 to 16")]
    assert edge(trial(4.0, block="gpt2"), trial(3.0, block="modern")) == []
    said = sentences([low, middle], groups_of([low, middle]))
    assert "--seed 0,1,2" in said[-1]


def test_the_picture_has_a_curve_for_each_combination_of_the_others():
    trials = [
        trial(4 + lr + width / 100 + seed, learning_rate=lr, d_model=width, block="gpt2", seed=seed)
        for lr in (0.01, 0.02, 0.04)
        for width in (8, 12)
        for seed in (0, 1)
    ]
    rates, widths = grid.draw(trials).axes
    assert rates.get_xlabel() == "learning_rate" and rates.get_xscale() == "log"
    assert widths.get_xlabel() == "d_model" and widths.get_xscale() == "linear"
    lines = {bars.get_label(): bars.lines[0] for bars in rates.containers}
    assert list(lines) == ["d_model=8,block=gpt2", "d_model=12,block=gpt2"]
    assert lines["d_model=8,block=gpt2"].get_ydata() == pytest.approx([4.59, 4.60, 4.62])
    assert len(widths.containers) == 3
    seeds = [trial(3.0 + seed, block=b, seed=seed) for seed in (0, 1) for b in ("gpt2", "modern")]
    (ax,) = grid.draw(seeds).axes
    assert ax.get_xlabel() == "seed" and len(ax.containers) == 2
    assert grid.draw([trial(None, seed=0), trial(None, seed=1)]) is None


# --- the runs


@pytest.mark.slow
def test_printed_commands_run_and_report_and_sample_find_them(tiny, capsys):
    assert (
        sweep.main([tiny, *SHORT, "--seed", "0,1", "--sample_prompts", "'a b','it\\'s'", "--print"])
        is None
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith("--resume") for line in lines)
    assert shlex.split(lines[1])[1] == str(ROOT / "train.py")
    report.main(["out/tiny-sweep"])
    assert "| 0 | - | - | not begun |" in capsys.readouterr().out
    ran = subprocess.run(["sh", "-c", lines[1]], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    about = json.loads(Path("out/tiny-sweep/seed=1/run.json").read_text())
    assert about["config"]["sample_prompts"] == ["a b", "it's"] and about["steps"] == 6
    assert sample.find_checkpoint() == Path("out/tiny-sweep/seed=1/best.pt")
    report.main([])
    assert "| tiny-sweep/seed=1 | finished |" in capsys.readouterr().out
    report.main(["out/tiny-sweep", "--format", "csv", "--recorded", "no"])
    assert capsys.readouterr().out.splitlines()[1].startswith("tiny-sweep/seed=1,finished,")
    report.main(["out/tiny-sweep"])
    assert "| 1 finished |" in capsys.readouterr().out


@pytest.mark.slow
def test_two_at_a_time_with_a_run_that_diverges(tiny, monkeypatch, capsys):
    started = []
    watch = lambda seconds: started.append(len(children(os.getpid()))) or SLEEP(seconds)  # noqa: E731
    monkeypatch.setattr(sweep.time, "sleep", watch)
    words = [tiny, *SHORT, "--learning_rate", "1e-2,1e30", "--grad_clip", "0", "--jobs", "2"]
    assert sweep.main(words) == 1
    said = capsys.readouterr()
    assert max(started) == 2
    assert re.search(r"^\| 0.01 \| \d\.\d+ \| best \| 1 finished \|", said.out, re.MULTILINE)
    assert re.search(r"^\| 1e\+30 \| - \| - \| failed: step ", said.out, re.MULTILINE)
    assert "learning_rate=0.01: finished" in said.err
    assert "learning_rate=1e+30: failed: " in said.err
    assert "Traceback" not in Path("out/tiny-sweep/learning_rate=1e+30/log.txt").read_text()


SLEEP = time.sleep


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_and_runs_nothing_twice(tiny, monkeypatch, capsys):
    words = [tiny, "--max_steps", "400", "--seed", "0,1", "--epochs", "99"]
    first, second = Path("out/tiny-sweep/seed=0"), Path("out/tiny-sweep/seed=1")

    # killed in the second run, which goes on by itself, and is not run a second time
    command = [sys.executable, str(ROOT / "sweep.py"), *words]
    with started(command, stdout=subprocess.DEVNULL) as process:
        until(lambda: step_of(second), process)
        (child,) = children(process.pid)
        process.kill()
        process.wait()
        with pytest.raises(UserError, match=f"process {child} "):
            sweep.main(words)
        os.kill(child, signal.SIGTERM)
        until(lambda: not Path(f"/proc/{child}").exists())
    log, reached = (first / "log.txt").read_text(), [step_of(second)]

    # Ctrl-C in what is left of it
    def look(seconds):
        SLEEP(seconds)
        if step_of(second) > reached[0] and len(reached) == 1:
            reached.append(step_of(second))
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sweep.time, "sleep", look)
    assert sweep.main(words) == 1
    said = capsys.readouterr().out
    assert re.search(r"stopped: 1 of 2 runs are finished; resume with: .*--seed 0,1", said)
    reached.append(step_of(second))
    assert 0 < reached[0] < reached[1] <= reached[2] < 400

    # to the end: no step of the first run, and none of the second's twice
    assert sweep.main(words) == 0
    assert "1 of them finished" in (said := capsys.readouterr().out) and "| 0, 1 | " in said
    assert (first / "log.txt").read_text() == log and Path("out/tiny-sweep/report.png").exists()
    resumed = re.findall(r"going on from .*, step (\d+)", (second / "log.txt").read_text())
    assert [int(step) for step in resumed] == [reached[0], reached[2]]
    assert [line["step"] for line in metrics(second)] == list(range(1, 401))
