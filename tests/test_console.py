import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from lab import console

ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def python(code, **kwargs):
    """Start Python code that may import lab, its streams as text in pipes unless said otherwise."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code], **pipes | dict(env=ENV) | kwargs)


# --- Ctrl-C


LONG_CALL = """
import time
from lab.console import stop_signals
with stop_signals():
    print("in it", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_the_first_ctrl_c_is_answered_at_once_and_a_second_ends_at_once():
    with python(LONG_CALL) as child:
        assert child.stdout.readline() == "in it\n"
        child.send_signal(signal.SIGINT)
        child.stderr.readline()
        assert "Ctrl-C" in child.stderr.readline() and child.poll() is None
        while child.poll() is None:  # one that follows at once is torchrun's echo of the first
            child.send_signal(signal.SIGINT)
            try:
                child.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                pass
        assert child.returncode == 1


def test_signals_are_noted_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        with console.stop_signals(quiet=True) as seen:
            assert not seen
            os.kill(os.getpid(), number)
            assert len(seen) == 1
        assert signal.getsignal(signal.SIGINT) == before


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with console.stop_signals() as seen:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not seen
    finally:
        signal.signal(signal.SIGHUP, before)


# --- streams


TALK = """
from lab.console import run
def main():
    for i in range(5000):
        print("a line → of some length")
    print("said", flush=True)
    import sys; print("to stderr →", file=sys.stderr)
    open("done", "w").close()
run(main, strict=%s)
"""


@pytest.mark.parametrize(
    "where, encoding",
    [
        (">/dev/full", "utf-8"),
        (">&-", "ascii"),
        ("2>/dev/full", "cp1252"),
        (">&- 2>&- <&-", "utf-8"),
        ("| head -c 1", "ascii"),
    ],
)
def test_no_stream_ends_a_run(tmp_path, where, encoding):
    (tmp_path / "talk.py").write_text(TALK % False)
    words = f"{sys.executable} talk.py {where}"
    env = ENV | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        ["bash", "-c", words], cwd=tmp_path, env=env, capture_output=True, timeout=60
    )
    assert done.returncode == 0 and (tmp_path / "done").exists()
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert b"to stderr ?" in done.stderr or encoding == "utf-8" or "2>" in where


@pytest.mark.parametrize("where, says", [(">/dev/full", b"No space left"), (" | head -c 1", b"")])
def test_what_a_command_is_for_must_be_written(tmp_path, where, says):
    (tmp_path / "talk.py").write_text(TALK % True)
    words = f"set -o pipefail; {sys.executable} talk.py {where}"
    done = subprocess.run(
        ["bash", "-c", words], cwd=tmp_path, env=ENV, capture_output=True, timeout=60
    )
    assert done.returncode == 1 and says in done.stderr
    assert done.stderr.count(b"\n") == bool(says) and b"Traceback" not in done.stderr


def test_a_file_never_takes_a_closed_stream_s_number(tmp_path):
    """Or what a library prints would go into a checkpoint."""
    code = "open('out', 'w').write('kept'); print('lost'); import os; os.write(1, b'lost')"
    (tmp_path / "a.py").write_text(f"from lab.console import run\nrun(lambda: exec({code!r}))")
    words = f"{sys.executable} a.py >&- 2>&-"
    subprocess.run(["bash", "-c", words], cwd=tmp_path, env=ENV, timeout=60, check=True)
    assert (tmp_path / "out").read_text() == "kept"


# --- commands and errors


def test_a_command_in_a_message_works_from_where_the_user_is(in_tmp):
    code = (
        "from lab.console import ROOT, command\n"
        "print(command('report.py', '--help'))\n"
        "print(command('report.py', ROOT / 'config', '-h'))"
    )
    for folder in in_tmp, ROOT, ROOT / "config":
        commands, _ = python(code, cwd=folder).communicate(timeout=60)
        assert len(commands.splitlines()) == 2
        for words in commands.splitlines():
            done = subprocess.run(
                words, shell=True, cwd=folder, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0 and "usage: python report.py" in done.stdout
    assert console.command("train.py", "a b$.py", processes=3).endswith(
        f"--nproc_per_node=3 {ROOT}/train.py 'a b$.py'"
    )


def test_an_error_is_one_line_whatever_is_in_it():
    child = python(
        "from lab.console import UserError, run\n"
        "def main():\n"
        "    raise UserError('no such run: out/two\\nlines')\n"
        "run(main)"
    )
    out, errors = child.communicate(timeout=60)
    assert (child.returncode, out, errors) == (2, "", "error: no such run: out/two lines\n")


@pytest.mark.parametrize("late", [0, 1])
def test_an_error_of_ranks_is_printed_once_whoever_meets_it_first(tmp_path, late):
    """torchrun ends the other rank, which here never comes to the error."""
    (tmp_path / "meet.py").write_text(
        "import os, signal, torch\nfrom lab.console import UserError, run\n"
        "def main():\n"
        f"    if os.environ['LOCAL_RANK'] == '{late}':\n"
        "        signal.pause()\n"
        "    raise UserError('both ranks would say so')\n"
        "run(main)\n"
    )
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, "meet.py"],
        cwd=tmp_path,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr.count("error: both ranks") == 1, done.stderr
