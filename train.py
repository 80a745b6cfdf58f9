"""The loop: batches, loss, step, checkpoint, evaluation.

    python train.py config/exp5.py [--setting value ...]
    torchrun --nproc_per_node=2 train.py config/exp5.py

A run is a pure function of its config: batch i follows from (seed, i), the learning rate from the step, dropout from
(seed, step, rank). Ranks and micro-batches only slice a batch, so that the world size changes the speed and nothing
else, and a resumed run is the same run.
"""

from lab.console import UserError, command, run, stop_signals

import contextlib
import dataclasses
import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from config import load_config
from data import Batches, load_meta, load_tokens, log_frequencies
from lab.files import Lock
from machine import compile_blocks, micro_batch_size, open_machine
from model import LanguageModel, load_checkpoint, load_model
from optimizer import lr_at, make_optimizers, warmup_of
from prepare import progress
from record import Record, State, find_run, mean
from report import perplexity, verdict


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
        "memory": f"about {model.memory_bytes(micro, machine.dtype, machine.device.type) / 1e9:,.1f} GB a rank, "
        "beside Python and torch themselves",
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


def resume_command(argv, machine):
    """The command that goes on with this run."""
    words = [word for word in argv if word != "--resume"]
    return command("train.py", *words, "--resume", processes=machine.local_world if machine.world > 1 else 1)


@dataclass
class Training:
    """What takes a step: the model, what is called in its place (DDP's wrapper over ranks), and what updates it."""

    model: LanguageModel
    stepped: torch.nn.Module
    optimizers: list  # AdamW, and Muon if it is asked for
    scaler: torch.amp.GradScaler
    micro: int  # sequences a forward pass
    compiled: bool


def new_model(config, vocab_size, tokens=None):
    """A model with the config's shape and its seed's weights, on the CPU. tokens: the training split, (n,) uint16."""
    torch.manual_seed(config.seed)
    model = LanguageModel(vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff,
                          config.num_layers, config.dropout, config.block)
    if config.unigram_bias and tokens is not None:
        model.head_bias.data = torch.from_numpy(log_frequencies(tokens, vocab_size))
    return model


def prepare_training(config, machine, model):
    """The Training of a model that is on its device."""
    optimizers = make_optimizers(config, model)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    wanted = machine.device.type == "cuda" if config.compile is None else config.compile
    compiled = wanted and compile_blocks(model, machine)
    stepped = model
    if machine.world > 1:
        stepped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Training(model, stepped, optimizers, scaler, micro_batch_size(config, model, machine), compiled)


