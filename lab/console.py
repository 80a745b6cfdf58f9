"""The terminal: a mistake as one line, streams that may fail, Ctrl-C, and commands to copy.

A script imports this before anything slow: from then on Ctrl-C ends it by one word.
"""

import contextlib
import errno
import io
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGAN = time.perf_counter()  # before the imports that take a second


class UserError(Exception):
    """The user's mistake, as one line: what, why, and the command that mends it."""


def first_line(error):
    """An exception's type and first line, for a message of one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


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


def quote(word):
    """A word as the shell wants it, on one line whatever is in it."""
    if "\n" not in word:
        return shlex.quote(word)
    word = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{word}'"


def torchrun(processes):
    """The command that starts so many processes of the script that follows it."""
    known = os.path.join(os.path.dirname(sys.executable), "torchrun")
    start = (
        "torchrun" if shutil.which("torchrun") == known else f"{python()} -m torch.distributed.run"
    )
    return f"{start} --nproc_per_node={processes}"


def command(script, *words, processes=1):
    """The command that runs a script of ours from the folder that the user is in, in so many
    processes. A word that is a Path is shown from there, too."""
    start = torchrun(processes) if processes > 1 else python()
    shown = [nearby(word) if isinstance(word, Path) else str(word) for word in words]
    return " ".join([start, *map(quote, [nearby(ROOT / script), *shown])])


# --- streams


class Stream(io.FileIO):
    """Standard output or error. What cannot be written is dropped, or is an error if `strict`."""

    failed = None  # the first OSError of a write
    strict = False

    def write(self, data):
        try:
            return super().write(data) or len(data)  # None: a pipe that does not block is full
        except OSError as error:
            self.failed = self.failed or error
            if self.strict:
                self.strict = False  # what is left in the buffer is dropped
                raise
            return len(data)


def open_streams(strict):
    """Replace sys.stdout and sys.stderr by streams that fail no program: characters that their
    encoding lacks become "?", and text that a full disk or a closed terminal refuses is dropped.

    strict: standard output is what the command is for, so that a failed write there raises OSError.
    """
    for number, name in (1, "stdout"), (2, "stderr"):
        old = getattr(sys, name)
        raw = Stream(number, "wb", closefd=False)
        raw.strict = strict and number == 1
        encoding = getattr(old, "encoding", None) or "utf-8"
        lines = number == 2 or raw.isatty()
        unbuffered = getattr(old, "write_through", False)  # python -u, as torchrun starts us
        buffer = io.BufferedWriter(raw)
        new = io.TextIOWrapper(buffer, encoding, "replace", None, lines, unbuffered)
        setattr(sys, name, new)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    sys.stdin.reconfigure(errors="replace", newline="\n")


def warn(text):
    """Print a warning to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def progress(total, description, **kwargs):
    """A tqdm bar on a terminal; in a log file, a line every 30 seconds."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(total=total, desc=description, dynamic_ncols=True, **kwargs)
    lines = dict(file=Lines(), mininterval=30, miniters=1, delay=30, position=0, ncols=100)
    return tqdm(total=total, desc=description, **lines, **kwargs)


class Lines:
    """Standard error for tqdm where it is no terminal: a line instead of a carriage return."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        sys.stderr.flush()


# --- signals


def end_at_once(number, frame):
    """What Ctrl-C does while a script imports: there is nothing to save yet."""
    os.write(2, b"interrupted\n")
    os._exit(1)


def watch_signals(pipe, quiet):
    """Answer signals as they come, while the program may be inside a long call: say at the first
    that the run stops, and end the process at a second Ctrl-C. Ends when the pipe is closed."""
    began = None
    while number := os.read(pipe, 1):
        now, again = time.monotonic(), number[0] == signal.SIGINT
        if began is None:
            began = now
            text = "\nstopping after this step; Ctrl-C again ends at once\n"
        elif again and now - began > 1:  # torchrun sends the first Ctrl-C a second time
            text = "\nended at once; the last checkpoint is whole\n"
        else:
            continue
        if not quiet:
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
        if now > began:
            os._exit(1)


@contextlib.contextmanager
def stop_signals(quiet=False):
    """A list that is empty until SIGINT, SIGTERM or SIGHUP comes; whoever works looks at it between
    two steps. SIGHUP stays ignored where it was (nohup). Puts the old handlers back when left."""
    seen, old = [], {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            old[number] = signal.signal(number, lambda number, frame: seen.append(number))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch_signals, args=(reading, quiet), daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in old.items():
            signal.signal(number, handler)
        os.close(writing)
        watcher.join()
        os.close(reading)


# --- the end of a program


def is_first_rank_to_say():
    """Whether no other rank of this machine has printed the error yet. torchrun ends the others as
    soon as one of them has failed, and so the first one speaks, whichever it is."""
    if "MASTER_PORT" not in os.environ or "torch" not in sys.modules:
        return True
    from torch.distributed import TCPStore

    key = "/".join(
        os.environ.get(name, "0") for name in ("GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")
    )
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=2))
        return store.add(f"error/{key}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # nobody listens there
        return True


def run(main, strict=False):
    """Call main() and end the process: 0 done, 2 the user's mistake, 1 anything else (Ctrl-C and
    standard output that is closed too). strict: see open_streams()."""
    open_streams(strict)
    if signal.getsignal(signal.SIGINT) == end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        if is_first_rank_to_say():
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 1
    except OSError:
        failed = sys.stdout.buffer.raw.failed
        if failed is None:
            raise
        if failed.errno != errno.EPIPE:  # `| head` took what it wanted
            print(f"error: cannot write to standard output: {failed.strerror}", file=sys.stderr)
        code = 1
    sys.exit(code)


for number in (0, 1, 2):  # or a closed stream's number would be the next file's
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)
program = Path(sys.argv[0]).resolve()
if program.is_file() and program.parent == ROOT:  # one of our scripts, and not a test of it
    if not hasattr(os, "sysconf"):
        print(
            "error: this program runs on Linux and macOS; on Windows, run it in WSL",
            file=sys.stderr,
        )
        sys.exit(2)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
