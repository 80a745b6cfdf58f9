"""GPT-2 as transformers keeps it: a folder with config.json and model.safetensors.

The block gpt2 computes what theirs does. The names differ, and their matrices (Conv1D) are stored
transposed.
"""

import json
from pathlib import Path

import torch

from lab.console import UserError
from lab.data import VOCAB_SIZE
from lab.folder import load_checkpoint

# what their config.json must say, or leave out, for the model to be ours
SAME = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}  # fmt: skip
# our names: theirs, of sizes and of what a tensor's name is made of
SIZES = {
    "vocab_size": "vocab_size", "max_seq_len": "n_positions", "d_model": "n_embd",
    "num_heads": "n_head", "d_ff": "n_inner", "num_layers": "n_layer",
}  # fmt: skip
PARTS = {
    "token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f", "blocks.": "h.",
    "attention_norm": "ln_1", "qkv": "attn.c_attn", "attention_out": "attn.c_proj",
    "mlp_norm": "ln_2", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj",
}  # fmt: skip
WORDS = {"Ġthe": 262, "Ġpeople": 661, "ization": 1634}  # by which GPT-2's tokenizer is known
NOT_WEIGHTS = ".attn.bias", ".attn.masked_bias", "lm_head.weight"  # masks, and wte once more


def open_weights(where):
    """A checkpoint's dict. where: a checkpoint of this program, or a folder that transformers wrote
    or a file in it. Raises UserError."""
    path = Path(where)
    if path.suffix in (".safetensors", ".bin", ".json"):
        path = path.parent
    if path.is_dir():
        return read_folder(path)
    if not path.exists():
        files = "config.json model.safetensors --local-dir gpt2"
        raise UserError(
            f"there is no {where}; name a checkpoint such as out/demo/best.pt, or a folder with "
            f"transformers' GPT-2: `hf download openai-community/gpt2 {files}` fetches OpenAI's"
        )
    return load_checkpoint(where)


def read_folder(folder):
    """The checkpoint's dict of a folder that transformers wrote. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_tokenizer(folder)
        args = model_args(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        model = our_weights(load_file(folder / "model.safetensors"), args["vocab_size"])
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        why = f"it has no {error}" if isinstance(error, LookupError) else error
        raise UserError(
            f"cannot read GPT-2 from {folder}: {why}; name a run's best.pt, or a folder with "
            "config.json and model.safetensors (not pytorch_model.bin, nor several parts), as "
            "transformers' save_pretrained writes it"
        ) from None
    return dict(model=model, model_args=args, tokenizer="gpt2", separator="endoftext", step=0)


def check_tokenizer(folder):
    """Raise ValueError if a folder holds a tokenizer whose words are not GPT-2's."""
    for name in ("vocab.json", "tokenizer.json"):
        path = folder / name
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            words = found["model"]["vocab"] if name == "tokenizer.json" else found
            if any(words.get(word) != id for word, id in WORDS.items()):
                raise ValueError(f"{name} is of another tokenizer than GPT-2's")


def model_args(config):
    """LanguageModel's arguments for their config.json, a dict. Raises ValueError."""
    config = SAME | config
    wrong = [f"{name} {config[name]}" for name in SAME if config[name] != SAME[name]]
    if wrong:
        raise ValueError(f"config.json has {', '.join(wrong)}")
    args = {ours: config[theirs] for ours, theirs in SIZES.items() if theirs != "n_inner"}
    args["d_ff"] = config.get("n_inner") or 4 * args["d_model"]
    if not args["num_heads"] or args["d_model"] % args["num_heads"]:
        raise ValueError(f"n_head {args['num_heads']} does not divide n_embd {args['d_model']}")
    # a larger vocabulary is GPT-2's with rows that pad it
    args["vocab_size"] = min(args["vocab_size"], VOCAB_SIZE)
    return args | dict(block="gpt2", head_bias=False)


def our_weights(tensors, vocab_size):
    """Their tensors under our names, as a state_dict in float32: the blocks' matrices are
    transposed, and the head's bias is zero."""
    state = {}
    for name, tensor in tensors.items():
        if name.endswith(NOT_WEIGHTS):
            continue
        name = name.removeprefix("transformer.")
        for ours, theirs in PARTS.items():
            name = name.replace(theirs, ours)
        is_matrix = name.startswith("blocks.") and tensor.dim() == 2
        state[name] = (tensor.t() if is_matrix else tensor).float().contiguous()
    # rows that pad GPT-2's vocabulary are left out
    state["token_embedding.weight"] = state["token_embedding.weight"][:vocab_size]
    return state | {"head_bias": torch.zeros(vocab_size)}
