"""What survives a restart: a run's state and its checkpoints.

out/<name>/last.pt holds all that a restart needs, prev.pt is the one before, best.pt the weights that evaluated best.
They hold tensors, dicts, lists, strings and numbers only: loading one executes nothing.
"""

import os
import zipfile
from dataclasses import dataclass, field

import torch

from config import UserError
from model import LanguageModel
from report import read_metrics

# Settings that may differ between a checkpoint and the run that goes on from it: they extend it or steer the machine,
# and leave the experiment what it is. All others must be the same.
FREE = {
    "data_dir", "out_dir", "micro_batch_size", "epochs", "max_steps", "max_hours", "patience", "eval_interval",
    "save_interval", "save_minutes", "log_interval", "device", "dtype", "compile", "rank_timeout", "resume", "dry_run",
    "expected_ppl", "recorded_ppl", "eval_only", "split", "eval_stride", "sample_prompts", "tensorboard",
}
NEEDED = {"model", "model_args", "step"}  # by sampling
NEEDED_TO_RESUME = NEEDED | {"optimizers", "scaler", "state", "config", "data"}


@dataclass
class State:
    """All of a run that must survive a restart beside the weights, the optimizers and the scaler."""

    step: int = 0  # optimizer steps done
    elapsed_s: float = 0.0  # over all restarts
    loss_sum: float = 0.0  # of the training loss, since the last line of metrics.jsonl
    loss_steps: int = 0
    epoch_loss_sum: float = 0.0  # since the last evaluation
    epoch_loss_steps: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    evaluated_step: int = 0  # the last evaluation's
    best: dict = field(default_factory=dict)  # the best evaluation's figures, and its step
    evaluations_since_best: int = 0


def differences(old, new):
    """The settings in which a checkpoint's config (a dict) differs from this run's and must not, as phrases."""
    changed = [k for k in sorted(old) if k not in FREE and k in new and old[k] != new[k]]
    return [f"{k} was {old[k]!r}, now {new[k]!r}" for k in changed]


def save_checkpoint(checkpoint, path, keep=None):
    """Write a checkpoint under a temporary name, fsync it and rename it: path is whole at every moment.

    keep: a path that what was at path is renamed to. Raises OSError, a full disk's for instance, and then leaves both
    as they were.
    """
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:  # torch.save makes a RuntimeError of a write that fails
        if os.path.exists(part):
            os.remove(part)
        if isinstance(error, OSError) or not isinstance(error.__context__, OSError):
            raise
        raise error.__context__ from None
    if keep and os.path.exists(path):
        os.replace(path, keep)
    os.replace(part, path)
    if hasattr(os, "O_DIRECTORY"):  # so that the new names outlive a power cut
        folder = os.open(os.path.dirname(path) or ".", os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def load_checkpoint(path, needed=NEEDED):
    """A checkpoint's dict, its tensors on the CPU. Executes nothing from the file. Raises UserError if it is not there
    or not whole: torch checks no sums, so that the zip's own are checked before."""
    try:
        with zipfile.ZipFile(path) as archive:
            checkpoint = archive.testzip() is None and torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; `python train.py config/demo.py` makes one") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except Exception:
        checkpoint = None  # torn, empty, or another program's: there are as many exceptions as ways to be so
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UserError(f"{path} is not a whole checkpoint of this program; remove it, or name another")
    return checkpoint


def load_newest(out_dir):
    """(checkpoint, path, warning) of the newest whole checkpoint in out_dir that a run can go on from.

    All None where there is none. A damaged last.pt is put aside and the one before it taken, and the warning says
    what that costs. Raises UserError if there are checkpoints and none is whole.
    """
    last, damaged = f"{out_dir}/last.pt", []
    # killed between two renames, a save leaves last.pt's successor whole under its temporary name
    for path in (last, f"{last}.part", f"{out_dir}/prev.pt"):
        if not os.path.lexists(path):
            continue
        try:
            checkpoint = load_checkpoint(path, NEEDED_TO_RESUME)
        except UserError:
            damaged.append(path)
            continue
        if last not in damaged:
            return checkpoint, path, None
        os.replace(last, f"{last}.damaged")  # or the next save would make it prev.pt
        lost = max(0, last_step(f"{out_dir}/metrics.jsonl") - checkpoint["step"])
        return checkpoint, path, (f"{last} is damaged and now {last}.damaged; going back to {path}, which costs "
                                  f"{lost:,} of the steps in metrics.jsonl")
    if last in damaged or f"{out_dir}/prev.pt" in damaged:
        raise UserError(f"{' and '.join(damaged)} are no whole checkpoints of this program; bring one back from a "
                        "copy, or begin anew with another --out_dir")
    return None, None, None


def last_step(path):
    """The highest step in a metrics.jsonl, 0 without one."""
    return max((line["step"] for line in read_metrics(path)), default=0)


def load_model(path):
    """(LanguageModel in eval mode on the CPU, the checkpoint's dict without its weights). Raises UserError."""
    checkpoint = load_checkpoint(path)
    try:
        with torch.device("meta"):  # nothing to initialise
            model = LanguageModel(**checkpoint["model_args"])
        model.load_state_dict(checkpoint.pop("model"), assign=True)
    except (TypeError, RuntimeError, AttributeError):
        raise UserError(f"{path} holds another model than this program's; name another checkpoint") from None
    return model.eval(), checkpoint
