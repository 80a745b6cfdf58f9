import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT

from lab import console


def bash(words, cwd, **env):
    """Run a line of bash, where lab can be imported."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    command = ["bash", "-c", f"set -o pipefail; {words}"]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, timeout=60)


# --- Ctrl-C


def test_a_signal_is_noted_and_told_once(capfd):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    seen = console.stop_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not seen
    signal.signal(signal.SIGHUP, before)
    seen = console.stop_signals()
    for number in signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        os.kill(os.getpid(), number)
    assert len(seen) == 4 and len(capfd.readouterr().err.strip().splitlines()) == 1


def test_a_second_ctrl_c_ends_at_once_but_not_torchrun_s_echo_of_the_first(monkeypatch):
    clock = iter([10.0, 10.5, 11.5])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(os, "_exit", sys.exit)
    console.stop_signals(quiet=True)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGINT)


# --- output


TALK = """
import contextlib, os, sys
from lab.console import run
def main():
    for i in range(5000):
        print("a line → of some length")
    print("to stderr →", file=sys.stderr, flush=True)
    with open("done", "w") as file:
        with contextlib.suppress(OSError):
            os.write(1, b"a library's line")
        file.write("whole")
run(main, strict=%s)
"""


@pytest.mark.parametrize("where", ["> /dev/full 2>&1", "<&- >&- 2>&-", "> log", "| head -c 1"])
def test_no_stream_ends_a_run(tmp_path, where):
    (tmp_path / "talk.py").write_text(TALK % False)
    done = bash(f"{sys.executable} talk.py {where}", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and (tmp_path / "done").read_text() == "whole"
    assert done.stderr == (b"" if "2>" in where else b"to stderr ?\n")


@pytest.mark.parametrize("where, code, lines", [("> /dev/full", 2, 1), ("| head -c 1", 1, 0)])
def test_what_a_command_is_for_must_be_written(tmp_path, where, code, lines):
    (tmp_path / "talk.py").write_text(TALK % True)
    done = bash(f"{sys.executable} talk.py {where}", tmp_path)
    assert done.returncode == code and done.stderr.count(b"\n") == lines
    assert not (tmp_path / "done").exists()


# --- commands and errors


def test_a_command_in_a_message_works_from_where_the_user_is(in_tmp, monkeypatch):
    assert b"usage: python report.py" in bash(console.command("report.py", "-h"), in_tmp).stdout
    for folder in in_tmp, ROOT / "config":
        monkeypatch.chdir(folder)
        *_, script, path = shlex.split(console.command("train.py", ROOT / "config/demo.py"))
        assert Path(script).samefile(ROOT / "train.py")
        assert Path(path).samefile(ROOT / "config/demo.py")
    assert "--nproc_per_node=3 " in console.command("train.py", processes=3)


@pytest.mark.parametrize(
    "end, rank, code, out, error",
    [
        ("raise UserError('no run\\nhere')", {}, 2, b"", b"error: no run here\n"),
        ("open('none')", {}, 2, b"", b"error: [Errno 2] No such file or directory: 'none'\n"),
        ("print(end='b'), sys.stderr.write('a')", dict(LOCAL_RANK="0"), 0, b"b", b"a"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(tmp_path, end, rank, code, out, error):
    begin = "import sys\nfrom lab.console import UserError, run\n"
    (tmp_path / "end.py").write_text(f"{begin}def main(): {end}\nrun(main)")
    done = bash(f"{sys.executable} end.py", tmp_path, **rank)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, error)
