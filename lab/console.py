"""The terminal: mistakes in one line, output that may fail, Ctrl-C, and commands to copy."""

import contextlib
import io
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """The user's mistake, as one line: what, why, and the command that fixes it."""


def first_line(error):
    """An exception's type and first line, for a message of one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def cpu_cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --- commands that a message names


def python():
    """The command that starts this Python."""
    known = shutil.which("python") == sys.executable
    return "python" if known else shlex.quote(os.path.relpath(sys.executable))


def command(script, *words, processes=1):
    """The command that runs a script of this program, typed in the current folder. Words that are
    Paths are shown relative to that folder."""
    words = [os.path.relpath(word) if isinstance(word, Path) else str(word) for word in words]
    line = " ".join(map(shlex.quote, [os.path.relpath(ROOT / script), *words]))
    if processes > 1:
        line = f"-m torch.distributed.run --nproc_per_node={processes} {line}"
    return f"{python()} {line}"


# --- output


class Output(io.FileIO):
    """Standard output or error. What a full disk or a closed terminal refuses is dropped, so that
    no run is lost because its log cannot be written."""

    def write(self, data):
        try:
            return super().write(data) or len(data)  # None: a pipe that does not block is full
        except OSError:
            return len(data)


def open_streams(strict):
    """Make standard error, and unless strict standard output, survive what they cannot write."""
    for name, mode in dict(stdin="r", stdout="w", stderr="w").items():
        if getattr(sys, name) is None:  # closed; the next file to be opened would get its number
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode, closefd=False))
    sys.stdin.reconfigure(errors="replace", newline="\n")
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    for name in ("stderr",) if strict else ("stdout", "stderr"):
        old = getattr(sys, name)
        buffer = io.BufferedWriter(Output(old.fileno(), "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, old.encoding, "replace", line_buffering=True))


def warn(text):
    """Print a warning to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def progress(total, description, **kwargs):
    """A tqdm bar, every 30 seconds where standard error is a log file."""
    from tqdm import tqdm

    slow = {} if sys.stderr.isatty() else dict(mininterval=30, delay=30, miniters=1)
    return tqdm(total=total, desc=description, dynamic_ncols=True, **slow, **kwargs)


# --- the end of a program


def stop_signals(quiet=False):
    """A list that is empty until SIGINT, SIGTERM or SIGHUP comes. The loop looks at it between two
    steps. A second Ctrl-C ends the process at once. quiet: print nothing."""
    seen = []  # when the signals came, in seconds

    def handle(number, frame):
        seen.append(time.monotonic())
        if number == signal.SIGINT and seen[-1] - seen[0] > 1:  # torchrun sends the first twice
            os._exit(1)
        if not quiet and len(seen) == 1:
            text = b"\nstopping after this step or evaluation; Ctrl-C again ends at once\n"
            with contextlib.suppress(OSError):  # not print(), amid which the signal may have come
                os.write(2, text)

    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
            signal.signal(number, handle)
    return seen


def run(main, strict=False):
    """Call main() and end the process. Exit codes: 0 done, 2 the user's mistake or a file that is
    not to be had, 1 anything else. strict: a write to standard output that fails ends it, too."""
    try:
        if not hasattr(os, "sysconf"):
            raise UserError("this program runs on Linux and macOS; on Windows, run it in WSL")
        open_streams(strict)
        code = main() or 0
        sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError):  # as `| head` closes it
        code = 1
    except (UserError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # torchrun ends this rank meanwhile, if rank 0 has printed the error
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2)
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        code = 2
    except Exception:
        if "LOCAL_RANK" not in os.environ:
            raise
        traceback.print_exc()
        why = "a rank failed as shown above, or lost another; go on from its checkpoint by --resume"
        print("error:", why, file=sys.stderr)
        code = 1
    # after a failure streams may fail again, and other ranks or their threads would be waited for
    sys.stderr.flush()
    if code or "LOCAL_RANK" in os.environ:
        os._exit(code)
    sys.exit(0)
