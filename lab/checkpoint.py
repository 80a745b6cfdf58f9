"""Checkpoints: written whole, read without executing anything, and the newest one that is whole.

They hold tensors, dicts, lists, strings and numbers only. out/NAME/last.pt is all that a restart
needs, prev.pt the one before, best.pt the weights that evaluated best.
"""

import contextlib
import os
import zipfile

import torch

from lab.console import ROOT, UserError, command
from lab.files import read_lines, write_keeping, write_whole

TO_SAMPLE = {"model", "model_args", "step"}
TO_RESUME = TO_SAMPLE | {"optimizers", "scaler", "state", "config", "data"}


def save(checkpoint, path, kept=None):
    """Write a checkpoint; path is whole at every moment. kept: where the one that was there goes.
    Raises OSError, a full disk's for instance, and then leaves both as they were."""

    def write(file):
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # what torch makes of a write that fails
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    if kept:
        write_keeping(path, write, kept)
    else:
        write_whole(path, write)


def load(path, needed=TO_SAMPLE):
    """A checkpoint's dict with the keys `needed`, its tensors on the CPU. Raises UserError if it is
    not there or not whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch checks no sums
            whole = archive.testzip() is None
        checkpoint = whole and torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        mend = command("train.py", ROOT / "config/demo.py")
        raise UserError(f"there is no checkpoint {path}; `{mend}` makes one") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except Exception:
        # torn, empty, or another program's: there are as many exceptions as ways to be so
        checkpoint = None
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UserError(
            f"{path} is not a whole checkpoint of this version of the program; name another"
        )
    return checkpoint


def shape_of(folder):
    """The model's arguments of a run's newest whole checkpoint, None where there is none. Changes
    nothing there."""
    for name in ("last", "prev"):
        with contextlib.suppress(UserError):
            return load(f"{folder}/{name}.pt", TO_RESUME)["model_args"]
    return None


def newest(folder):
    """(checkpoint, path, warning) of the newest whole checkpoint in a run's folder.

    All None where there is none. A damaged last.pt is put aside and prev.pt taken; the warning says
    what that costs. Raises UserError if there are checkpoints and none is whole.
    """
    last, prev = f"{folder}/last.pt", f"{folder}/prev.pt"
    damaged = []
    for path in (last, prev):
        if not os.path.lexists(path):
            continue
        try:
            checkpoint = load(path, TO_RESUME)
        except UserError:
            damaged.append(path)
            continue
        if not damaged:
            return checkpoint, path, None
        os.replace(last, f"{last}.damaged")  # or the next save would make it prev.pt
        steps = [line["step"] for line in read_lines(f"{folder}/metrics.jsonl")]
        lost = max(0, max(steps, default=0) - checkpoint["step"])
        warning = (
            f"{last} is damaged and now {last}.damaged; going back to {path}, which costs "
            f"{lost:,} of the steps in metrics.jsonl"
        )
        return checkpoint, path, warning
    if damaged:
        raise UserError(
            f"{' and '.join(damaged)} are no whole checkpoints of this version of the program; "
            "bring one back from a copy, or begin anew with another --out_dir"
        )
    return None, None, None
