"""Files: who owns a folder."""

from lab.console import UserError, warn

import fcntl
import os
import socket
import time


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
                    raise UserError(f"{folder} is in use by {owner or 'another process'}; {mend}") from None
                time.sleep(0.05)
                continue
            except OSError as error:
                warn(f"no locks here ({error.strerror}); let no other process write into {folder}")
            self.owned = True

    def sign(self):
        """Write who the owner is into the lock's file."""
        try:
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
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
