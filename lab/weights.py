"""What a run begins with: its shape, its compute dtype and its first weights."""

import torch

from lab.console import UserError
from lab.data import log_frequencies
from lab.folder import fits_memory, metadata_of
from lab.gpt2 import open_weights
from lab.machine import choose_dtype
from model import LanguageModel

# what weights bring along of a config; vocab_size is the data set's, dropout the run's own
SHAPE = "max_seq_len", "d_model", "num_heads", "d_ff", "num_layers", "block", "head_bias"


def settle(config, machine, dataset=None):
    """(the Config with the shape and the compute dtype that a run will have, the weights of
    init_from as a state_dict on the CPU or None). A run that goes on keeps its shape. dataset:
    whose tokens the weights must read. Raises UserError."""
    metadata = machine.from_rank_0(lambda: metadata_of(config.out_dir)) if config.resume else {}
    old, weights = metadata.get("config", {}), None
    if config.init_from and old:
        # what is named otherwise is for the run's folder to refuse
        kept = {name: old[name] for name in SHAPE if name in old and name not in config.named}
        config = config.changed(**kept)
    elif config.init_from:
        checkpoint = open_weights(config.init_from)
        if dataset:
            check_vocabulary(checkpoint, dataset, config.init_from)
        config = with_shape_of(config, checkpoint)
        checkpoint = with_context(checkpoint, config.max_seq_len)
        weights = LanguageModel.from_checkpoint(checkpoint).state_dict()
    return settle_dtype(config, machine, old.get("dtype"), metadata.get("device")), weights


def settle_dtype(config, machine, old_dtype=None, old_device=None):
    """The Config with its compute dtype, which becomes the Machine's too: as the user names it, as
    it was on the same kind of device, or as choose_dtype() says."""
    kind = machine.device.type
    if config.dtype == "auto" and old_dtype and old_device in (None, kind):
        machine.dtype = getattr(torch, old_dtype)
    else:
        machine.dtype = machine.from_rank_0(lambda: choose_dtype(config, machine))
    name = str(machine.dtype).removeprefix("torch.")
    if old_dtype not in (None, name):
        machine.say(f"the compute dtype was {old_dtype} until here, and is {name} from here on")
    return config.changed(dtype=name)


def check_vocabulary(checkpoint, dataset, where):
    """Raise UserError if the checkpoint at `where` reads other ids than the data set's."""
    theirs = checkpoint.get("tokenizer"), checkpoint["model_args"]["vocab_size"]
    if theirs != (dataset.tokenizer, dataset.vocab_size):
        raise UserError(
            f"{where} reads {theirs[1]:,} ids of tokenizer {theirs[0]}, and {dataset.name} has "
            f"{dataset.vocab_size:,} of {dataset.tokenizer}; choose another --dataset"
        )


def with_shape_of(config, checkpoint):
    """The Config with a checkpoint's shape. Raises UserError where the user has named another; for
    another context see with_context()."""
    theirs = {k: v for k, v in checkpoint["model_args"].items() if k in SHAPE}
    named = [k for k in theirs if k in config.named and k != "max_seq_len"]
    differ = {k: theirs[k] for k in named if theirs[k] != getattr(config, k)}
    if differ:
        phrase = ", ".join(f"{k} {v}, not {getattr(config, k)}" for k, v in differ.items())
        words = " ".join(f"--{k} {v}" for k, v in differ.items())
        raise UserError(f"{config.init_from} has {phrase}; leave that out, or use {words}")
    return config.changed(**{k: v for k, v in theirs.items() if k not in config.named})


def with_context(checkpoint, context):
    """A checkpoint whose model reads `context` tokens. Raises UserError if that is more than it has
    learned positions."""
    model, args = dict(checkpoint["model"]), checkpoint["model_args"] | {"max_seq_len": context}
    positions = model.get("position_embedding.weight")
    if positions is not None:
        if context > len(positions):
            raise UserError(
                f"max_seq_len {context} is more than the {len(positions)} positions that these "
                f"weights have learned; use --max_seq_len {len(positions)} or less"
            )
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
    with fits_memory(
        f"to train this model takes about {wanted / 1e9:,.1f} GB, and {kind} has "
        f"{there / 1e9:,.1f} GB per rank; use a smaller --d_model, --d_ff or --num_layers"
    ):
        if wanted > there:
            raise MemoryError
        return new_model(config, planned.args["vocab_size"], tokens).to(machine.device)
