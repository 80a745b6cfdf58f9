"""How far a run is: what is due, and why it is over."""

import math
import time

import torch


class State:
    """All of a run that must survive a restart beside weights, optimizers and scaler, and what
    follows from it. It is the same on every rank, so that all of them take the same way."""

    def __init__(self, config, batches, total_steps):
        self.config, self.batches, self.total_steps = config, batches, total_steps
        self.step = 0  # optimizer steps done
        self.elapsed_s = 0.0  # over all restarts
        self.loss_sum = 0.0  # of the training loss, since the last line of metrics.jsonl
        self.loss_steps = 0
        self.epoch_loss_sum = 0.0  # since the last evaluation
        self.epoch_loss_steps = 0
        self.skipped = 0  # steps whose loss or gradient was not finite
        self.skipped_in_a_row = 0
        self.evaluated_step = 0  # the last evaluation's
        self.best = {}  # the best evaluation's figures, and its step
        self.evaluations_since_best = 0
        # what no checkpoint holds
        self.pending = []  # (loss, norm) of steps that are not counted yet, on the device
        self.started = time.perf_counter()
        self.saved_s = 0.0

    def state_dict(self):
        """What survives a restart, as a dict of numbers and dicts."""
        own = ("config", "batches", "total_steps", "pending", "started", "saved_s")
        return {name: value for name, value in vars(self).items() if name not in own}

    def load_state_dict(self, saved):
        """Go on from a state_dict()."""
        vars(self).update(saved)
        self.started = time.perf_counter() - self.elapsed_s
        self.saved_s = self.elapsed_s

    # --- what comes in

    def count(self, machine):
        """Count the pending steps' losses, one by one, so that the sums do not depend on when that
        is done. Waits for the device."""
        if not self.pending:
            return
        losses, norms = (torch.stack(values).tolist() for values in zip(*self.pending, strict=True))
        bad = [not math.isfinite(norm) for norm in norms]
        totals = machine.reduce(*losses, *bad)
        for loss, skipped in zip(totals[: len(bad)], totals[len(bad) :], strict=True):
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            self.skipped += bool(skipped)
            if math.isfinite(loss):
                self.loss_sum += loss
                self.loss_steps += 1
                self.epoch_loss_sum += loss
                self.epoch_loss_steps += 1
        self.pending.clear()

    def train_loss(self):
        """The mean training loss since the last call of it, nats a token."""
        loss = self.loss_sum / self.loss_steps if self.loss_steps else math.nan
        self.loss_sum, self.loss_steps = 0.0, 0
        return loss

    def evaluated(self, figures, best):
        """Take an evaluation in. best: whether best.pt holds it. Returns the mean training loss
        since the evaluation before."""
        steps = self.epoch_loss_steps
        train_loss = self.epoch_loss_sum / steps if steps else math.nan
        self.evaluated_step, self.epoch_loss_sum, self.epoch_loss_steps = self.step, 0.0, 0
        self.evaluations_since_best = 0 if best else self.evaluations_since_best + 1
        if best:
            self.best = dict(step=self.step, **figures)
        return train_loss

    # --- what follows

    @property
    def epoch(self):
        """Epochs done, a fraction."""
        return self.batches.epoch_at(self.step)

    def clock(self):
        """Seconds since the run began, over all restarts."""
        return time.perf_counter() - self.started

    def why_over(self):
        """Why the run is over, as a phrase; "" while it is not."""
        c = self.config
        if self.step >= self.total_steps:
            return f"{self.step:,} of {self.total_steps:,} steps are done"
        if c.max_hours and self.elapsed_s >= 3600 * c.max_hours:
            return f"max_hours {c.max_hours} have passed"
        if c.patience and self.evaluations_since_best >= c.patience:
            return f"{c.patience} evaluations brought no new best"
        return ""

    def evaluation_is_due(self):
        """Whether to evaluate before the next step: at an epoch's end, every eval_interval steps,
        and at the end of the run."""
        if self.evaluated_step == self.step:
            return False
        interval = self.config.eval_interval
        epoch_ended = int(self.epoch) > int(self.batches.epoch_at(self.step - 1))
        return epoch_ended or (interval and self.step % interval == 0) or bool(self.why_over())

    def save_is_due(self):
        """Whether to save after this step."""
        c = self.config
        minutes = (self.elapsed_s - self.saved_s) / 60
        by_step = c.save_interval and self.step % c.save_interval == 0
        return bool(by_step or (c.save_minutes and minutes >= c.save_minutes))
