"""A run's folder: what the run writes there, by rank 0, and what it goes on from."""

import json
import math
import os
import platform
import subprocess
import time

import torch

from lab import checkpoint, files
from lab.console import UserError, python, warn
from lab.notebook import write_entry
from lab.optimizer import warmup_of


class Folder:
    """The folder of one run, and its owner's hold on it.

    Rank 0 writes; the other ranks call the same methods, which do nothing there. A full disk costs
    what cannot be written and not the run: what was whole stays whole.
    """

    def __init__(self, path, machine):
        self.path, self.machine = path, machine
        self.last, self.prev, self.best = (f"{path}/{name}.pt" for name in ("last", "prev", "best"))
        self.final, self.metrics = f"{path}/final.json", f"{path}/metrics.jsonl"
        self.saved = 0, 0  # the step, and the last evaluation's step, that last.pt holds
        self.lock, self.board = files.Lock(), None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.lock.release()

    # --- what a run goes on from

    def open(self, config, data, again):
        """Own the folder, on rank 0, and find what the run goes on from.

        data: {split: SHA-256}. again: the command that resumes. Returns (a checkpoint or None,
        whether its last figures are written). Raises UserError.
        """
        goes_on = config.resume or restarted()
        try:
            os.makedirs(self.path, exist_ok=True)
            # after a restart the dead rank may still be on its way out
            mend, seconds = "wait for it, or choose another --out_dir", 10 if restarted() else 0
            self.lock.take(f"{self.path}/.lock", self.path, mend, seconds)
            if not goes_on:
                self.refuse_taken(config, data, again)
            found, path, warning = checkpoint.newest(self.path)
            if warning:
                warn(warning)
            if found and (changed := differences(config, data, found)):
                raise UserError(
                    f"{path} is of another experiment: {changed}; bring that back, or choose "
                    "another --out_dir"
                )
            self.keep_metrics(found["state"] if found else dict(step=0, evaluated_step=0))
        except OSError as error:
            raise UserError(
                f"cannot write into {self.path}: {error.strerror}; mend that, or use another "
                "--out_dir"
            ) from None
        if found:
            self.machine.say(f"going on from {path}, step {found['step']:,}")
        elif goes_on:
            self.machine.say(f"no checkpoint in {self.path} yet; beginning at step 0")
        return found, os.path.exists(self.final)

    def refuse_taken(self, config, data, again):
        """Raise UserError if the folder holds a run, with what goes on from there: the run itself,
        or another folder."""
        if not any(map(os.path.exists, (self.last, self.prev, self.best, self.metrics))):
            return
        try:
            changed = differences(config, data, checkpoint.load(self.last, checkpoint.TO_RESUME))
        except UserError:
            changed = ""  # --resume says what is damaged
        if changed:
            raise UserError(
                f"{self.path} holds another experiment: {changed}; choose another --out_dir for "
                "this one"
            )
        raise UserError(
            f"{self.path} holds a run already; `{again}` continues it, --out_dir DIR makes another"
        )

    def keep_metrics(self, state):
        """Drop the lines of metrics.jsonl that a resumed run will write again, those past its
        checkpoint, and torn ones."""
        if not os.path.exists(self.metrics):
            return
        kept = []
        for line in files.read_lines(self.metrics):
            reached = state["evaluated_step" if "val_loss" in line else "step"]
            if line["step"] <= reached:
                kept.append(json.dumps(line) + "\n")
        with open(self.metrics, encoding="utf-8", errors="replace") as file:
            changed = file.read() != "".join(kept)
        if changed:
            files.write_text(self.metrics, "".join(kept))

    # --- what it writes

    def begin(self, state, about, tensorboard):
        """Write run.json, from the dict `about`; from here on the run has not ended."""
        self.saved = state.step, state.evaluated_step
        if self.machine.rank > 0:
            return
        self.board = board(self.path) if tensorboard else None
        if os.path.exists(self.final):
            os.remove(self.final)
        path = f"{self.path}/run.json"
        began = files.read_json(path).get("began") or time.strftime("%Y-%m-%d %H:%M:%S")
        machine = f"{self.machine}, {self.machine.device_name()}"
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        about |= dict(began=began, commit=commit(), machine=machine, versions=versions)
        text = json.dumps(about, indent=2) + "\n"
        self.write("run.json", lambda: files.write_text(path, text))

    def write(self, what, function):
        """Call function() on rank 0; whether it went through, on rank 0 alone (True elsewhere)."""
        if self.machine.rank > 0:
            return True
        try:
            function()
        except OSError as error:
            why = error.strerror or error
            warn(f"cannot write {what} ({why}); the run goes on, {self.last_is()}")
            return False
        return True

    def last_is(self):
        """What last.pt holds, as a phrase."""
        return f"{self.last} is of step {self.saved[0]:,}" if self.saved[0] else "nothing saved"

    def log(self, state, **values):
        """Write a line of metrics.jsonl, whole or not at all."""
        line = dict(step=state.step, epoch=state.epoch, tokens=state.tokens, **values)
        line |= dict(skipped=state.skipped, elapsed_s=state.clock())
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None
            elif self.board and isinstance(value, float):
                self.board.add_scalar(name, value, state.step)
        self.write("metrics.jsonl", lambda: files.append_json(self.metrics, line))

    def save(self, state, contents):
        """Write last.pt, unless it holds this very state; what it held becomes prev.pt. contents():
        the checkpoint's dict."""
        now = state.step, state.evaluated_step
        if now != self.saved:
            write = self.write(
                self.last, lambda: checkpoint.save(contents(), self.last, kept=self.prev)
            )
            self.saved = now if write else self.saved

    def save_best(self, contents):
        """Write best.pt; whether it went through, the same on every rank."""
        written = self.write(self.best, lambda: checkpoint.save(contents(), self.best))
        return not self.machine.reduce(not written)[0]

    def write_entry(self):
        """Write notebook.md and curve.png anew."""
        self.write("notebook.md", lambda: write_entry(self.path))

    def finish(self, state, final):
        """Write the last figures and the entry for the last time. Returns whether all of the run is
        on the disk."""
        text = json.dumps(final) + "\n"
        written = not final or self.write(self.final, lambda: files.write_text(self.final, text))
        if final:
            self.write_entry()
        return written and self.saved == (state.step, state.evaluated_step)


