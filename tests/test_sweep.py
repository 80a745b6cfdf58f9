import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, children, metrics, started, step_of, until
from test_notebook import leave

import report
import sweep
from lab import grid
from lab.console import UserError
from lab.grid import Trial, difference, groups_of

SHORT = ["tiny.py", "--max_steps", "6"]
SLEEP = time.sleep
TOP = Path("out/tiny-sweep")


def plan(*words):
    """[(a run's Trial, its words)] of a sweep's command."""
    return sweep.jobs_of([*SHORT, *words])[2]


def trial(loss, sha256="one", tokenizer="gpt2", **settings):
    """A run of a sweep with this loss, not begun if None, and 10 - loss bits per byte."""
    made = Trial("nowhere", settings)
    made.text = dict(sha256=sha256, tokenizer=tokenizer, words=1, bytes=1)
    made.best = dict(val_loss=loss, val_bits_per_byte=10 - loss) if loss else None
    return made


# --- the grid


def test_the_grid_is_every_combination_in_a_folder_of_its_own(tiny):
    words = "--learning_rate 1e-2,4e-3 --block=gpt2,modern --compile none,false --seed 0,1"
    runs = plan(*words.split(), "--expected_ppl", "35,42")
    names = [Path(run.folder).name for run, _ in runs]
    assert len(set(names)) == 16 and all(run.steps == 6 for run, _ in runs)
    # the last word's values stand next to each other; names follow the settings' own order
    common = "block=gpt2,learning_rate=0.01,compile=None,seed="
    assert names[:2] == [f"{common}0", f"{common}1"]
    assert {"--compile=None", "--expected_ppl=(35, 42)"} < set(runs[0][1])
    assert len(plan("--seed", "1,0,1", "--learning_rate", "0.004,1e-2")) == 4
    assert plan("--data_dir", "data,./data")[1][0].folder == f"{TOP}/data_dir=.%2Fdata"
    names = [Path(run.folder).name for run, _ in plan("--question", f"{'?' * 300}a,{'?' * 300}b")]
    assert len(set(names)) == 2 and max(map(len, names)) <= 255
    # all runs have the dtype that the first was given
    TOP.mkdir(parents=True)
    (TOP / "sweep.json").write_text('{"config": {"dtype": "float16"}}')
    assert all("--dtype=float16" in words for _, words in plan("--dtype", "auto", "--seed", "0,1"))


def test_mistakes_are_one_line_before_the_first_run(tiny):
    words = "--learning_rate=-1,1e-2,x --sed 0,1 --jobs 0"
    for line, named in (
        (words, ("learning_rate", "'-1'", "sed", "jobs")),
        ("--dataset none --seed 0,1", ("data set none",)),
        ("--seed 3", ("--seed 0,1,2",)),
        ("--seed 0,1 --eval_only", ("eval_only",)),
    ):
        with pytest.raises(UserError) as error:
            sweep.main([*SHORT, *line.split()])
        assert all(name in str(error.value) for name in named), str(error.value)
    assert not Path("out").exists()


def test_another_sweep_s_folder_is_refused_and_a_larger_grid_is_not(tiny):
    one = [*SHORT, "--print", "--learning_rate", "0.01,0.02"]
    assert sweep.main(one) is None
    with pytest.raises(UserError, match="0.01,0.02`.*d_model.*--out_dir"):
        sweep.main([*one, "--d_model", "4"])
    # its runs have the default seed, and keep their folders
    sweep.main([*SHORT, "--print", "--learning_rate", "0.02,0.04", "--seed", "0,1"])
    found = {Path(run.folder).name: run.settings["seed"] for run in grid.read_trials(TOP)}
    assert found.pop("learning_rate=0.02,seed=1") == found.pop("learning_rate=0.04,seed=1") == 1
    rest = "learning_rate=0.01", "learning_rate=0.02", "learning_rate=0.04,seed=0"
    assert found == dict.fromkeys(rest, 0)


# --- the figures, by hand


def test_means_deviations_and_paired_errors_are_those_worked_out_by_hand():
    # three seeds at 0.01, at 0.02 seed by seed a little worse, and two at 0.04
    losses = {0.02: (4.25, 4.5, 4.75), 0.01: (4.0, 4.5, 4.5), 0.04: (5.0, 6.0)}
    runs = [(rate, seed, loss) for rate, all in losses.items() for seed, loss in enumerate(all)]
    trials = [trial(loss, learning_rate=rate, seed=seed) for rate, seed, loss in runs]
    (_, best), (_, second), (_, third) = groups_of(trials)[0]
    # 4.25 4.5 4.75: mean 4.5, squares 0.0625 + 0 + 0.0625 over 2
    assert grid.mean_of(second) == pytest.approx((4.5, 0.25))
    # seed by seed 0.25 0 0.25: mean 1/6; squares 1/144 + 1/36 + 1/144 = 1/24, over 2 is 1/48, and
    # over 3 again 1/144. Student's t is 4.30
    assert difference(second, best) == (pytest.approx(1 / 6), pytest.approx(1 / 12), True)
    # the two seeds that both have, 1 and 1.5: mean 1.25, squares 1/8, over 2 1/16
    assert difference(third, best) == (1.25, pytest.approx(1 / 4), True)
    assert difference({0: 1.42, 1: 1.44, 2: 1.46}, {0: 1, 1: 1, 2: 1})[2] is False
    rows = grid.text(trials).splitlines()[2:]
    assert rows[0] == "| 0.01 | 0, 1, 2 | 4.3333 ± 0.2887 | best | 3 finished |"
    assert rows[1].startswith("| 0.02 | 0, 1, 2 | 4.5000 ± 0.2500 | +0.1667 ± 0.0833, may")


