"""How fast a config trains on this machine, and how near that is to what the machine can do.

    python bench.py config/exp5.py [--steps N] [--profile] [--setting value ...]
    torchrun --nproc_per_node=2 bench.py config/exp5.py

Takes train.py's own steps, on random tokens, so that no data set is needed.
"""

from lab.console import run

import argparse
import os
import resource
import statistics
import sys
import time

import numpy as np
import torch

from config import load_config
from machine import open_machine
from prepare import progress
from train import Batches, new_model, prepare_training, take_step

VOCAB_SIZE = 50257
WARM_UP = 3  # steps that are not counted: compilation, allocations, caches


def matmul_peak(machine, seconds=1.0):
    """FLOP/s of this rank on square matrices of machine.dtype, timed for about so many seconds: the median."""
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv=None):
    began = time.perf_counter()
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    config = load_config(rest, "bench.py", "--steps N (20) counts N steps, --profile traces three more")
    with open_machine(config) as machine:
        return bench(config, machine, max(1, args.steps), args.profile, began)


def bench(config, machine, steps, profile, began):
    """Time `steps` training steps and print what came of it."""
    tokens = np.random.RandomState(0).randint(VOCAB_SIZE, size=1 << 20).astype(np.uint16)
    batches = Batches(tokens, config.max_seq_len, config.batch_size, config.seed)
    training = prepare_training(config, machine, new_model(config, VOCAB_SIZE).to(machine.device))
    model = training.model
    step_tokens = config.batch_size * config.max_seq_len

    def step(i):
        start = time.perf_counter()
        loss, norm = take_step(config, machine, training, batches, i, config.learning_rate)
        machine.wait()
        return time.perf_counter() - start

    step(0)
    first = time.perf_counter() - began
    for i in range(1, WARM_UP):
        step(i)
    before = matmul_peak(machine)
    bar = progress(steps, "timing", unit="step", leave=False, disable=machine.rank > 0)
    speeds = []
    for i in range(WARM_UP, WARM_UP + steps):
        speeds.append(step_tokens / step(i))
        bar.update()
    bar.close()
    peaks = [sum(machine.gather(peak)) for peak in (before, matmul_peak(machine))]
    peak, median, flops = statistics.mean(peaks), statistics.median(speeds), model.flops_per_token()
    memory = ", ".join(f"{value / 1e9:.2f}" for value in machine.gather(peak_bytes(machine.device)))
    machine.say(
        f"config       {config.name} on {machine}, {'compiled' if training.compiled else 'not compiled'}, "
        f"{model.count()['total']:,} parameters\n"
        f"tokens/s     median {median:,.0f}, minimum {min(speeds):,.0f}, maximum {max(speeds):,.0f} over {steps} steps "
        f"of {config.batch_size} x {config.max_seq_len}, in forward passes of {training.micro}\n"
        f"first step   {first:.1f} s after the start\n"
        f"peak memory  {memory} GB a process\n"
        f"matmul peak  {peak / 1e9:,.0f} GFLOP/s ({peaks[0] / 1e9:,.0f} before, {peaks[1] / 1e9:,.0f} after)\n"
        f"MFU          {flops * median / peak:.3f} = {flops:,} FLOPs a token x tokens/s / matmul peak"
    )
    if profile:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if machine.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            for i in range(3):
                step(WARM_UP + steps + i)
        if machine.rank == 0:
            trace = f"{config.out_dir}/trace.json"
            os.makedirs(config.out_dir, exist_ok=True)
            profiler.export_chrome_trace(trace)
            key = "self_device_time_total" if machine.device.type == "cuda" else "self_cpu_time_total"
            print(profiler.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=50))
            print(f"the trace of three steps is in {trace}; chrome://tracing and ui.perfetto.dev show it")
    return 0


if __name__ == "__main__":
    run(main)
