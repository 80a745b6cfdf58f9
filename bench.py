"""How fast a config trains on this machine, and how near that is to what the machine can do.

    python bench.py config/exp5.py [--steps N] [--profile] [--setting value ...]
    torchrun --nproc_per_node=2 bench.py config/exp5.py
    python bench.py config/exp5.py --peer DIR    # beside nanoGPT's model.py in DIR, in turn

Takes train.py's own steps, on random tokens, so that no data set is needed.
"""

import importlib.util
import os
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import Config, load_config
from lab.console import BEGAN, UserError, progress, run
from lab.data import VOCAB_SIZE, Batches
from lab.dtype import has_bfloat16
from lab.machine import open_machine
from lab.settings import setting
from lab.trainer import Trainer
from lab.weights import new_model

WARM_UP = 3  # steps that are not counted: compilation, allocations, caches
PEER_VOCAB = 50304  # what nanoGPT pads GPT-2's vocabulary to


@dataclass
class Options(Config):
    """A run's settings, and what to time of it."""

    steps: int = setting(20, "steps that are timed", low=1)
    profile: bool = setting(False, "trace three more steps into out_dir/trace.json")
    peer: str = setting("", "a checkout of nanoGPT, to be timed in turn with ours", path=True)
    peer_only: bool = setting(False, "time the peer alone, for its memory")
    peer_dtype: str = setting(
        "auto",
        "the peer's matmuls; auto is as its README says: bfloat16 on CUDA, float32 on a CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    peer_compile: bool | None = setting(
        None, "torch.compile the peer (None: as its README says, on CUDA only)"
    )


def main(argv=None):
    config = load_config(argv, "bench.py", Options)
    with open_machine(config) as machine:
        return bench(config, machine)


def bench(config, machine):
    """Time config.steps training steps, ours or a peer's or both in turn, and print what came of
    it."""
    random = np.random.RandomState(0)
    tokens = random.randint(VOCAB_SIZE, size=1 << 20).astype(np.uint16)
    batches = Batches(tokens, config.max_seq_len, config.batch_size, config.seed)
    model = new_model(config, VOCAB_SIZE).to(machine.device)
    trainer = Trainer(config, machine, model, batches, total_steps=1000)
    graphed = trainer.graphed
    sides = {} if config.peer_only else {"ours": trainer.step}
    if config.peer or config.peer_only:
        sides["peer"] = peer_step(config, machine, trainer)

    # the first steps, and the machine's peak before and after
    firsts = {name: seconds(machine, step, 0) for name, step in sides.items()}
    first = time.perf_counter() - BEGAN
    if graphed and not trainer.graphed:
        raise UserError("the step could not be recorded; leave --cuda_graph out")
    for i in range(1, WARM_UP):
        for step in sides.values():
            seconds(machine, step, i)
    memory = machine.gather(peak_bytes(machine.device))  # before the peak's own matrices
    before = best_peak(machine)

    # in turn, so that whatever else the machine does meets both
    times = {name: [] for name in sides}
    bar = progress(config.steps, "timing", unit="step", leave=False, disable=machine.rank > 0)
    for i in range(config.steps):
        for name, step in sides.items():
            times[name].append(seconds(machine, step, WARM_UP + i))
        bar.update()
    bar.close()
    peaks = before, best_peak(machine)

    if "ours" in sides:
        tell(config, machine, trainer, times["ours"], first, peaks, memory)
    if "peer" in sides:
        tell_peer(config, machine, times, firsts["peer"], memory)
    if machine.device.type == "cuda":
        for name, step in sides.items():
            tell_device(config, machine, name, step)
    if config.profile:
        profile(config, machine, trainer.step)
    return 0


def seconds(machine, step, i):
    """How long step i takes, waited for."""
    began = time.perf_counter()
    step(i)
    machine.wait()
    return time.perf_counter() - began


def matmul_peak(machine, dtype, limit=0.5):
    """FLOP/s of this rank on square matrices of dtype, timed for about so many seconds: the
    median."""
    n = 2048 if machine.device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=machine.device).to(dtype) for _ in range(2))
    out, times = torch.empty_like(a), []
    for _ in range(3):
        torch.mm(a, b, out=out)
    while sum(times) < limit:
        times.append(seconds(machine, lambda _: torch.mm(a, b, out=out), 0))
    return 2 * n**3 / statistics.median(times)


def best_peak(machine):
    """FLOP/s of all ranks in the dtype that this machine multiplies faster."""
    dtypes = {machine.dtype, torch.float32}
    if machine.device.type == "cpu" and has_bfloat16():
        dtypes.add(torch.bfloat16)
    return max(
        sum(machine.gather(matmul_peak(machine, dtype))) for dtype in sorted(dtypes, key=str)
    )


