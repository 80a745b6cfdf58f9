import math
import os
import signal

import numpy as np
import pytest
import torch
from helpers import CPU, RANKS, ROOT, VOCAB, before_each_pass, near

import train
from config import load_config
from lab.data import Dataset, Split
from lab.evaluate import evaluate, spans
from model import LanguageModel

pytestmark = pytest.mark.arithmetic


def loud(dropout=0.5, context=16):
    """A model whose losses differ from token to token."""
    torch.manual_seed(0)
    model = LanguageModel(VOCAB, context, 8, 2, 16, 1, dropout)
    with torch.no_grad():
        model.token_embedding.weight.mul_(20)
    return model


LOSS = near(
    torch.float32, VOCAB
)  # a loss is the log of a sum over the vocabulary; means of many are no farther off


def direct(model, tokens, context, stride):
    """The reference: one window at a time, plain logits, float64; every token but the first
    once, from the first window that holds it, windows beginning at multiples of stride. Its
    losses by window, as lists."""
    model.eval()
    tokens, done, windows = torch.from_numpy(tokens.astype(np.int64)), 1, []
    for start in range(0, len(tokens) - 1, stride):
        window = tokens[start : start + context + 1]
        with torch.no_grad():
            loss = (
                -model(window[None, :-1])[0]
                .double()
                .log_softmax(-1)
                .gather(1, window[1:, None])[:, 0]
            )
        fresh = loss[done - start - 1 :].tolist()
        done += len(fresh)
        windows.append(fresh)
        if done == len(tokens):
            return windows


@pytest.mark.parametrize("rows, dropout", [(1, 0.0), (3, 0.5), (64, 0.5)])
def test_evaluation_is_the_whole_split_in_order(tiny, rows, dropout):
    split, model = Dataset("tiny").split("val"), loud(dropout)
    figures = evaluate(model.train(), split, CPU, rows)
    assert model.training
    windows = direct(model, split.tokens, 16, 16)
    losses = sum(windows, [])
    nats, n = sum(losses), len(split.tokens) - 1
    assert len(losses) == figures["tokens"] == n and (figures["context"], figures["stride"]) == (
        16,
        16,
    )
    assert figures["loss"] == pytest.approx(nats / n, rel=LOSS)
    assert math.log(figures["ppl"]) == pytest.approx(nats / n, rel=LOSS)
    assert figures["bits_per_byte"] == pytest.approx(nats / split.bytes / math.log(2), rel=LOSS)
    assert math.log(figures["ppl_word"]) == pytest.approx(min(700, nats / split.words), rel=LOSS)
    residuals = np.array([sum(window) - nats / n * len(window) for window in windows])
    k, spread = len(windows), np.linalg.norm(residuals)
    condition = np.linalg.norm([sum(window) for window in windows]) / spread  # of a difference
    assert figures["stderr"] == pytest.approx(
        spread * math.sqrt(k / (k - 1)) / n, rel=condition * LOSS
    )


@pytest.mark.parametrize("stride, context", [(1, 16), (5, 16), (8, 16), (15, 16), (3, 7)])
def test_the_strided_figure_is_that_of_a_double_loop(tiny, stride, context):
    split, model = Dataset("tiny").split("val"), loud(context=context)
    split.tokens = split.tokens[:100]
    figures = evaluate(model, split, CPU, 4, stride)
    losses = sum(direct(model, split.tokens, context, stride), [])
    assert len(losses) == 99 == figures["tokens"] and figures["stride"] == stride
    assert figures["loss"] == pytest.approx(sum(losses) / 99, rel=LOSS)
    other = evaluate(model, split, CPU, 4)["loss"]
    assert abs(figures["loss"] / other - 1) > 10 * LOSS  # another figure


def test_every_token_counts_once_with_context_enough():
    for n, context, stride in ((1, 4, 4), (99, 16, 5), (100, 16, 16), (17, 16, 1), (16, 16, 3)):
        counted = [
            token for _, end, first in spans(n, context, stride) for token in range(first, end)
        ]
        assert counted == list(range(n))
        for start, end, first in spans(n, context, stride):
            assert end - start <= context and (start == 0 or first - start >= context - stride)


