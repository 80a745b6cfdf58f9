"""One optimizer step: batch, loss, gradients, clipping, update."""

from lab.console import first_line

import contextlib
import math

import numpy as np
import torch

from lab.optimizer import lr_at, make_optimizers


def micro_batch_size(config, model, machine):
    """Sequences a forward pass: as configured, else as many of this rank's rows as fit into the
    device's memory (on a CPU 1,024 tokens of them), in equal parts.

    It depends on the device's size, not on what is free just now, so that a resumed run cuts alike.
    """
    all_rows = rows = math.ceil(config.batch_size / machine.world)
    if config.micro_batch_size:
        return min(config.micro_batch_size, rows)
    kind, context = machine.device.type, model.args["max_seq_len"]
    if kind == "mps":
        rows = min(rows, max(1, 32766 // context))  # see head_loss()
    if kind == "cpu":
        rows = min(rows, max(1, 1024 // context))  # more is no faster, and takes more memory
    budget = machine.memory() * (0.8 if kind == "cuda" else 0.5)
    fits = 1
    for n in range(rows, 1, -1):
        if model.memory_bytes(n, machine.dtype, kind) <= budget:
            fits = n
            break
    # GPUs may differ, and an evaluation is cut alike on all of them
    fits = int(machine.smallest(fits)[0])
    return math.ceil(all_rows / math.ceil(all_rows / fits))


def compiles(machine):
    """Whether torch.compile works here; one line where it does not."""
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.zeros(8, device=machine.device))
    except Exception as error:  # the compiler's back ends fail in their own ways
        why = first_line(error)[:150]
        machine.say(f"torch.compile does not work here ({why}); going on without it")
        return False
    return True


class Trainer:
    """What takes a step: a model, its optimizers and, in float16, a loss scaler."""

    def __init__(self, config, machine, model, batches, total_steps):
        """model: on its device. total_steps: the whole run's, for the learning rate."""
        self.config, self.machine, self.model = config, machine, model
        self.batches, self.total_steps = batches, total_steps
        self.micro = micro_batch_size(config, model, machine)
        self.optimizers = make_optimizers(config, model)
        half = machine.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=half)
        wanted = machine.device.type == "cuda" if config.compile is None else config.compile
        self.compiled = wanted and compiles(machine)
        if self.compiled:
            model.compile_parts()
        self.forward = model  # over ranks DDP, which averages their gradients
        if machine.world > 1:
            ddp = torch.nn.parallel.DistributedDataParallel
            self.forward = ddp(model, gradient_as_bucket_view=True)

    def step(self, i):
        """Take optimizer step i. Returns this rank's share of the batch's mean loss, and the norm
        of the gradient before clipping; both 0-d, on the device.

        A step whose loss or gradient is not finite changes neither weights nor optimizers.
        """
        loss = self.backward(i)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = self.config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.update(norm, lr_at(i, self.config, self.total_steps))
        return loss, norm

    def backward(self, i):
        """Form the gradients of batch i, summed over micro-batches and averaged over ranks."""
        machine, batch_size = self.machine, self.config.batch_size
        # dropout's masks follow from the seed, the step and the rank
        seed = np.random.SeedSequence([self.config.seed, i, machine.rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        parts = self.rows(i).split(self.micro)
        total = torch.zeros((), device=machine.device)
        for number, part in enumerate(parts, 1):
            # DDP averages over ranks at the last backward pass; no_sync must enclose both passes
            quiet = machine.world > 1 and number < len(parts)
            with self.forward.no_sync() if quiet else contextlib.nullcontext():
                with machine.autocast():
                    loss = self.forward(part[:, :-1], part[:, 1:]) * (len(part) / batch_size)
                self.scaler.scale(loss * machine.world).backward()
            total += loss.detach()
        return total

    def rows(self, i):
        """This rank's rows of batch i, on the device."""
        machine = self.machine
        rows = torch.from_numpy(self.batches.batch(i, machine.rank, machine.world))
        if machine.device.type == "cuda":
            return rows.pin_memory().to(machine.device, non_blocking=True)
        return rows.to(machine.device)

    def update(self, norm, lr):
        """Update the weights, unless the gradient's norm is not finite, and drop the gradients."""
        # the optimizers read it on the device, so that nobody waits for it; the scaler would look
        # at infinities alone
        found_inf = (~norm.isfinite()).float()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            optimizer.found_inf = found_inf
            optimizer.step()
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)

    def lr(self, i):
        """AdamW's learning rate at step i."""
        return lr_at(i, self.config, self.total_steps)

    def patience(self):
        """How many steps in a row may be skipped: a scaler begins far too high on purpose, and
        comes down by one power of two a step."""
        return 20 if self.scaler.is_enabled() else 5

    def state_dict(self):
        """What a restart needs: weights, optimizers and scaler."""
        return dict(
            model=self.model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            scaler=self.scaler.state_dict(),
        )

    def load_state_dict(self, saved):
        """Go on from a state_dict()."""
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if saved["scaler"]:  # nothing where the run was not in float16 until now
            self.scaler.load_state_dict(saved["scaler"])
