"""The step as a CUDA graph. On a CPU what a graph would hold is run as it is; test_cuda.py has the
rest."""

import math

import helpers
import pytest
import torch
from helpers import CPU, MODERN, MUON, RANKS, ROOT, TOKENS, assert_same_curve, same

from lab.graph import Capture
from lab.trainer import GraphedStep, Trainer

SETTINGS = ("--micro_batch_size", "4", "--weight_decay", "0.5")  # 6 sequences: parts of 4 and 2


class Watched(Trainer):
    """A Trainer one of whose steps is not finite, and one of whose passes may fail."""

    bad, fails = False, 0

    def backward(self, rows):
        if self.fails:
            self.fails -= 1
            raise RuntimeError("cannot be captured\nsecond line")
        loss = super().backward(rows)
        if self.bad:
            self.model.head_bias.grad[3] = math.inf
        return loss


def watched(graph, *more, machine=CPU, cls=Watched):
    words = ["tiny.py", *SETTINGS, *more]
    return helpers.trainer_of(words, 30, machine, graph, cls)


def take(trainer, steps, bad=7):
    """The losses and norms of steps."""
    curve = []
    for i in steps:
        trainer.bad = i == bad
        curve.append(tuple(value.item() for value in trainer.step(i)))
    return curve


@pytest.mark.arithmetic
@pytest.mark.parametrize("more", [(), MODERN])
def test_a_run_that_changes_to_a_graph_and_back_is_the_eager_one(tiny, more):
    whole = watched(False, *more)
    expected = take(whole, range(18))
    curve, saved = [], None
    for steps, graph in ((range(5), False), (range(5, 12), True), (range(12, 18), False)):
        part = watched(graph, *more)
        if saved:
            part.load_state_dict(saved)
        curve += take(part, steps)
        assert isinstance(part.take_step, GraphedStep) == graph
        saved = part.state_dict()
    assert math.isinf(curve[7][1]) and not torch.isinf(saved["model"]["head_bias"]).any()
    # a graph's learning rates are float32
    condition = MUON if more else 1
    for mine, theirs in zip(zip(*curve, strict=True), zip(*expected, strict=True), strict=True):
        values = [(a, b) for a, b in zip(theirs, mine, strict=True) if math.isfinite(a)]
        assert_same_curve(*zip(*values, strict=True), TOKENS, condition=condition)


@pytest.mark.parametrize("more", [(), MODERN])
def test_a_capture_changes_nothing(tiny, more):
    trainer = watched(True, *more)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    GraphedStep(trainer, Capture(CPU.device))
    assert same(before, trainer.model.state_dict())
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            assert not any(value.any() for value in state.values())


def test_a_step_that_cannot_be_captured_is_taken_one_by_one(tiny, capsys):
    trainer = watched(True)
    trainer.fails = 1
    curve = take(trainer, range(10))
    assert capsys.readouterr().out.count("RuntimeError: cannot be captured") == 1
    assert not trainer.graphed
    assert curve == take(watched(False), range(10))


RANK = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, torch.distributed as dist
from lab.machine import Machine
from test_graph import take, watched
dist.init_process_group("gloo")
machine = Machine(torch.device({device!r}), torch.float32, dist.get_rank(), 2, 2)
trainer = watched(True, *{more!r}, machine=machine)
losses, norms = zip(*take(trainer, range(12), bad=None))
assert trainer.graphed
losses = machine.reduce(*losses)
if machine.rank == 0:
    print(*losses, *norms)
    sys.stdout.flush()
dist.barrier()
os._exit(0)  # gloo's threads may abort a rank that leaves before the other
"""


def curve_of_two_ranks(script, folder, device, more):
    """The losses and norms of two processes on one device, each step two graphs and one sum."""
    names = dict(root=str(ROOT), tests=str(ROOT / "tests"), device=device, more=more)
    (folder / "rank.py").write_text(RANK.format(**names))
    out = script(folder / "rank.py", launch=RANKS).stdout
    values = [float(word) for word in out.split()[-24:]]
    return values[:12], values[12:]


@pytest.mark.slow
@pytest.mark.arithmetic
def test_over_ranks_two_graphs_and_one_sum_are_one_process(tiny, tmp_path, script):
    more = ("--dropout", "0", *MODERN)
    one = zip(*take(watched(False, *more), range(12), bad=None), strict=True)
    two = curve_of_two_ranks(script, tmp_path, "cpu", more)
    for mine, theirs in zip(two, one, strict=True):
        assert_same_curve(theirs, mine, TOKENS, condition=MUON)
