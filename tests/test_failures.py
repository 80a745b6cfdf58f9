"""What goes wrong, on purpose: bad input, damaged checkpoints, full disks, kills, numbers that
are none, lost ranks."""

import contextlib
import copy
import os
import random
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from bad_inputs import CASES, flipped
from helpers import (
    MODERN,
    ROOT,
    VOCAB,
    assert_the_same_run,
    forbid,
    kill_at_random,
    limited,
    metrics,
    rows_of,
    same,
    trainer_of,
    weights,
)

import train
from lab import checkpoint
from lab.checkpoint import load as load_checkpoint
from lab.checkpoint import newest
from lab.console import UserError


@pytest.fixture
def done(tiny, tmp_path_factory):
    """tiny, with a finished run of six steps in out/done."""
    assert (
        train.main([tiny, "--max_steps", "6", "--save_interval", "3", "--out_dir", "out/done"]) == 0
    )
    return tiny


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(done, name):
    spoil, words, says = CASES[name]
    if spoil:
        spoil()
    with pytest.raises(UserError) as caught:
        train.main(words)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert (
        not os.path.exists("executed") and os.listdir("out/done") and not os.path.exists("out/tiny")
    )


# --- checkpoints


@pytest.mark.parametrize("how", ["truncated", "bits flipped", "empty", "another program's", "gone"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(done, capsys, how):
    options = [done, "--max_steps", "9", "--save_interval", "3", "--resume"]
    shutil.copytree("out/done", "out/whole")
    path = Path("out/done/last.pt")
    assert train.main([*options, "--out_dir", "out/whole"]) == 0
    content = path.read_bytes()
    spoiled = dict(
        zip(
            ["truncated", "bits flipped", "empty", "another program's"],
            [content[:-9], flipped(content), b"", b"PK\x03\x04" + b"x" * 99],
            strict=True,
        )
    )
    path.write_bytes(spoiled[how]) if how in spoiled else path.unlink()
    before = load_checkpoint("out/done/prev.pt")["step"]
    assert train.main([*options, "--out_dir", "out/done"]) == 0
    shown = capsys.readouterr()
    assert f"going on from out/done/prev.pt, step {before}" in shown.out
    if how != "gone":
        assert (
            f"which costs {6 - before} of the steps" in shown.err
            and Path("out/done/last.pt.damaged").exists()
        )
    assert_the_same_run("out/whole", "out/done", curves=False)


def test_every_flipped_bit_is_found_or_harmless(done):
    path = Path("out/done/last.pt")
    content, whole = path.read_bytes(), load_checkpoint(path)
    places = random.Random(0)
    refused = 0
    for _ in range(60):
        at = places.randrange(len(content))
        path.write_bytes(
            content[:at] + bytes([content[at] ^ 1 << places.randrange(8)]) + content[at + 1 :]
        )
        try:
            again = load_checkpoint(path)
        except UserError:
            refused += 1
        else:
            assert same(again["model"], whole["model"]) and again["state"] == whole["state"]
    assert refused > 50


def test_a_kill_between_a_save_s_two_renames_loses_nothing(done, monkeypatch):
    content = load_checkpoint("out/done/last.pt")
    paths = "out/done/last.pt", "out/done/prev.pt"
    steps = lambda: [load_checkpoint(path)["step"] for path in paths]  # noqa: E731
    checkpoint.save(content | {"step": 7}, *paths)
    assert steps() == [7, 6]
    for step, renames in enumerate(
        (0, 1, 2, 9), 8
    ):  # killed before the first rename, after it, ...
        last, left, replace = steps()[0], renames, os.replace

        def dying(source, target):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            replace(source, target)  # noqa: B023

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", dying)
            checkpoint.save(content | {"step": step}, *paths)
        assert steps()[0] == (step if renames else last)  # both whole
        assert newest("out/done")[0]["step"] == steps()[0]
    assert steps() == [11, 10]


def test_where_no_hard_link_can_be_two_checkpoints_are_kept_too(done):
    """Here, since they are on two file systems."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(".").st_dev:
        pytest.skip("there is no second file system")
    content = load_checkpoint("out/done/last.pt")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        paths = "out/done/last.pt", f"{elsewhere}/prev.pt"
        for step in 7, 8:
            checkpoint.save(content | {"step": step}, *paths)
        assert [load_checkpoint(path)["step"] for path in paths] == [8, 7]
        assert os.listdir(elsewhere) == ["prev.pt"]
    assert not list(Path("out/done").glob("*.part"))


def test_a_full_disk_costs_what_cannot_be_written_and_not_the_run(done, capsys):
    """Files of 16 kB fit and checkpoints do not; a disk that is full is in torture.py."""
    options = [done, "--max_steps", "20", "--save_interval", "3", "--resume"]
    shutil.copytree("out/done", "out/whole")
    assert train.main([*options, "--out_dir", "out/whole"]) == 0
    with limited(resource.RLIMIT_FSIZE, 16000):
        assert train.main([*options, "--out_dir", "out/done"]) == 1
    shown = capsys.readouterr()
    assert "cannot write out/done/last.pt (File too large); the run goes on" in shown.err
    assert "out/done/best.pt" in shown.err and "saved to out/done/best.pt" not in shown.out
    assert "last.pt is of step 6" in shown.out and not list(Path("out/done").glob("*.part"))
    assert [load_checkpoint(f"out/done/{name}.pt")["step"] for name in ("last", "best")] == [6, 6]
    assert train.main([*options, "--out_dir", "out/done"]) == 0
    assert_the_same_run("out/whole", "out/done")


@pytest.mark.parametrize("minutes, steps", [("1e-9", [6, 5]), ("60", []), ("0", [])])
def test_save_minutes(tiny, minutes, steps):
    """A run that such a rate ends at step 6, and that does not save at its end."""
    options = ["--save_interval", "0", "--save_minutes", minutes, "--learning_rate", "1e38"]
    assert train.main([tiny, *options]) == 1
    saved = [Path(f"out/tiny/{name}.pt") for name in ("last", "prev")]
    assert [load_checkpoint(path)["step"] for path in saved if path.exists()] == steps


# --- killed


@pytest.mark.slow
def test_killed_at_any_moment_the_run_is_the_same(tiny):
    command = [
        tiny,
        "--epochs",
        "9",
        "--max_steps",
        "100",
        "--eval_interval",
        "40",
        "--save_interval",
        "1",
    ]
    assert train.main([*command, "--out_dir", "out/whole"]) == 0
    command = [*command, "--out_dir", "out/cut", "--resume"]
    amid, worst = kill_at_random(
        [sys.executable, str(ROOT / "train.py"), *command], "out/cut", random.Random(0), 2
    )
    assert worst <= 1
    assert train.main(command) == 0
    assert_the_same_run("out/whole", "out/cut")


# --- numbers that are none


@pytest.mark.parametrize("more", [(), MODERN])
def test_a_step_that_is_not_finite_never_reaches_the_weights(tiny, capsys, more):
    options = [tiny, *more]
    assert train.main([*options, "--max_steps", "6"]) == 0
    word = 0
    found = forbid(word)
    trainer, still, bad = trainer_of(options, 18), [], []
    trainer.load_state_dict(found)
    for i in range(6, 18):
        before = copy.deepcopy(trainer.state_dict())
        trainer.step(i)
        still += [i + 1] if unchanged(before, trainer.state_dict()) else []
        bad += [i + 1] if word in rows_of(trainer.batches, i)[:, 1:] else []
    assert still == bad and 2 <= len(bad) <= 10
    assert train.main([*options, "--max_steps", "18", "--resume"]) == 0
    assert f"{len(bad)} of 18 steps had no finite loss" in capsys.readouterr().out
    assert [line["skipped"] for line in metrics()] == [
        sum(b <= i for b in bad) for i in range(1, 19)
    ]
    assert not torch.isnan(weights("out/tiny/last.pt")["head_bias"]).any()


def unchanged(before, after):
    """Whether two state_dict()s of a Trainer have the same weights and moments."""
    optimizers = zip(before["optimizers"], after["optimizers"], strict=True)
    return same(before["model"], after["model"]) and all(
        same(one["state"][p], two["state"][p]) for one, two in optimizers for p in two["state"]
    )


def test_after_a_few_such_steps_in_a_row_the_run_stops(tiny, capsys):
    options = [tiny, "--save_interval", "1"]
    assert train.main([*options, "--max_steps", "6"]) == 0
    poisoned = forbid(slice(0, VOCAB // 2))["model"]
    assert train.main([*options, "--max_steps", "20", "--resume"]) == 1
    assert "error: 5 steps in a row, the last at 11" in capsys.readouterr().err
    found = load_checkpoint("out/tiny/last.pt")
    assert found["step"] == 11 and same(found["model"], poisoned)


def test_a_run_that_stopped_for_such_steps_goes_on_where_they_are_mended(tiny):
    options = [tiny, "--log_interval", "10", "--save_interval", "10"]
    assert train.main([*options, "--max_steps", "10"]) == 0
    whole = weights("out/tiny/last.pt")
    forbid(slice(0, VOCAB // 2))
    assert train.main([*options, "--max_steps", "30", "--resume"]) == 1
    found = load_checkpoint("out/tiny/last.pt")
    checkpoint.save(found | {"model": whole}, "out/tiny/last.pt")
    assert train.main([*options, "--max_steps", "30", "--resume"]) == 0
    assert [line["skipped"] for line in metrics()] == [0, 10, 10]
