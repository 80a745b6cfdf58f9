"""One optimizer step: batch, loss, gradients, clipping, update; eager, or as a CUDA graph."""

import contextlib
import math
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lab.console import first_line
from lab.graph import Capture
from lab.optimizer import lr_at, make_optimizers


def micro_batch_size(config, model, machine):
    """Sequences per forward pass: as configured, else as many of this rank's rows as fit into the
    device's memory (on a CPU 1,024 tokens of them), in equal parts.

    It depends on the device's size, not on what is free just now, so that a resumed run cuts alike.
    """
    rows = math.ceil(config.batch_size / machine.world)
    if config.micro_batch_size:
        return min(config.micro_batch_size, rows)
    kind, context = machine.device.type, model.args["max_seq_len"]
    # on a CPU more is no faster, and takes more memory; on MPS see head_loss()
    tokens = {"cpu": 1024, "mps": 32766}.get(kind, rows * context)
    # on CUDA the rest is for evaluations, which cannot use what a graph holds
    budget = machine.memory() * (0.7 if kind == "cuda" else 0.5)
    fits = min(rows, max(1, tokens // context))
    while fits > 1 and model.memory_bytes(fits, machine.dtype, kind) > budget:
        fits -= 1
    # GPUs may differ, and an evaluation is cut alike on all of them
    fits = min(machine.gather(fits))
    return math.ceil(rows / math.ceil(rows / fits))


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
        # skipped steps in a row that end a run; a scaler begins far too high, and halves at each
        self.most_skipped = 20 if half else 5
        # uint16 seen as int16, which torch can index; on a GPU if a tenth of its memory holds it
        self.tokens = torch.from_numpy(batches.tokens.view(np.int16))
        if machine.device.type == "cuda" and self.tokens.nbytes <= machine.memory() / 10:
            self.tokens = self.tokens.to(machine.device)
        wanted = machine.device.type == "cuda" if config.compile is None else config.compile
        self.compiled = wanted and compiles(machine)
        if self.compiled:
            model.compile_parts()
        alone = machine.device.type == "cuda" and machine.world == 1
        self.graphed = not half and (alone if config.cuda_graph is None else config.cuda_graph)
        self.forward = model  # DDP, where steps are eager over ranks
        self.take_step = None  # eager_step or a GraphedStep, from the first step on

    def step(self, i):
        """Take optimizer step i. Returns this rank's share of the batch's mean loss, and the norm
        of the gradient before clipping; both 0-d, on the device.

        A step whose loss or gradient is not finite changes neither weights nor optimizers.
        """
        if self.take_step is None:
            self.take_step = self.choose_step()
        return self.take_step(i)

    def choose_step(self):
        """What takes the steps: a CUDA graph; or, with a line where that fails on any rank, the
        eager step, for which DDP averages gradients over ranks."""
        say = self.machine.say
        if self.compiled:
            say("the first step compiles, which takes up to a minute")
        if self.graphed:
            capture, why = Capture(self.machine.device), ""
            try:
                graphed_step = GraphedStep(self, capture)
            except RuntimeError as error:
                why = capture.give_up(error)
            failed = [reason for reason in self.machine.gather(why) if reason]
            if not failed:
                return graphed_step
            say(f"no CUDA graph ({failed[0]}); going on step by step")
            self.graphed = False
            self.model.zero_grad(set_to_none=True)
            make_eager(self.groups())
        if self.machine.world > 1:
            self.forward = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        return self.eager_step

    # --- what a step is made of

    def eager_step(self, i):
        """See step()."""
        self.seed(i)
        self.set_learning_rate(i)
        starts = self.starts(i).to(self.tokens.device, non_blocking=True)
        rows = self.rows(starts).to(self.machine.device)
        loss = self.backward(rows)
        norm = self.clip()
        self.update(norm)
        self.model.zero_grad(set_to_none=True)
        return loss, norm

    def seed(self, i):
        """Let dropout's masks follow from the seed, the step and the rank."""
        seed = np.random.SeedSequence([self.config.seed, i, self.machine.rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))

    def set_learning_rate(self, i):
        """Give each group of parameters its learning rate of step i."""
        for group in self.groups():
            lr = self.lr(i) * group["scale"]
            if torch.is_tensor(group["lr"]):  # a graph reads it where it is
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def starts(self, i):
        """Where this rank's windows of batch i begin, (rows,) int64, in the CPU's memory."""
        starts = torch.from_numpy(self.batches.starts(i, self.machine.rank, self.machine.world))
        return starts.pin_memory() if self.machine.device.type == "cuda" else starts

    def rows(self, starts):
        """The tokens of windows and of their targets, taken as a ring: (rows, T + 1) int64, where
        the tokens are."""
        reach = torch.arange(self.batches.max_seq_len + 1, device=starts.device)
        bits = self.tokens[(starts[:, None] + reach) % len(self.tokens)]
        return bits.long() & 0xFFFF

    def backward(self, rows):
        """Form the gradients of this rank's rows, summed over micro-batches. Returns its share of
        the batch's mean loss."""
        parts, ddp = rows.split(self.micro), self.forward is not self.model
        total = torch.zeros((), device=rows.device)
        for number, part in enumerate(parts, 1):
            # DDP averages over ranks at the last backward pass; no_sync must enclose both passes
            quiet = ddp and number < len(parts)
            with self.forward.no_sync() if quiet else contextlib.nullcontext():
                with self.machine.autocast():
                    loss = self.forward(part[:, :-1], part[:, 1:])
                loss = loss * (len(part) / self.config.batch_size)
                self.scaler.scale(loss * self.machine.world if ddp else loss).backward()
            total += loss.detach()
        return total

    def clip(self):
        """Scale the gradients down to the largest norm that is allowed. Returns their norm."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = self.config.grad_clip or math.inf
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def update(self, norm):
        """Update the weights, unless the gradient's norm is not finite."""
        # the optimizers read it on the device, so that nobody waits for it
        found_inf = (~norm.isfinite()).float()
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf
            optimizer.step()
        self.scaler.update()

    def groups(self):
        """The optimizers' groups of parameters."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def lr(self, i):
        """AdamW's learning rate at step i."""
        return lr_at(i, self.config, self.total_steps)

    # --- what a restart needs

    def state_dict(self):
        """Weights, optimizers and scaler; the same whatever took the steps."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        for saved in optimizers:
            make_eager(saved["param_groups"])
        return dict(
            model=self.model.state_dict(), optimizers=optimizers, scaler=self.scaler.state_dict()
        )

    def load_state_dict(self, saved):
        """Go on from a state_dict(); before the first step."""
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if saved["scaler"]:  # nothing where the run was not in float16 until now
            self.scaler.load_state_dict(saved["scaler"])


class GraphedStep:
    """A step as one CUDA graph. Over ranks it is two, and between them one sum over all gradients.

    Outside the graph stays what is another at each step: dropout's seed, where the windows begin,
    and the learning rates.
    """

    def __init__(self, trainer, capture):
        """Capture the step; no weight changes. Raises RuntimeError where that fails."""
        self.trainer = trainer
        device, world = trainer.machine.device, trainer.machine.world
        if trainer.tokens.device.type != device.type:
            raise RuntimeError("the training tokens take over a tenth of the device's memory")

        # all that the graph reads and writes stays where it is from here on
        self.starts = trainer.starts(0).to(device)
        self.result = torch.zeros(2, device=device)  # the loss and the gradient's norm
        self.gradients = None
        if world > 1:
            # over ranks all gradients are views of one tensor, for one sum
            parameters = list(trainer.model.parameters())
            sizes = [p.numel() for p in parameters]
            self.gradients = parameters[0].new_zeros(sum(sizes))
            for parameter, part in zip(parameters, self.gradients.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)
        for group in trainer.groups():
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            if "capturable" in group:  # AdamW's
                group["capturable"] = True

        # a warm-up changes no weight, but makes the optimizers' states
        def whole(dry=False):
            self.backward()
            self.sum_over_ranks()
            self.update(dry)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True")  # a warm-up is no capture
            capture.warm_up(lambda: whole(dry=True))
        if world == 1:
            self.parts = [capture.capture(whole)]
        else:
            first, last = capture.capture(self.backward), capture.capture(self.update)
            self.parts = [first, self.sum_over_ranks, last]

    def __call__(self, i):
        """See Trainer.step()."""
        self.trainer.seed(i)
        self.trainer.set_learning_rate(i)
        self.starts.copy_(self.trainer.starts(i), non_blocking=True)
        for part in self.parts:
            part()
        return self.result.clone().unbind()  # the next step writes there

    def backward(self):
        """From the windows' starts to the gradients of this rank's rows."""
        if self.gradients is not None:
            self.gradients.zero_()
        self.result[0] = self.trainer.backward(self.trainer.rows(self.starts))

    def sum_over_ranks(self):
        """Sum the gradients over all ranks."""
        if self.gradients is not None:
            dist.all_reduce(self.gradients)

    def update(self, dry=False):
        """From the gradients to the weights. dry: as if the gradients were not finite."""
        norm = self.trainer.clip()
        self.trainer.update(norm * math.nan if dry else norm)
        self.result[1] = norm
        if self.gradients is None:
            self.trainer.model.zero_grad(set_to_none=True)


def make_eager(groups):
    """Make optimizers' groups of parameters what they are without a graph, in place."""
    for group in groups:
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False
