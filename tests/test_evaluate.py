import math

import numpy as np
import pytest
import torch
from helpers import CPU, RANKS, VOCAB, forbid, metrics, near

import train
from lab.console import UserError
from lab.data import Dataset
from lab.evaluate import evaluate
from lab.folder import load_checkpoint
from model import LanguageModel

pytestmark = pytest.mark.arithmetic


def loud(context=16):
    """A model whose losses differ from token to token."""
    torch.manual_seed(0)
    model = LanguageModel(VOCAB, context, 8, 2, 16, 1, dropout=0.5)
    with torch.no_grad():
        model.token_embedding.weight.mul_(20)
    return model


# a loss is the log of a sum over the vocabulary; means of many are no farther off
LOSS = near(torch.float32, VOCAB)


def direct(model, tokens, context):
    """The reference: one window at a time, plain logits, float64. Every token but the first counts
    once. Returns the losses of each window, as lists."""
    model.eval()
    tokens, windows = torch.from_numpy(tokens.astype(np.int64)), []
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        with torch.no_grad():
            logprobs = model(window[None, :-1])[0].double().log_softmax(-1)
        windows.append((-logprobs.gather(1, window[1:, None])[:, 0]).tolist())
    return windows


@pytest.mark.parametrize("rows", [3, 64])
def test_evaluation_is_the_whole_split_in_order(tiny, rows):
    split, model = Dataset("tiny").split("val"), loud()
    figures = evaluate(model.train(), split, CPU, rows)
    assert model.training
    windows = direct(model, split.tokens, 16)
    losses = sum(windows, [])
    nats, n = sum(losses), len(split.tokens) - 1
    assert len(losses) == figures["tokens"] == n
    assert figures["context"] == 16
    assert figures["loss"] == pytest.approx(nats / n, rel=LOSS)
    assert math.log(figures["ppl"]) == pytest.approx(nats / n, rel=LOSS)
    assert figures["bits_per_byte"] == pytest.approx(nats / split.bytes / math.log(2), rel=LOSS)
    assert math.log(figures["ppl_word"]) == pytest.approx(min(700, nats / split.words), rel=LOSS)
    residuals = np.array([sum(window) - nats / n * len(window) for window in windows])
    k, spread = len(windows), np.linalg.norm(residuals)
    condition = np.linalg.norm([sum(window) for window in windows]) / spread  # of a difference
    stderr = spread * math.sqrt(k / (k - 1)) / n
    assert figures["stderr"] == pytest.approx(stderr, rel=condition * LOSS)


def test_a_text_without_words_has_no_perplexity_per_word(tiny):
    split, model = Dataset("tiny").split("val"), loud()
    for nbytes, has_one in (7, True), (9, False):
        split.bytes = nbytes * split.words
        assert (evaluate(model, split, CPU, 8)["ppl_word"] is not None) == has_one


# --- the command


def shown(capsys, *words):
    """The lines of figures that --eval_only prints."""
    assert train.main(["tiny.py", "--eval_only", *words]) == 0
    return capsys.readouterr().out.splitlines()[1:]


@pytest.mark.slow
def test_eval_only_shows_the_run_s_own_figures_on_any_number_of_ranks(tiny, capsys, script):
    # the best checkpoint's, which is not the last one's
    words = "--learning_rate 3 --lr_schedule constant --eval_interval 2 --max_steps 8".split()
    assert train.main([tiny, *words]) == 0
    curve = [line["val_loss"] for line in metrics(evaluations=True)]
    assert min(curve) < curve[-1]
    out = capsys.readouterr().out
    figures = out[out.index("val         loss") :].splitlines()[:2]
    counts = "over 699 tokens, 350 words, 2,100 bytes; context 16, separator none"
    assert counts in figures[1]
    assert shown(capsys, "--micro_batch_size", "5") == figures
    assert script("train.py", tiny, "--eval_only", launch=RANKS).stdout.splitlines()[1:] == figures


@pytest.mark.parametrize("block", ["gpt2", "modern"])
def test_eval_only_takes_the_context_that_is_asked_for(tiny, capsys, block):
    assert train.main([tiny, "--block", block, "--max_steps", "6"]) == 0
    capsys.readouterr()
    split = Dataset("tiny").split("val")
    model = LanguageModel.from_checkpoint(load_checkpoint("out/tiny/best.pt"))
    loss = np.mean(sum(direct(model, split.tokens, 10), []))
    lines = shown(capsys, "--max_seq_len", "10")
    assert "context 10," in lines[1]
    assert float(lines[0].split(" loss ")[1].split()[0]) == pytest.approx(loss, abs=1e-4)
    if block == "modern":
        assert "context 20" in shown(capsys, "--max_seq_len", "20")[1]
    else:
        with pytest.raises(UserError, match="20 .* 16"):
            shown(capsys, "--max_seq_len", "20")


def test_eval_only_keeps_to_the_run_s_dtype(tiny, capsys):
    """float16, which auto never chooses on a CPU, and the config's file does not name."""
    assert train.main([tiny, "--max_steps", "6", "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    assert shown(capsys) == out[out.index("val         loss") :].splitlines()[:2]


def test_eval_only_s_mistakes_are_named(tiny):
    def refused(match, *words):
        with pytest.raises(UserError, match=match):
            train.main([tiny, "--eval_only", *words])

    refused("out/tiny/best.pt")
    assert train.main([tiny, "--max_steps", "6"]) == 0
    refused("test", "--split", "test")
    forbid(slice(None), "out/tiny/best.pt")
    refused("loss of", "--split", "val")
