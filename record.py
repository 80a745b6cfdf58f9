"""What a run writes into its folder while it goes, and reads back when it goes on: checkpoints, metrics, the notebook's
entry.

out/<name>/last.pt holds all that a restart needs, prev.pt is the one before, best.pt the weights that evaluated best.
They hold tensors, dicts, lists, strings and numbers only: loading one executes nothing.
"""

from lab.console import UserError, python, warn

import dataclasses
import errno
import json
import math
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field

import torch

from data import load_tokenizer
from model import load_checkpoint
from optimizer import warmup_of
from report import perplexity, read_json, read_metrics, write_entry, write_text
from sample import end_of_text, generate, prompt_ids, until_end

SAMPLE_TOKENS = 60  # of each prompt's continuation

# Settings that may differ between a checkpoint and the run that goes on from it: they extend it or steer the machine,
# and leave the experiment what it is. All others must be the same.
FREE = {
    "data_dir", "out_dir", "micro_batch_size", "epochs", "max_steps", "max_hours", "patience", "eval_interval",
    "save_interval", "save_minutes", "log_interval", "device", "dtype", "compile", "rank_timeout", "resume", "dry_run",
    "expected_ppl", "recorded_ppl", "eval_only", "split", "eval_stride", "sample_prompts", "tensorboard",
}
NEEDED_TO_RESUME = ("optimizers", "scaler", "state", "config", "data")


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


def load_newest(out_dir):
    """(checkpoint, path, warning) of the newest whole checkpoint in out_dir that a run can go on from.

    All None where there is none. A damaged last.pt is put aside and the one before it taken, and the warning says
    what that costs. Raises UserError if there are checkpoints and none is whole.
    """
    last, damaged, warning = f"{out_dir}/last.pt", [], None
    part = f"{last}.part"  # killed between two renames, a save leaves last.pt's successor whole under this name
    for path in (last, part, f"{out_dir}/prev.pt"):
        if not os.path.lexists(path):
            continue
        try:
            checkpoint = load_checkpoint(path, NEEDED_TO_RESUME)
        except UserError:
            damaged.append(path)
            continue
        if last in damaged:
            os.replace(last, f"{last}.damaged")  # or the next save would make it prev.pt
            lost = max(0, last_step(f"{out_dir}/metrics.jsonl") - checkpoint["step"])
            warning = (f"{last} is damaged and now {last}.damaged; going back to {path}, which costs {lost:,} of the "
                       "steps in metrics.jsonl")
        if path == part:  # or the next save would begin by emptying it
            os.replace(part, last)
            path = last
        return checkpoint, path, warning
    if last in damaged or f"{out_dir}/prev.pt" in damaged:
        raise UserError(f"{' and '.join(damaged)} are no whole checkpoints of this program; bring one back from a "
                        "copy, or begin anew with another --out_dir")
    return None, None, None


def last_step(path):
    """The highest step in a metrics.jsonl, 0 without one."""
    return max((line["step"] for line in read_metrics(path)), default=0)


def mean(total, count):
    """total / count; of nothing, not a number."""
    return total / count if count else math.nan


def keep_metrics(path, state):
    """Drop the lines of metrics.jsonl that a resumed run will write again: those past its checkpoint."""
    if os.path.exists(path):
        kept = [values for values in read_metrics(path)
                if values["step"] <= (state.evaluated_step if "val_loss" in values else state.step)]
        write_text(path, "".join(json.dumps(values) + "\n" for values in kept))


def differences(config, checkpoint, data):
    """What makes a checkpoint another experiment than this config and these token files, as a phrase; "" if nothing."""
    old, new = checkpoint["config"], settings_of(config)
    changed = [f"{k} was {old[k]!r}, now {new[k]!r}" for k in sorted(old)
               if k not in FREE and k in new and old[k] != new[k]]
    changed += [f"its {split} split was another (SHA-256)" for split in data
                if data[split] != checkpoint["data"][split]]
    return "; ".join(changed)


def refuse_taken(config, data, again):
    """Raise UserError if out_dir holds a run, with what goes on from there: the run itself, or another folder."""
    out, names = config.out_dir, ("last.pt", "prev.pt", "best.pt", "metrics.jsonl")
    if not any(os.path.exists(f"{out}/{name}") for name in names):
        return
    try:
        changed = differences(config, load_checkpoint(f"{out}/last.pt", NEEDED_TO_RESUME), data)
    except UserError:
        changed = ""  # --resume says what is damaged
    if changed:
        raise UserError(f"{out} holds another experiment: {changed}; choose another --out_dir for this one")
    raise UserError(f"{out} holds a run already; `{again}` continues it, --out_dir DIR makes another")