def restarted():
    """Whether torchrun started this process again, since a rank had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def describe(config, dataset, model, batches, total_steps):
    """What the run is, for run.json."""
    warmup = warmup_of(config, total_steps)
    return dict(
        name=config.name,
        doc=config.doc,
        config=config.plain() | {"warmup_steps": warmup},
        steps=total_steps,
        step_tokens=batches.step_tokens,
        parameters=model.count(),
        flops_per_token=model.flops_per_token(),
        vocab_size=dataset.vocab_size,
        data=dict(
            source=dataset.source["name"],
            tokenizer=dataset.tokenizer,
            separator=dataset.separator,
            splits={split: vars(counts) for split, counts in dataset.counts.items()},
        ),
    )


def differences(config, data, found):
    """What makes a checkpoint another experiment than this config and these token files, as a
    phrase; "" if nothing."""
    changed = config.differences(found["config"])
    changed += [
        f"its {split} split was another (SHA-256)"
        for split in data
        if data[split] != found["data"][split]
    ]
    return "; ".join(changed)


def commit():
    """This program's commit, with a + where files differ from it; "unknown" outside a clone."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    git = ["git", "-C", root, "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip() or "unknown"


def board(folder):
    """TensorBoard's writer, None with a line where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        install = f"{python()} -m pip install tensorboard"
        warn(f"there is no tensorboard here (`{install}`); going on without")
        return None
    return SummaryWriter(folder)
