"""Files that are whole, a folder's lock, and checkpoints: damaged, torn, killed amid a save."""

import contextlib
import errno
import itertools
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import same

import train
from lab import folder
from lab.console import UserError
from lab.folder import load_checkpoint, newest_checkpoint, save_checkpoint


@pytest.fixture
def done(tiny):
    """tiny, with a finished run of six steps in out/done."""
    words = [tiny, *"--max_steps 6 --save_interval 3 --out_dir out/done".split()]
    assert train.main(words) == 0
    return tiny


@pytest.mark.skipif(sys.platform != "linux", reason="needs a /dev/null that fsync refuses")
def test_a_file_that_does_not_reach_the_disk_leaves_what_was_there(in_tmp):
    Path("kept").write_text("old")
    os.symlink("/dev/null", "kept.part")
    with pytest.raises(OSError):
        folder.write_text("kept", "new")
    assert os.listdir() == ["kept"] and Path("kept").read_text() == "old"


# --- checkpoints


def test_every_flipped_bit_is_found_or_harmless(done):
    path, places, refused = Path("out/done/last.pt"), random.Random(0), 0
    content, whole = path.read_bytes(), load_checkpoint(path)
    for _ in range(60):
        at, flipped = places.randrange(len(content)), 1 << places.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ flipped]) + content[at + 1 :])
        try:
            read = load_checkpoint(path)
        except UserError:
            refused += 1
        else:
            assert same(read["model"], whole["model"]) and read["state"] == whole["state"]
    assert refused > 50


class Malice:
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)


@pytest.mark.parametrize("content", [Malice(), {"model": {}}, torch.zeros(3)])
def test_what_is_no_checkpoint_is_one_line_and_executes_nothing(in_tmp, content):
    torch.save(content, "other.pt")
    with pytest.raises(UserError, match="other.pt"):
        load_checkpoint("other.pt")
    assert not Path("executed").exists()


def test_only_damage_puts_a_checkpoint_aside(done, monkeypatch):
    """Not too little memory, nor a disk that cannot be read."""
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    shutil.copy("out/done/last.pt", "out/done/prev.pt")
    for error in full, OSError(errno.EIO, "Input/output error"):

        def fail(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as patch, pytest.raises((RuntimeError, OSError)):
            patch.setattr(torch, "load", fail)
            newest_checkpoint("out/done")
    assert newest_checkpoint("out/done")[1] == "out/done/last.pt"


def test_a_kill_between_a_save_s_two_renames_loses_nothing(done, monkeypatch):
    content, paths = load_checkpoint("out/done/last.pt"), ("out/done/last.pt", "out/done/prev.pt")
    save_checkpoint(content | {"step": 7}, *paths)
    newest = 7
    for step, renames in enumerate((0, 1, 2), 8):  # killed before the first, between both, after
        done_so_far, replace = itertools.count(), os.replace

        def dying(source, target, renames=renames, done_so_far=done_so_far, replace=replace):
            if next(done_so_far) >= renames:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", dying)
            save_checkpoint(content | {"step": step}, *paths)
        before, newest = newest, step if renames else newest
        checkpoint, path = newest_checkpoint("out/done")
        assert (checkpoint["step"], path) == (newest, paths[0])
        assert load_checkpoint(paths[1])["step"] == (before if renames else 6)
