"""Each kernel beside a slow reference or a peer's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, near

from lab import kernels
from lab.kernels import HeadLoss, causal_attention, head_loss, rotate, rotations, softmax_expression

pytestmark = pytest.mark.arithmetic


@pytest.mark.parametrize("rows, block", [(1, 1), (7, 3), (24, 5), (10, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# softmax_expression: as one expression, which is compiled on a GPU
@pytest.mark.parametrize("fused", [None, softmax_expression])
def test_the_fused_loss_is_cross_entropy(rows, block, dtype, fused, monkeypatch):
    monkeypatch.setattr(kernels, "head_rows", lambda kind, V, N: (rows, block))
    torch.manual_seed(0)
    tensors = torch.randn(24, 16) * 3, torch.randn(97, 16), torch.randn(97)
    targets = torch.randint(97, (24,))
    ours = [t.to(dtype).requires_grad_() for t in tensors]
    loss = HeadLoss.apply(*ours, targets, fused)
    losses, *_ = head_loss(*(t.detach() for t in ours), targets, False, fused)
    # a logit, its softmax, and a gradient or the mean over the rows
    tolerance = near(dtype, 16 + 97 + 24)
    assert_near(losses.mean(), loss, tolerance)
    (loss * 2.5).backward()
    truth = [t.detach().double().requires_grad_() for t in ours]
    expected = F.cross_entropy(F.linear(*truth), targets)
    (expected * 2.5).backward()
    assert_near(loss, expected, tolerance)
    for mine, theirs in zip(ours, truth, strict=True):
        assert_near(mine.grad, theirs.grad, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_loss_in_low_precision_is_as_near_the_truth_as_autocast(dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(64, 32), torch.randn(501, 32) * 0.3, torch.randn(501)
    targets = torch.randint(501, (64,))

    def grads(loss_of, *tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        loss = loss_of(*leaves)
        loss.mean().backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    def plain(*tensors):
        return F.cross_entropy(F.linear(*tensors), targets, reduction="none")

    def fused(*tensors):
        return HeadLoss.apply(*tensors, targets)

    truth = grads(plain, *(t.double() for t in (x, weight, bias)))
    with torch.autocast("cpu", dtype):
        ours, theirs = grads(fused, x, weight, bias), grads(plain, x, weight, bias)
        ours[0], *_ = head_loss(x, weight, bias, targets, gradients=False)  # a loss a token
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == torch.float32
        # n errors tell their size to a share of 1 / sqrt(2 n), and a quotient of two such is off
        # by 1 / sqrt(n)
        assert (mine - true).norm() <= (1 + 3 / math.sqrt(mine.numel())) * (other - true).norm()


def test_the_fused_loss_is_exact_where_a_probability_rounds_to_one_or_to_nothing():
    x = torch.tensor([[60.0], [-200.0], [200.0]])
    weight, bias = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([0.5, 0.0, -0.5])
    targets = torch.tensor([0, 1, 2])
    losses, *_ = head_loss(x, weight, bias, targets, gradients=False)
    logits = F.linear(x.double(), weight.double(), bias.double())
    expected = F.cross_entropy(logits, targets, reduction="none")
    # of one logit's size all the same, since a loss is a difference of two
    far = near(torch.float32, 3)
    torch.testing.assert_close(losses.double(), expected, rtol=far, atol=far)
    assert not head_loss(x * math.nan, weight, bias, targets, gradients=False)[0].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_blocks_is_scaled_dot_product_attention(dtype):
    torch.manual_seed(0)
    # two whole blocks of rows and a part of one
    tensors = [torch.randn(2, 3, 300, 8) for _ in range(4)]
    kinds = dtype, torch.float32
    ours, truth = ([t.to(kind).requires_grad_() for t in tensors[:3]] for kind in kinds)
    results = []
    # in float32 it is scaled_dot_product_attention()
    for leaves in ours, truth:
        y = causal_attention(*leaves)
        y.backward(tensors[3].to(y.dtype))
        results.append([y.detach().float(), *(leaf.grad.float() for leaf in leaves)])
    for mine, true in zip(*results, strict=True):
        # A rounding's standard deviation is eps / sqrt(12) at most, and a norm of many holds to it;
        # there are twelve of them, inputs included, to a gradient at the most. In bfloat16 torch's
        # own kernel fails where ATEN_CPU_CAPABILITY is below AVX-512 and oneDNN is not told so.
        assert (mine - true).norm() < near(dtype, 12) / math.sqrt(12) * true.norm()


def test_dropout_keeps_its_share_and_the_mean():
    torch.manual_seed(0)
    dropout, x = kernels.Dropout(0.3), torch.ones(37, 4001, dtype=torch.float64, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    kept = y > 0
    # four standard errors of a mean, at a standard deviation of 1
    error = 4 / math.sqrt(y.numel())
    assert abs(kept.double().mean() - 0.7) < error * math.sqrt(0.7 * 0.3)
    assert abs(y.mean() - 1) < error * math.sqrt(0.3 / 0.7)
    assert torch.equal(x.grad, y.detach()) and y[kept].unique().numel() == 1
    assert y.max().item() == pytest.approx(1 / 0.7, rel=2**-16)  # to which p is rounded
    both = (kept[:, 1:] & kept[:, :-1]).double().mean(), (kept[1:] & kept[:-1]).double().mean()
    # neighbours know nothing of each other
    assert all(abs(share - 0.49) < error / 2 for share in both)
    assert not torch.equal(dropout(x), y)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)  # a function of the seed
    assert torch.equal(dropout.eval()(x), x)


def test_rotary_positions_are_those_of_transformers_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    q, k, positions = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8), torch.randint(500, (2, 7))
    cos, sin = rotations(500, 8)[:, positions].unsqueeze(2)
    whole = (torch.cat((t, t), -1).squeeze(1) for t in (cos, sin))
    rotated = llama.apply_rotary_pos_emb(q, k, *whole)
    for mine, theirs in zip((q, k), rotated, strict=True):
        # two products and their sum
        assert_near(rotate(mine, cos, sin), theirs, near(torch.float32, 3))
    config = llama.LlamaConfig(hidden_size=24, num_attention_heads=3, rope_theta=10000.0)
    embedded = llama.LlamaRotaryEmbedding(config)(q, positions)
    for mine, theirs in zip((cos, sin), embedded, strict=True):
        # an angle of up to 500 is off by its own rounding, and the first, slower ones a tenth and
        # less, by theirs
        assert_near(torch.cat((mine, mine), -1).squeeze(1), theirs, 500 * near(torch.float32, 1))
