"""The plan: what is about to be trained, and how long that takes."""

import math
import time

import torch

from lab.notebook import facts
from lab.optimizer import warmup_of
from lab.trainer import micro_batch_size


def describe(config, dataset, model, batches, total_steps):
    """What the run is, a dict for run.json."""
    own = {name: getattr(config, name) for name in ("name", "doc", "file", "given", "departs")}
    data = dict(
        source=dataset.source["name"],
        tokenizer=dataset.tokenizer,
        separator=dataset.separator,
        splits={split: vars(counts) for split, counts in dataset.counts.items()},
    )
    return own | dict(
        config=config.plain() | {"warmup_steps": warmup_of(config, total_steps)},
        steps=total_steps,
        step_tokens=batches.step_tokens,
        parameters=model.count(),
        flops_per_token=model.flops_per_token(),
        vocab_size=dataset.vocab_size,
        data=data,
    )


def plan_text(metadata, config, machine, model):
    """What is about to be trained, as text: facts, first weights, time and memory. metadata:
    describe()'s. model: of the same shape, with or without memory."""
    micro = micro_batch_size(config, model, machine)
    memory = model.memory_bytes(micro, machine.dtype, machine.device.type) / 1e9
    source = f"from {config.init_from}" if config.init_from else f"with seed {config.seed}"
    lines = {
        "run": f"{config.out_dir} on {machine}",
        "weights": "" if config.resume else f"initialised {source}",
        **facts(metadata),
        "time": how_long(metadata, config, model, machine) if machine.device.type == "cpu" else "",
        "memory": f"about {memory:,.1f} GB per rank, beside Python and torch themselves, with "
        f"{micro} sequences per forward pass",
    }
    return "\n".join(f"{name:10}  {line}" for name, line in lines.items() if line)


def how_long(metadata, config, model, machine):
    """How long a run takes on a CPU, as a phrase."""
    tokens, limit = metadata["steps"] * metadata["step_tokens"], 3600 * config.max_hours
    seconds = tokens * seconds_per_token(model, machine) / machine.world
    ends = f", and max_hours ends it after {config.max_hours:g}" if 0 < limit < seconds else ""
    size, unit = (3600, "hours") if seconds > 7200 else (60, "min") if seconds > 120 else (1, "s")
    return f"about {math.ceil(seconds / size):,} {unit} on this machine{ends}"


def seconds_per_token(model, machine):
    """What a token of training costs on this CPU, estimated within 1.4: its matmuls at the speed of
    a part of the head's, the rest as 3.3 softmaxes over the vocabulary and 115 logits' share of one
    for each channel of each layer, as measured in experiments 1, 3, 5, 6_small and the demo."""
    args, times = model.args, []
    width = min(args["d_model"], 512)  # wider ones are as fast
    x, weight = (torch.randn(n, width).to(machine.dtype) for n in (256, 8192))
    for _ in range(12):  # others may come between
        began = time.perf_counter()
        logits = x @ weight.t()
        between = time.perf_counter()
        torch.softmax(logits, -1, dtype=torch.float32)
        times.append((between - began, time.perf_counter() - between))
    matmul, softmax = map(min, zip(*times, strict=True))
    numbers = 3.3 * args["vocab_size"] + 115 * args["d_model"] * args["num_layers"]
    return (model.flops_per_token() * matmul / (2 * width) + numbers * softmax) / logits.numel()
