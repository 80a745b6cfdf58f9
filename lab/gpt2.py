"""GPT-2 as `transformers` keeps it: a folder with config.json and model.safetensors, on the disk or
on the Hugging Face hub.

The block gpt2 computes what theirs does. The names differ, and their matrices (Conv1D) are stored
the other way round.
"""

import json
import os
from pathlib import Path

import torch

from lab.console import UserError, first_line
from lab.data import VOCAB_SIZE
from lab.folder import load_checkpoint, write_text, write_whole
from lab.sources import no_hub

# OpenAI's weights, each at the commit that they were looked up at
HUB = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
# what their config.json must say, or leave out, for the model to be ours
SAME = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}  # fmt: skip
# our names: theirs, of sizes and of tensors
SIZES = {
    "vocab_size": "vocab_size", "max_seq_len": "n_positions", "d_model": "n_embd",
    "num_heads": "n_head", "d_ff": "n_inner", "num_layers": "n_layer",
}  # fmt: skip
OUTSIDE = {
    "token_embedding.weight": "wte.weight", "position_embedding.weight": "wpe.weight",
    "final_norm.weight": "ln_f.weight", "final_norm.bias": "ln_f.bias",
}  # fmt: skip
OF_A_BLOCK = {
    "attention_norm": "ln_1", "qkv": "attn.c_attn", "attention_out": "attn.c_proj",
    "mlp_norm": "ln_2", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj",
}  # fmt: skip


def open_weights(where):
    """A checkpoint's dict. where: a file of this program, a folder of transformers', or a name in
    HUB. Raises UserError."""
    if os.path.isdir(where):
        return read_folder(Path(where))
    if where in HUB:
        return read_folder(download(where))
    return load_checkpoint(where)


def download(name):
    """The folder with a model of HUB's, fetched where it is not here yet. Raises UserError."""
    import huggingface_hub

    repository, revision = f"openai-community/{name}", HUB[name]
    try:
        for file in ("config.json", "model.safetensors"):
            path = huggingface_hub.hf_hub_download(repository, file, revision=revision)
    except Exception as error:  # as many ways to fail as there are libraries below
        page = f"https://huggingface.co/{repository}/tree/{revision}"
        mend = f"download these two files of {page} into a folder, and name that instead of {name}"
        raise no_hub(f"config.json and model.safetensors of {repository}", error, mend) from None
    return Path(path).parent


def tensor_names(num_layers):
    """{our name of a tensor: theirs}, for a model of so many blocks."""
    names = dict(OUTSIDE)
    for layer in range(num_layers):
        for ours, theirs in OF_A_BLOCK.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"h.{layer}.{theirs}.{kind}"
    return names


def turned(name, tensor):
    """A tensor of ours as theirs, and back: the blocks' matrices are transposed."""
    matrix = name.startswith("blocks.") and tensor.dim() == 2
    return tensor.t().contiguous() if matrix else tensor


# --- reading


def read_folder(folder):
    """The checkpoint's dict of a folder as save_pretrained() writes it. Raises UserError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = SAME | config  # what it leaves out is GPT-2's
        if others := [f"{name} {found[name]}" for name in SAME if found[name] != SAME[name]]:
            raise UserError(f"{folder} holds another model than GPT-2: {', '.join(others)}")
        args = model_args(config)
        model = read_tensors(folder, args)
    except UserError:
        raise
    except Exception as error:  # a file that is missing or damaged, a tensor that is not there
        raise UserError(
            f"{folder} does not hold GPT-2's config.json and model.safetensors, as transformers' "
            f"save_pretrained writes them ({first_line(error)}); of a run, name the file best.pt"
        ) from None
    return dict(model=model, model_args=args, tokenizer="gpt2", separator="endoftext", step=0)


def model_args(config):
    """LanguageModel's arguments for their config.json."""
    args = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
    args["d_ff"] = args["d_ff"] or 4 * args["d_model"]
    return args | dict(block="gpt2", head_bias=False)


def read_tensors(folder, args):
    """A folder's weights, a state_dict of ours in float32; the head's bias is zero."""
    from safetensors.torch import load_file

    found = {}
    for path in folder.glob("*.safetensors"):  # large models come in several
        for name, tensor in load_file(path).items():
            found[name.removeprefix("transformer.")] = tensor
    names = tensor_names(args["num_layers"])
    state = {ours: turned(ours, found[theirs]).float() for ours, theirs in names.items()}
    return state | {"head_bias": torch.zeros(args["vocab_size"])}


# --- writing


def write_folder(model, folder):
    """Write a model of block gpt2, but for its head's bias, as transformers reads it. The folder is
    new or empty. Raises UserError."""
    from safetensors.torch import save

    state, names = model.state_dict(), tensor_names(model.args["num_layers"])
    tensors = {f"transformer.{names[name]}": turned(name, state[name]) for name in names}
    content = save(tensors, {"format": "pt"})
    try:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise UserError(f"{folder} is not empty; name a folder that is new")
        write_whole(f"{folder}/model.safetensors", lambda file: file.write(content))
        write_text(f"{folder}/config.json", json.dumps(their_config(model.args), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; name another folder") from None


def their_config(args):
    """config.json, a dict, for LanguageModel's arguments."""
    sizes = {theirs: args[ours] for ours, theirs in SIZES.items()}
    end = VOCAB_SIZE - 1 if args["vocab_size"] == VOCAB_SIZE else None  # GPT-2's <|endoftext|>
    ends = dict(bos_token_id=end, eos_token_id=end)
    dropout = dict(embd_pdrop=args["dropout"], resid_pdrop=args["dropout"], attn_pdrop=0.0)
    return SAME | sizes | ends | dropout | dict(architectures=["GPT2LMHeadModel"])
