"""A run's folder: what the run writes there, by rank 0, and what it goes on from.

out/NAME/last.pt is all that a restart needs, prev.pt the checkpoint before, best.pt the weights
that evaluated best. Reading one executes nothing. torch is imported where a checkpoint is read or
written, since report.py does without.
"""

import contextlib
import glob
import json
import os
import platform
import shlex
import socket
import time
import zipfile
from importlib.metadata import version

from lab.console import ROOT, UserError, first_line, warn

# --- files that are whole at every moment


def write_whole(path, write, kept=None):
    """Call write(file) on a new binary file, bring it to the disk and rename it to `path`, so that
    path is whole at every moment. kept: the path that the old file is moved to first. Raises
    OSError, a full disk's for instance, and then leaves both as they were."""
    # Two processes may write one entry or picture. Only the run itself writes a checkpoint, where
    # the next save takes the place of what a kill has left.
    own = "" if str(path).endswith(".pt") else f".{os.getpid()}"
    part = f"{path}{own}.part"
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise
    if kept and os.path.exists(path):
        os.replace(path, kept)
    os.replace(part, path)


def write_text(path, text):
    """Write a text file whole, in UTF-8; what is no text in it becomes "?". Raises OSError."""
    write_whole(path, lambda file: file.write(text.encode(errors="replace")))


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
        values = json.loads(read_bytes(path))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def read_lines(path):
    """The dicts of a file of JSON lines; [] without a file. A line that a kill has torn is left
    out."""
    values = []
    for line in read_bytes(path).splitlines():
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return [line for line in values if isinstance(line, dict)]


def folders_with(file, tops):
    """The folders in and below some that hold a file; links are followed, each is taken once."""
    patterns = [f"{glob.escape(str(top))}/**/{file}" for top in tops]
    paths = [path for pattern in patterns for path in glob.glob(pattern, recursive=True)]
    paths.sort(key=len, reverse=True)  # of several paths to a folder, the shortest
    found = {os.path.realpath(path): os.path.dirname(path) for path in paths}
    return sorted(found.values())


