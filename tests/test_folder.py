"""Files that are whole, a folder's lock, and checkpoints: damaged, torn, killed amid a save."""

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import same

from lab.console import UserError
from lab.folder import (
    load_checkpoint,
    newest_checkpoint,
    read_lines,
    save_checkpoint,
    write_text,
    write_whole,
)


def test_two_processes_that_write_one_file_do_not_meet(in_tmp, monkeypatch):
    def write(file):
        file.write(b"one")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            write_text("page", "two")

    write_whole("page", write)
    assert Path("page").read_bytes() == b"one" and os.listdir() == ["page"]


def test_what_is_renamed_is_on_the_disk(in_tmp, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    write_text("page", "whole")
    assert done == ["fsync", "replace"]


def test_what_is_no_line_of_the_log_is_left_out(in_tmp):
    write_text("lines", '{"step": 1}\n5\n[]\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_lines("lines")] == [1, 2]


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
    last, prev, replace = "out/done/last.pt", "out/done/prev.pt", os.replace
    content = load_checkpoint(last)
    save_checkpoint(content | {"step": 7}, last, prev)

    def die(source, target):
        if target == last:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        save_checkpoint(content | {"step": 8}, last, prev)
    checkpoint, path = newest_checkpoint("out/done")
    assert (checkpoint["step"], path, load_checkpoint(prev)["step"]) == (8, last, 7)
