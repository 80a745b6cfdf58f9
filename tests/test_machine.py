"""Where a process runs: its device, its compute dtype, its ranks; the memory that a pass takes."""

import pytest
import torch
from helpers import CPU, MODERN, refuse_float64, trainer_of

from config import Config
from lab import machine
from lab.console import UserError
from lab.data import Dataset
from lab.evaluate import evaluate
from lab.machine import Machine, choose_device, choose_dtype, ranks_of

ALONE = ranks_of({})


def one_of(rank, world, local_world, local_rank):
    """A process among others."""
    return Machine(CPU.device, CPU.dtype, rank, world, local_world, local_rank)


# --- ranks and devices


def test_ranks_are_torchrun_s_and_stray_variables_mean_nothing():
    stray = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert ranks_of(stray) == ranks_of(dict(WORLD_SIZE="", RANK="x")) == ALONE
    assert ranks_of(stray | dict(TORCHELASTIC_RUN_ID="a")) == one_of(3, 4, 2, 1)


def test_what_cannot_be_had_is_named():
    with pytest.raises(UserError, match="mps"):
        choose_device(Config(device="mps"), ALONE)
    with pytest.raises(UserError, match="batch_size 1"):
        choose_device(Config(device="cpu", batch_size=1), one_of(0, 2, 2, 0))


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(Config(device="cuda"), one_of(3, 4, 2, 1)) == torch.device("cuda", 1)
    assert choose_device(Config(device="auto"), ALONE) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="2 cuda"):
        choose_device(Config(device="cuda"), one_of(0, 3, 3, 0))


# --- the compute dtype


@pytest.mark.parametrize("bfloat16, chosen", [(8, "bfloat16"), (9.5, "float32")])
def test_the_faster_dtype_is_chosen_and_a_near_tie_is_float32(monkeypatch, bfloat16, chosen):
    times = iter([[10, 12], [bfloat16, 12]])
    monkeypatch.setattr(machine.timeit, "repeat", lambda *args, **kwargs: next(times))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert choose_dtype(Config(dtype="auto"), CPU) == getattr(torch, chosen)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert choose_dtype(Config(dtype="auto"), CPU) == torch.float32


@pytest.mark.parametrize("more", [(), MODERN])
def test_training_and_evaluating_take_no_float64(tiny, more):
    """MPS has none."""
    trainer = trainer_of([tiny, *more], 9)
    with refuse_float64():
        for i in range(3):
            trainer.step(i)
        evaluate(trainer.model, Dataset("tiny").split("val"), CPU, 3)
