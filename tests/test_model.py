import math

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_near, near

from config import load_config
from lab.console import UserError
from lab.folder import load_checkpoint, save_checkpoint
from lab.kernels import rms_norm
from lab.weights import new_model
from model import LanguageModel

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
    "names, budget",
    [
        (("exp1", "exp2", "exp6_tiny"), 869_153),
        (("exp3", "exp6_small"), 7_342_033),
        (("exp4",), 16_206_673),
        (("exp5", "exp6"), 19_365_713),
    ],
)
def test_the_experiments_sizes_and_experiment_6_keeps_to_them(names, budget):
    for name in names:
        config = load_config([str(ROOT / f"config/{name}.py")])
        with torch.device("meta"):
            n = new_model(config, 50257).count()
        assert n["total"] == n["embeddings"] + n["head_bias"] + n["blocks"]
        assert (0.99 * budget if "exp6" in name else budget - 1) < n["total"] <= budget
        if "exp6" not in name:
            assert n["embeddings"] == (50257 + 512) * config.d_model and n["head_bias"] == 50257


def test_flops_are_six_per_weight_and_those_of_half_the_attention():
    weights = 97 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 32)
    assert small().flops_per_token() == 6 * weights + 2 * 12 * 12 * 16 / 2


def test_the_first_block_s_values_are_mixed_into_the_others():
    model, tokens = shaken(small(block="modern")), torch.arange(12)[None]
    block = model.blocks[1]
    block.value_mix.data = torch.tensor([0.0, 1.0])
    before = model(tokens)
    block.qkv.weight.data[32:] += 1  # its own values
    assert torch.equal(model(tokens), before)


def test_the_notebook_s_snippet():
    shape = dict(max_seq_len=512, d_model=16, num_heads=2, d_ff=64, num_layers=2)
    model = LanguageModel(vocab_size=50257, **shape, dropout=0.3)
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 50257)


def test_initialisation_is_gpt2_s():
    model = small(d_model=64, d_ff=256, num_layers=8)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (1 if name.endswith("norm.weight") else 0)).all(), name
        else:
            std = 0.02 / 4 if "_out." in name else 0.02  # sqrt(2 * 8) = 4
            five_errors = 5 / math.sqrt(2 * p.numel())
            assert abs(p.std().item() / std - 1) < five_errors, name


def test_a_modern_model_begins_as_its_embeddings():
    model, tokens = small(block="modern"), torch.randint(97, (2, 12))
    assert torch.equal(model.hidden(tokens), rms_norm(rms_norm(model.token_embedding(tokens))))
    assert_near(model.hidden(tokens).square().mean(-1), torch.ones(2, 12), 0.01)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):  # the stream is in its dtype
        assert model.hidden(tokens).dtype == torch.bfloat16


@BLOCKS
def test_no_position_sees_a_later_one(block):
    model = shaken(small(block=block))
    x = model.token_embedding.weight
    seen = model.hidden(torch.arange(12)[None])  # each position has a word of its own
    for i in range(12):
        (grad,) = torch.autograd.grad(seen[0, i, :3].sum(), x, retain_graph=True)
        reached = grad.abs().sum(-1) > 0
        assert reached.tolist() == [j <= i for j in range(97)]


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
    logits = model(tokens).flatten(0, 1)
    each = F.cross_entropy(logits, targets.flatten(), reduction="none").view(3, 12)
    # a logit, its softmax, the mean; what they are of is the same
    tolerance = near(torch.float32, 16 + 97 + 36)
    assert_near(model.token_losses(tokens, targets), each, tolerance)
    assert_near(model(tokens, targets), each.mean(), tolerance)
    with torch.no_grad():
        assert_near(model(tokens, targets), each.mean(), tolerance)


@BLOCKS
def test_dropout_acts_in_training_alone(block):
    model, tokens = small(dropout=0.5, block=block), torch.randint(97, (2, 12))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@BLOCKS
def test_a_checkpoint_comes_back_and_another_model_s_is_refused(block, tmp_path):
    model, path = shaken(small(block=block)), tmp_path / "best.pt"
    save_checkpoint(dict(model=model.state_dict(), model_args=model.args, step=3), path)
    checkpoint = load_checkpoint(path)
    tokens = torch.randint(97, (1, 5))
    assert torch.equal(LanguageModel.from_checkpoint(checkpoint)(tokens), model(tokens))
    for wrong in {"model_args": {"width": 3}}, {"model_args": model.args | {"d_model": 32}}:
        with pytest.raises(UserError):
            LanguageModel.from_checkpoint(checkpoint | wrong)
