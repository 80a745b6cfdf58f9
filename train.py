"""The loop: batches, loss, step, checkpoint, evaluation.

    python train.py config/exp5.py [--setting value ...]
    torchrun --nproc_per_node=2 train.py config/exp5.py

A run is a pure function of its config: batch i follows from (seed, i), the learning rate from the step, dropout from
(seed, step, rank). Ranks and micro-batches only slice a batch, so that the world size changes the speed and nothing
else, and a resumed run is the same run.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from config import UserError, load_config, run
from machine import compile_blocks, micro_batch_size, open_machine
from model import LanguageModel, load_checkpoint, save_checkpoint
from prepare import load_meta, load_tokens, progress

# Settings that may differ between a checkpoint and the run that goes on from it: they extend it or steer the machine,
# and leave the experiment what it is. All others must be the same.
FREE = {
    "data_dir", "out_dir", "micro_batch_size", "epochs", "max_steps", "max_hours", "patience", "eval_interval",
    "save_interval", "log_interval", "device", "dtype", "compile", "resume", "dry_run", "expected_ppl", "recorded_ppl",
}


# --- the experiment, as pure functions ------------------------------------------------------------------------------


class Batches:
    """The order of a run's training windows, a pure function of (seed, i).

    Each epoch takes the tokens as a ring, cuts it at a random phase into windows of max_seq_len and shuffles them;
    a batch is the next batch_size windows, and one that begins in one epoch may end in the next. So every token is a
    target once an epoch, but for the remainder shorter than a window, which lies elsewhere in each epoch.
    """

    def __init__(self, tokens, max_seq_len, batch_size, seed):
        self.tokens, self.max_seq_len, self.batch_size, self.seed = tokens, max_seq_len, batch_size, seed
        self.windows = len(tokens) // max_seq_len  # an epoch
        self.shuffled = {}  # epoch -> its windows' starts; the last two that were asked for

    def starts(self, epoch):
        """Where an epoch's windows begin, in its order: (windows,) int64."""
        if epoch not in self.shuffled:
            random = np.random.RandomState([self.seed, epoch])  # its stream is fixed for ever (NEP 19)
            phase = random.randint(len(self.tokens))
            order = phase + random.permutation(self.windows) * self.max_seq_len
            self.shuffled = dict(list(self.shuffled.items())[-1:]) | {epoch: order % len(self.tokens)}
        return self.shuffled[epoch]

    def batch(self, i, rank=0, world=1):
        """The rows of batch i that are this rank's: (rows, max_seq_len + 1) int64, inputs and targets overlapping."""
        windows = np.array_split(np.arange(i * self.batch_size, (i + 1) * self.batch_size), world)[rank]
        starts = [self.starts(window // self.windows)[window % self.windows] for window in windows]
        reach = np.arange(self.max_seq_len + 1)
        rows = [self.tokens.take(start + reach, mode="wrap") for start in starts]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def epoch_end(self, epoch):
        """How many steps it takes until `epoch` epochs are whole."""
        return math.ceil(epoch * self.windows / self.batch_size)


def lr_at(step, config, total_steps):
    """The learning rate of a step, counted from 0: linear warm-up, then a cosine to min_learning_rate, or constant."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1, done)))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)


def parameter_groups(model, weight_decay):
    """AdamW's groups: matrices and embeddings decay, biases and gains do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    assert {*map(id, matrices), *map(id, rest)} == {*map(id, model.parameters())}
    return [dict(params=matrices, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]


# --- what a restart needs -------------------------------------------------------------------------------------------


@dataclass
class State:
    """All of a run that must survive a restart beside the weights, the optimizer and the scaler."""

    step: int = 0  # optimizer steps done
    elapsed_s: float = 0.0  # over all restarts
    loss_sum: float = 0.0  # of the training loss, since the last line of metrics.jsonl
    loss_steps: int = 0
    epoch_loss_sum: float = 0.0  # since the last evaluation
    epoch_loss_steps: int = 0
    evaluated_step: int = 0  # the last evaluation's
    best: dict = field(default_factory=dict)  # the best evaluation's figures, and its step
    evaluations_since_best: int = 0


def differences(old, new):
    """The settings in which a checkpoint's config (a dict) differs from this run's and must not, as phrases."""
    changed = [k for k in sorted(old) if k not in FREE and k in new and old[k] != new[k]]
    return [f"{k} was {old[k]!r}, now {new[k]!r}" for k in changed]


def keep_metrics(path, state):
    """Drop the lines of metrics.jsonl that a resumed run will write again: those past its checkpoint."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        lines = [(json.loads(line), line) for line in file if line.endswith("\n")]
    with open(path + ".part", "w", encoding="utf-8") as file:
        for values, line in lines:
            if values["step"] <= (state.evaluated_step if "val_loss" in values else state.step):
                file.write(line)
    os.replace(path + ".part", path)


# --- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(model, tokens, counts, config, machine, rows, stopped=lambda: False):
    """The loss over a whole split, in order, every token predicted once: sums over counts, over all ranks.

    counts: the split's entry of meta.json. The first token has nothing before it and is not predicted. Returns
    val_loss (nats a token), val_ppl, val_ppl_word, val_bits_per_byte; None if stopped() on any rank.
    """
    model.eval()
    length = config.max_seq_len
    windows = math.ceil((len(tokens) - 1) / length)
    batches = [range(i, min(i + rows, windows)) for i in range(0, windows, rows)]
    nats, predicted, ended = 0.0, 0, 0
    with progress(len(batches), "evaluating", leave=False, disable=machine.rank > 0) as bar, machine.autocast():
        for batch in batches[machine.rank :: machine.world]:
            if stopped():
                ended = 1
                break
            start, end = batch.start * length, min(batch.stop * length, len(tokens) - 1)
            chunk = np.zeros(len(batch) * length + 1, dtype=np.int64)  # the last window is filled up, then cut again
            chunk[: end - start + 1] = tokens[start : end + 1]
            chunk = torch.from_numpy(chunk).to(machine.device)
            losses = model.token_losses(chunk[:-1].view(-1, length), chunk[1:].view(-1, length))
            nats += losses.flatten()[: end - start].cpu().double().sum().item()
            predicted += end - start
            bar.update(machine.world)
    model.train()
    nats, predicted, ended = machine.total(nats, predicted, ended)
    if ended:
        return None
    return {
        "val_loss": nats / predicted,
        "val_ppl": math.exp(min(nats / predicted, 700)),
        "val_ppl_word": math.exp(min(nats / counts["words"], 700)),
        "val_bits_per_byte": nats / counts["bytes"] / math.log(2),
    }


# --- the run --------------------------------------------------------------------------------------------------------


def plan(config, meta, batches, total_steps, model, micro, machine):
    """What is about to be trained, as text: the true counts, the data, Chinchilla's ratio, steps, FLOPs, memory."""
    n, tokens, step_tokens = model.count(), len(batches.tokens), config.batch_size * config.max_seq_len
    run_tokens, flops, over = total_steps * step_tokens, model.flops_per_token(), 20 * n["total"] / tokens
    times = f"{over:.1f} times over" if over > 1 else f"{1 / over:.1f} times under"
    lines = {
        "run": f"{config.out_dir} on {machine}",
        "parameters": f"{n['total']:,}: embeddings {n['embeddings']:,}, head bias {n['head_bias']:,}, "
        f"blocks {n['blocks']:,}",
        "data": f"{config.dataset}: {tokens:,} training tokens, {meta['splits']['val']['tokens']:,} validation tokens",
        "ratio": f"{tokens / n['total']:.2f} tokens a parameter an epoch, {run_tokens / n['total']:.2f} in the run",
        "": f"Chinchilla's is 20: {tokens / 20:,.0f} parameters for one epoch of this data; this model is {times} that",
        "steps": f"{total_steps:,} of {config.batch_size} x {config.max_seq_len} = {step_tokens:,} tokens, "
        f"{batches.windows / config.batch_size:,.1f} an epoch, in forward passes of {micro} sequences a rank",
        "compute": f"{flops:,} FLOPs a token, {flops * step_tokens:.3g} a step, {flops * run_tokens:.3g} in the run",
        "memory": f"about {model.memory_bytes(micro, machine.dtype) / 1e9:.1f} GB a rank",
    }
    return "\n".join(f"{name:10}  {line}" for name, line in lines.items())


def why_over(state, config, total_steps):
    """Why a run is over, as a phrase; "" while it is not. Follows from the state alone, so that every rank agrees."""
    if state.step >= total_steps:
        return f"all {total_steps:,} steps are done"
    if config.max_hours and state.elapsed_s >= 3600 * config.max_hours:
        return f"max_hours {config.max_hours} have passed"
    if config.patience and state.evaluations_since_best >= config.patience:
        return f"{config.patience} evaluations brought no new best"
    return ""


class StopFlag:
    """Set by SIGINT and SIGTERM, read by the loop at a step's end. Puts the old handlers back when left."""

    def __enter__(self):
        self.set = False
        self.old = {number: signal.signal(number, self.catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self, number, frame):
        self.set = True

    def __exit__(self, *exception):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def resume_command(argv, machine):
    """The command that goes on with this run."""
    start = f"torchrun --nproc_per_node={machine.local_world}" if machine.world > 1 else "python"
    return " ".join([start, "train.py", *(word for word in argv if word != "--resume"), "--resume"])


@dataclass
class Training:
    """What takes a step: the model, what is called in its place (DDP's wrapper over ranks), and what updates it."""

    model: LanguageModel
    stepped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    micro: int  # sequences a forward pass
    compiled: bool


def new_model(config, vocab_size):
    """A model with the config's shape and its seed's weights, on the CPU."""
    torch.manual_seed(config.seed)
    return LanguageModel(vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff,
                         config.num_layers, config.dropout)


def prepare_training(config, machine, model):
    """The Training of a model that is on its device."""
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate,
                                  betas=(config.beta1, config.beta2), fused=True)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    wanted = machine.device.type == "cuda" if config.compile is None else config.compile
    compiled = wanted and compile_blocks(model, machine)
    stepped = model
    if machine.world > 1:
        stepped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Training(model, stepped, optimizer, scaler, micro_batch_size(config, model, machine), compiled)


def take_step(config, machine, training, batches, step, lr):
    """One optimizer step; (this rank's share of the batch's mean loss, the gradient's norm), on the device."""
    stepped, optimizer, scaler = training.stepped, training.optimizer, training.scaler
    seed = np.random.SeedSequence([config.seed, step, machine.rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(seed[0]))  # dropout's
    for group in optimizer.param_groups:
        group["lr"] = lr
    rows = batches.batch(step, machine.rank, machine.world)
    if machine.device.type == "cuda":
        rows = rows.pin_memory()
    parts = rows.to(machine.device, non_blocking=True).split(training.micro)
    total = torch.zeros((), device=machine.device)
    for i, part in enumerate(parts):
        # DDP averages over ranks at the last backward pass; no_sync must enclose forward and backward
        quiet = machine.world > 1 and i < len(parts) - 1
        with stepped.no_sync() if quiet else contextlib.nullcontext():
            with machine.autocast():
                loss = stepped(part[:, :-1], part[:, 1:]) * (len(part) / config.batch_size)
            scaler.scale(loss * machine.world).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(training.model.parameters(), config.grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config = load_config(argv)
    with open_machine(config) as machine, StopFlag() as stop:
        return train(config, machine, stop, resume_command(argv, machine))


def train(config, machine, stop, again):
    """Run config to its end or to a signal, and return the process's exit code. again: the command that resumes.

    Raises UserError before the first step for whatever the user must mend.
    """
    meta = load_meta(config.dataset, config.data_dir)
    tokens, val_tokens = (load_tokens(config.dataset, split, config.data_dir) for split in ("train", "val"))
    if len(tokens) <= config.max_seq_len or len(val_tokens) < 2:
        raise UserError(f"{config.dataset} has {len(tokens):,} training and {len(val_tokens):,} validation tokens, not "
                        f"one window of {config.max_seq_len}; prepare more text, or use a smaller --max_seq_len")
    batches = Batches(tokens, config.max_seq_len, config.batch_size, config.seed)
    total_steps = batches.epoch_end(config.epochs)
    total_steps = min(total_steps, config.max_steps) if config.max_steps else total_steps
    if config.warmup_steps >= total_steps:
        raise UserError(f"warmup_steps {config.warmup_steps} leaves nothing of the run's {total_steps} steps; "
                        f"use --warmup_steps {total_steps // 10}")

    model = new_model(config, meta["vocab_size"]).to(machine.device)
    micro = micro_batch_size(config, model, machine)
    machine.say(plan(config, meta, batches, total_steps, model, micro, machine))
    if config.dry_run:
        return 0
    state = State()

    last, prev, best, metrics = (f"{config.out_dir}/{n}" for n in ("last.pt", "prev.pt", "best.pt", "metrics.jsonl"))
    found = next((path for path in (last, prev) if os.path.exists(path)), None)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun --max-restarts
    if not (config.resume or restarted) and any(map(os.path.exists, (last, prev, best, metrics))):
        raise UserError(f"{config.out_dir} holds a run already; `{again}` continues it, --out_dir DIR makes another")
    if found:
        checkpoint = load_checkpoint(found)
        if changed := differences(checkpoint["config"], dataclasses.asdict(config)):
            raise UserError(f"{found} is of another experiment: {'; '.join(changed)}; undo it or change --out_dir")
        state = State(**checkpoint["state"])
        over = why_over(state, config, total_steps)
        if over and state.evaluated_step == state.step:
            machine.say(f"{config.out_dir} is finished: {over}; its best checkpoint is {best}")
            return 0
        machine.say(f"going on from {found}, step {state.step:,}")
    elif config.resume:
        machine.say(f"no checkpoint in {config.out_dir} yet; beginning at step 0")

    training = prepare_training(config, machine, model)
    if found:
        model.load_state_dict(checkpoint["model"])
        training.optimizer.load_state_dict(checkpoint["optimizer"])
        training.scaler.load_state_dict(checkpoint["scaler"])
        del checkpoint
    if machine.rank == 0:
        os.makedirs(config.out_dir, exist_ok=True)
        keep_metrics(metrics, state)
    losses = []  # of the steps since take_losses(), on the device
    saved = (state.step, state.evaluated_step)
    step_tokens = config.batch_size * config.max_seq_len
    started, busy, interval = time.perf_counter() - state.elapsed_s, 0.0, 0

    def epoch_at(step):
        return step * config.batch_size / batches.windows

    def log(**values):
        """Write a line of metrics.jsonl."""
        if machine.rank == 0:
            values = dict(step=state.step, epoch=epoch_at(state.step), tokens=state.step * step_tokens, **values,
                          elapsed_s=time.perf_counter() - started)
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with open(metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")

    def take_losses():
        """Add the last steps' losses to the state, one by one, so that the sums do not depend on when it is done."""
        for loss in machine.total(*torch.stack(losses).tolist()) if losses else ():
            state.loss_sum, state.loss_steps = state.loss_sum + loss, state.loss_steps + 1
            state.epoch_loss_sum, state.epoch_loss_steps = state.epoch_loss_sum + loss, state.epoch_loss_steps + 1
        losses.clear()

    def contents(**more):
        """A checkpoint: tensors, dicts, lists, strings and numbers only."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
        return dict(model=model.state_dict(), model_args=model.args, tokenizer=meta["tokenizer"], step=state.step,
                    config=settings, **more)

    def save_last():
        """Write last.pt, unless it holds this very state; what it held becomes prev.pt."""
        nonlocal saved
        take_losses()
        if machine.rank == 0 and saved != (state.step, state.evaluated_step):
            save_checkpoint(contents(optimizer=training.optimizer.state_dict(), state=dataclasses.asdict(state),
                                     scaler=training.scaler.state_dict()), last, keep=prev)
        saved = (state.step, state.evaluated_step)

    bar = progress(total_steps, "training", initial=state.step, unit="step", disable=machine.rank > 0)
    while True:
        over = why_over(state, config, total_steps)
        due = int(epoch_at(state.step)) > int(epoch_at(state.step - 1))
        due = due or (config.eval_interval and state.step % config.eval_interval == 0)
        # evaluation comes first: a run that was saved, and then stopped amid its evaluation, still owes it
        if (due or over) and state.evaluated_step < state.step:
            save_last()
            figures = evaluate(model, val_tokens, meta["splits"]["val"], config, machine, micro, lambda: stop.set)
            if figures is None:
                over = ""
                break
            train_loss = state.epoch_loss_sum / state.epoch_loss_steps
            better = figures["val_loss"] < state.best.get("val_loss", math.inf)
            state.evaluated_step, state.epoch_loss_sum, state.epoch_loss_steps = state.step, 0.0, 0
            state.evaluations_since_best = 0 if better else state.evaluations_since_best + 1
            if better:
                state.best = dict(step=state.step, **figures)
                if machine.rank == 0:
                    save_checkpoint(contents(metrics=figures), best)
            log(train_loss=train_loss, **figures, best=better)
            bar.clear()
            machine.say(f"epoch {epoch_at(state.step):.4g} | step {state.step:,} | train loss {train_loss:.4f} | "
                        f"val loss {figures['val_loss']:.4f} | val perplexity {figures['val_ppl']:.2f}"
                        + (f" | best so far, saved to {best}" if better else ""))
            continue  # patience may have run out
        if over:
            break

        clock = time.perf_counter()
        lr = lr_at(state.step, config, total_steps)
        loss, norm = take_step(config, machine, training, batches, state.step, lr)
        losses.append(loss)
        state.step, interval = state.step + 1, interval + 1
        log_due = state.step % config.log_interval == 0
        if log_due:
            take_losses()  # waits for the device, so that the clock is true
        busy += time.perf_counter() - clock
        if log_due:
            train_loss, speed = state.loss_sum / state.loss_steps, interval * step_tokens / busy
            log(train_loss=train_loss, lr=lr, grad_norm=norm.item(), tokens_per_s=speed)
            bar.set_postfix_str(f"loss {train_loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s", refresh=False)
            busy, interval, state.loss_sum, state.loss_steps = 0.0, 0, 0.0, 0
        bar.update()
        # the ranks agree on the signal and on the time
        stopping, state.elapsed_s = machine.total(stop.set, time.perf_counter() - started, op=dist.ReduceOp.MAX)
        if stopping:
            break
        if config.save_interval and state.step % config.save_interval == 0:
            save_last()
    save_last()
    bar.close()
    if not over:
        machine.say(f"stopped at step {state.step:,}, saved to {last}; go on with: {again}")
        return 1
    machine.say(f"finished: {over}")
    if state.best:
        machine.say(f"best at step {state.best['step']:,}, in {best}: perplexity a token {state.best['val_ppl']:.2f}, "
                    f"perplexity a word {state.best['val_ppl_word']:.2f}, bits a byte "
                    f"{state.best['val_bits_per_byte']:.4f}\nover the whole validation split: {len(val_tokens) - 1:,} "
                    f"tokens predicted, windows of {config.max_seq_len}, separator {meta['separator']}")
    if state.best and config.expected_ppl:
        low, high = config.expected_ppl
        machine.say(f"expected {low:g} to {high:g}: {'met' if state.best['val_ppl'] <= high else 'not met'}")
    if config.recorded_ppl:
        machine.say(f"the notebook recorded {config.recorded_ppl:g}")
    return 0


if __name__ == "__main__":
    run(main)
