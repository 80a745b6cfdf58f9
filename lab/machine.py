"""Where a process runs: its device, its compute dtype, its place among the ranks."""

import contextlib
import math
import os
import platform
import re
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from lab.console import UserError, cpu_cores, first_line, warn


@dataclass
class Machine:
    """What a process runs on, and what it asks of the other ranks."""

    device: torch.device
    dtype: torch.dtype  # of the matmuls
    rank: int = 0
    world: int = 1
    local_world: int = 1  # ranks on this computer
    why: str = ""  # this dtype, where it was chosen

    def __str__(self):
        why = f" ({self.why})" if self.why else ""
        return f"{self.world} x {self.device.type}, {str(self.dtype)[6:]}{why}"

    def device_name(self):
        """The processor's name, and how many cores this process uses of it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor() or platform.machine()
        cores = torch.get_num_threads()
        return f"{cores} core{'s' * (cores > 1)} of {name}"

    def memory(self):
        """Bytes that this process can count on: its GPU's, or its share of the computer's."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = Path("/sys/fs/cgroup/memory.max")  # a container's
        allowed = limit.read_text().strip() if limit.exists() else ""
        return (min(total, int(allowed)) if allowed.isdigit() else total) / self.local_world

    def autocast(self):
        """The context in which matmuls run in dtype."""
        low = self.dtype != torch.float32
        # no weight is used twice in a pass, and a graph would keep old casts
        return torch.autocast(self.device.type, self.dtype, enabled=low, cache_enabled=False)

    def wait(self):
        """Until the device has done what it was given, so that a clock is true."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def say(self, *words, **kwargs):
        """Print on rank 0 alone, at once."""
        if self.rank == 0:
            print(*words, flush=True, **kwargs)

    # --- among the ranks

    def reduce(self, *values, op=dist.ReduceOp.SUM):
        """Each value's sum (or op) over all ranks, a list of floats."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)  # on the CPU: no device has to wait
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def largest(self, *values):
        """Each value's largest over all ranks, a list of floats."""
        return self.reduce(*values, op=dist.ReduceOp.MAX)

    def smallest(self, *values):
        """Each value's smallest over all ranks, a list of floats."""
        return self.reduce(*values, op=dist.ReduceOp.MIN)

    def gather(self, value):
        """The value of every rank, a list."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, values):
        """Raise UserError on every rank if a rank's dict of values is not rank 0's."""
        first, *others = self.gather(values)
        for rank, theirs in enumerate(others, 1):
            keys = [k for k in first if theirs[k] != first[k]]
            if keys:
                differ = "; ".join(f"{k} {theirs[k]!r} there, {first[k]!r} here" for k in keys)
                raise UserError(
                    f"rank {rank} has other settings than rank 0: {differ}; start all ranks with "
                    "one command, on one data set"
                )

    def from_rank_0(self, function):
        """What function() returns on rank 0, on every rank; so too a UserError that it raises."""
        result = [None]
        if self.rank == 0:
            try:
                result = [function()]
            except UserError as error:
                result = [error]
        if self.world > 1:
            dist.broadcast_object_list(result)
        if isinstance(result[0], UserError):
            raise result[0]
        return result[0]


class Ranks(NamedTuple):
    """A process's place among those that torchrun started."""

    rank: int
    world: int
    local_rank: int  # among those on this computer
    local_world: int


