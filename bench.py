"""How fast a config trains on this machine, and how near that is to what the machine can do.

    python bench.py config/exp5.py [--steps N] [--profile] [--setting value ...]
    torchrun --nproc_per_node=2 bench.py config/exp5.py

Takes train.py's own steps, on random tokens, so that no data set is needed.
"""

from lab.console import BEGAN, progress, run

import os
import resource
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from config import Config, load_config
from lab.data import VOCAB_SIZE, Batches
from lab.machine import open_machine
from lab.settings import setting
from lab.trainer import Trainer
from train import new_model

WARM_UP = 3  # steps that are not counted: compilation, allocations, caches


@dataclass
class Options(Config):
    """A run's settings, and what to time of it."""

    steps: int = setting(20, "steps that are timed", low=1)
    profile: bool = setting(False, "trace three more steps into out_dir/trace.json")


def matmul_peak(machine, seconds=1.0):
    """FLOP/s of this rank on square matrices of machine.dtype, timed for about so many seconds: the
    median."""
    n = 2048 if machine.device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=machine.device).to(machine.dtype) for _ in range(2))
    out, times = torch.empty_like(a), []
    for _ in range(3):
        torch.mm(a, b, out=out)
    while sum(times) < seconds:
        machine.wait()
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        machine.wait()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times)


def peak_bytes(device):
    """The most memory that this process has held: of the device on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(argv=None):
    config = load_config(argv, "bench.py", Options)
    with open_machine(config) as machine:
        return bench(config, machine)


def bench(config, machine):
    """Time config.steps training steps and print what came of it."""
    random = np.random.RandomState(0)
    tokens = random.randint(VOCAB_SIZE, size=1 << 20).astype(np.uint16)
    batches = Batches(tokens, config.max_seq_len, config.batch_size, config.seed)
    model = new_model(config, VOCAB_SIZE).to(machine.device)
    trainer = Trainer(config, machine, model, batches, total_steps=1000)

    def timed(i):
        start = time.perf_counter()
        trainer.step(i)
        machine.wait()
        return time.perf_counter() - start

    timed(0)
    first = time.perf_counter() - BEGAN
    for i in range(1, WARM_UP):
        timed(i)
    before = matmul_peak(machine)
    bar = progress(config.steps, "timing", unit="step", leave=False, disable=machine.rank > 0)
    speeds = []
    for i in range(WARM_UP, WARM_UP + config.steps):
        speeds.append(batches.step_tokens / timed(i))
        bar.update()
    bar.close()
    after = matmul_peak(machine)
    tell(config, machine, trainer, speeds, first, (before, after))
    if config.profile:
        profile(config, machine, timed)
    return 0


def tell(config, machine, trainer, speeds, first, peaks):
    """Print the figures. first: seconds to the end of the first step; peaks: FLOP/s of this rank,
    before and after the steps."""
    model = trainer.model
    peaks = [sum(machine.gather(peak)) for peak in peaks]
    peak, median, flops = statistics.mean(peaks), statistics.median(speeds), model.flops_per_token()
    memory = machine.gather(peak_bytes(machine.device))
    gigabytes = ", ".join(f"{value / 1e9:.2f}" for value in memory)
    machine.say(
        f"config       {config.name} on {machine}, "
        f"{'compiled' if trainer.compiled else 'not compiled'}, "
        f"{model.count()['total']:,} parameters\n"
        f"tokens/s     median {median:,.0f}, minimum {min(speeds):,.0f}, maximum "
        f"{max(speeds):,.0f} over {config.steps} steps of {config.batch_size} x "
        f"{config.max_seq_len}, in forward passes of {trainer.micro}\n"
        f"first step   {first:.1f} s after the start\n"
        f"peak memory  {gigabytes} GB a process\n"
        f"matmul peak  {peak / 1e9:,.0f} GFLOP/s ({peaks[0] / 1e9:,.0f} before, "
        f"{peaks[1] / 1e9:,.0f} after)\n"
        f"MFU          {flops * median / peak:.3f} = {flops:,} FLOPs a token x tokens/s / matmul "
        "peak"
    )


def profile(config, machine, timed):
    """Trace three more steps, and print the operations that took longest."""
    activities, key = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if machine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        for i in range(3):
            timed(WARM_UP + config.steps + i)
    if machine.rank == 0:
        trace = f"{config.out_dir}/trace.json"
        os.makedirs(config.out_dir, exist_ok=True)
        profiler.export_chrome_trace(trace)
        averages = profiler.key_averages()
        print(averages.table(sort_by=key, row_limit=10, max_name_column_width=50))
        print(f"the trace of three steps is {trace}; ui.perfetto.dev shows it")


if __name__ == "__main__":
    run(main)
