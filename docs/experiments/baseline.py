"""nanoGPT's own model and optimizer beside ours, on the same batches, in turn.

    python -m docs.experiments.baseline config/exp5.py --peer DIR [--setting value ...]

DIR is a checkout of nanoGPT (https://github.com/karpathy/nanoGPT). Its step is as its train.py
makes it: in float32 and not compiled on a CPU, as its README says, in bfloat16 and compiled on
CUDA, unless --peer_dtype and --peer_compile say otherwise.
"""

import importlib.util
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import WARM_UP, peak_bytes, seconds, trainer_of
from config import Config, load_config
from lab.console import UserError, run
from lab.machine import open_machine
from lab.settings import setting
from lab.weights import settle

VOCAB_SIZE = 50304  # what nanoGPT pads GPT-2's vocabulary to


@dataclass
class Options(Config):
    """A run's settings, and how the baseline runs."""

    steps: int = setting(20, "steps that are timed", low=1)
    peer: str = setting("", "the checkout of nanoGPT", path=True)
    peer_only: bool = setting(False, "time the baseline alone, for its memory")
    peer_dtype: str = setting(
        "auto", "of its matmuls; auto: by its README", choices=("auto", "float32", "bfloat16")
    )
    peer_compile: bool | None = setting(None, "torch.compile it (None: by its README)")


def main(argv=None):
    config = load_config(argv, "-m docs.experiments.baseline", Options)
    with open_machine(config) as machine:
        config, _ = settle(config, machine)
        trainer = trainer_of(config, machine)
        sides = {} if config.peer_only else {"ours": trainer.step}
        sides["nanoGPT"] = baseline_step(config, machine, trainer)
        times = {name: [] for name in sides}
        for i in range(WARM_UP + config.steps):
            for name, step in sides.items():  # in turn, so that other work meets both
                times[name].append(seconds(machine, step, i))
    for name, found in times.items():
        median = statistics.median(found[WARM_UP:])
        speed = config.batch_size * config.max_seq_len / median
        print(f"{name:8} median {speed:,.0f} tokens/s, {1000 * median:,.2f} ms per step")
    if config.peer_only:
        print(f"peak memory {peak_bytes(machine.device) / 1e9:.2f} GB")
    else:
        pairs = zip(times["ours"][WARM_UP:], times["nanoGPT"][WARM_UP:], strict=True)
        ratios = [theirs / ours for ours, theirs in pairs]
        print(
            f"ours is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
            f"{max(ratios):.2f})"
        )


def baseline_step(config, machine, trainer):
    """step(i) of nanoGPT's own model and optimizer, on our batches. Raises UserError if there is
    none to be had for this config."""
    path = Path(config.peer, "model.py")
    if config.block != "gpt2" or config.d_ff != 4 * config.d_model:
        raise UserError("nanoGPT's block is gpt2 with d_ff 4 * d_model; choose such a config")
    try:
        spec = importlib.util.spec_from_file_location("peer_model", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["peer_model"] = module  # its dataclass looks there
        spec.loader.exec_module(module)
        shape, GPT = module.GPTConfig, module.GPT
    except (OSError, AttributeError, ImportError) as error:
        raise UserError(
            f"{path} is not nanoGPT's model.py ({error}); run `git clone "
            "https://github.com/karpathy/nanoGPT`, and name that folder with --peer"
        ) from None

    # as its train.py makes them
    kind = machine.device.type
    model = GPT(
        shape(
            block_size=config.max_seq_len,
            vocab_size=VOCAB_SIZE,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_embd=config.d_model,
            dropout=config.dropout,
            bias=True,
        )
    ).to(machine.device)
    betas = config.beta1, config.beta2
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, kind)
    parameters = list(model.parameters())
    if kind == "cuda" if config.peer_compile is None else config.peer_compile:
        model = torch.compile(model)
    readme = torch.bfloat16 if kind == "cuda" else torch.float32
    dtype = readme if config.peer_dtype == "auto" else getattr(torch, config.peer_dtype)

    def step(i):
        starts = trainer.starts(i).to(trainer.tokens.device, non_blocking=True)
        rows = trainer.rows(starts)
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            _, loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    run(main)
