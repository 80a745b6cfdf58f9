"""What goes wrong with a run, on purpose: damaged data and checkpoints, full disks, kills, numbers
that are none."""

import itertools
import json
import math
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from helpers import (
    MODERN,
    VOCAB,
    assert_the_same_run,
    before_each_pass,
    forbid,
    limited,
    make_dataset,
    metrics,
    rows_of,
    same,
    trainer_of,
)

import train
from lab.console import UserError
from lab.folder import load_checkpoint, save_checkpoint


def saved_steps(*paths):
    """The steps of those checkpoints that are there."""
    return [load_checkpoint(path)["step"] for path in paths if os.path.exists(path)]


# --- what is not as it was left


def spoil_split():
    path = Path("data/tiny/train.bin")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def prepare_anew():
    shutil.rmtree("data/tiny")
    make_dataset(Path("data"), seed=2)


def damage_both():
    for name in "last", "prev":
        Path(f"out/done/{name}.pt").write_bytes(b"torn")


def leave_weights_alone():
    os.remove("out/done/last.pt")


def put_weights_in_its_place():
    shutil.copy("out/done/best.pt", "out/done/last.pt")


@pytest.mark.parametrize(
    "spoil, named",
    [
        (spoil_split, "train.bin"),
        (lambda: Path("data/tiny/meta.json").write_text("{}"), "meta.json"),
        (prepare_anew, "SHA-256"),
        (damage_both, "prev.pt"),
        (leave_weights_alone, "out/done/best.pt"),
        (put_weights_in_its_place, "out/done/last.pt"),
    ],
)
def test_what_was_spoiled_is_one_line(done, spoil, named):
    best = Path("out/done/best.pt").read_bytes()
    spoil()
    with pytest.raises(UserError) as caught:
        train.main([done, *"--out_dir out/done --resume --max_steps 9".split()])
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert Path("out/done/best.pt").read_bytes() == best


def test_a_folder_that_cannot_be_written_is_one_line(tiny):
    Path("out").write_text("in the way")
    with pytest.raises(OSError, match="out/tiny"):  # which console.run() prints
        train.main([tiny, "--max_steps", "6"])


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tiny, capsys):
    options = [tiny, *"--max_steps 9 --save_interval 3 --resume".split()]
    passes = itertools.count(1)

    def stop(training):
        if next(passes) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with before_each_pass(stop):
        assert train.main([*options, "--out_dir", "out/done"]) == 1
    shutil.copytree("out/done", "out/whole")
    path = Path("out/done/last.pt")
    assert train.main([*options, "--out_dir", "out/whole"]) == 0
    os.truncate(path, path.stat().st_size - 9)
    before = load_checkpoint("out/done/prev.pt")["step"]
    assert train.main([*options, "--out_dir", "out/done"]) == 0
    shown = capsys.readouterr()
    assert f"out/done/prev.pt, step {before}" in shown.out
    assert Path("out/done/last.pt.damaged").exists()
    assert_the_same_run("out/whole", "out/done", curves=False)


# --- full disks, kills


def test_a_full_disk_costs_what_cannot_be_written_and_not_the_run(done, capsys):
    """Files of 16 kB fit and checkpoints do not; a disk that is full is in torture.py."""
    options = [done, *"--max_steps 20 --save_interval 3 --eval_interval 5 --resume".split()]
    shutil.copytree("out/done", "out/whole")
    assert train.main([*options, "--out_dir", "out/whole"]) == 0
    with limited(resource.RLIMIT_FSIZE, 16000):
        assert train.main([*options, "--out_dir", "out/done"]) == 1
    shown = capsys.readouterr()
    for path in "out/done/last.pt", "out/done/best.pt":
        assert f"cannot write {path}" in shown.err
    assert saved_steps("out/done/last.pt", "out/done/best.pt") == [6, 6]
    assert not list(Path("out/done").glob("*.part"))
    # what best.pt does not hold was no best
    bests = [line["step"] for line in metrics("out/done", True) if line["best"]]
    assert bests == [6] and len(metrics("out/done", True)) > 2
    assert train.main([*options, "--out_dir", "out/done"]) == 0
    assert_the_same_run("out/whole", "out/done")


