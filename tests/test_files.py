import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from lab import files
from lab.console import UserError
from lab.files import Lock


def test_a_lock_has_one_owner_whom_it_names(tmp_path):
    with Lock() as one, Lock() as two:
        one.take(tmp_path / ".lock", "the folder", "wait")
        with pytest.raises(
            UserError, match=f"the folder is in use by process {os.getpid()} on .+; wait"
        ):
            two.take(tmp_path / ".lock", "the folder", "wait")
        assert one.owned and not two.owned
    with Lock() as three:
        three.take(tmp_path / ".lock", "the folder", "wait")
    assert (tmp_path / ".lock").exists()


OWNER = """
import os, sys
from lab.files import Lock
lock = Lock()
lock.take(".lock", "the folder", "wait")
if not os.fork():
    print(os.getpid(), flush=True)
sys.stdin.read()
"""


def test_a_killed_owner_s_lock_is_free_though_its_child_lives(tmp_path):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=tmp_path, env=env, **pipes)
    forked = int(owner.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"in use by process {owner.pid} "):
            Lock().take(tmp_path / ".lock", "the folder", "wait")
        owner.kill()
        owner.wait()
        os.kill(forked, 0)  # it lives
        with Lock() as lock:
            lock.take(tmp_path / ".lock", "the folder", "wait", seconds=10)
            assert lock.owned
    finally:
        os.kill(forked, signal.SIGKILL)
        owner.stdin.close(), owner.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a /dev/null that fsync refuses")
def test_a_file_that_does_not_reach_the_disk_leaves_what_was_there(in_tmp):
    Path("kept").write_text("old")
    os.symlink("/dev/null", "kept.part")
    with pytest.raises(OSError, match="Invalid argument"):
        files.write_text("kept", "new")
    assert os.listdir() == ["kept"] and Path("kept").read_text() == "old"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with Lock() as lock:
        lock.take(tmp_path / ".lock", "the folder", "wait")
        assert lock.owned
    assert "warning: no locks here (No locks available)" in capsys.readouterr().err
