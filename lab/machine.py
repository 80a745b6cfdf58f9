"""Where a process runs: its device, the dtype of its matmuls, its place among the ranks."""

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

import torch
import torch.distributed as dist

from lab.console import UserError, cpu_cores, first_line, torchrun


@dataclass
class Machine:
    """Where this process runs: its device, the dtype of its matmuls, and its place among the
    ranks."""

    device: torch.device
    dtype: torch.dtype
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
        name = platform.processor() or platform.machine()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo") as file:
                names = [
                    line.split(":")[1].strip() for line in file if line.startswith("model name")
                ]
            name = names[0] if names else name
        return f"{torch.get_num_threads()} cores of {name}"

    def memory(self):
        """Bytes of memory that this process can count on: its device's, or its share of the
        computer's."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = "/sys/fs/cgroup/memory.max"  # a container's
        if os.path.exists(limit):
            with open(limit) as file:
                allowed = file.read().strip()
            there = min(there, int(allowed)) if allowed.isdigit() else there
        return there / self.local_world

    def autocast(self):
        """The context in which matmuls run in dtype."""
        low = self.dtype != torch.float32
        # no weight is used twice in a pass, and a graph would keep old casts
        return torch.autocast(self.device.type, self.dtype, enabled=low, cache_enabled=False)

    def reduce(self, *values, op=dist.ReduceOp.SUM):
        """Each value's sum (or op) over all ranks, a list of floats. By way of the CPU, so that no
        device has to wait."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def largest(self, *values):
        """Each value's largest over all ranks."""
        return self.reduce(*values, op=dist.ReduceOp.MAX)

    def smallest(self, *values):
        """Each value's smallest over all ranks."""
        return self.reduce(*values, op=dist.ReduceOp.MIN)

    def gather(self, value):
        """The value of every rank, a list."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self):
        """Until the device has done what it was given, so that a clock is true."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def agree(self, values):
        """Raise UserError, on every rank, if a rank's dict of values is not rank 0's; it names the
        rank and what differs."""
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

    def say(self, *words, **kwargs):
        """Print on rank 0 alone, at once."""
        if self.rank == 0:
            print(*words, flush=True, **kwargs)


@dataclass
class Ranks:
    """A process's place among those that torchrun started."""

    rank: int
    world: int
    local_rank: int  # among those on this computer
    local_world: int


def ranks_of(environment):
    """The Ranks that torchrun's variables tell. Raises UserError for variables that something else
    has left there."""
    defaults = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
    said = {name: environment[name] for name in defaults if environment.get(name)}
    try:
        ranks = Ranks(*(int(value) for value in (defaults | said).values()))
        fits = 0 <= ranks.rank < ranks.world and 0 <= ranks.local_rank < ranks.local_world
    except ValueError:
        fits = False
    if not fits or (ranks.world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys()):
        found = ", ".join(f"{name}={value}" for name, value in said.items())
        raise UserError(
            f"the environment has {found}, and torchrun did not start this process; "
            f"`unset {' '.join(said)}`, or start it with `{torchrun(2)} train.py ...`"
        )
    return ranks


def choose_device(config, ranks):
    """The torch.device of a process. Raises UserError if there is none for it."""
    kind, _, index = config.device.partition(":")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if kind == "auto":
        kind = "cuda" if cuda else "cpu"
    if not dict(cpu=True, cuda=cuda, mps=mps)[kind]:
        raise UserError(
            f"this torch {torch.__version__} finds no {kind} device; use --device cpu or leave it "
            "out"
        )
    wanted = max(ranks.local_world, int(index or 0) + 1)
    if kind == "cuda" and wanted > torch.cuda.device_count():
        raise UserError(
            f"{ranks.local_world} processes on device {config.device}, and "
            f"{torch.cuda.device_count()} GPUs; use torchrun --nproc_per_node with as many as "
            "there are"
        )
    if config.cuda_graph and kind != "cuda":
        raise UserError(f"cuda_graph needs a CUDA device, and this is {kind}; leave it out")
    if kind == "mps" and ranks.world > 1:
        raise UserError("mps takes one process; leave torchrun out, or add --device cpu")
    if config.batch_size < ranks.world:
        raise UserError(
            f"batch_size {config.batch_size} leaves some of {ranks.world} ranks without a "
            "sequence; start fewer"
        )
    if kind != "cuda":
        return torch.device(kind)
    return torch.device("cuda", int(index) if index and ranks.world == 1 else ranks.local_rank)


def choose_dtype(config, machine):
    """(the compute dtype of a run, why, as a phrase, "" where there is nothing to say)."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype), ""
    if machine.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16, ""
    if machine.device.type != "cpu" or not has_bfloat16():
        return torch.float32, ""
    # a CPU that has the instruction may still be slower with it
    rows, D, F = 1024, min(config.d_model, 4096), min(config.d_ff, 4096)
    x, weight = torch.randn(rows, D), torch.randn(D, F)
    low_x, low_weight = x.bfloat16(), weight.bfloat16()
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(3):
        for left, right in ((x, weight), (low_x, low_weight)):
            began = time.perf_counter()
            for _ in range(max(1, 2**31 // (rows * D * F))):
                left @ right
            best[left.dtype] = min(best[left.dtype], 1000 * (time.perf_counter() - began))
    full, low = best.values()
    why = f"measured: float32 {full:.0f} ms, bfloat16 {low:.0f} ms"
    return torch.bfloat16 if low < 0.9 * full else torch.float32, why


def has_bfloat16():
    """Whether the CPU multiplies bfloat16 by itself. Emulated it is slower than float32."""
    supported = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    known = [getattr(torch.cpu, name, lambda: False) for name in supported]
    return any(instruction() for instruction in known)


@contextlib.contextmanager
def open_machine(config):
    """The Machine of this process, in float32; joins the ranks if torchrun started it, and leaves
    them. Raises UserError. A lost rank ends this one too: see end_of_ranks()."""
    # Huge pages for large tensors, read at the first allocation: a step's fresh buffers cost a
    # fifth as much to touch.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
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
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=config.rank_timeout)
        dist.init_process_group(backend, timeout=timeout)
        yield machine
    except RuntimeError as error:
        end_of_ranks(error, ranks)
    finally:
        dist.destroy_process_group()


def end_of_ranks(error, ranks):
    """End this process, exit code 1, after a RuntimeError among ranks: with one line where another
    rank is lost. Never returns, since leaving the group would wait for what the others began."""
    words = "gloo|nccl|connection|timed out|timeout"
    if isinstance(error, dist.DistError) or re.search(words, str(error), re.I):
        print(
            f"error: rank {ranks.rank} of {ranks.world} lost another rank ({first_line(error)}); "
            "the last checkpoint is whole; start again with --resume",
            file=sys.stderr,
            flush=True,
        )
    else:
        traceback.print_exc()
    os._exit(1)
