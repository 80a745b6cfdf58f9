"""Files: written whole, read line by line, and a folder's one owner."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time

from lab.console import UserError, warn


def write_whole(path, write):
    """Call write(file) on a new binary file, bring it to the disk and rename it to `path`, so that
    path is whole at every moment. Raises OSError, a full disk's for instance, and then leaves path
    as it was."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise
    os.replace(part, path)
    sync_folder(path)


def sync_folder(path):
    """Bring the names in a file's folder to the disk, so that they outlive a power cut."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems cannot
        os.fsync(folder)
    os.close(folder)


def write_text(path, text):
    """Write a text file whole, in UTF-8; what is no text in it becomes "?". Raises OSError."""
    write_whole(path, lambda file: file.write(text.encode(errors="replace")))


def write_keeping(path, write, kept):
    """write_whole(), and then `kept` is what was at `path`. Both are whole at every moment, and
    hold two different states from the second write on. Raises OSError."""
    part = f"{kept}.part"
    with contextlib.suppress(FileNotFoundError):
        os.remove(part)  # a killed process's
    if os.path.exists(path):
        link_or_copy(path, part)
    try:
        write_whole(path, write)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise
    if os.path.exists(part):
        os.replace(part, kept)
        sync_folder(kept)


def link_or_copy(path, new):
    """A second name for a file or, where the file system has none, a copy. Raises OSError."""
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)


def read_bytes(path):
    """A file's bytes, b"" without a file. Raises OSError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def read_json(path):
    """A JSON file's dict; {} where there is none or it is torn."""
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def append_json(path, values):
    """Add a dict as a line to a file, one that a kill or a full disk tore before it left apart.
    Raises OSError."""
    line = json.dumps(values).encode() + b"\n"
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_lines(path):
    """The dicts with a step in a file of JSON lines; torn lines are left out. [] without a file."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
    return [v for v in found if isinstance(v, dict) and isinstance(v.get("step"), int)]


class Lock:
    """One process's hold on a folder, by flock on a file that stays there: the kernel frees it when
    the process ends, however it ends. Leaving a `with` frees it too."""

    descriptors = set()  # of all locks of this process; a forked child gives them back

    def __init__(self):
        self.descriptor = None
        self.owned = False

    def take(self, path, folder, mend, seconds=0):
        """Take the lock at `path`, waiting up to so many seconds. Raises UserError, which names
        `folder`, its owner and `mend`, if another process has it; OSError if path is not to be had.
        Where the file system has no locks, a warning, and it counts as taken."""
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.descriptors.add(self.descriptor)
        end = time.monotonic() + seconds
        while not self.owned:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.sign()
            except BlockingIOError:
                if time.monotonic() >= end:
                    owner = os.pread(self.descriptor, 1000, 0).decode(errors="replace").strip()
                    raise UserError(
                        f"{folder} is in use by {owner or 'another process'}; {mend}"
                    ) from None
                time.sleep(0.05)
                continue
            except OSError as error:
                warn(f"no locks here ({error.strerror}); let no other process write into {folder}")
            self.owned = True

    def sign(self):
        """Write who the owner is into the lock's file."""
        try:
            os.ftruncate(self.descriptor, 0)
            os.pwrite(
                self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0
            )
        except OSError:
            pass  # a full disk: the lock holds without its owner's name

    def release(self):
        if self.descriptor is not None:
            self.descriptors.discard(self.descriptor)
            os.close(self.descriptor)
        self.descriptor, self.owned = None, False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()


def give_back():
    """Close the locks that a forked child has inherited, so that they end with their owner."""
    for descriptor in Lock.descriptors:
        os.close(descriptor)


os.register_at_fork(after_in_child=give_back)