def find_run(config, data, machine, lock, again):
    """(checkpoint, whether its last figures are written): what this run goes on from, (None, False) for a new run.
    From here on this process owns out_dir.

    data: {split: SHA-256}. Raises UserError.
    """
    out, restarted = config.out_dir, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    mend = "wait for it, or choose another --out_dir"
    try:
        os.makedirs(out, exist_ok=True)
        # after a restart the dead rank may still be on its way out
        lock.take(f"{out}/.lock", out, mend, seconds=10 if restarted else 0)
        if not (config.resume or restarted):
            refuse_taken(config, data, again)
        checkpoint, path, warning = load_newest(out)
        if warning:
            warn(warning)
        if checkpoint and (changed := differences(config, checkpoint, data)):
            raise UserError(f"{path} is of another experiment: {changed}; bring that back, or choose another --out_dir")
        keep_metrics(f"{out}/metrics.jsonl", State(**checkpoint["state"]) if checkpoint else State())
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}; mend that, or use another --out_dir") from None
    if checkpoint:
        machine.say(f"going on from {path}, step {checkpoint['step']:,}")
    elif config.resume or restarted:
        machine.say(f"no checkpoint in {out} yet; beginning at step 0")
    return checkpoint, os.path.exists(f"{out}/final.json")


def commit():
    """The commit of this program, with a + where files differ from it; "unknown" outside a clone."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def settings_of(config):
    """The config as a dict of what JSON and a checkpoint can hold."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