def test_a_run_whose_best_could_never_be_written_has_not_finished(tiny):
    Path("out/tiny/best.pt.part").mkdir(parents=True)
    assert train.main([tiny, "--max_steps", "6"]) == 1
    assert saved_steps("out/tiny/last.pt", "out/tiny/best.pt") == [6]


def test_a_run_whose_last_could_never_be_written_can_begin_anew(tiny):
    Path("out/tiny/last.pt.part").mkdir(parents=True)
    assert train.main([tiny, "--max_steps", "6"]) == 1
    assert saved_steps("out/tiny/last.pt", "out/tiny/best.pt") == [6]
    os.rmdir("out/tiny/last.pt.part")
    assert train.main([tiny, "--max_steps", "6", "--resume"]) == 0


@pytest.mark.parametrize("minutes, steps", [("1e-9", [6, 5]), ("60", [])])
def test_save_minutes(tiny, minutes, steps):
    """A run that such a rate ends at step 6, and that does not save at its end."""
    options = ["--save_interval", "0", "--save_minutes", minutes, "--learning_rate", "1e38"]
    assert train.main([tiny, *options]) == 1
    assert saved_steps("out/tiny/last.pt", "out/tiny/prev.pt") == steps


# --- numbers that are none


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny, capsys):
    assert train.main([tiny, "--max_steps", "6"]) == 0
    word, batches = 0, trainer_of([tiny], 18).batches
    forbid(word)
    bad = [i + 1 for i in range(6, 18) if word in rows_of(batches, i)[:, 1:]]
    assert 2 <= len(bad) <= 10
    # its validation holds the word too, so that the run ends there, by one line
    assert train.main([tiny, "--max_steps", "18", "--resume"]) == 1
    assert "not finite" in capsys.readouterr().err
    skipped = [line["skipped"] for line in metrics()]
    assert metrics(evaluations=True)[-1]["train_loss"] > 1  # of those that are finite
    assert skipped == [sum(b <= i for b in bad) for i in range(1, 19)]


@pytest.mark.parametrize("more", [(), MODERN])
def test_after_a_few_such_steps_in_a_row_the_run_stops_with_its_weights_as_they_were(
    tiny, capsys, more
):
    options = [tiny, "--save_interval", "1", *more]
    assert train.main([*options, "--max_steps", "6"]) == 0
    poisoned = forbid(slice(0, VOCAB // 2))["model"]
    assert train.main([*options, "--max_steps", "20", "--resume"]) == 1
    assert "step 11: " in capsys.readouterr().err
    checkpoint = load_checkpoint("out/tiny/last.pt")
    assert checkpoint["step"] == 11 and same(checkpoint["model"], poisoned)


def test_an_evaluation_that_is_not_finite_ends_the_run_and_is_no_best(tiny, capsys):
    assert train.main([tiny, "--max_steps", "6", "--eval_interval", "3"]) == 0
    checkpoint = load_checkpoint("out/tiny/last.pt")
    checkpoint["model"]["head_bias"][:] = math.nan
    save_checkpoint(checkpoint, "out/tiny/last.pt")
    best = load_checkpoint("out/tiny/best.pt")["step"]
    for _ in range(2):  # a resume meets it again
        assert train.main([tiny, *"--max_steps 8 --eval_interval 1 --resume".split()]) == 1
        assert "--learning_rate" in capsys.readouterr().err
    last = metrics(evaluations=True)[-1]
    assert last["val_loss"] is None and last["best"] is False
    assert load_checkpoint("out/tiny/best.pt")["step"] == best
    assert json.loads(Path("out/tiny/run.json").read_text())["steps"] == 8
