"""The learning rate, AdamW and Muon, and who gets which."""

import functools

import pytest
import torch
from helpers import assert_near, near

from config import Config
from lab.optimizer import Muon, lr_at, make_optimizers, orthogonalise
from model import LanguageModel


def test_learning_rate():
    config = Config(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    approx = functools.partial(pytest.approx, rel=near(torch.float64, 10), abs=0)
    rates = [lr_at(step, config, 110) for step in range(111)]
    assert rates[0] == approx(0.1) and rates[9] == rates[10] == 1 and rates[60] == approx(0.55)
    assert rates[110] == approx(0.1) and rates[10:] == sorted(rates[10:], reverse=True)
    config.lr_schedule = "constant"
    assert lr_at(5, config, 110) == approx(0.6) and lr_at(109, config, 110) == 1
    config.lr_schedule = "trapezoid"
    assert lr_at(5, config, 110) == approx(0.6)
    assert lr_at(66, config, 110) == lr_at(10, config, 110) == 1
    assert lr_at(88, config, 110) == approx(0.55) and lr_at(110, config, 110) == approx(0.1)


@pytest.mark.arithmetic
def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    x = torch.randn(3, 12, 30)
    u, before, v = torch.linalg.svd(x.double(), full_matrices=False)
    values = before / before.norm(dim=-1, keepdim=True)
    # all errors are as large as the largest value's
    condition = (values[:, :1] / values[:, -1:]).max()
    for _ in range(5):  # each singular value by itself
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert 0.6 < values.min() and values.max() < 1.3
    # the three sums of each of five rounds
    tolerance = condition * near(torch.float32, 5 * (30 + 12 + 12))
    # and directions stay
    assert_near(orthogonalise(x), u @ torch.diag_embed(values) @ v, tolerance)
    assert torch.equal(orthogonalise(x.mT), orthogonalise(x).mT)


@pytest.mark.arithmetic
def test_muon_takes_torch_s_steps(monkeypatch):
    """torch's own takes a matrix at a time and would round to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    torch.manual_seed(0)
    ours = [torch.randn(8, 24), torch.randn(24, 8), torch.randn(8, 24)]
    theirs, begun = [p.clone() for p in ours], [p.clone() for p in ours]
    one = Muon([dict(params=ours)], lr=0.02, weight_decay=0.1)
    two = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="original")
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step(), two.step()
    # random numbers, 8 x 24: singular values within a factor of (24**0.5 + 8**0.5) / (24**0.5 -
    # 8**0.5) = 4
    updates_rounding = 4 * near(torch.float32, 5 * 5 * (24 + 8 + 8))
    for p, q, start in zip(ours, theirs, begun, strict=True):
        # what they moved by, which is small beside the weights
        weights_rounding = 5 * near(torch.float32, 1) * start.abs().max() / (q - start).abs().max()
        assert_near(p - start, q - start, updates_rounding + weights_rounding)


@pytest.mark.parametrize("block", ["gpt2", "modern"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_updated_once_and_beside_muon_the_blocks_alone_decay(block, optimizer):
    model = LanguageModel(50, 8, 8, 2, 16, 1, block=block)
    config = Config(
        weight_decay=0.1, optimizer=optimizer, learning_rate=1e-3, muon_learning_rate=2e-2
    )
    names = {id(p): name for name, p in model.named_parameters()}
    updated, muon = [], set()
    for each in make_optimizers(config, model):
        for group in each.param_groups:
            mine = [names[id(p)] for p in group["params"]]
            for p in group["params"]:
                decays = isinstance(each, Muon) if optimizer == "muon" else p.dim() > 1
                assert (group["weight_decay"] == 0.1) == decays
            if isinstance(each, Muon):
                muon.update(mine)
                assert group["scale"] == pytest.approx(20, rel=near(torch.float64, 2))
            updated += mine
    assert sorted(updated) == sorted(names.values())
    matrices = {"qkv", "attention_out", "mlp_in", "mlp_out"} if optimizer == "muon" else set()
    assert muon == {f"blocks.0.{name}.weight" for name in matrices}