class Record:
    """What a run writes into its folder, by rank 0: metrics.jsonl, the checkpoints, and the notebook's entry.

    A disk that is full costs what cannot be written and not the run; what was whole stays whole.
    """

    def __init__(self, config, machine, training, state, meta, data, batches, total_steps):
        self.config, self.machine, self.training, self.state = config, machine, training, state
        self.meta, self.data, self.windows = meta, data, batches.windows
        self.last, self.prev, self.best = (f"{config.out_dir}/{name}.pt" for name in ("last", "prev", "best"))
        self.saved, self.saved_s = (state.step, state.evaluated_step), state.elapsed_s
        self.began_s = time.perf_counter() - state.elapsed_s
        self.board = board(config) if machine.rank == 0 else None
        self.final = f"{config.out_dir}/final.json"
        if machine.rank == 0 and os.path.exists(self.final):  # a run that is extended has not ended yet
            os.remove(self.final)
        self.write("run.json", lambda: self.describe(total_steps))

    def describe(self, total_steps):
        """Write run.json: what the run is."""
        path, model, meta = f"{self.config.out_dir}/run.json", self.training.model, self.meta
        about = dict(
            name=self.config.name, doc=self.config.doc, steps=total_steps,
            config=settings_of(self.config) | {"warmup_steps": warmup_of(self.config, total_steps)},
            step_tokens=self.config.batch_size * self.config.max_seq_len,
            began=read_json(path).get("began") or time.strftime("%Y-%m-%d %H:%M"), commit=commit(),
            machine=f"{self.machine}, {self.machine.device_name()}",
            versions=f"Python {platform.python_version()}, torch {torch.__version__}",
            parameters=model.count(), flops_per_token=model.flops_per_token(), vocab_size=meta["vocab_size"],
            data=dict(source=meta["source"]["name"], tokenizer=meta["tokenizer"], separator=meta["separator"],
                      splits=meta["splits"]),
        )
        write_text(path, json.dumps(about, indent=2) + "\n")

    def finish(self, final):
        """Write the last figures, and the entry for the last time; whether all of the run is on the disk."""
        written = not final or self.write(self.final, lambda: write_text(self.final, json.dumps(final) + "\n"))
        if final:
            self.write("notebook.md", lambda: write_entry(self.config.out_dir))
        return written and self.saved == (self.state.step, self.state.evaluated_step)

    def epoch_at(self, step):
        return step * self.config.batch_size / self.windows

    def last_is(self):
        return f"{self.last} is of step {self.saved[0]:,}" if self.saved[0] else "nothing saved"

    def write(self, what, function):
        """Call function() on rank 0; whether it went through, on rank 0 alone (True elsewhere)."""
        if self.machine.rank > 0:
            return True
        try:
            function()
        except OSError as error:
            warn(f"cannot write {what} ({error.strerror}); the run goes on, {self.last_is()}")
            return False
        return True

    def log(self, **values):
        """Write a line of metrics.jsonl, whole or not at all."""
        step, step_tokens = self.state.step, self.config.batch_size * self.config.max_seq_len
        values = dict(step=step, epoch=self.epoch_at(step), tokens=step * step_tokens, **values,
                      skipped=self.state.skipped, elapsed_s=time.perf_counter() - self.began_s)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

        def append():
            with open(f"{self.config.out_dir}/metrics.jsonl", "ab", buffering=0) as file:
                line = json.dumps(finite).encode() + b"\n"
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.write("metrics.jsonl", append)
        if self.board:
            for name, value in finite.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, step)

    def take(self, losses, norms):
        """Add the last steps' losses to the state, one by one, so that the sums do not depend on when it is done, and
        count the steps that were skipped. Empties both lists."""
        if not losses:
            return
        state, bad = self.state, [not math.isfinite(norm) for norm in torch.stack(norms).tolist()]
        totals = self.machine.total(*torch.stack(losses).tolist(), *bad)
        for loss, skipped in zip(totals[: len(bad)], totals[len(bad) :], strict=True):
            state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
            state.skipped += bool(skipped)
            if math.isfinite(loss):
                state.loss_sum, state.loss_steps = state.loss_sum + loss, state.loss_steps + 1
                state.epoch_loss_sum, state.epoch_loss_steps = state.epoch_loss_sum + loss, state.epoch_loss_steps + 1
        losses.clear(), norms.clear()

    def contents(self, **more):
        """A checkpoint: tensors, dicts, lists, strings and numbers only."""
        model = self.training.model
        return dict(model=model.state_dict(), model_args=model.args, tokenizer=self.meta["tokenizer"],
                    separator=self.meta["separator"], step=self.state.step, config=settings_of(self.config), **more)

    def save(self):
        """Write last.pt, unless it holds this very state; what it held becomes prev.pt."""
        now = self.state.step, self.state.evaluated_step

        def write():
            more = dict(optimizers=[optimizer.state_dict() for optimizer in self.training.optimizers],
                        scaler=self.training.scaler.state_dict(), state=dataclasses.asdict(self.state), data=self.data)
            save_checkpoint(self.contents(**more), self.last, keep=self.prev)

        if now != self.saved and self.write(self.last, write):
            self.saved = now
        self.saved_s = self.state.elapsed_s

    def evaluated(self, figures):
        """Take an evaluation into the state, the best checkpoint, the log and the notebook."""
        state = self.state
        figures = {f"val_{k}": figures[k] for k in ("loss", "stderr", "ppl", "ppl_word", "bits_per_byte")}
        train_loss = mean(state.epoch_loss_sum, state.epoch_loss_steps)
        better = figures["val_loss"] < state.best.get("val_loss", math.inf)
        state.evaluated_step, state.epoch_loss_sum, state.epoch_loss_steps = state.step, 0.0, 0
        state.evaluations_since_best = 0 if better else state.evaluations_since_best + 1
        written = better and self.write(self.best, lambda: save_checkpoint(self.contents(metrics=figures), self.best))
        if better and not self.machine.total(not written)[0]:  # the best is what best.pt holds
            state.best = dict(step=state.step, **figures)
        self.log(train_loss=train_loss, **figures, best=better, **self.samples() if better else {})
        self.machine.say(f"epoch {self.epoch_at(state.step):.4g} | step {state.step:,} | train loss {train_loss:.4f} | "
                         f"val loss {figures['val_loss']:.4f} | val perplexity {perplexity(figures['val_ppl'])}"
                         + (f" | best so far, saved to {self.best}" if written else ""))
        self.write("notebook.md", lambda: write_entry(self.config.out_dir))

    def samples(self):
        """{"samples": [(prompt, continuation), ...]} of sample_prompts, on rank 0; from generators of its own, so that
        looking changes nothing."""
        prompts, model = self.config.sample_prompts, self.training.model
        if self.machine.rank > 0 or not prompts or self.meta["tokenizer"] != "gpt2":
            return {}
        try:
            encoding = load_tokenizer()
        except UserError as error:  # data prepared elsewhere, and no way to tiktoken's files here
            warn(f"no samples for the notebook: {error}")
            return {}
        end = end_of_text(self.meta, encoding)
        ids = [prompt_ids(prompt, encoding, end) for prompt in prompts]
        model.eval()
        steps = [new for new, _ in generate(model, ids, SAMPLE_TOKENS, vocab_size=encoding.n_vocab)]
        model.train()
        rows = [until_end(list(row), end) for row in zip(*steps, strict=True)]
        return {"samples": [[prompt, encoding.decode(row)] for prompt, row in zip(prompts, rows, strict=True)]}


def board(config):
    """TensorBoard's writer if it is asked for and there, else None."""
    if not config.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warn(f"there is no tensorboard here (`{python()} -m pip install tensorboard`); going on without")
        return None
    return SummaryWriter(config.out_dir)
