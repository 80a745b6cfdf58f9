"""A config's training step beside that of nanoGPT's own model.py and optimizer, in turn.

    python docs/experiments/baseline.py config/exp3.py --peer DIR [--steps N] [--setting value ...]

DIR is a checkout of nanoGPT. Both take the same shape and the same rows of random tokens. nanoGPT
runs as its README says: float32 without compile on a CPU, bfloat16 with compile on CUDA.
"""

import importlib.util
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import bench
from config import load_config
from lab.console import UserError, run
from lab.machine import open_machine
from lab.settings import setting
from lab.weights import settle

VOCAB_SIZE = 50304  # what nanoGPT pads GPT-2's vocabulary to


@dataclass
class Options(bench.Options):
    """bench.py's settings, and how to run the baseline."""

    peer: str = setting("nanoGPT", "a checkout of nanoGPT", path=True)
    peer_only: bool = setting(False, "time the baseline alone, for its memory")
    peer_dtype: str = setting(
        "auto",
        "of the baseline's matmuls; auto is as its README says: bfloat16 on CUDA, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    peer_compile: bool | None = setting(
        None, "torch.compile the baseline (None: as its README says, on CUDA only)"
    )


def main(argv=None):
    config = load_config(argv, "docs/experiments/baseline.py", Options)
    machine = open_machine(config)
    config, _ = settle(config, machine)
    if machine.world > 1 or config.block != "gpt2" or config.d_ff != 4 * config.d_model:
        raise UserError(
            "nanoGPT's block is gpt2 with d_ff 4 * d_model, and it is timed in one process; "
            f"use --block gpt2 --d_ff {4 * config.d_model} without torchrun"
        )
    compare(config, machine)


def compare(config, machine):
    """Time the two in turn, so that whatever else the machine does meets both; print the figures of
    each and the ratio of the pairs."""
    trainer = bench.new_trainer(config, machine)
    steps = {} if config.peer_only else {"ours": trainer.step}
    steps["nanoGPT"] = baseline_step(config, machine, trainer)
    times = {name: [] for name in steps}
    for i in range(bench.UNCOUNTED + config.steps):
        for name, step in steps.items():
            times[name].append(bench.seconds(machine, step, i))

    # what came of it
    for name, step in steps.items():
        timed = times[name][bench.UNCOUNTED :]
        speeds = [trainer.batches.step_tokens / t for t in timed]
        print(
            f"{name:11}  median {statistics.median(speeds):,.0f} tokens/s, minimum "
            f"{min(speeds):,.0f}, maximum {max(speeds):,.0f}; first step {times[name][0]:.1f} s"
        )
        if machine.device.type == "cuda":
            tell_device(machine, name, step, bench.UNCOUNTED + config.steps)
    print(f"peak memory  {bench.peak_bytes(machine.device) / 1e9:.2f} GB of {' and '.join(steps)}")
    if not config.peer_only:
        pairs = zip(times["nanoGPT"], times["ours"], strict=True)
        ratios = [theirs / ours for theirs, ours in pairs][bench.UNCOUNTED :]
        print(
            f"ratio        ours is {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def tell_device(machine, name, step, start):
    """Print what a CUDA device does with a step: waited for one by one and together, how many
    kernels, and how much of the time it is busy."""
    alone = statistics.median(bench.seconds(machine, step, start + i) for i in range(20))

    def many(first):
        for i in range(first, first + 20):
            step(i)

    together = min(bench.seconds(machine, many, start + 20 * turn) for turn in (1, 2, 3)) / 20
    with torch.profiler.profile() as profiler:
        bench.seconds(machine, step, start)
    cuda = torch.autograd.DeviceType.CUDA
    kernels = [event for event in profiler.events() if event.device_type == cuda]
    launches = [event for event in profiler.events() if "Launch" in event.name]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    machine.say(
        f"{name:11}  {1000 * alone:.2f} ms waited for, {1000 * together:.2f} ms together; "
        f"{len(kernels)} kernels in {len(launches)} launches, busy for {busy / together:.2f} of it"
    )


def load_baseline(folder):
    """nanoGPT's model.py as a module. Raises UserError."""
    path = Path(folder, "model.py")
    try:
        spec = importlib.util.spec_from_file_location("baseline_model", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["baseline_model"] = module  # its dataclass looks there
        spec.loader.exec_module(module)
        _ = module.GPTConfig, module.GPT
    except (OSError, AttributeError, ImportError) as error:
        raise UserError(
            f"{path} is not nanoGPT's model.py ({error}); run `git clone "
            "https://github.com/karpathy/nanoGPT`, and name that folder with --peer"
        ) from None
    return module


def baseline_step(config, machine, trainer):
    """step(i) of nanoGPT's own model and optimizer, on the trainer's rows, as its train.py makes
    them. Raises UserError."""
    module, kind = load_baseline(config.peer), machine.device.type
    shape = module.GPTConfig(
        block_size=config.max_seq_len,
        vocab_size=VOCAB_SIZE,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_embd=config.d_model,
        dropout=config.dropout,
        bias=True,
    )
    model = module.GPT(shape).to(machine.device)
    betas = config.beta1, config.beta2
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, kind)
    parameters = list(model.parameters())
    if kind == "cuda" if config.peer_compile is None else config.peer_compile:
        model = torch.compile(model)
    readme = torch.bfloat16 if kind == "cuda" else torch.float32
    dtype = readme if config.peer_dtype == "auto" else getattr(torch, config.peer_dtype)

    def step(i):
        starts = trainer.starts(i).to(trainer.tokens.device, non_blocking=True)
        rows = trainer.rows(starts).to(machine.device)
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            _, loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    run(main)
