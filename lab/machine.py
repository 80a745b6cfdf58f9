"""Where a process runs: its device, its compute dtype, its place among the ranks."""

import os
import platform
import re
import timeit
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lab.console import UserError, cpu_cores


@dataclass
class Machine:
    """What a process runs on, and what it asks of the other ranks."""

    device: torch.device
    dtype: torch.dtype  # of the matmuls
    rank: int = 0
    world: int = 1
    local_world: int = 1  # ranks on this computer
    local_rank: int = 0  # this one's number among them

    def __str__(self):
        return f"{self.world} x {self.device.type}, {str(self.dtype)[6:]}"

    def device_name(self):
        """The processor's name, and how many cores this process uses of it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        info = Path("/proc/cpuinfo")
        text = info.read_text() if info.exists() else ""
        name = re.search(r"^model name\s*: (.+)", text, re.M)
        cores = torch.get_num_threads()
        return f"{cores} core{'s' * (cores > 1)} of {name[1] if name else platform.machine()}"

    def memory(self):
        """Bytes that this process can count on: its GPU's, or its share of the computer's."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total / self.local_world

    def autocast(self):
        """The context in which matmuls run in dtype."""
        low = self.dtype != torch.float32
        # no weight is used twice in a pass, and a graph would keep old casts
        return torch.autocast(self.device.type, self.dtype, enabled=low, cache_enabled=False)

    def say(self, *words, **kwargs):
        """Print on rank 0 alone, at once."""
        if self.rank == 0:
            print(*words, flush=True, **kwargs)

    # --- among the ranks

    def reduce(self, *values):
        """Each value's sum over all ranks, a list of floats."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)  # on the CPU: no device has to wait
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value):
        """The value of every rank, a list."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, values):
        """Raise UserError on every rank if a rank has other values."""
        if any(theirs != values for theirs in self.gather(values)):
            raise UserError("the ranks differ in settings or data; start all with one command")

    def from_rank_0(self, function):
        """Call function() on rank 0 alone. Every rank returns its result, or raises its UserError
        or OSError."""
        result = [None]
        if self.rank == 0:
            try:
                result = [function()]
            except (UserError, OSError) as error:
                result = [error]
        if self.world > 1:
            dist.broadcast_object_list(result)
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]


def ranks_of(environment):
    """A Machine with the ranks that torchrun's variables tell, its device still to be chosen.
    Without torchrun's mark there is one process: a cluster may have left variables like these."""
    ranks = ()
    if "TORCHELASTIC_RUN_ID" in environment:
        names = "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"
        ranks = [int(environment[name]) for name in names]
    return Machine(torch.device("cpu"), torch.float32, *ranks)


def choose_device(config, machine):
    """The torch.device of a machine's process. Raises UserError if there is none for it."""
    kind, processes = config.device, machine.local_world
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = dict(cpu=processes, cuda=gpus, mps=int(torch.backends.mps.is_available()))
    if kind == "auto":
        kind = "cuda" if gpus else "cpu"
    if processes > there[kind]:
        raise UserError(
            f"there are {there[kind]} {kind} devices for {processes} processes; use --device cpu "
            "or fewer processes"
        )
    if config.batch_size < machine.world:
        raise UserError(
            f"batch_size {config.batch_size} leaves some of {machine.world} ranks without a "
            "sequence; start fewer"
        )
    return torch.device("cuda", machine.local_rank) if kind == "cuda" else torch.device(kind)


def choose_dtype(config, machine):
    """A run's compute dtype."""
    kind = machine.device.type
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    # emulated bfloat16 is slower than float32, and even a CPU's own may be
    if kind != "cpu" or not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    # so time a part of the head's matmul, which is most of a small model's work
    width, seconds = min(config.d_model, 1024), []  # wider ones give the same answer
    for dtype in torch.float32, torch.bfloat16:
        x, weight = torch.randn(256, width, dtype=dtype), torch.randn(8192, width, dtype=dtype)
        times = timeit.repeat(lambda x=x, weight=weight: x @ weight.t(), number=1, repeat=8)
        seconds.append(min(times))  # since other work may come between
    full, low = seconds
    return torch.bfloat16 if low < 0.9 * full else torch.float32


def open_machine(config):
    """The Machine of this process, in float32, among the ranks if torchrun started it. Raises
    UserError."""
    # Huge pages for large tensors, read at the first allocation: a step's fresh buffers cost a
    # fifth as much to touch.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    machine = ranks_of(os.environ)
    machine.device = choose_device(config, machine)
    on_cuda = machine.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(machine.device)
    elif machine.local_world > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # torchrun would leave each process one
        torch.set_num_threads(max(1, cpu_cores() // machine.local_world))
    if machine.world > 1:
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=config.rank_timeout))
    return machine
