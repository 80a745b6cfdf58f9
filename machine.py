"""Where a process runs: its device, the dtype of its matmuls, its place among the ranks that torchrun started."""

from lab.console import UserError, first_line, torchrun

import contextlib
import math
import os
import platform
import re
import signal
import sys
import time
import traceback
import uuid
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from model import softmax_loss
from prepare import cpu_cores


@dataclass
class Machine:
    """Where this process runs: its device, the dtype of its matmuls, and its place among the ranks."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    local_world: int = 1

    def __str__(self):
        return f"{self.world} x {self.device.type}, {str(self.dtype)[6:]}"

    def device_name(self):
        """The processor's name, and how many cores this process uses of it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        name = platform.processor() or platform.machine()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo") as file:
                name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
        return f"{torch.get_num_threads()} cores of {name}"

    def memory(self):
        """Bytes of memory that this process can count on: its device's, or its share of the computer's."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        bytes_there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = "/sys/fs/cgroup/memory.max"  # a container's
        if os.path.exists(limit):
            with open(limit) as file:
                allowed = file.read().strip()
            bytes_there = min(bytes_there, int(allowed)) if allowed.isdigit() else bytes_there
        return bytes_there / self.local_world

    def autocast(self):
        """The context in which matmuls run in dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def total(self, *values, op=dist.ReduceOp.SUM):
        """Each value's sum (or op) over all ranks, as floats. On the CPU, so that no device has to wait."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op)
        return tensor.tolist()

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
        """Raise UserError, on every rank, if a rank's dict of values is not rank 0's, and name it."""
        first, *others = self.gather(values)
        for rank, theirs in enumerate(others, 1):
            if differ := [f"{k} {theirs[k]!r} there, {first[k]!r} here" for k in first if theirs[k] != first[k]]:
                raise UserError(f"rank {rank} was started otherwise than rank 0: {'; '.join(differ)}; start all ranks "
                                "with one command, on one data set")

    def from_rank_0(self, function):
        """What function() returns on rank 0, on every rank; a UserError that it raises there, too."""
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


def bfloat16_is_native(device):
    """Whether a device multiplies bfloat16 by itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in supported)


def this_start(store, rank, world, seconds):
    """The part of torchrun's store that is this start's own.

    After a restart the store still holds the addresses of ranks that are dead, and a rank that reads one before its
    new owner has written there connects to nobody (pytorch#135712; counting restarts does not help, since machines
    count differently). So rank 0 draws a name, every other rank answers under it with one of its own, and goes on only
    when rank 0 has repeated that. Raises UserError after `seconds`.
    """
    mine, end, missing = uuid.uuid4().hex, time.monotonic() + seconds, 0
    try:
        if rank == 0:
            store.set("start", mine)
            answers = []
            for missing in range(1, world):
                answers.append(store.get(f"{mine}/{missing}").decode())  # waits
            store.set(f"{mine}/go", " ".join(answers))
            return dist.PrefixStore(mine, store)
        while time.monotonic() < end:
            start = store.get("start").decode()
            store.set(f"{start}/{rank}", mine)
            if store.check([f"{start}/go"]) and mine in store.get(f"{start}/go").decode():
                return dist.PrefixStore(start, store)
            time.sleep(0.05)
    except RuntimeError:  # the store's time-out, or the store itself has gone
        pass
    raise UserError(f"rank {missing} has not begun within {seconds:g} s; start all ranks together, or raise "
                    "--rank_timeout")


