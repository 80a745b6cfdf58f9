"""The terminal: a mistake as one line, output that may fail, Ctrl-C, and commands to copy."""

import contextlib
import errno
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """The user's mistake, as one line: what, why, and the command that fixes it."""


def first_line(error):
    """An exception's type and first line, for a message of one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0] or 'no message'}"


def cpu_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --- commands that a message names


def nearby(path):
    """A path as the user would type it: relative below the current folder, else absolute."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith("..") else relative


def python():
    """The command that starts this Python."""
    for name in ("python", "python3"):
        if shutil.which(name) == sys.executable:
            return name
    return shlex.quote(nearby(sys.executable))


def torchrun(processes):
    """The command that starts so many processes of the script that follows it."""
    ours = os.path.join(os.path.dirname(sys.executable), "torchrun")
    module = f"{python()} -m torch.distributed.run"
    start = "torchrun" if shutil.which("torchrun") == ours else module
    return f"{start} --nproc_per_node={processes}"


def command(script, *words, processes=1):
    """The command that runs a script of ours from the folder that the user is in, in so many
    processes. A word that is a Path is shown from there, too."""
    start = torchrun(processes) if processes > 1 else python()
    shown = [nearby(word) if isinstance(word, Path) else str(word) for word in words]
    return " ".join([start, *map(shlex.quote, [nearby(ROOT / script), *shown])])


# --- output


class Output:
    """A text stream that loses what a full disk or a closed terminal refuses, and fails no program
    for it. `error` is the first OSError; where `strict`, flush() raises it."""

    def __init__(self, stream, strict=False):
        self.stream, self.strict, self.error = stream, strict, None
        stream.reconfigure(errors="replace")  # characters that its encoding lacks become "?"

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError as error:
            self.error = self.error or error
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as error:
            self.error = self.error or error
        if self.strict and self.error:
            raise self.error

    def __getattr__(self, name):
        return getattr(self.stream, name)


def warn(text):
    """Print a warning to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def progress(total, description, **kwargs):
    """A tqdm bar on a terminal; in a log file, a line every 30 seconds."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        kwargs |= dict(file=Lines(), mininterval=30, miniters=1, delay=30, position=0, ncols=100)
        return tqdm(total=total, desc=description, **kwargs)
    return tqdm(total=total, desc=description, dynamic_ncols=True, **kwargs)


class Lines:
    """Standard error for tqdm where it is no terminal: a line instead of a carriage return."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        sys.stderr.flush()


# --- signals, and the end of a program


@contextlib.contextmanager
def stop_signals(quiet=False):
    """A list that is empty until SIGINT, SIGTERM or SIGHUP comes; whoever works looks at it between
    two steps. A second Ctrl-C ends the process. SIGHUP stays ignored where it was (nohup)."""
    seen = []  # when they came

    def handler(number, frame):
        seen.append(time.monotonic())
        text = b"\nstopping after this step; Ctrl-C again ends at once\n"
        is_second = len(seen) > 1
        if is_second:
            # torchrun sends the first Ctrl-C twice
            if number != signal.SIGINT or seen[-1] - seen[0] < 1:
                return
            text = b"\nended at once; the last checkpoint is whole\n"
        with contextlib.suppress(OSError):
            os.write(2, b"" if quiet else text)
        if is_second:
            os._exit(1)

    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    old = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number in numbers if old[number] != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, handler)
    try:
        yield seen
    finally:
        for number in heard:
            signal.signal(number, old[number])


def run(main, strict=False):
    """Call main() and end the process: 0 done, 2 the user's mistake, 1 anything else.

    strict: standard output is what the command is for, so that a failed write there is an error;
    one into a closed pipe, as of `| head`, is none to speak of.
    """
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:  # closed before the program began
            setattr(sys, name, open(os.devnull, mode))
    sys.stdin.reconfigure(errors="replace", newline="\n")
    sys.stdout, sys.stderr = Output(sys.stdout, strict), Output(sys.stderr)
    text = ""
    try:
        if not hasattr(os, "sysconf"):
            raise UserError("this program runs on Linux and macOS; on Windows, run it in WSL")
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code, text = 2, "error: " + " ".join(str(error).splitlines())
    except KeyboardInterrupt:
        code, text = 1, "interrupted"
    except OSError as error:
        if error is not sys.stdout.error:
            raise
        code = 1
        if error.errno != errno.EPIPE:
            text = f"error: cannot write to standard output: {error.strerror}"
    sys.stdout.strict = False
    if text:
        if int(os.environ.get("LOCAL_RANK") or 0) > 0:
            time.sleep(2)  # torchrun ends this rank by then, where rank 0 has said the same
        print(text, file=sys.stderr, flush=True)
    sys.exit(code)