def test_the_standard_error_is_how_far_such_texts_differ():
    class Coin(torch.nn.Module):
        """A model whose losses are drawn: each window's tokens have one."""

        args = dict(max_seq_len=16)

        def token_losses(self, tokens, targets):
            return (1 + torch.rand(len(tokens), 1, generator=generator)).expand(tokens.shape)

    generator, split = torch.Generator().manual_seed(0), Split(np.zeros(161, np.uint16), 1, 1)
    found = [evaluate(Coin(), split, CPU, 4) for _ in range(400)]
    spread = np.std([figures["loss"] for figures in found])
    said = np.linalg.norm([figures["stderr"] for figures in found]) / math.sqrt(400)
    assert spread == pytest.approx(
        said, rel=3 / math.sqrt(2 * 400)
    )  # three standard errors of a standard deviation


def test_forward_passes_have_one_shape(tiny):
    """Compiled code would be compiled anew for another, a last short one."""
    split, model = Dataset("tiny").split("val"), loud()
    split.tokens = split.tokens[:100]
    shapes = []
    model.token_embedding.register_forward_hook(lambda _, args, out: shapes.append(args[0].shape))
    for rows, passes in ((4, 2), (8, 1)):
        evaluate(model, split, CPU, rows)
        assert len(shapes) == passes and set(shapes) == {(min(rows, 7), 16)}
        shapes.clear()


@pytest.mark.slow
def test_eval_only_shows_the_run_s_own_figures_on_any_number_of_ranks(tiny, capsys, script):
    assert train.main([tiny, "--max_steps", "6"]) == 0
    shown = capsys.readouterr().out
    figures = shown[shown.index("val         loss") :].splitlines()[:2]
    assert (
        "over 699 tokens, 350 words, 2,100 bytes; context 16, stride 16, separator none"
        in figures[1]
    )
    for words in ([], ["--batch_size", "2"], ["--micro_batch_size", "5"], ["--dropout", "0"]):
        assert train.main([tiny, "--eval_only", *words]) == 0
        assert capsys.readouterr().out.splitlines()[1:] == figures
    assert train.main([tiny, "--eval_only", "--eval_stride", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == figures and "stride 4" in lines[4] and lines[3] != figures[0]
    assert script("train.py", tiny, "--eval_only", launch=RANKS).stdout.splitlines()[1:] == figures


def test_ctrl_c_ends_eval_only(tiny):
    assert train.main([tiny, "--max_steps", "6"]) == 0
    ctrl_c = before_each_pass(lambda training: os.kill(os.getpid(), signal.SIGINT))
    with ctrl_c, pytest.raises(KeyboardInterrupt):
        train.main([tiny, "--eval_only"])


def test_eval_only_s_mistakes_are_one_line(tiny):
    from lab.console import UserError

    with pytest.raises(UserError, match="there is no checkpoint out/tiny/best.pt"):
        train.main([tiny, "--eval_only"])
    assert train.main([tiny, "--max_steps", "6"]) == 0
    with pytest.raises(UserError, match="has no test split"):
        train.main([tiny, "--eval_only", "--split", "test"])
    with pytest.raises(UserError, match="leaves tokens out"):
        train.main([tiny, "--eval_only", "--eval_stride", "17"])


@pytest.mark.slow
def test_experiment_1_on_the_real_validation_text(shared_data, in_tmp):
    """The program's figure, untrained, against ten lines that share nothing with it but the
    weights."""
    import prepare

    (in_tmp / "src").mkdir()
    text = (shared_data / "wiki.valid.raw").read_text(encoding="utf-8")
    for name in ("train", "valid"):
        (in_tmp / f"src/wiki.{name}.raw").write_text(text[:60000], encoding="utf-8")
    prepare.prepare("wikitext-2", "src")
    c = load_config([str(ROOT / "config/exp1.py")])
    torch.manual_seed(0)
    model = LanguageModel(50257, 512, c.d_model, c.num_heads, c.d_ff, c.num_layers).eval()
    with torch.no_grad():
        model.token_embedding.weight.mul_(10)
    figures = evaluate(model, Dataset("wikitext-2").split("val"), CPU, 4)
    ids = torch.from_numpy(np.fromfile("data/wikitext-2/val.bin", dtype=np.uint16).astype(np.int64))
    nats = 0.0
    for start in range(0, len(ids) - 1, 512):
        x, y = ids[start : start + 512], ids[start + 1 : start + 513]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                model(x[None, : len(y)])[0], y, reduction="none"
            )
            nats += losses.double().sum().item()
    assert figures["loss"] == pytest.approx(nats / (len(ids) - 1), rel=near(torch.float32, 50257))
