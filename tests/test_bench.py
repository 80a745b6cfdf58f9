"""bench.py's figures, and nanoGPT's beside them."""

import re
import time
from pathlib import Path

import torch
from helpers import CPU, RANKS

import bench
from docs.experiments import baseline

FIGURES = "config tokens/s MFU memory"


def test_bench_says_how_fast_and_leaves_a_trace(tiny, capsys):
    bench.main([tiny, "--steps", "2", "--profile"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in FIGURES.split())
    assert 0 < float(re.search(r"MFU +([\d.]+)", shown)[1]) < 1
    assert Path("out/tiny/trace.json").stat().st_size > 0


def test_the_machine_s_peak_is_in_the_right_order():
    began = time.perf_counter()
    peak = bench.matmul_peak(CPU, torch.float32, limit=0.1)
    assert 1e8 < peak < 1e15 and time.perf_counter() > began


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
        self.embed = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, tokens, targets):
        logits = self.embed(tokens) @ self.embed.weight.t()
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
"""


def test_the_baseline_is_timed_in_turn(tiny, capsys):
    Path("peer").mkdir()
    Path("peer/model.py").write_text(PEER)
    words = [tiny, *"--steps 2 --d_ff 32 --peer peer".split()]
    baseline.main(words)
    assert re.search(r"ours is [\d.]+ times", capsys.readouterr().out)
    baseline.main([*words, "--peer_only"])
    assert "GB" in capsys.readouterr().out


def test_bench_under_torchrun(tiny, script):
    done = script("bench.py", tiny, "--steps", "2", launch=RANKS)
    assert done.stdout.count("MFU") == 1 and "2 x cpu" in done.stdout