def take_step(config, machine, training, batches, step, lr):
    """One optimizer step; (this rank's share of the batch's mean loss, the gradient's norm), on the device.

    Where the norm is not finite, which it is not either where a loss is not, weights and optimizers stay as they were.
    """
    stepped, scaler = training.stepped, training.scaler
    seed = np.random.SeedSequence([config.seed, step, machine.rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(seed[0]))  # dropout's
    rows = torch.from_numpy(batches.batch(step, machine.rank, machine.world))
    if machine.device.type == "cuda":
        rows = rows.pin_memory()
    parts = rows.to(machine.device, non_blocking=machine.device.type == "cuda").split(training.micro)
    total = torch.zeros((), device=machine.device)
    for i, part in enumerate(parts):
        # DDP averages over ranks at the last backward pass; no_sync must enclose forward and backward
        quiet = machine.world > 1 and i < len(parts) - 1
        with stepped.no_sync() if quiet else contextlib.nullcontext():
            with machine.autocast():
                loss = stepped(part[:, :-1], part[:, 1:]) * (len(part) / config.batch_size)
            scaler.scale(loss * machine.world).backward()
        total += loss.detach()
    for optimizer in training.optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(training.model.parameters(), config.grad_clip or math.inf)
    # read on the device, so that nobody waits for it; scaler.step() would look at inf alone
    found_inf = (~norm.isfinite()).float()
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        optimizer.found_inf = found_inf
        optimizer.step()
    scaler.update()
    training.model.zero_grad(set_to_none=True)
    return total, norm


def spans(predicted, context, stride):
    """Windows (start, end, first): inputs start to end, of which those from first on count. Every one of the first
    `predicted` positions counts once, with at least context - stride before it where there are so many."""
    found, start, first = [], 0, 0
    while first < predicted:
        end = min(start + context, predicted)
        found.append((start, end, first))
        start, first = start + stride, end
    return found


def evaluate(model, tokens, counts, context, machine, rows, stride=0, stopped=lambda: False):
    """The loss over a whole split, in order, every token but the first predicted once.

    tokens (n,) uint16; counts: the split's entry of meta.json; rows: windows a forward pass; stride: how far windows of
    `context` move (0: by their length, without overlap). Returns a dict, None if stopped() on any rank: loss (nats a
    token), its standard error `stderr` (over windows, since a window's tokens are not independent), ppl, ppl_word,
    bits_per_byte, and tokens, words, bytes, context and stride that they are over.
    """
    was_training = model.training
    model.eval()
    stride = stride or context
    windows = spans(len(tokens) - 1, context, stride)
    rows = min(rows, len(windows))
    batches = [windows[i : i + rows] for i in range(0, len(windows), rows)]
    sums, ended = torch.zeros(5, dtype=torch.float64), 0  # over windows: nats, tokens, and their products
    with progress(len(batches), "evaluating", leave=False, disable=machine.rank > 0) as bar, machine.autocast():
        for batch in batches[machine.rank :: machine.world]:
            if stopped():
                ended = 1
                break
            # short windows are filled up, then cut again; a last short batch, too: another shape would compile anew
            chunk = np.zeros((rows, context + 1), dtype=np.int64)
            for row, (start, end, _) in zip(chunk, batch, strict=False):
                row[: end - start + 1] = tokens[start : end + 1]
            chunk = torch.from_numpy(chunk).to(machine.device)
            losses = model.token_losses(chunk[:, :-1], chunk[:, 1:]).cpu().double()
            for row, (start, end, first) in zip(losses, batch, strict=False):
                nats, n = row[first - start : end - start].sum().item(), end - first
                sums += torch.tensor([nats, n, nats * nats, nats * n, n * n], dtype=torch.float64)
            bar.update(machine.world)
    model.train(was_training)
    nats, n, squares, products, lengths, ended = machine.total(*sums.tolist(), ended)
    if ended:
        return None
    loss, k = nats / n, len(windows)
    spread = max(0.0, squares - 2 * loss * products + loss * loss * lengths)  # of windows around loss * their length
    return {
        "loss": loss,
        "stderr": math.sqrt(spread * k / (k - 1)) / n if k > 1 else None,
        "ppl": math.exp(min(loss, 700)),
        "ppl_word": math.exp(min(nats / counts["words"], 700)),
        "bits_per_byte": nats / counts["bytes"] / math.log(2),
        "tokens": int(n), "words": counts["words"], "bytes": counts["bytes"], "context": context, "stride": stride,
    }


def describe(split, figures, separator):
    """Figures as the two lines that a user reads, with what they are counted over."""
    error = f" ± {figures['stderr']:.4f}" if figures["stderr"] is not None else ""
    return (
        f"{split:11} loss {figures['loss']:.4f}{error} a token, perplexity {perplexity(figures['ppl'])} a token, "
        f"{perplexity(figures['ppl_word'])} a word, {figures['bits_per_byte']:.4f} bits a byte\n{'':11} over "
        f"{figures['tokens']:,} tokens, {figures['words']:,} words, {figures['bytes']:,} bytes; context "
        f"{figures['context']}, stride {figures['stride']}, separator {separator}"
    )


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config = load_config(argv)
    with open_machine(config) as machine:
        if config.eval_only:
            return eval_only(config, machine)
        with stop_signals(quiet=machine.rank > 0) as stop, Lock() as lock:
            return train(config, machine, stop, lock, resume_command(argv, machine))


def eval_only(config, machine):
    """Print the figures of the best checkpoint in out_dir on a split. Raises UserError."""
    model, checkpoint = load_model(f"{config.out_dir}/best.pt")
    meta = load_meta(config.dataset, config.data_dir)
    tokens = load_tokens(config.dataset, config.split, config.data_dir)
    if meta["vocab_size"] != model.args["vocab_size"] or meta["tokenizer"] != checkpoint["tokenizer"]:
        raise UserError(f"{config.out_dir} was trained with another tokenizer than {config.dataset}'s; choose another "
                        "--dataset")
    context = model.args["max_seq_len"]
    if config.eval_stride > context:
        raise UserError(f"eval_stride {config.eval_stride} leaves tokens out: the context is {context}")
    model.to(machine.device)
    micro = micro_batch_size(config, model, machine)
    machine.say(f"{config.out_dir}/best.pt, step {checkpoint['step']:,}, on {machine}")
    for stride in (0, config.eval_stride) if config.eval_stride else (0,):
        figures = evaluate(model, tokens, meta["splits"][config.split], context, machine, micro, stride)
        machine.say(describe(config.split, figures, meta["separator"]))
    return 0


def build_model(config, machine, planned, tokens):
    """The model to train, on its device. planned: it without memory. Raises UserError if it does not fit there."""
    kind, there = machine.device.type, machine.memory()
    wanted = planned.memory_bytes(1, machine.dtype, kind)
    try:
        if wanted > there:
            raise MemoryError
        return new_model(config, planned.args["vocab_size"], tokens).to(machine.device)
    except (MemoryError, RuntimeError) as error:
        memory = ("out of memory", "allocate memory", "alloc_cpu")  # what torch's allocators say
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in memory):
            raise
        raise UserError(f"to train this model takes about {wanted / 1e9:,.1f} GB, and {kind} has {there / 1e9:,.1f} "
                        "GB a rank; use a smaller --d_model, --d_ff or --num_layers") from None


