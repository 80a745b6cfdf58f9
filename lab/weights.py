"""What a run begins with: its shape, its compute dtype and its first weights."""

import torch

from lab.console import UserError
from lab.data import log_frequencies
from lab.folder import metadata_of
from lab.gpt2 import open_weights
from lab.machine import choose_dtype
from model import LanguageModel


def settle(config, machine, dataset=None):
    """(the Config with the shape and the compute dtype that a run will have, the weights of
    init_from as a state_dict on the CPU or None). A run that goes on keeps its shape. dataset:
    whose tokens the weights must read. Raises UserError."""
    old, weights = {}, None
    if config.resume:
        old = machine.from_rank_0(lambda: metadata_of(config.out_dir)).get("config", {})
    if config.init_from and old:
        config = with_shape_of(config, old)
    elif config.init_from:
        checkpoint = open_weights(config.init_from)
        if dataset:
            check_vocabulary(checkpoint, dataset, config.init_from)
        config = with_shape_of(config, checkpoint["model_args"])
        checkpoint = with_context(checkpoint, config.max_seq_len)
        weights = LanguageModel.from_checkpoint(checkpoint).state_dict()
    return settle_dtype(config, machine, old), weights


def settle_dtype(config, machine, old):
    """The Config with its compute dtype, which becomes the Machine's too: as the user names it, as
    it was in the config `old`, a dict, or as choose_dtype() says."""
    if config.dtype == "auto":
        config = config.changed(dtype=old.get("dtype", "auto"))
    machine.dtype = machine.from_rank_0(lambda: choose_dtype(config, machine))
    return config.changed(dtype=str(machine.dtype).removeprefix("torch."))


def check_vocabulary(checkpoint, dataset, where):
    """Raise UserError if the checkpoint at `where` reads other ids than the data set's."""
    theirs = checkpoint.get("tokenizer"), checkpoint["model_args"]["vocab_size"]
    if theirs != (dataset.tokenizer, dataset.vocab_size):
        raise UserError(
            f"{where} reads {theirs[1]:,} ids of tokenizer {theirs[0]}, and {dataset.name} has "
            f"{dataset.vocab_size:,} of {dataset.tokenizer}; choose a --dataset in that vocabulary"
        )


def with_shape_of(config, theirs):
    """The Config with the shape of init_from's weights, which is among `theirs`, a dict. Raises
    UserError where the user has named another; for another context see with_context()."""
    own = "vocab_size", "dropout"  # the data set's, and the run's
    shape = {k: theirs[k] for k in config.model_args(0) if k in theirs and k not in own}
    named = [k for k in shape if k in config.named]
    differ = [k for k in named if shape[k] != getattr(config, k) and k != "max_seq_len"]
    if differ:
        words = " ".join(f"--{k} {shape[k]}" for k in differ)
        raise UserError(f"{config.init_from} has another shape; use {words}, or leave that out")
    return config.changed(**{k: v for k, v in shape.items() if k not in named})


def with_context(checkpoint, context):
    """A checkpoint whose model reads `context` tokens. Raises UserError if that is more than it has
    learned positions."""
    model, args = dict(checkpoint["model"]), checkpoint["model_args"] | {"max_seq_len": context}
    positions = model.get("position_embedding.weight")
    if positions is not None:
        if context > len(positions):
            fix = f"use --max_seq_len {len(positions)} or less"
            raise UserError(f"these weights have not learned {context} positions; {fix}")
        model["position_embedding.weight"] = positions[:context]
    return checkpoint | dict(model=model, model_args=args)


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
    if wanted > there:
        raise UserError(
            f"to train this model takes about {wanted / 1e9:,.1f} GB, and {kind} has "
            f"{there / 1e9:,.1f} GB per rank; use a smaller --d_model, --d_ff or --num_layers"
        )
    return new_model(config, planned.args["vocab_size"], tokens).to(machine.device)
