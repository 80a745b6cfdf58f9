"""What only a GPU can show: `make test-cuda`. Skipped elsewhere, and by `make test`, whose
numbers are the CPU's."""

import functools
import math

import numpy as np
import pytest
import test_graph
import torch
import torch.nn.functional as F
from helpers import (
    MODERN,
    MUON,
    RANKS,
    ROOT,
    TOKENS,
    VOCAB,
    assert_same_curve,
    assert_same_curves,
    metrics,
    near,
    same,
    weights,
)

import train
from config import load_config
from lab import kernels
from lab.data import Batches
from lab.folder import load_checkpoint
from lab.generate import SamplingOptions, Texts
from lab.kernels import HeadLoss, head_loss, softmax_expression
from lab.machine import Machine
from lab.trainer import Trainer
from lab.weights import new_model
from model import LanguageModel

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU, or not make test-cuda"
)


GPU = Machine(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("fused", [None, softmax_expression, torch.compile(softmax_expression)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_loss_is_the_truth_s(dtype, fused, monkeypatch):
    monkeypatch.setattr(kernels, "head_rows", lambda kind, V, N: (2048, 512))
    torch.manual_seed(0)
    # two chunks
    x, weight = torch.randn(2999, 64) * 0.5, torch.randn(50257, 64) * 0.3
    bias = torch.randn(50257)
    targets = torch.randint(50257, (2999,))
    leaves = [t.cuda().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        losses, *_ = head_loss(*(t.detach() for t in leaves), targets.cuda(), False, fused)
        loss = HeadLoss.apply(*leaves, targets.cuda(), fused)
    loss.backward()
    truth = [t.double().cuda().requires_grad_() for t in (x, weight, bias)]
    each = F.cross_entropy(F.linear(*truth), targets.cuda(), reduction="none")
    each.mean().backward()
    # sums of 64, 50257 and 2999 in float32; and what goes into a gradient's matmul was rounded to
    # dtype three times
    sums = near(torch.float32, 64 + 50257 + 2999)
    tolerance = sums if dtype == torch.float32 else sums + near(dtype, 3)
    assert (losses - each).norm() / each.norm() < tolerance
    assert abs(loss / each.mean() - 1) < tolerance
    for mine, theirs in zip(leaves, truth, strict=True):
        assert (mine.grad - theirs.grad).norm() / theirs.grad.norm() < tolerance


@pytest.mark.parametrize("more", [(), MODERN])
def test_a_gpu_gives_the_curve_of_the_cpu(tiny, more, monkeypatch):
    # a scaler that begins so low skips no step; one that begins as torch's does is tried below
    low_scaler = functools.partial(torch.amp.GradScaler, init_scale=256.0)
    options = [tiny, "--dropout", "0", "--max_steps", "20", "--eval_interval", "10", *more]
    runs = {
        "cpu": (),
        "plain": ("--compile", "False"),
        "compiled": (),
        "parts": ("--micro_batch_size", "2"),
        "low": ("--dtype", "bfloat16"),
        "half": ("--dtype", "float16"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", low_scaler)
        for out, settings in runs.items():
            device = ("--device", "cuda") if out != "cpu" else ()
            assert train.main([*options, *device, *settings, "--out_dir", out]) == 0
    moved = np.ptp([line["train_loss"] for line in metrics("cpu")])
    for out in list(runs)[1:]:
        dtype = {"low": torch.bfloat16, "half": torch.float16}.get(out, torch.float32)
        # every sum is another; some 40 tensors are rounded
        terms = TOKENS + VOCAB if dtype == torch.float32 else 40
        if more and dtype != torch.bfloat16:
            # Muon is in bfloat16 on a GPU, five rounds of three products
            dtype, terms = torch.bfloat16, 15
        for evaluations, key in ((False, "train_loss"), (True, "val_loss")):
            lines = (metrics(folder, evaluations) for folder in ("cpu", out))
            whole, mine = ([line[key] for line in each] for each in lines)
            assert_same_curve(whole, mine, terms, 20, moved, dtype=dtype)
    scaled = "--device cuda --dtype float16 --out_dir scaled".split()
    assert train.main([*options, *scaled]) == 0
    assert metrics("scaled")[-1]["skipped"] < 10  # the scaler came down, and on it went


def test_a_resumed_run_goes_on_as_it_was(tiny):
    options = [tiny, *"--device cuda --lr_schedule constant --warmup_steps 0".split()]
    options += "--block modern --optimizer muon".split()
    assert train.main([*options, "--max_steps", "20", "--out_dir", "whole"]) == 0
    for steps in ("9", "20"):
        assert train.main([*options, "--max_steps", steps, "--out_dir", "cut", "--resume"]) == 0
    one, two = ([line["train_loss"] for line in metrics(out)] for out in ("whole", "cut"))
    # sums on a GPU come in no fixed order, before Muon's rounds in bfloat16; dropout is the same
    assert_same_curve(one, two, TOKENS, condition=MUON)


def curve(out):
    return [line["train_loss"] for line in metrics(out)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("more", [(), MODERN])
def test_a_graph_gives_the_curve_of_the_eager_step(tiny, capsys, more, dtype):
    # dropout, a learning rate that moves, parts of 4 and 2, and there and back by resume
    options = [tiny, "--device", "cuda", "--dtype", dtype, "--micro_batch_size", "4", *more]
    options += ["--max_steps", "30", "--save_interval", "5", "--warmup_steps", "10"]
    eager = "--cuda_graph", "False"
    assert train.main([*options, "--out_dir", "eager", *eager]) == 0
    assert train.main([*options, "--out_dir", "graph"]) == 0
    # both follow from the run's length, too
    constant = "--lr_schedule constant --warmup_steps 0".split()
    turns = (eager, ("--resume",), (*eager, "--resume"))
    for steps, turn in zip(("11", "21", "30"), turns, strict=True):
        part = [*options, *constant, "--out_dir", "turns", "--max_steps", steps]
        assert train.main([*part, *turn]) == 0
    assert train.main([*options, *constant, "--out_dir", "constant", *eager]) == 0
    assert "no CUDA graph" not in capsys.readouterr().out
    # sums on a GPU come in no fixed order, before Muon's rounds in bfloat16
    condition = MUON if more else 1
    for one, two in (("eager", "graph"), ("constant", "turns")):
        assert_same_curve(curve(one), curve(two), TOKENS, condition=condition)


def test_a_graph_skips_a_step_that_is_not_finite(tiny):
    trainer = test_graph.watched(True, "--device", "cuda", machine=GPU)
    take = test_graph.take(trainer, range(3), bad=None)
    trainer.model.head_bias.data[3] = math.inf
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    skipped = test_graph.take(trainer, range(3, 5), bad=None)
    assert all(math.isfinite(norm) for _, norm in take) and trainer.graphed
    assert not any(math.isfinite(norm) for _, norm in skipped)
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())


class Waiting(test_graph.Trainer):
    """A Trainer whose step reads a number on the host, which no graph can hold."""

    def backward(self, rows):
        loss = super().backward(rows)
        loss.item()
        return loss


def test_a_step_that_waits_goes_on_eagerly(tiny, capsys):
    settings = "--device", "cuda", "--dropout", "0.1"
    one = test_graph.watched(True, *settings, machine=GPU, cls=Waiting)
    two = test_graph.watched(False, *settings, machine=GPU)
    curves = [test_graph.take(trainer, range(12), bad=None) for trainer in (one, two)]
    assert capsys.readouterr().out.count("no CUDA graph") == 1 and not one.graphed
    for mine, theirs in zip(*(zip(*c, strict=True) for c in curves), strict=True):
        assert_same_curve(theirs, mine, TOKENS)


ONE_GPU = """
import sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
import train
from lab import console, machine
# train.py gives each rank a GPU of its own, and NCCL asks for that; gloo does not
machine.choose_device = lambda config, ranks: torch.device("cuda", 0)
join = dist.init_process_group
dist.init_process_group = lambda backend, **settings: join("gloo", **settings)
console.run(train.main)
"""


@pytest.mark.parametrize("graph", ["False", "True"])
def test_two_processes_on_one_gpu_are_one(tiny, tmp_path, script, graph):
    # step by step by DDP, and as two graphs with one sum between them
    options = [tiny, *"--device cuda --dropout 0 --max_steps 20 --eval_interval 10".split()]
    assert train.main([*options, "--out_dir", "one"]) == 0
    ranks = tmp_path / "ranks.py"
    ranks.write_text(ONE_GPU.format(root=str(ROOT)))
    options += ["--out_dir", "two", "--cuda_graph", graph]
    assert "no CUDA graph" not in script(ranks, *options, launch=RANKS).stdout
    assert_same_curves("one", "two", 20)


def test_a_step_that_is_not_finite_never_reaches_the_weights(tiny, monkeypatch):
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: real(*args) * math.nan)
    assert train.main([tiny, "--device", "cuda", "--save_interval", "2", *MODERN]) == 1
    begun = new_model(load_config([tiny, *MODERN]), VOCAB).state_dict()
    assert same(begun, weights("out/tiny/last.pt"))


@pytest.mark.parametrize(
    "config, rows", [("config/exp5.py", 32), ("config/exp6.py", 32), ("config/exp1.py", 8)]
)
def test_the_memory_of_a_step_is_what_the_plan_says(config, rows):
    config = load_config([config])
    low, full = torch.bfloat16, torch.float32
    for dtype, config.compile in (low, True), (low, False), (full, False):
        machine = Machine(torch.device("cuda"), dtype)
        torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        tokens = np.random.RandomState(0).randint(50257, size=1 << 18).astype(np.uint16)
        batches = Batches(tokens, config.max_seq_len, config.batch_size, 0)
        trainer = Trainer(config, machine, new_model(config, 50257).cuda(), batches, 1000)
        assert trainer.micro == rows
        for step in range(3):
            trainer.step(step)
        planned = trainer.model.memory_bytes(rows, dtype, "cuda")
        seen = torch.cuda.max_memory_allocated() - held
        del trainer
        torch._dynamo.reset()
        print(
            f"{config.name}, {dtype}, compile {config.compile}: {seen / 1e9:.2f} of "
            f"{planned / 1e9:.2f} GB planned"
        )
        assert 0.2 < seen / planned < 1.1


def test_text_is_the_cpu_s(tiny, capsys):
    assert train.main([tiny, "--device", "cuda", *MODERN]) == 0
    best = LanguageModel.from_checkpoint(load_checkpoint("out/tiny/best.pt"))
    prompts, texts = [[5], [7, 8, 9, 10]], []
    for device, graph in (("cpu", False), ("cuda", False), ("cuda", True)):
        greedy = Texts(best.to(device), 2, SamplingOptions(0), graph)
        texts.append([*greedy.generate(prompts, 40)])
    assert texts[0] == texts[1] == texts[2]
    options = SamplingOptions(1.0, 20, 0.9, 1.3, seed=2)
    one, two = (Texts(best, 2, options, graph) for graph in (False, True))
    for more in prompts, prompts[::-1]:  # a captured step serves other prompts, too
        ids = [[*texts.generate(more, 40)] for texts in (one, two)]
        assert ids[0] == ids[1]
    assert capsys.readouterr().err.count("no CUDA graph") == 0
