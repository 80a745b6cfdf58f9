"""How fast a config trains on this machine, and how near that is to what the machine can do.

    python bench.py config/exp5.py [--steps N] [--setting value ...]
    torchrun --nproc_per_node=2 bench.py config/exp5.py

Takes train.py's own steps, on random tokens, so that no data set is needed.
"""

import functools
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from config import Config, load_config
from lab.console import run
from lab.data import Batches, vocabulary_of
from lab.folder import read_json
from lab.machine import open_machine
from lab.settings import setting
from lab.trainer import Trainer
from lab.weights import new_model, settle

UNCOUNTED = 3  # steps that are not counted: compilation, allocations, caches


@dataclass
class Options(Config):
    """A run's settings, and what to time of it."""

    steps: int = setting(20, "steps that are timed", low=1)


def main(argv=None):
    config = load_config(argv, "bench.py", Options)
    machine = open_machine(config)
    config, _ = settle(config, machine)
    trainer = new_trainer(config, machine)
    first, *_ = [seconds(machine, trainer.step, i) for i in range(UNCOUNTED)]
    steps = range(UNCOUNTED, UNCOUNTED + config.steps)
    times = [seconds(machine, trainer.step, i) for i in steps]
    memory = machine.gather(peak_bytes(machine.device))  # before the peak's own matrices
    peak = matmul_peak(machine)

    # what came of it
    speeds = [trainer.batches.step_tokens / t for t in times]
    median, model = statistics.median(speeds), trainer.model
    flops, parameters = model.flops_per_token(), model.count()["total"]
    how = "compiled" if trainer.compiled else "not compiled"
    how += ", as a CUDA graph" if trainer.graphed and machine.device.type == "cuda" else ""
    machine.say(
        f"config       {config.name} on {machine}, {how}, {parameters:,} parameters\n"
        f"tokens/s     median {median:,.0f}, minimum {min(speeds):,.0f}, maximum "
        f"{max(speeds):,.0f} over {config.steps} steps of {config.batch_size} x "
        f"{config.max_seq_len}, in forward passes of {trainer.micro}\n"
        f"first step   {first:.1f} s\n"
        f"peak memory  {', '.join(f'{value / 1e9:.2f}' for value in memory)} GB per process\n"
        f"matmul peak  {peak / 1e9:,.0f} GFLOP/s in the compute dtype\n"
        f"MFU          {flops * median / peak:.3f} = {flops:,} FLOPs per token x tokens/s / "
        "matmul peak"
    )


def new_trainer(config, machine):
    """A Trainer of a config's model on random tokens, of the data set's vocabulary: as its name
    tells, if it is not prepared."""
    meta = read_json(f"{config.data_dir}/{config.dataset}/meta.json")
    vocab_size = meta.get("vocab_size", vocabulary_of(config.dataset)[1])
    tokens = np.random.RandomState(0).randint(vocab_size, size=1 << 20).astype(np.uint16)
    batches = Batches(tokens, config.max_seq_len, config.batch_size, config.seed)
    model = new_model(config, vocab_size).to(machine.device)
    return Trainer(config, machine, model, batches, total_steps=1000)


def seconds(machine, function, *args):
    """How long function(*args) takes, waited for."""
    began = time.perf_counter()
    function(*args)
    getattr(torch, machine.device.type).synchronize()
    return time.perf_counter() - began


def matmul_peak(machine):
    """FLOP/s of all ranks on square matrices in the compute dtype; the median of half a second."""
    n = 2048 if machine.device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=machine.device).to(machine.dtype) for _ in range(2))
    multiply, times = functools.partial(torch.mm, a, b, out=torch.empty_like(a)), []
    while sum(times) < 0.5:
        times.append(seconds(machine, multiply))
    return sum(machine.gather(2 * n**3 / statistics.median(times)))


def peak_bytes(device):
    """The most memory that this process has held: reserved on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource  # not at the top: Windows has none, and console.run() says so

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    run(main)
