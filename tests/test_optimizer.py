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
    assert rates[110] == approx(0.1) and all(
        a >= b for a, b in zip(rates[10:], rates[11:], strict=False)
    )
    config.lr_schedule = "constant"
    assert lr_at(5, config, 110) == approx(0.6) and lr_at(109, config, 110) == 1
    config.lr_schedule = "trapezoid"
    assert (
        lr_at(5, config, 110) == approx(0.6)
        and lr_at(66, config, 110) == lr_at(10, config, 110) == 1
    )
    assert lr_at(88, config, 110) == approx(0.55) and lr_at(110, config, 110) == approx(0.1)


@pytest.mark.parametrize("total, warmup", [(100_000, 200), (2000, 200), (60, 6), (9, 0), (1, 0)])
def test_a_warm_up_that_is_not_given_is_a_tenth_of_the_run_or_200_steps(total, warmup):
    config = Config(learning_rate=1.0)
    rates = [lr_at(step, config, total) for step in range(min(total, 300))]
    assert rates.index(max(rates)) == max(0, warmup - 1) and 0 < rates[0] <= 1
    assert rates[:warmup] == [pytest.approx((i + 1) / warmup) for i in range(warmup)]


@pytest.mark.arithmetic
def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    x = torch.randn(3, 12, 30)
    u, before, v = torch.linalg.svd(x.double(), full_matrices=False)
    values = before / before.norm(dim=-1, keepdim=True)
    condition = (
        values[:, :1] / values[:, -1:]
    ).max()  # all errors are as large as the largest value's
    for _ in range(5):  # each singular value by itself
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert 0.6 < values.min() and values.max() < 1.3
    tolerance = condition * near(
        torch.float32, 5 * (30 + 12 + 12)
    )  # the three sums of each of five rounds
    assert_near(
        orthogonalise(x), u @ torch.diag_embed(values) @ v, tolerance
    )  # and directions stay
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
    for p, q, start in zip(
        ours, theirs, begun, strict=True
    ):  # what they moved by, which is small beside the weights
        weights_rounding = 5 * near(torch.float32, 1) * start.abs().max() / (q - start).abs().max()
        # random numbers, 8 x 24: singular values within a factor of (24**0.5 + 8**0.5) / (24**0.5
        # - 8**0.5) = 4
        assert_near(
            p - start, q - start, 4 * near(torch.float32, 5 * 5 * (24 + 8 + 8)) + weights_rounding
        )


@pytest.mark.parametrize("block", ["gpt2", "modern"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_updated_once_and_weight_decay_acts_on_matrices_alone(block, optimizer):
    model = LanguageModel(50, 8, 8, 2, 16, 1, block=block)
    config = Config(
        weight_decay=0.1, optimizer=optimizer, learning_rate=1e-3, muon_learning_rate=2e-2
    )
    names = {id(p): name for name, p in model.named_parameters()}
    updated, muon = [], set()
    for each in make_optimizers(config, model):
        for group in each.param_groups:
            mine = [names[id(p)] for p in group["params"]]
            assert all(
                (group["weight_decay"] == 0.1) == (model.get_parameter(name).dim() > 1)
                for name in mine
            )
            if isinstance(each, Muon):
                muon.update(mine)
                assert group["scale"] == pytest.approx(20, rel=near(torch.float64, 2))
            updated += mine
    assert sorted(updated) == sorted(names.values())
    matrices = {"qkv", "attention_out", "mlp_in", "mlp_out"} if optimizer == "muon" else set()
    assert muon == {f"blocks.0.{name}.weight" for name in matrices}