def peak_bytes(device):
    """The most memory that this process has held: reserved on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- what is printed


def tell(config, machine, trainer, times, first, peaks, memory):
    """Print our figures. times: seconds a step; first: seconds to the end of the first step; peaks:
    FLOP/s, before and after the steps; memory: the most bytes that each rank has held."""
    model, step_tokens = trainer.model, trainer.batches.step_tokens
    speeds = [step_tokens / t for t in times]
    peak, median, flops = statistics.mean(peaks), statistics.median(speeds), model.flops_per_token()
    gigabytes = ", ".join(f"{value / 1e9:.2f}" for value in memory)
    how = "compiled" if trainer.compiled else "not compiled"
    how += ", one CUDA graph a step" if trainer.graphed else ""
    machine.say(
        f"config       {config.name} on {machine}, {how}, {model.count()['total']:,} parameters\n"
        f"tokens/s     median {median:,.0f}, minimum {min(speeds):,.0f}, maximum "
        f"{max(speeds):,.0f} over {config.steps} steps of {config.batch_size} x "
        f"{config.max_seq_len}, in forward passes of {trainer.micro}\n"
        f"first step   {first:.1f} s after the start\n"
        f"peak memory  {gigabytes} GB a process\n"
        f"matmul peak  {peak / 1e9:,.0f} GFLOP/s in the faster dtype ({peaks[0] / 1e9:,.0f} "
        f"before, {peaks[1] / 1e9:,.0f} after)\n"
        f"MFU          {flops * median / peak:.3f} = {flops:,} FLOPs a token x tokens/s / matmul "
        "peak"
    )


def tell_peer(config, machine, times, first, memory):
    """Print the peer's figures, and ours beside them. See tell()."""
    median, step_tokens = statistics.median(times["peer"]), config.batch_size * config.max_seq_len
    line = f"nanoGPT      median {step_tokens / median:,.0f} tokens/s; first step {first:.1f} s"
    if config.peer_only:
        line += f"; peak memory {memory[0] / 1e9:.2f} GB"
    else:
        ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["peer"], strict=True)]
        line += (
            f"; ours is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
            f"{max(ratios):.2f}); the memory is that of both"
        )
    machine.say(line)


def tell_device(config, machine, name, step):
    """Print what a CUDA device does with a step: waited for one by one and together, how many
    kernels, and how much of the time it is busy."""
    start = WARM_UP + config.steps
    alone = statistics.median(seconds(machine, step, start + i) for i in range(20))

    def many(i):
        for k in range(20):
            step(start + i * 20 + k)

    together = min(seconds(machine, many, i) for i in range(1, 4)) / 20
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        seconds(machine, step, start)
    cuda = torch.autograd.DeviceType.CUDA
    kernels = [event for event in profiler.events() if event.device_type == cuda]
    launches = [event for event in profiler.events() if "Launch" in event.name]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    machine.say(
        f"{name:11}  {1000 * alone:.2f} ms a step waited for, {1000 * together:.2f} ms together; "
        f"{len(kernels)} kernels in {len(launches)} launches, busy for {busy / together:.2f} of it"
    )


def profile(config, machine, step):
    """Trace three more steps, and print the operations that took longest."""
    activities, key = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if machine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        for i in range(3):
            seconds(machine, step, WARM_UP + config.steps + i)
    if machine.rank == 0:
        trace = f"{config.out_dir}/trace.json"
        os.makedirs(config.out_dir, exist_ok=True)
        profiler.export_chrome_trace(trace)
        averages = profiler.key_averages()
        print(averages.table(sort_by=key, row_limit=10, max_name_column_width=50))
        print(f"the trace of three steps is {trace}; ui.perfetto.dev shows it")


# --- the peer


def peer_step(config, machine, trainer):
    """step(i) of nanoGPT's own model and optimizer, on our batches. Raises UserError if there is
    none to be had for this config."""
    path = Path(config.peer, "model.py")
    if machine.world > 1 or config.block != "gpt2" or config.d_ff != 4 * config.d_model:
        raise UserError(
            "nanoGPT's block is gpt2 with d_ff 4 * d_model, and it is timed in one process; choose "
            "such a config, or leave --peer out"
        )
    try:
        spec = importlib.util.spec_from_file_location("peer_model", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["peer_model"] = module  # its dataclass looks there
        spec.loader.exec_module(module)
        shape, GPT = module.GPTConfig, module.GPT
    except (OSError, AttributeError, ImportError) as error:
        raise UserError(
            f"{path} is not nanoGPT's model.py ({error}); run `git clone "
            "https://github.com/karpathy/nanoGPT`, and name that folder"
        ) from None

    # as its train.py makes them
    kind = machine.device.type
    model = GPT(
        shape(
            block_size=config.max_seq_len,
            vocab_size=PEER_VOCAB,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_embd=config.d_model,
            dropout=config.dropout,
            bias=True,
        )
    ).to(machine.device)
    betas = config.beta1, config.beta2
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, kind)
    parameters = list(model.parameters())
    if kind == "cuda" if config.peer_compile is None else config.peer_compile:
        model = torch.compile(model)
    readme = torch.bfloat16 if kind == "cuda" else torch.float32
    dtype = readme if config.peer_dtype == "auto" else getattr(torch, config.peer_dtype)

    def step(i):
        starts = trainer.starts(i).to(trainer.tokens.device, non_blocking=True)
        rows = trainer.rows(starts)
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            _, loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    run(main)