def ranks_of(environment):
    """The Ranks that torchrun's variables tell. Without its mark there is one process, since a
    cluster may have left variables of the same names."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return Ranks(0, 1, 0, 1)
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    return Ranks(*(int(environment[name]) for name in names))


def choose_device(config, ranks):
    """The torch.device of a process. Raises UserError if there is none for it."""
    kind, _, index = config.device.partition(":")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = dict(cpu=ranks.local_world, cuda=gpus, mps=int(torch.backends.mps.is_available()))
    if kind == "auto":
        kind = "cuda" if gpus else "cpu"
    wanted = max(ranks.local_world, int(index or 0) + 1)
    if wanted > there[kind]:
        raise UserError(
            f"there are {there[kind]} {kind} devices, and device {config.device} in "
            f"{ranks.local_world} processes takes {wanted}; use --device cpu or fewer processes"
        )
    if config.cuda_graph and kind != "cuda":
        raise UserError(f"cuda_graph needs a CUDA device, and this is {kind}; leave it out")
    if config.batch_size < ranks.world:
        raise UserError(
            f"batch_size {config.batch_size} leaves some of {ranks.world} ranks without a "
            "sequence; start fewer"
        )
    if kind != "cuda":
        return torch.device(kind)
    return torch.device("cuda", int(index) if index and ranks.world == 1 else ranks.local_rank)


def choose_dtype(config, machine):
    """(a run's compute dtype, why, as a phrase, "" where there is nothing to say)."""
    kind = machine.device.type
    if config.dtype != "auto":
        return getattr(torch, config.dtype), ""
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16, ""
    if kind != "cpu" or not has_bfloat16():
        return torch.float32, ""
    # a CPU that has the instruction may still be slower with it
    full, low = matmul_ms(config.d_model)
    why = f"measured: float32 {full:.1f} ms, bfloat16 {low:.1f} ms"
    return torch.bfloat16 if low < 0.9 * full else torch.float32, why


def has_bfloat16():
    """Whether the CPU multiplies bfloat16 by itself. Emulated it is slower than float32."""
    names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def matmul_ms(d_model):
    """(in float32, in bfloat16): milliseconds of a part of the head's matmul, which is most of a
    small model's work. The least of eight, in turn, since other work may come between."""
    width = min(d_model, 1024)  # wider ones give the same answer
    x, weight = torch.randn(256, width), torch.randn(8192, width)
    pairs = (x, weight), (x.bfloat16(), weight.bfloat16())
    least = [math.inf, math.inf]
    for _ in range(8):
        for i, (left, right) in enumerate(pairs):
            began = time.perf_counter()
            left @ right.t()
            least[i] = min(least[i], 1000 * (time.perf_counter() - began))
    return least


@contextlib.contextmanager
def open_machine(config):
    """The Machine of this process, in float32; joins the ranks if torchrun started it, and leaves
    them. Raises UserError. A RuntimeError among ranks ends the process with exit code 1."""
    # Huge pages for large tensors, read at the first allocation: a step's fresh buffers cost a
    # fifth as much to touch.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    check_compile_cache()
    ranks = ranks_of(os.environ)
    device = choose_device(config, ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if device.type == "cpu" and ranks.local_world > 1 and threads == "1":
        # torchrun would leave each process one
        torch.set_num_threads(max(1, cpu_cores() // ranks.local_world))
    machine = Machine(device, torch.float32, ranks.rank, ranks.world, ranks.local_world)
    if ranks.world == 1:
        yield machine
        return
    join(device, config.rank_timeout)
    try:
        yield machine
    except RuntimeError as error:
        end_process(error, ranks)
    finally:
        dist.destroy_process_group()


def check_compile_cache():
    """Let torch use a folder of its own where TORCHINDUCTOR_CACHE_DIR cannot be written: it makes
    that folder even where nothing is compiled, and would fail."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if folder and not os.access(folder, os.W_OK):
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        warn(f"TORCHINDUCTOR_CACHE_DIR {folder} cannot be written; going on without it")


def join(device, minutes):
    """Join the other ranks. Raises UserError if one of them has not begun in time."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    except RuntimeError as error:
        raise UserError(
            f"not all ranks have begun within {minutes:g} minutes ({first_line(error)[:150]}); "
            "start them together, or raise --rank_timeout"
        ) from None


def end_process(error, ranks):
    """End this process, exit code 1, after a RuntimeError among ranks: with one line where another
    rank is lost. Never returns: to leave the group would wait for what the others began."""
    lost = "gloo|nccl|connection|timed out|timeout"
    if isinstance(error, dist.DistError) or re.search(lost, str(error), re.I):
        print(
            f"error: rank {ranks.rank} of {ranks.world} lost another rank "
            f"({first_line(error)[:150]}); the steps since the last checkpoint are lost; resume "
            "with --resume",
            file=sys.stderr,
            flush=True,
        )
    else:
        traceback.print_exc()
    os._exit(1)
