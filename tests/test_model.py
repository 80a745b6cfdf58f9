from lab.console import UserError

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_near, near
from torch.utils.flop_counter import FlopCounterMode

from config import load_config
from lab import kernels
from lab.checkpoint import load as load_checkpoint
from lab.checkpoint import save as save_checkpoint
from lab.kernels import (
    Dropout,
    HeadLoss,
    causal_attention,
    head_loss,
    head_rows,
    rms_norm,
    rotate,
    rotations,
    softmax_loss,
)
from model import LanguageModel
from plan import new_model

pytestmark = pytest.mark.arithmetic
BLOCKS = pytest.mark.parametrize("block", ["gpt2", "modern"])
# small()'s gradients, forward and back: in each of two layers eight sums over 16, 12 or 32, then
# head and softmax
DEEP = near(torch.float32, 2 * (2 * 8 * 32 + 16 + 97))


def small(dropout=0.0, vocab_size=97, **kwargs):
    torch.manual_seed(0)
    args = dict(max_seq_len=12, d_model=16, num_heads=4, d_ff=32, num_layers=2) | kwargs
    return LanguageModel(vocab_size, dropout=dropout, **args)


def shaken(model):
    """A model whose every weight is random, those that begin at zero too, in eval mode."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


@pytest.mark.parametrize(
    "name, budget", [("exp6_tiny", 869_153), ("exp6_small", 7_342_033), ("exp6", 19_365_713)]
)
def test_experiment_6_keeps_to_the_budget(name, budget):
    c = load_config([str(ROOT / f"config/{name}.py")])
    with torch.device("meta"):
        model = new_model(c, 50257)
    assert 0.99 * budget < model.count()["total"] <= budget


@pytest.mark.parametrize(
    "name, count",
    [
        ("exp1", 869_153),
        ("exp2", 869_153),
        ("exp3", 7_342_033),
        ("exp4", 16_206_673),
        ("exp5", 19_365_713),
    ],
)
def test_parameter_counts(name, count):
    c = load_config([str(ROOT / f"config/{name}.py")])
    with torch.device("meta"):
        model = LanguageModel(
            50257, c.max_seq_len, c.d_model, c.num_heads, c.d_ff, c.num_layers, c.dropout
        )
    counted = model.count()
    assert (
        counted["total"]
        == count
        == counted["embeddings"] + counted["head_bias"] + counted["blocks"]
    )
    assert counted["embeddings"] == (50257 + 512) * c.d_model and counted["head_bias"] == 50257


def test_the_notebook_s_snippet():
    model = LanguageModel(
        vocab_size=50257,
        max_seq_len=512,
        d_model=16,
        num_heads=2,
        d_ff=64,
        num_layers=2,
        dropout=0.3,
    )
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 50257)


def test_initialisation_is_gpt2_s():
    model = small(d_model=64, d_ff=256, num_layers=8)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (1 if name.endswith("norm.weight") else 0)).all(), name
        else:
            std = 0.02 / 4 if "_out." in name else 0.02  # sqrt(2 * 8) = 4
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), (
                name
            )  # five of its standard errors


def test_logits_are_those_of_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    model = small(vocab_size=301, d_model=32, num_layers=3).eval()
    config = transformers.GPT2Config(
        vocab_size=301, n_positions=12, n_embd=32, n_layer=3, n_head=4, n_inner=32
    )
    peer = transformers.GPT2LMHeadModel(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (
            model.parameters()
        ):  # every weight is random, the biases and gains too; only the head's bias is zero
            p.normal_(std=0.2 if p.dim() > 1 else 1.0)
        model.head_bias.zero_()
        pairs = [
            (peer.transformer.wte, model.token_embedding),
            (peer.transformer.wpe, model.position_embedding),
            (peer.transformer.ln_f, model.final_norm),
        ]
        for theirs, ours in zip(peer.transformer.h, model.blocks, strict=True):
            pairs += [
                (theirs.ln_1, ours.attention_norm),
                (theirs.ln_2, ours.mlp_norm),
                (theirs.attn.c_attn, ours.qkv),
                (theirs.attn.c_proj, ours.attention_out),
                (theirs.mlp.c_fc, ours.mlp_in),
                (theirs.mlp.c_proj, ours.mlp_out),
            ]
        for theirs, ours in pairs:
            weight = ours.weight.T if "Conv1D" in type(theirs).__name__ else ours.weight
            theirs.weight.copy_(weight)
            if hasattr(theirs, "bias"):
                theirs.bias.copy_(ours.bias)
        tokens = torch.randint(301, (2, 12))
        logits, expected = model(tokens), peer(tokens).logits
    assert expected.std() > 0.2
    # a layer's norms, matmuls and attention sum over 32 or 12, eight times; then the last norm and
    # the head
    assert_near(logits, expected, near(torch.float32, 3 * 8 * 32 + 2 * 32))


def test_rotary_positions_are_those_of_transformers_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    q, k, positions = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8), torch.randint(500, (2, 7))
    cos, sin = rotations(500, 8)[:, positions].unsqueeze(2)
    whole = (torch.cat((t, t), -1).squeeze(1) for t in (cos, sin))
    for mine, theirs in zip(
        (rotate(q, cos, sin), rotate(k, cos, sin)),
        llama.apply_rotary_pos_emb(q, k, *whole),
        strict=True,
    ):
        assert_near(mine, theirs, near(torch.float32, 3))  # two products and their sum
    config = llama.LlamaConfig(hidden_size=24, num_attention_heads=3, rope_theta=10000.0)
    for mine, theirs in zip(
        (cos, sin), llama.LlamaRotaryEmbedding(config)(q, positions), strict=True
    ):
        # an angle of up to 500 is off by its own rounding, and the first, slower ones a tenth and
        # less, by theirs
        assert_near(torch.cat((mine, mine), -1).squeeze(1), theirs, 500 * near(torch.float32, 1))


def test_a_modern_model_begins_as_its_embeddings():
    model, tokens = small(block="modern"), torch.randint(97, (2, 12))
    assert torch.equal(model.hidden(tokens), rms_norm(rms_norm(model.token_embedding(tokens))))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@BLOCKS
def test_no_position_sees_a_later_one(block):
    model = shaken(small(block=block))
    x = model.token_embedding.weight
    seen = model.hidden(torch.arange(12)[None])  # each position has a word of its own
    for i in range(12):
        (grad,) = torch.autograd.grad(seen[0, i, :3].sum(), x, retain_graph=True)
        reached = grad.abs().sum(-1) > 0
        assert reached.tolist() == [j <= i for j in range(97)]


# chunks of one row; chunks and blocks that do not divide; one chunk; the softmax of each chunk at
# once
@pytest.mark.parametrize("rows, block", [(1, 1), (7, 3), (24, 5), (10, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "fused", [None, softmax_loss]
)  # as one expression, which is compiled on a GPU
def test_the_fused_loss_and_its_gradients_are_cross_entropy_s(
    rows, block, dtype, fused, monkeypatch
):
    monkeypatch.setattr(kernels, "head_rows", lambda kind, V, N: (rows, block))
    torch.manual_seed(0)
    x, weight, bias = (
        t.to(dtype) for t in (torch.randn(24, 16) * 3, torch.randn(97, 16), torch.randn(97))
    )
    targets = torch.randint(97, (24,))
    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    loss = HeadLoss.apply(*ours, targets, fused)
    losses, *_ = head_loss(x, weight, bias, targets, False, fused)
    tolerance = near(
        dtype, 16 + 97 + 24
    )  # a logit, its softmax, and a gradient or the mean over the rows
    assert_near(losses.mean(), loss, tolerance)
    (loss * 2.5).backward()
    truth = [t.double().requires_grad_() for t in (x, weight, bias)]
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
    expected = F.cross_entropy(
        F.linear(x.double(), weight.double(), bias.double()), targets, reduction="none"
    )
    # of one logit's size all the same, since a loss is a difference of two
    torch.testing.assert_close(
        losses.double(), expected, rtol=near(torch.float32, 3), atol=near(torch.float32, 3)
    )
    assert not head_loss(x * math.nan, weight, bias, targets, gradients=False)[0].isfinite().any()


def test_chunks_are_equal_and_bounded():
    for N in (1, 31, 4096, 16384, 4097):
        rows, block = head_rows("cpu", 50257, N)
        assert rows * 50257 <= 1 << 26 and block <= rows <= N
        assert N - rows * (math.ceil(N / rows) - 1) > rows - math.ceil(
            N / rows
        )  # the last is as long, or nearly


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_blocks_is_scaled_dot_product_attention(dtype):
    torch.manual_seed(0)
    # two whole blocks of rows and a part of one
    tensors = [torch.randn(2, 3, 300, 8) for _ in range(4)]
    kinds = dtype, torch.float32
    ours, truth = ([t.to(kind).requires_grad_() for t in tensors[:3]] for kind in kinds)
    results = []
    for leaves, attention in (
        (ours, causal_attention),
        (truth, lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)),
    ):
        y = attention(*leaves)
        y.backward(tensors[3].to(y.dtype))
        results.append([y.detach().float(), *(leaf.grad.float() for leaf in leaves)])
    for mine, true in zip(*results, strict=True):
        # A rounding's standard deviation is eps / sqrt(12) at most, and a norm of many holds to it;
        # there are twelve of them, inputs included, to a gradient at the most. In bfloat16 torch's
        # own kernel fails where ATEN_CPU_CAPABILITY is below AVX-512 and oneDNN is not told so.
        assert (mine - true).norm() < near(dtype, 12) / math.sqrt(12) * true.norm()


def test_dropout_keeps_its_share_and_the_mean():
    torch.manual_seed(0)
    dropout, x = Dropout(0.3), torch.ones(37, 4001, dtype=torch.float64, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    kept = y > 0
    error = 4 / math.sqrt(y.numel())  # four standard errors of a mean, at a standard deviation of 1
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


def test_two_hundred_steps_in_bfloat16_stay_on_the_float32_reference():
    tokens = (
        torch.randint(0, 50, (4000,), generator=torch.Generator().manual_seed(1)).cumsum(0) % 97
    )

    def curve(dtype, fused):
        model = small(max_seq_len=32, d_model=32, d_ff=64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
        losses, random = [], torch.Generator().manual_seed(2)
        for _ in range(200):
            rows = torch.stack(
                [tokens[i : i + 33] for i in torch.randint(3960, (8,), generator=random)]
            )
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                if fused:
                    loss = model(rows[:, :-1], rows[:, 1:])
                else:
                    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    reference, ours = curve(torch.float32, fused=False), curve(torch.bfloat16, fused=True)
    noise = (curve(torch.bfloat16, fused=False) - reference).abs()
    moved = reference[0] - reference[-20:].mean()
    assert moved > 0.3  # it learns
    # as near as autocast's own, or half as far again, since deviations that last for many steps
    # are few in 200; and
    # both nearer than one rounding of what was learnt
    assert (ours - reference).abs().mean() < 1.5 * noise.mean() and noise.mean() < near(
        torch.bfloat16, 1
    ) * moved


@BLOCKS
def test_the_fused_loss_under_compile_and_accumulation(block):
    tokens = torch.randint(97, (4, 13))
    for accumulate in (1, 2):
        model, fused = shaken(small(block=block)), shaken(small(block=block))
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        compiled = torch.compile(fused, backend="aot_eager")
        for part in tokens.chunk(accumulate):
            (compiled(part[:, :-1], part[:, 1:]) / accumulate).backward()
        for mine, theirs in zip(fused.parameters(), model.parameters(), strict=True):
            assert_near(mine.grad, theirs.grad, DEEP)


@BLOCKS
def test_loss_logits_and_token_losses_agree(block):
    model = shaken(small(block=block))
    tokens, targets = torch.randint(97, (3, 12)), torch.randint(97, (3, 12))
    each = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none").view(
        3, 12
    )
    tolerance = near(
        torch.float32, 16 + 97 + 36
    )  # a logit, its softmax, the mean; what they are of is the same
    assert_near(model.token_losses(tokens, targets), each, tolerance)
    assert_near(model(tokens, targets), each.mean(), tolerance)
    with torch.no_grad():
        assert_near(model(tokens, targets), each.mean(), tolerance)


def test_without_gradients_none_are_formed():
    """Where they are, the head has two more matmuls."""
    model, tokens = small(vocab_size=128), torch.randint(128, (3, 12))  # 128: nothing is padded
    with FlopCounterMode(display=False) as logits:
        model(tokens)
    with FlopCounterMode(display=False) as loss, torch.no_grad():
        model(tokens, tokens)
    with FlopCounterMode(display=False) as training:
        model(tokens, tokens)
    assert loss.get_total_flops() == logits.get_total_flops() > 0
    assert training.get_total_flops() - loss.get_total_flops() == 2 * 2 * 36 * 16 * 128


@BLOCKS
def test_dropout_acts_in_training_alone(block):
    model, tokens = small(dropout=0.5, block=block), torch.randint(97, (2, 12))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@BLOCKS
def test_checkpoints_come_back_and_strangers_are_refused(block, tmp_path):
    model, path = shaken(small(block=block)), tmp_path / "best.pt"
    save_checkpoint(dict(model=model.state_dict(), model_args=model.args, step=3), path)
    rest = load_checkpoint(path)
    again = LanguageModel.from_checkpoint(rest)
    tokens = torch.randint(97, (1, 5))
    assert torch.equal(again(tokens), model(tokens)) and rest["step"] == 3
    whole = path.read_bytes()
    for spoiled in (
        b"",
        whole[:1000],
        whole[: len(whole) // 2],
        b"text",
        b"PK\x03\x04" + b"x" * 100,
    ):
        path.write_bytes(spoiled)
        with pytest.raises(UserError, match="not a whole checkpoint"):
            load_checkpoint(path)
    save_checkpoint(dict(model={}, model_args={"width": 3}, step=3), path)
    with pytest.raises(UserError, match="another model"):
        LanguageModel.from_checkpoint(load_checkpoint(path))
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        load_checkpoint(path)


class Malice:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_loading_a_checkpoint_executes_nothing(tmp_path):
    torch.save({"model": Malice(), "model_args": {}, "step": 0}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "bad.pt")