def take_lock(path, folder, fix):
    """An open file that holds the lock at `path`: by flock, which ends as the file is closed or the
    process ends, however it ends. Raises UserError, which names `folder`, its owner and `fix`, if
    another process has it; OSError if path is not to be had or its file system has no locks."""
    import fcntl  # not at the top: Windows has none, and console.run() says so

    file = open(path, "a+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().decode().strip() or "another process"
        raise UserError(f"{folder} is in use by {owner}; {fix}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


# --- checkpoints


def save_checkpoint(checkpoint, path, kept=None):
    """Write a checkpoint, a dict, as write_whole() does; but torch makes a RuntimeError of a write
    that fails. Between its two renames the new one has a name that newest_checkpoint() knows."""
    import torch

    write_whole(path, lambda file: torch.save(checkpoint, file), kept)


def load_checkpoint(path):
    """A checkpoint's dict, its tensors on the CPU. Raises UserError if its checksums or its
    format are wrong; OSError; where memory is too small, as torch does."""
    import torch

    checkpoint = None
    try:
        with zipfile.ZipFile(path) as archive:
            is_whole = archive.testzip() is None  # torch checks no checksums
        if is_whole:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torn or another program's: torch raises many kinds
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
    if not isinstance(checkpoint, dict) or "model_args" not in checkpoint:
        raise UserError(
            f"{path} is not a valid checkpoint of this program; bring it back from a copy, or use "
            "another"
        )
    return checkpoint


def is_out_of_memory(error):
    """Whether an exception says that memory is full; torch's allocators raise RuntimeError."""
    words = "out of memory", "allocate memory", "alloc_cpu"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def newest_checkpoint(folder):
    """(checkpoint, path) of the newest valid checkpoint in a run's folder, (None, None) where there
    is none. A damaged last.pt is put aside, with a warning, and prev.pt taken. Raises UserError if
    there are checkpoints and none is valid; OSError."""
    last, prev, part = (f"{folder}/{name}" for name in ("last.pt", "prev.pt", "last.pt.part"))
    if os.path.exists(prev) and os.path.exists(part) and not os.path.exists(last):
        os.replace(part, last)  # a save was killed between its two renames
    for path in filter(os.path.exists, (last, prev)):
        try:
            return load_checkpoint(path), path
        except UserError:
            if path == prev or not os.path.exists(prev):
                raise
            os.replace(last, f"{last}.damaged")  # or the next save would make it prev.pt
            warn(f"{last} is damaged and now {last}.damaged; going back to {prev}")
    return None, None


def metadata_of(folder):
    """run.json of a run that has a checkpoint to go on from, a dict; else {}."""
    has_one = any(os.path.exists(f"{folder}/{name}.pt") for name in ("last", "prev"))
    return read_json(f"{folder}/run.json") if has_one else {}


# --- the folder of one run


class Folder:
    """The folder of one run. Rank 0 writes; on the other ranks the same methods do nothing. What
    cannot be written costs one warning and not the run. locks: an ExitStack, which frees it."""

    def __init__(self, path, machine, locks):
        self.path, self.machine, self.locks = path, machine, locks
        self.last, self.prev, self.best = (f"{path}/{name}.pt" for name in ("last", "prev", "best"))
        self.final, self.metrics = f"{path}/final.json", f"{path}/metrics.jsonl"
        self.saved = 0, 0  # the step, and the last evaluation's step, that last.pt holds

    def open(self, config, hashes, resume_command):
        """Own the folder, on rank 0. Returns (the checkpoint to go on from or None, whether the
        run's last figures are written). hashes: {split: SHA-256}. Raises UserError, OSError."""
        os.makedirs(self.path, exist_ok=True)
        fix = "wait for it, or choose another --out_dir"
        self.locks.enter_context(take_lock(f"{self.path}/.lock", self.path, fix))
        taken = any(map(os.path.exists, (self.last, self.prev, self.best, self.metrics)))
        if taken and not config.resume:
            old = read_json(f"{self.path}/run.json").get("config", {})
            same = f"resume with: {resume_command}, or " * (not config.differences(old))
            raise UserError(
                f"{self.path} holds a run already; {same}begin another with --out_dir DIR"
            )
        checkpoint, path = newest_checkpoint(self.path)
        finished = bool(read_json(self.final))
        weights = path or self.best
        if "state" not in (checkpoint or {}) and (checkpoint or finished):
            raise UserError(
                f"{weights} holds weights alone, and no checkpoint to go on from is beside it; "
                f"begin another run with --init_from {shlex.quote(weights)} --out_dir DIR"
            )
        if checkpoint:
            changed = config.differences(checkpoint["config"])
            for split in hashes:
                if hashes[split] != checkpoint["data"][split]:
                    changed.append(f"its {split} split was another (SHA-256)")
            if changed:
                raise UserError(
                    f"{path} is of another experiment: {'; '.join(changed)}; bring that back, or "
                    "choose another --out_dir"
                )
            self.machine.say(f"going on from {path}, step {checkpoint['step']:,}")
        elif config.resume:
            self.machine.say(f"no checkpoint in {self.path} yet; beginning at step 0")
        if taken:
            self.keep_metrics(checkpoint["state"] if checkpoint else {})
        return checkpoint, finished

    def keep_metrics(self, state):
        """Drop the lines of metrics.jsonl that a resumed run will write again, those past its
        checkpoint, and torn ones."""
        text = ""
        for line in read_lines(self.metrics):
            if line["step"] <= state.get("evaluated_step" if "val_loss" in line else "step", 0):
                text += json.dumps(line) + "\n"
        write_text(self.metrics, text)

    # --- what the run writes

    def begin(self, state, metadata):
        """Write run.json, on rank 0; from here on the run has not ended. Raises OSError."""
        self.saved = state.step, state.evaluated_step
        machine, path = self.machine, f"{self.path}/run.json"
        metadata |= dict(
            began=read_json(path).get("began") or time.strftime("%Y-%m-%d %H:%M:%S"),
            commit=commit(),
            machine=f"{machine}, {machine.device_name()}",
            versions=f"Python {platform.python_version()}, torch {version('torch')}",
        )
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.final)
        write_text(path, json.dumps(metadata, indent=2) + "\n")

    def write(self, what, function, *args):
        """Call function(*args) on rank 0. Returns whether it succeeded; True on other ranks."""
        if self.machine.rank > 0:
            return True
        try:
            function(*args)
        except (OSError, RuntimeError) as error:  # see save_checkpoint()
            why = first_line(error.__context__ or error)
            warn(f"cannot write {what} ({why}); the run goes on, {self.last_is()}")
            return False
        return True

    def last_is(self):
        """What last.pt holds, as a phrase."""
        return f"{self.last} holds step {self.saved[0]:,}" if self.saved[0] else "nothing is saved"

    def log(self, state, **values):
        """Write a line of metrics.jsonl. What is not finite is null there."""
        tokens = state.step * state.batches.step_tokens
        line = dict(step=state.step, epoch=state.epoch, tokens=tokens, **values)
        line |= dict(skipped=state.skipped, elapsed_s=state.clock())
        line = json.loads(json.dumps(line), parse_constant=lambda nan: None)  # JSON has no nan

        def append():
            with open(self.metrics, "a") as file:
                file.write(json.dumps(line) + "\n")

        self.write("metrics.jsonl", append)

    def save(self, state, checkpoint):
        """Write last.pt, unless it holds this very state; what it held becomes prev.pt."""
        now = state.step, state.evaluated_step
        paths = self.last, self.prev
        if now != self.saved and self.write(self.last, save_checkpoint, checkpoint, *paths):
            self.saved = now

    def save_best(self, checkpoint):
        """Write best.pt; whether it went through, the same on every rank."""
        written = self.write(self.best, save_checkpoint, checkpoint, self.best)
        return not self.machine.reduce(not written)[0]

    def finish(self, state, final):
        """Write the last figures, a dict, empty if no best.pt could be written; only where last.pt
        holds the end. Returns whether all of the run is on the disk; then prev.pt goes."""
        text = json.dumps(final) + "\n"
        saved = final and self.saved == (state.step, state.evaluated_step)
        whole = saved and self.write(self.final, write_text, self.final, text)
        if whole and self.machine.rank == 0:
            with contextlib.suppress(OSError):
                os.remove(self.prev)
        return whole


def commit():
    """This program's commit, with a + where files differ from it; "unknown" outside a clone."""
    git = f"git -C {shlex.quote(str(ROOT))} describe --always --dirty=+ --exclude='*' 2> /dev/null"
    return os.popen(git).read().strip() or "unknown"
