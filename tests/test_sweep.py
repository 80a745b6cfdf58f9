import json
import os
import re
import shlex
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
from lab.console import UserError

SHORT = ["tiny.py", "--max_steps", "6"]
SLEEP = time.sleep
TOP = Path("out/tiny-sweep")


def plan(*words):
    """(what sweep.json is to hold, {a run's folder: its words}) of a sweep's command."""
    _, _, about, jobs = sweep.jobs_of([*SHORT, *words])
    return about, jobs


def leave_sweep(figures, vary=("learning_rate", "seed"), top="s"):
    """A sweep's folder with finished runs, as {a run's values: its figures for leave()}."""
    runs = {}
    for values, line in figures.items():
        name = ",".join(map(str, values))
        runs[name] = dict(zip(vary, values, strict=True))
        path = leave(f"{top}/{name}", **line)
        about = json.loads((path / "run.json").read_text())
        about["config"] |= runs[name]
        (path / "run.json").write_text(json.dumps(about))
        (path / "final.json").write_text('{"val": {}}')
    about = dict(command="sweep it", vary=vary, runs=runs, config={})
    Path("out", top, "sweep.json").write_text(json.dumps(about))


def rows(capsys, *words):
    """A report's table, a list of cells for each row."""
    report.main(list(words))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


# --- the grid


def test_the_grid_is_every_combination_in_a_folder_of_its_own(tiny):
    words = "--learning_rate 1e-2,4e-3 --block=gpt2,modern --compile none,false --seed 0,1"
    about, jobs = plan(*words.split(), "--expected_ppl", "35,42")
    names = list(about["runs"])
    assert len(jobs) == 16 and about["steps"] == 16 * 6
    # the last word's values stand next to each other; names follow the settings' own order
    common = "block=gpt2,learning_rate=0.01,compile=None,seed="
    assert names[:2] == [f"{common}0", f"{common}1"]
    assert list(map(os.path.basename, jobs)) == names
    assert {"--compile=None", "--expected_ppl=(35, 42)"} < set(next(iter(jobs.values())))
    assert len(plan("--seed", "1,0,1", "--learning_rate", "0.004,1e-2")[1]) == 4
    assert f"{TOP}/data_dir=.%2Fdata,seed=0" in plan("--data_dir", "data,./data")[1]
    assert len(plan("--seed", "0,1", "--question", "Well, which?")[1]) == 2
    names = plan("--data_dir", f"{'./' * 150}data,{'./' * 151}data")[0]["runs"]
    assert len(names) == 2 and max(map(len, names)) <= 255
    # all runs have the dtype that the first was given
    TOP.mkdir(parents=True)
    (TOP / "sweep.json").write_text('{"config": {"dtype": "float16"}}')
    _, jobs = plan("--dtype", "auto", "--seed", "0,1")
    assert all("--dtype=float16" in words for words in jobs.values())


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
    with pytest.raises(UserError, match="what varies was"):
        sweep.main([*SHORT, "--print", "--learning_rate", "0.01", "--d_model", "8,16"])
    # more values, of a setting and of the seed, which had one
    for more in "--learning_rate 0.02,0.04", "--learning_rate 0.02 --seed 0,1":
        sweep.main([*SHORT, "--print", *more.split()])
    about = json.loads((TOP / "sweep.json").read_text())
    runs = [(0.01, 0), (0.02, 0), (0.04, 0), (0.02, 1)]
    assert list(about["runs"]) == [f"learning_rate={rate},seed={seed}" for rate, seed in runs]
    assert about["runs"]["learning_rate=0.02,seed=1"] == dict(learning_rate=0.02, seed=1)


# --- the figures, by hand


def test_means_deviations_and_paired_errors_are_those_worked_out_by_hand(in_tmp, capsys):
    # three seeds at 0.01, at 0.02 seed by seed a little worse, and two at 0.04
    losses = {0.02: (4.25, 4.5, 4.75), 0.01: (4.0, 4.5, 4.5), 0.04: (5.0, 6.0)}
    leave_sweep(
        {
            (rate, seed): dict(val_loss=loss, val_bits_per_byte=loss)
            for rate, all_seeds in losses.items()
            for seed, loss in enumerate(all_seeds)
        }
    )
    best, second, third = (row[2:7] for row in rows(capsys, "out/s"))
    assert best[1:] == ["0, 1, 2", "0.01", "4.3333 ± 0.2887", "best"]
    # 4.25 4.5 4.75: mean 4.5, squares 0.0625 + 0 + 0.0625 over 2.
    # Seed by seed 0.25 0 0.25: mean 1/6; squares 1/144 + 1/36 + 1/144 = 1/24, over 2 is 1/48, and
    # over 3 again 1/144. Student's t is 4.30
    assert second[3:] == ["4.5000 ± 0.2500", "+0.1667 ± 0.0833, may be chance"]
    # the two seeds that both have, 1 and 1.5: mean 1.25, squares 1/8, over 2 1/16
    assert third[1:3] == ["0, 1", "0.04"] and third[4] == "+1.2500 ± 0.2500, may be chance"
    sure = report.difference({0: 1.08, 1: 1.1, 2: 1.12}, {0: 1, 1: 1, 2: 1})  # 8.7 times
    assert sure == "+0.1000 ± 0.0115"


def test_a_sweep_is_one_entry_of_the_notebook(in_tmp, capsys):
    leave("alone")
    leave_sweep({(rate, 0): dict(val_loss=loss) for rate, loss in ((0.01, 3.0), (0.02, 2.0))})
    report.main(["out/s"])
    assert "| best |" in capsys.readouterr().out
    Path("out/s/conclusion.md").write_text("The middle one.")
    report.main(["--notebook"])
    page, whole = Path("out/s/notebook.md").read_text(), Path("out/notebook.md").read_text()
    assert all(part in page for part in ("`sweep it`", "| best |", "## Conclusion\n\nThe middle"))
    assert re.findall(r"^# .*\((.*)\)$", whole, re.MULTILINE) == ["alone", "s"]
    assert "](s/report.png)" in whole and "](s/0.02%2C0/notebook.md)" in whole


# --- the runs


@pytest.mark.slow
def test_printed_commands_two_at_a_time_and_one_that_diverges(tiny, monkeypatch, capsys):
    words = [*SHORT, "--learning_rate", "1e-2,4e-2,1e30", "--grad_clip", "0"]
    words += ["--sample_prompts", "'a b','it\\'s'"]
    assert sweep.main([*words, "--print"]) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and Path(shlex.split(lines[0])[1]).samefile(ROOT / "train.py")
    subprocess.run(["sh", "-c", lines[0]], check=True, timeout=120)
    about = json.loads((TOP / "learning_rate=0.01,seed=0/run.json").read_text())
    assert about["config"]["sample_prompts"] == ["a b", "it's"] and about["steps"] == 6
    count = []
    monkeypatch.setattr(
        sweep.time, "sleep", lambda s: count.append(len(children(os.getpid()))) or SLEEP(s)
    )
    assert sweep.main([*words, "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert max(count) == 2 and "| best |" in said.out
    assert "| 1e+30 | - | - | " in said.out and "skipped: error: " in said.err


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
