"""Where a process runs: its device, its compute dtype, its place among the ranks."""

import contextlib
import os
import platform
import re
import sys
import timeit
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

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
    local_rank: int = 0  # this one's number among them
    why: str = ""  # this dtype, where it was chosen

    def __str__(self):
        why = f" ({self.why})" if self.why else ""
        return f"{self.world} x {self.device.type}, {str(self.dtype)[6:]}{why}"

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
        """Raise UserError on every rank if a rank's dict of values is not rank 0's."""
        first, *others = self.gather(values)
        for rank, theirs in enumerate(others, 1):
            keys = [k for k in first if theirs[k] != first[k]]
            if keys:
                differ = "; ".join(f"{k} {theirs[k]!r} there, {first[k]!r} here" for k in keys)
                raise UserError(
                    f"rank {rank} has other settings than rank 0: {differ}; start all with one "
                    "command, on one data set"
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
    kind, _, index = config.device.partition(":")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = dict(cpu=machine.local_world, cuda=gpus, mps=int(torch.backends.mps.is_available()))
    if kind == "auto":
        kind = "cuda" if gpus else "cpu"
    wanted = max(machine.local_world, int(index or 0) + 1)
    if wanted > there[kind]:
        raise UserError(
            f"there are {there[kind]} {kind} devices, and device {config.device} in "
            f"{machine.local_world} processes takes {wanted}; use --device cpu or fewer processes"
        )
    if config.cuda_graph and kind != "cuda":
        raise UserError(f"cuda_graph needs a CUDA device, and this is {kind}; leave it out")
    if config.batch_size < machine.world:
        raise UserError(
            f"batch_size {config.batch_size} leaves some of {machine.world} ranks without a "
            "sequence; start fewer"
        )
    if kind != "cuda":
        return torch.device(kind)
    return torch.device("cuda", int(index) if index and machine.world == 1 else machine.local_rank)


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
    full, low = (matmul_ms(dtype, config.d_model) for dtype in (torch.float32, torch.bfloat16))
    why = f"measured: float32 {full:.1f} ms, bfloat16 {low:.1f} ms"
    return torch.bfloat16 if low < 0.9 * full else torch.float32, why


def has_bfloat16():
    """Whether the CPU multiplies bfloat16 by itself. Emulated it is slower than float32."""
    return torch.cpu._is_avx512_bf16_supported()


def matmul_ms(dtype, d_model):
    """Milliseconds of a part of the head's matmul, which is most of a small model's work. The least
    of eight, since other work may come between."""
    width = min(d_model, 1024)  # wider ones give the same answer
    x, weight = (torch.randn(n, width).to(dtype) for n in (256, 8192))
    return 1000 * min(timeit.repeat(lambda: x @ weight.t(), number=1, repeat=8))


@contextlib.contextmanager
def open_machine(config):
    """The Machine of this process, in float32; joins the ranks if torchrun started it, and leaves
    them. Raises UserError. A RuntimeError among ranks ends the process with exit code 1."""
    # Huge pages for large tensors, read at the first allocation: a step's fresh buffers cost a
    # fifth as much to touch.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    check_compile_cache()

    # where this process runs
    machine = ranks_of(os.environ)
    machine.device = choose_device(config, machine)
    if machine.device.type == "cuda":
        torch.cuda.set_device(machine.device)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if machine.device.type == "cpu" and machine.local_world > 1 and threads == "1":
        # torchrun would leave each process one
        torch.set_num_threads(max(1, cpu_cores() // machine.local_world))
    if machine.world == 1:
        yield machine
        return

    # among ranks
    backend = "cpu:gloo,cuda:nccl" if machine.device.type == "cuda" else "gloo"
    minutes = config.rank_timeout
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    except RuntimeError as error:
        raise UserError(
            f"not all ranks have begun within {minutes:g} minutes ({first_line(error)[:150]}); "
            "start them together, or raise --rank_timeout"
        ) from None
    try:
        yield machine
    except RuntimeError:
        # leaving the group would wait for what the others began
        traceback.print_exc()
        print(
            f"error: rank {machine.rank} of {machine.world} failed as shown above, or lost another "
            "rank; resume from the last checkpoint with --resume",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
    finally:
        dist.destroy_process_group()


def check_compile_cache():
    """Let torch use a folder of its own where TORCHINDUCTOR_CACHE_DIR cannot be written: it makes
    that folder even where nothing is compiled, and would fail."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        warn(f"TORCHINDUCTOR_CACHE_DIR {folder} cannot be written; going on without it")
