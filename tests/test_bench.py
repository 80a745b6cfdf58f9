import re
from pathlib import Path

import pytest
from helpers import ROOT, make_dataset

import bench
import train
from docs.experiments import baseline

FLOPS = r"MFU +\S+ ="
BASELINE = """
import torch, types
GPTConfig = types.SimpleNamespace
class GPT(torch.nn.Embedding):
    def __init__(self, config):
        super().__init__(config.vocab_size, config.n_embd)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)
    def forward(self, x, y):
        logits = super().forward(x) @ self.weight.t()
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


def number(name, out):
    """The number that follows a name in what was printed."""
    return float(re.search(name + r" +([\d,.]+)", out)[1].replace(",", ""))


def test_the_vocabulary_is_the_data_set_s_or_what_its_name_tells(in_tmp, capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda machine: 2e9)
    words = [
        str(ROOT / "config/demo.py"),
        *"--steps 1 --d_model 8 --d_ff 64 --num_layers 1".split(),
    ]
    make_dataset(Path("data"), "mine", vocab_size=500)
    for more, rows in (
        ([], 2048),
        (["--dataset", "wikitext-2-300"], 300),
        (["--dataset", "mine"], 500),
    ):
        assert not bench.main([*words, *more])
        total = number("compiled,", capsys.readouterr().out)
        blocks = 4 * 8 * 8 + 2 * 8 * 64 + 4
        assert total == 9 * rows + blocks


def test_bench_says_how_fast(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda machine: 2e9)
    assert not bench.main(["tiny.py", "--steps", "4", "--dropout", "0"])
    out = capsys.readouterr().out
    low, median, high = (number(name, out) for name in ("minimum", "median", "maximum"))
    assert 0 < low <= median <= high
    rounding = 0.0005 + number(FLOPS, out) * 0.5 / 2e9  # of the figures as they are shown
    assert abs(number("MFU", out) - number(FLOPS, out) * median / 2e9) < rounding


def test_the_shape_is_that_of_init_from(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda machine: 2e9)
    assert train.main([tiny, "--max_steps", "1"]) == 0
    Path("other.py").write_text('dataset = "tiny"\ninit_from = "out/tiny/best.pt"\n')
    flops = []
    for config in tiny, "other.py":
        bench.main([config, "--steps", "1", "--device", "cpu", "--batch_size", "2"])
        flops.append(number(FLOPS, capsys.readouterr().out))
    assert flops[0] == flops[1]


def test_the_baseline_is_timed_in_turn(tiny, capsys):
    Path("nanoGPT").mkdir()
    Path("nanoGPT/model.py").write_text(BASELINE)
    words = ["tiny.py", "--steps", "3", "--d_ff", "32"]
    baseline.main(words)
    out = capsys.readouterr().out
    for name in "ratio +ours is", "nanoGPT +median", "ours +median":
        assert number(name, out) > 0
    for wrong, named in (["--d_ff", "16"], "--d_ff 32"), (["--peer", "."], "model.py"):
        with pytest.raises(baseline.UserError, match=named):
            baseline.main([*words, *wrong])
