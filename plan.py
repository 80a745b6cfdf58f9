"""What is about to be trained: the batches, the plan, the model and the weights it begins with."""

import torch

from lab import checkpoint
from lab.console import UserError
from lab.data import Batches, log_frequencies
from lab.folder import restarted
from lab.gpt2 import open_weights
from lab.notebook import chinchilla
from lab.optimizer import warmup_of
from lab.trainer import micro_batch_size
from model import LanguageModel


def batches_of(config, train):
    """(the run's Batches, its number of steps). Raises UserError where there is nothing to do."""
    tokens, context = train.tokens, config.max_seq_len
    if len(tokens) <= context:
        raise UserError(
            f"{config.dataset} has {len(tokens):,} training tokens, not one window of {context}; "
            "prepare more text, or use a smaller --max_seq_len"
        )
    batches = Batches(tokens, context, config.batch_size, config.seed)
    total_steps = batches.epoch_end(config.epochs)
    if config.max_steps:
        total_steps = min(total_steps, config.max_steps)
    if warmup_of(config, total_steps) >= total_steps:
        raise UserError(
            f"warmup_steps {config.warmup_steps} leaves nothing of the run's {total_steps} steps; "
            f"use --warmup_steps {total_steps // 10}"
        )
    return batches, total_steps


def plan_text(config, machine, dataset, model, batches, total_steps):
    """What is about to be trained, as text: the true counts, the data, Chinchilla's ratio, steps,
    FLOPs, memory."""
    n, flops, tokens = model.count(), model.flops_per_token(), len(batches.tokens)
    step_tokens, run_tokens = batches.step_tokens, total_steps * batches.step_tokens
    micro = micro_batch_size(config, model, machine)
    memory = model.memory_bytes(micro, machine.dtype, machine.device.type) / 1e9
    lines = {
        "run": f"{config.out_dir} on {machine}",
        "weights": f"begin as those of {config.init_from or f'seed {config.seed}'}",
        "parameters": f"{n['total']:,}: embeddings {n['embeddings']:,}, head bias "
        f"{n['head_bias']:,}, blocks {n['blocks']:,}",
        "data": f"{config.dataset}: {tokens:,} training tokens, "
        f"{dataset.counts['val'].tokens:,} validation tokens",
        "ratio": f"{tokens / n['total']:.2f} tokens a parameter an epoch, "
        f"{run_tokens / n['total']:.2f} in the run",
        "": f"Chinchilla's is 20: {chinchilla(n['total'], tokens)}",
        "steps": f"{total_steps:,} of {config.batch_size} x {config.max_seq_len} = "
        f"{step_tokens:,} tokens, {batches.windows / config.batch_size:,.1f} an epoch, in forward "
        f"passes of {micro} sequences a rank",
        "compute": f"{flops:,} FLOPs a token, {flops * step_tokens:.3g} a step, "
        f"{flops * run_tokens:.3g} in the run",
        "memory": f"about {memory:,.1f} GB a rank, beside Python and torch themselves",
    }
    return "\n".join(f"{name:10}  {line}" for name, line in lines.items())


def new_model(config, vocab_size, tokens=None):
    """A model with the config's shape and its seed's weights, on the CPU. tokens: the training
    split's, (n,) uint16, for the head's bias if it begins at their frequencies."""
    torch.manual_seed(config.seed)
    model = LanguageModel(**config.model_args(vocab_size))
    if config.unigram_bias and tokens is not None:
        model.head_bias.data = torch.from_numpy(log_frequencies(tokens, vocab_size))
    return model


def build_model(config, machine, planned, tokens):
    """The model to train, on its device. planned: the same without memory. Raises UserError if it
    does not fit there."""
    kind, there = machine.device.type, machine.memory()
    wanted = planned.memory_bytes(1, machine.dtype, kind)
    try:
        if wanted > there:
            raise MemoryError
        return new_model(config, planned.args["vocab_size"], tokens).to(machine.device)
    except (MemoryError, RuntimeError) as error:
        # what torch's allocators say
        words = ("out of memory", "allocate memory", "alloc_cpu")
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        raise UserError(
            f"to train this model takes about {wanted / 1e9:,.1f} GB, and {kind} has "
            f"{there / 1e9:,.1f} GB a rank; use a smaller --d_model, --d_ff or --num_layers"
        ) from None


def starting_weights(config, machine, dataset):
    """The weights that a run begins with, a state_dict on the CPU; None for its seed's, and where
    it goes on from its own. With init_from the config takes their shape. Raises UserError."""
    if not config.init_from:
        return None
    if config.resume or restarted():
        own = machine.from_rank_0(lambda: checkpoint.shape_of(config.out_dir))
        if own:
            config.take_shape(own)  # what was named otherwise is for the folder to refuse
            return None
    model, _ = load_model(config.init_from, dataset)
    theirs = config.take_shape(model.args)
    weights = model.state_dict()
    positions = weights.get("position_embedding.weight")
    if positions is None or config.max_seq_len <= len(positions):
        theirs.pop("max_seq_len", None)  # rotary positions have no end, learned ones can be cut
    if theirs:
        differ = ", ".join(f"{k} {v}, not {getattr(config, k)}" for k, v in theirs.items())
        mend = " ".join(f"--{k} {v}" for k, v in theirs.items())
        raise UserError(f"{config.init_from} has {differ}; leave that out, or use {mend}")
    if positions is not None:
        weights["position_embedding.weight"] = positions[: config.max_seq_len]
    return weights


def load_model(where, dataset):
    """(the model of open_weights(where), on the CPU; its checkpoint's dict). Raises UserError if
    it reads other ids than the data set's."""
    found = open_weights(where)
    model = LanguageModel.from_checkpoint(found)
    theirs = found.get("tokenizer"), model.args["vocab_size"]
    if theirs != (dataset.tokenizer, dataset.vocab_size):
        raise UserError(
            f"{where} was trained with another tokenizer than {dataset.name}'s; choose another "
            "--dataset"
        )
    return model, found
