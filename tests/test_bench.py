import json
import re
from pathlib import Path

import pytest

import bench
from lab.machine import open_machine


def test_bench_says_how_fast_and_leaves_a_trace(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda machine, dtype: 2e9)
    assert bench.main(["tiny.py", "--steps", "4", "--profile", "--dropout", "0"]) == 0
    out = capsys.readouterr().out
    assert "over 4 steps of 6 x 16" in out and "out/tiny/trace.json" in out
    low, median, high = (
        float(re.search(name + r" ([\d,]+)", out)[1].replace(",", ""))
        for name in ("minimum", "median", "maximum")
    )
    assert 0 < low <= median <= high
    flops, mfu = (
        int(re.search(r"= ([\d,]+) FLOPs", out)[1].replace(",", "")),
        float(re.search(r"MFU +(\S+)", out)[1]),
    )
    assert (
        abs(mfu - flops * median / 2e9) < 0.0005 + flops * 0.5 / 2e9
    )  # it and the median were rounded to be shown
    assert json.load(open("out/tiny/trace.json"))["traceEvents"]
    assert len(re.findall(r"^ +\S*aten::\S+", out, re.MULTILINE)) >= 5


def test_the_machine_s_peak_is_in_the_right_order():
    config = bench.load_config(["config/demo.py", "--device", "cpu", "--dtype", "float32"])
    with open_machine(config) as machine:
        assert 1e8 < bench.matmul_peak(machine, machine.dtype, limit=0.1) < 1e14


PEER = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)

    def forward(self, x, y):
        logits = self.embedding(x) @ self.embedding.weight.t()
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


def test_a_peer_is_timed_in_turn(tiny, capsys, monkeypatch, script):
    monkeypatch.setattr(bench, "matmul_peak", lambda machine, dtype: 2e9)
    Path("peer").mkdir()
    Path("peer/model.py").write_text(PEER)
    fits = ("tiny.py", "--steps", "3", "--d_ff", "32", "--peer", "peer")
    assert bench.main(fits) == 0
    out = capsys.readouterr().out
    assert re.search(r"nanoGPT +median [\d,]+ tokens/s; .* ours is [\d.]+ times as fast", out)
    assert bench.main([*fits, "--peer_only"]) == 0
    out = capsys.readouterr().out
    assert "nanoGPT" in out and "peak memory" in out and "MFU" not in out
    for wrong, says in ((("--d_ff", "16"), "d_ff 4 * d_model"), (("--peer", "."), "git clone")):
        assert says in script("bench.py", *fits, *wrong, code=2).stderr


@pytest.mark.slow
def test_bench_under_torchrun(tiny, script):
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    out = script(
        "bench.py", "tiny.py", "--steps", "2", "--out_dir", "elsewhere", launch=launch
    ).stdout
    assert out.count("tokens/s") == 2 and "tiny on 2 x cpu" in out  # one report, and its MFU line
