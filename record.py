"""What a run writes into its folder while it goes: metrics, checkpoints, the notebook's entry."""

import dataclasses
import errno
import json
import math
import os
import platform
import subprocess
import sys
import time

import torch

from checkpoint import save_checkpoint
from data import load_tokenizer
from report import read_json, read_metrics, write_entry
from sample import generate

SAMPLE_TOKENS = 60  # of each prompt's continuation


def mean(total, count):
    """total / count; of nothing, not a number."""
    return total / count if count else math.nan


def keep_metrics(path, state):
    """Drop the lines of metrics.jsonl that a resumed run will write again: those past its checkpoint."""
    if os.path.exists(path):
        lines = read_metrics(path)
        with open(path + ".part", "w", encoding="utf-8") as file:
            for values in lines:
                if values["step"] <= (state.evaluated_step if "val_loss" in values else state.step):
                    file.write(json.dumps(values) + "\n")
        os.replace(path + ".part", path)


def commit():
    """The commit of this program, with a + where files differ from it; "unknown" outside a clone."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


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
            name=self.config.name, doc=self.config.doc, config=self.settings(), steps=total_steps,
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
            self.machine.say(f"warning: cannot write {what} ({error.strerror}); the run goes on, {self.last_is()}",
                             file=sys.stderr)
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
                    step=self.state.step, config=self.settings(), **more)

    def settings(self):
        """The config as a dict of what JSON and a checkpoint can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.config).items()}

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
                         f"val loss {figures['val_loss']:.4f} | val perplexity {figures['val_ppl']:.2f}"
                         + (f" | best so far, saved to {self.best}" if written else ""))
        if os.path.exists(f"{self.config.out_dir}/run.json"):
            self.write("notebook.md", lambda: write_entry(self.config.out_dir))

    def samples(self):
        """{"samples": [(prompt, continuation), ...]} of sample_prompts, on rank 0; from generators of its own, so that
        looking changes nothing."""
        prompts, model = self.config.sample_prompts, self.training.model
        if self.machine.rank > 0 or not prompts or self.meta["tokenizer"] != "gpt2":
            return {}
        encoding = load_tokenizer()
        ids = [encoding.encode_ordinary(prompt) or encoding.encode_ordinary("\n") for prompt in prompts]
        model.eval()
        steps = [new for new, _ in generate(model, ids, SAMPLE_TOKENS, vocab_size=encoding.n_vocab)]
        model.train()
        return {"samples": [[prompt, encoding.decode([new[i] for new in steps])] for i, prompt in enumerate(prompts)]}


def board(config):
    """TensorBoard's writer if it is asked for and there, else None."""
    if not config.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("warning: there is no tensorboard here (`pip install tensorboard`); going on without", file=sys.stderr)
        return None
    return SummaryWriter(config.out_dir)


def write_text(path, text):
    """Write a small file whole or not at all."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.part", path)