def train(config, machine, stop, lock, again):
    """Run config to its end or to a signal, and return the process's exit code. again: the command that resumes.

    Raises UserError before the first step for whatever the user must mend.
    """
    meta = load_meta(config.dataset, config.data_dir)
    splits = {split: load_tokens(config.dataset, split, config.data_dir) for split in meta["splits"]}
    tokens = splits.pop("train")
    if len(tokens) <= config.max_seq_len:
        raise UserError(f"{config.dataset} has {len(tokens):,} training tokens, not one window of "
                        f"{config.max_seq_len}; prepare more text, or use a smaller --max_seq_len")
    batches = Batches(tokens, config.max_seq_len, config.batch_size, config.seed)
    total_steps = batches.epoch_end(config.epochs)
    total_steps = min(total_steps, config.max_steps) if config.max_steps else total_steps
    if warmup_of(config, total_steps) >= total_steps:
        raise UserError(f"warmup_steps {config.warmup_steps} leaves nothing of the run's {total_steps} steps; "
                        f"use --warmup_steps {total_steps // 10}")
    data = {split: meta["splits"][split]["sha256"] for split in ("train", "val")}
    machine.agree({"dtype": str(machine.dtype), "data": data} | {
        k: v for k, v in dataclasses.asdict(config).items() if k not in ("data_dir", "out_dir", "device", "dtype")
    })

    with torch.device("meta"):
        planned = new_model(config, meta["vocab_size"])
    micro = micro_batch_size(config, planned, machine)
    machine.say(plan(config, meta, batches, total_steps, planned, micro, machine))
    if config.dry_run:
        return 0
    model = build_model(config, machine, planned, tokens)
    checkpoint, finished = machine.from_rank_0(lambda: find_run(config, data, machine, lock, again))
    state = State(**checkpoint["state"]) if checkpoint else State()
    over = why_over(state, config, total_steps)
    if over and state.evaluated_step == state.step and finished:
        machine.say(f"{config.out_dir} is finished: {over}; its best checkpoint is {config.out_dir}/best.pt")
        return 0
    training = prepare_training(config, machine, model)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        for optimizer, saved in zip(training.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if checkpoint["scaler"]:  # nothing where the run was not in float16 until now
            training.scaler.load_state_dict(checkpoint["scaler"])
        del checkpoint
    record = Record(config, machine, training, state, meta, data, batches, total_steps)

    bar = progress(total_steps, "training", initial=state.step, unit="step", disable=machine.rank > 0)
    losses, norms = [], []  # of the steps since they were last taken, on the device
    step_tokens = config.batch_size * config.max_seq_len
    started, busy, interval = time.perf_counter() - state.elapsed_s, 0.0, 0
    while True:
        over = why_over(state, config, total_steps)
        epoch = int(record.epoch_at(state.step))
        due = epoch > int(record.epoch_at(state.step - 1))
        due = due or (config.eval_interval and state.step % config.eval_interval == 0)
        # evaluation comes first: a run that was saved, and then stopped amid its evaluation, still owes it
        if (due or over) and state.evaluated_step < state.step:
            record.take(losses, norms)
            record.save()
            figures = evaluate(model, splits["val"], meta["splits"]["val"], config.max_seq_len, machine, micro,
                               stopped=lambda: bool(stop))
            if figures is None:
                over = ""
                break
            bar.clear()
            record.evaluated(figures)
            continue  # patience may have run out
        if over:
            break

        clock = time.perf_counter()
        lr = lr_at(state.step, config, total_steps)
        loss, norm = take_step(config, machine, training, batches, state.step, lr)
        losses.append(loss), norms.append(norm)
        state.step, interval = state.step + 1, interval + 1
        log_due = state.step % config.log_interval == 0
        if log_due:
            record.take(losses, norms)  # waits for the device, so that the clock is true
        busy += time.perf_counter() - clock
        if log_due:
            train_loss, speed = mean(state.loss_sum, state.loss_steps), interval * step_tokens / busy
            record.log(train_loss=train_loss, lr=lr, grad_norm=norm.item(), tokens_per_s=speed)
            bar.set_postfix_str(f"loss {train_loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s", refresh=False)
            busy, interval, state.loss_sum, state.loss_steps = 0.0, 0, 0.0, 0
        bar.update()
        # the ranks agree on the signal and on the time
        stopping, state.elapsed_s = machine.total(bool(stop), time.perf_counter() - started, op=dist.ReduceOp.MAX)
        saving = config.save_interval and state.step % config.save_interval == 0
        if config.save_minutes and state.elapsed_s - record.saved_s >= 60 * config.save_minutes:
            saving = True
        if stopping or saving:
            record.take(losses, norms)
            record.save()
        # a scaler begins far too high on purpose, and comes down by one power of two a step
        if (log_due or saving) and state.skipped_in_a_row >= (20 if training.scaler.is_enabled() else 5):
            bar.close()
            machine.say(f"error: {state.skipped_in_a_row} steps in a row, the last at {state.step:,}, had no finite "
                        "loss or gradient, and none of them reached the weights; try a lower --learning_rate, a longer "
                        "--warmup_steps or --dtype float32, with another --out_dir", file=sys.stderr)
            return 1
        if stopping:
            break
    record.take(losses, norms)
    record.save()
    bar.close()
    final = over and state.best and last_figures(config, machine, micro, meta, record, splits, lambda: bool(stop))
    if not over or final is None:
        machine.say(f"stopped at step {state.step:,}, {record.last_is()}; go on with: {again}")
        return 1
    machine.say(f"finished: {over}")
    if state.skipped:
        machine.say(f"{state.skipped:,} of {state.step:,} steps had no finite loss or gradient and were skipped")
    if state.best:
        machine.say(f"best at step {state.best['step']:,}, in {record.best}")
        for split, figures in final.items():
            machine.say(describe(split, figures, meta["separator"]))
    if state.best and config.expected_ppl:
        low, high = config.expected_ppl
        machine.say(f"expected {low:g} to {high:g}: {verdict(config.expected_ppl, state.best['val_ppl'])}")
    if config.recorded_ppl:
        machine.say(f"the notebook recorded {perplexity(config.recorded_ppl)}")
    if not record.finish(final):
        machine.say(f"{config.out_dir} could not be written to the last: {record.last_is()}; free some space, then: "
                    f"{again}")
        return 1
    return 0


def last_figures(config, machine, micro, meta, record, splits, stopped):
    """{split: figures} of the best checkpoint over splits, {split: tokens}; None if stopped() on any rank."""
    best = machine.from_rank_0(lambda: load_checkpoint(record.best))
    model = record.training.model
    model.load_state_dict(best["model"])
    found = {}
    for split, tokens in splits.items():
        found[split] = evaluate(model, tokens, meta["splits"][split], config.max_seq_len, machine, micro,
                                stopped=stopped)
        if found[split] is None:
            return None
    return found


if __name__ == "__main__":
    run(main)