def ranks_of(environment):
    """(rank, ranks, rank on this machine, ranks on it) as torchrun says them. Raises UserError for
    variables that something else has left there."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    said = {name: environment[name] for name in names if environment.get(name)}
    try:
        rank, world, local_rank, local_world = (
            int(said.get(name, default)) for name, default in zip(names, (0, 1, 0, 1), strict=True)
        )
        fits = 0 <= rank < world and 0 <= local_rank < local_world
    except ValueError:
        fits = False
    if not fits or (world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys()):
        found = ", ".join(f"{name}={value}" for name, value in said.items())
        raise UserError(f"the environment has {found}, and torchrun did not start this process; "
                        f"`unset {' '.join(said)}`, or start it with `{torchrun(2)} train.py ...`")
    return rank, world, local_rank, local_world


@contextlib.contextmanager
def open_machine(config):
    """The Machine of this process; joins the ranks if torchrun started it, and leaves them. Raises UserError."""
    # huge pages for large tensors, read at the first allocation: a step's fresh buffers cost a fifth as much to touch
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    rank, world, local_rank, local_world = ranks_of(os.environ)
    kind, _, index = config.device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[kind]:
        raise UserError(f"this torch {torch.__version__} finds no {kind} device; use --device cpu or leave it out")
    if kind == "cuda" and max(local_world, int(index or 0) + 1) > torch.cuda.device_count():
        raise UserError(f"{local_world} processes on device {config.device}, and {torch.cuda.device_count()} GPUs; "
                        "use torchrun --nproc_per_node with as many as there are")
    if kind == "mps" and world > 1:
        raise UserError("mps takes one process; leave torchrun out, or add --device cpu")
    if config.batch_size < world:
        raise UserError(f"batch_size {config.batch_size} leaves some of {world} ranks without a sequence; start fewer")
    if kind == "cuda":
        index = index if index and world == 1 else local_rank
        device = torch.device("cuda", int(index))
        torch.cuda.set_device(device)
    else:
        device = torch.device(kind)
    if kind == "cpu" and local_world > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, cpu_cores() // local_world))  # torchrun would leave each process one
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if bfloat16_is_native(device) else "float16" if kind == "cuda" else "float32"
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        timeout = timedelta(minutes=config.rank_timeout)
        store = this_start(*next(dist.rendezvous("env://", timeout=timeout)), timeout.total_seconds())
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
        roll_call = dist.new_group(backend="gloo", timeout=min(timeout, timedelta(seconds=15)))
    try:
        yield Machine(device, getattr(torch, dtype), rank, world, local_world)
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or re.search("gloo|nccl|connection closed|timed out", str(error), re.I)
        if world == 1:
            raise
        if not lost:  # an error of this rank's own
            traceback.print_exc()
            os._exit(1)  # leaving the group would wait for what the others began
        missing = ""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun may end this rank while it asks
        try:  # who does not answer? in a group of its own, since the one that broke is of no more use
            patience = timedelta(seconds=min(10, 60 * config.rank_timeout))
            dist.monitored_barrier(roll_call, timeout=patience, wait_all_ranks=True)
        except RuntimeError as silent:
            missing = str(silent).splitlines()[0]
        print(f"error: rank {rank} of {world} lost another rank ({missing or first_line(error)}); the last checkpoint "
              "is whole: start again with --resume, or use torchrun --max-restarts", file=sys.stderr, flush=True)
        os._exit(1)  # the other ranks' threads would wait for ever
    finally:
        if world > 1:
            dist.destroy_process_group()


def micro_batch_size(config, model, machine):
    """Sequences a forward pass: as configured, else as many of this rank's rows as fit into the device's memory (on a
    CPU 1,024 tokens of them), in equal parts. Depends on the device's size, not on what is free just now, so that a
    resumed run cuts alike."""
    all_rows = rows = math.ceil(config.batch_size / machine.world)
    if config.micro_batch_size:
        return min(config.micro_batch_size, rows)
    kind = machine.device.type
    if kind == "mps":
        rows = min(rows, max(1, 32766 // config.max_seq_len))  # see head_loss
    if kind == "cpu":
        rows = min(rows, max(1, 1024 // config.max_seq_len))  # more would be no faster, and take more memory
    budget = machine.memory() * (0.8 if kind == "cuda" else 0.5)
    fits = next((n for n in range(rows, 1, -1) if model.memory_bytes(n, machine.dtype, kind) <= budget), 1)
    fits = int(machine.total(fits, op=dist.ReduceOp.MIN)[0])  # GPUs may differ, and an evaluation is cut alike
    return math.ceil(all_rows / math.ceil(all_rows / fits))


def compile_blocks(model, machine):
    """torch.compile the model's hidden(), in place, and say whether that worked; where there is no compiler, one line,
    and it stays as it is."""
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.zeros(8, device=machine.device))
    except Exception as error:  # the compiler's back ends fail in their own ways
        machine.say(f"torch.compile does not work here ({first_line(error)[:150]}); going on without it")
        return False
    model.hidden = torch.compile(model.hidden)
    if machine.device.type == "cuda":  # on a CPU the blocks of rows that stay in the cache are faster
        model.fused = torch.compile(softmax_loss)
    return True