def test_the_picture_has_a_curve_for_each_combination_of_the_others():
    values = [(lr, d, seed) for lr in (0.01, 0.02, 0.04) for d in (8, 12) for seed in (0, 1)]
    trials = [trial(a + d + b, learning_rate=a, d_model=d, seed=b) for a, d, b in values]
    rates, widths = grid.draw(trials).axes
    assert (rates.get_xlabel(), rates.get_xscale()) == ("learning_rate", "log")
    assert widths.get_xlabel() == "d_model"
    lines = {bars.get_label(): bars.lines[0] for bars in rates.containers}
    assert list(lines) == ["d_model=8", "d_model=12"]
    assert lines["d_model=8"].get_ydata() == pytest.approx([8.51, 8.52, 8.54])


def test_what_does_not_compare_is_not_compared():
    trials = [trial(loss, str(loss), d_model=int(loss)) for loss in (3.0, 4.0)]
    assert "best" not in grid.text(trials).split("runs |")[1] and "differ" in grid.text(trials)
    # one text, two tokenizers: the higher loss per token has fewer bits per byte
    trials = [trial(3.0, d_model=3), trial(4.0, "bpe", "own-1", d_model=4)]
    assert re.search(r"^\| 4 \| 6.0000 \| best", grid.text(trials), re.MULTILINE)
    assert "bits per byte" in grid.draw(trials).axes[0].get_ylabel()


def test_a_run_counts_by_the_steps_that_it_took(in_tmp):
    """As many as the sweep asks for, fewer, fewer by its patience, and more by hand."""
    path = leave("run")
    (path / "final.json").write_text('{"val": {}}')
    assert Trial(path, {}, 9).state == "finished"
    shorter = Trial(path, {}, 12)
    assert shorter.state != "finished" and not shorter.best
    metadata = (path / "run.json").read_text().replace('"steps": 9', '"steps": 12')
    (path / "run.json").write_text(metadata)
    assert Trial(path, {}, 12).state == "finished"
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "val_loss": 1.0}\n')
    longer = Trial(path, {}, 9)
    assert "12" in longer.state and longer.best["step"] == 9


def test_a_sweep_is_one_entry_of_the_notebook(in_tmp, capsys):
    leave("alone")
    runs = {f"learning_rate={rate}": dict(learning_rate=rate) for rate in (0.01, 0.02)}
    for name, loss in zip(runs, (3.0, 2.0), strict=True):
        (leave(f"s/{name}", val_loss=loss) / "final.json").write_text('{"val": {}}')
    Path("out/s/sweep.json").write_text(json.dumps(dict(command="sweep it", runs=runs)))
    report.main(["out/s"])
    assert "| best |" in capsys.readouterr().out
    assert Path("out/s/conclusion.md").exists()
    Path("out/s/conclusion.md").write_text("The middle one.")
    report.main(["--notebook"])
    page, whole = Path("out/s/notebook.md").read_text(), Path("out/notebook.md").read_text()
    assert all(part in page for part in ("`sweep it`", "| best |", "## Conclusion\n\nThe middle"))
    assert re.findall(r"^## .*\((.*)\)$", whole, re.MULTILINE) == ["alone", "s"]
    assert "](s/report.png)" in whole and "](s/learning_rate%3D0.02/notebook.md)" in whole
    shutil.copytree("out/s", "out/t")
    report.main(["out/s", "out/t", "--notebook"])
    both = Path("out/notebook-selected.md").read_text()
    assert re.findall(r"^## .*\((.*)\)$", both, re.MULTILINE) == ["s", "t"]


# --- the runs


@pytest.mark.slow
def test_printed_commands_two_at_a_time_and_one_that_diverges(tiny, monkeypatch, capsys):
    words = [*SHORT, "--learning_rate", "1e-2,4e-2,1e30", "--grad_clip", "0"]
    words += ["--sample_prompts", "'a b','it\\'s'"]
    assert sweep.main([*words, "--print"]) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and Path(shlex.split(lines[0])[1]).samefile(ROOT / "train.py")
    subprocess.run(["sh", "-c", lines[0]], check=True, timeout=120)
    about = json.loads((TOP / "learning_rate=0.01/run.json").read_text())
    assert about["config"]["sample_prompts"] == ["a b", "it's"] and about["steps"] == 6
    count = []
    monkeypatch.setattr(
        sweep.time, "sleep", lambda s: count.append(len(children(os.getpid()))) or SLEEP(s)
    )
    assert sweep.main([*words, "--jobs", "2"]) == 1
    said = capsys.readouterr().out
    assert max(count) == 2 and "| best | 1 finished |" in said
    assert "| 1e+30 | - | - | failed: " in said


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_and_runs_nothing_twice(tiny, capsys):
    words = ["tiny.py", "--max_steps", "400", "--seed", "0,1", "--epochs", "99"]
    first, second = TOP / "seed=0", TOP / "seed=1"

    # Ctrl-C in the second run
    with started([sys.executable, ROOT / "sweep.py", *words], stdout=subprocess.PIPE) as process:
        until(lambda: step_of(second), process)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "--seed 0,1" in out.splitlines()[-1]
    log = (first / "log.txt").read_text()
    assert 0 < step_of(second) < 400

    # to the end: no step of the first run, and none of the second's twice
    assert sweep.main(words) == 0
    assert "| 0, 1 | " in capsys.readouterr().out
    assert (first / "log.txt").read_text() == log
    assert [line["step"] for line in metrics(second)] == list(range(1, 401))
