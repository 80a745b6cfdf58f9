"""GPT-2 as transformers keeps it: a folder with config.json and model.safetensors.

The block gpt2 computes what theirs does. The names differ, and their matrices (Conv1D) are stored
transposed.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from lab.console import UserError, python
from lab.data import VOCAB_SIZE
from lab.encode import END, pairs_of
from lab.folder import load_checkpoint, write_text, write_whole
from lab.text import no_hub

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


# SHA-256 of the lines of GPT-2's merges, and of its words with their ids
TOKENIZER = (
    "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0",
    "9c0fcef8e6413e73d753e2d0ffbbae0c5e4757f1d0d893fde332050b8cadb47e",
)


def open_weights(where):
    """A checkpoint's dict. where: a checkpoint of this program, a folder that transformers wrote or
    a file in it, or a name in HUB. Raises UserError."""
    path, name = Path(where), where.removeprefix("openai-community/")
    if path.suffix in (".safetensors", ".bin", ".json"):
        path = path.parent
    if path.is_dir():
        return read_folder(path)
    if name in HUB:
        return read_folder(download(name))
    if not path.exists():
        raise UserError(
            f"there is no {where}; name a checkpoint such as out/demo/best.pt, a folder with "
            f"transformers' GPT-2, or one of {', '.join(HUB)}"
        )
    return load_checkpoint(where)


def download(name):
    """The folder with a model of HUB's, fetched where it is not here yet. Raises UserError."""
    import huggingface_hub

    repository, revision = f"openai-community/{name}", HUB[name]
    files = "config.json", "model.safetensors"
    page = f"https://huggingface.co/{repository}/tree/{revision}"
    try:
        for file in files:
            path = huggingface_hub.hf_hub_download(repository, file, revision=revision)
    except Exception as error:
        fix = f"download {' and '.join(files)} from {page}, and name their folder"
        raise no_hub(repository, error, fix) from None
    return Path(path).parent


def tensors_of(num_layers):
    """(our name, theirs, whether theirs is transposed) of each tensor of so many blocks."""
    found = [(ours, theirs, False) for ours, theirs in OUTSIDE.items()]
    for layer in range(num_layers):
        for ours, theirs in OF_A_BLOCK.items():
            ours, theirs = f"blocks.{layer}.{ours}", f"h.{layer}.{theirs}"
            found.append((f"{ours}.weight", f"{theirs}.weight", "norm" not in ours))
            found.append((f"{ours}.bias", f"{theirs}.bias", False))
    return found


# --- reading


def read_folder(folder):
    """The checkpoint's dict of a folder that transformers wrote. Raises UserError."""
    from safetensors import SafetensorError

    try:
        check_tokenizer(folder)
        args = model_args(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        model = our_weights(read_tensors(folder), args)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        why = f"it has no {error}" if isinstance(error, LookupError) else error
        raise UserError(
            f"cannot read GPT-2 from {folder}: {why}; name a folder as transformers' "
            "save_pretrained writes it, or a run's best.pt"
        ) from None
    return dict(model=model, model_args=args, tokenizer="gpt2", separator="endoftext", step=0)


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


def read_tensors(folder):
    """{name: tensor} of model.safetensors, else of the files that its index names."""
    from safetensors.torch import load_file

    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return load_file(whole)
    if not index.exists() and any(folder.glob("pytorch_model*")):
        load = f"from transformers import GPT2LMHeadModel as M; M.from_pretrained('{folder}')"
        convert = f"{python()} -c \"{load}.save_pretrained('{folder}')\""
        raise ValueError(f"pytorch_model.bin is not read; convert it: `{convert}`")
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    tensors = {file: load_file(folder / file) for file in set(files.values())}
    return {name: tensors[file][name] for name, file in files.items()}


def our_weights(tensors, args):
    """Their tensors as a state_dict of ours in float32; the head's bias is zero. Raises ValueError
    for one that is not there, or not of the size that args say."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    state = {"head_bias": torch.zeros(args["vocab_size"])}
    for ours, theirs, transposed in tensors_of(args["num_layers"]):
        if theirs not in tensors:
            raise ValueError(f"it has no tensor {theirs}")
        tensor = tensors[theirs].float()
        state[ours] = tensor.t().contiguous() if transposed else tensor
    # rows that pad GPT-2's vocabulary are left out
    state["token_embedding.weight"] = state["token_embedding.weight"][: args["vocab_size"]]
    for ours, rows in ("token_embedding", "vocab_size"), ("position_embedding", "max_seq_len"):
        size, wanted = list(state[f"{ours}.weight"].shape), [args[rows], args["d_model"]]
        if size != wanted:
            theirs = OUTSIDE[f"{ours}.weight"]
            raise ValueError(f"{theirs} has size {size} where config.json gives {wanted}")
    return state


def check_tokenizer(folder):
    """Raise ValueError if a tokenizer lies in a folder whose merges, or words with their ids, are
    not GPT-2's."""
    for path in sorted(folder.iterdir()):
        parts = []  # lists of lines
        if path.name == "merges.txt":
            parts = [path.read_text(encoding="utf-8").strip("\n").split("\n")[1:]]
        elif path.name in ("vocab.json", "tokenizer.json"):
            model = json.loads(path.read_text(encoding="utf-8"))
            model = model["model"] if path.name == "tokenizer.json" else {"vocab": model}
            parts = [sorted(f"{id} {word}" for word, id in dict(model["vocab"]).items())]
            if "merges" in model:
                merges = model["merges"]
                parts.append([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
        elif path.suffix == ".model" or path.name == "vocab.txt":  # SentencePiece's, BERT's
            parts = [[]]
        for lines in parts:
            if hashlib.sha256("\n".join(lines).encode()).hexdigest() not in TOKENIZER:
                raise ValueError(f"{path.name} is of another tokenizer than GPT-2's")


# --- writing


def write_folder(model, encoding, folder):
    """Write a model of block gpt2, but for its head's bias, and its tokenizer, as transformers
    reads them. The folder is new or empty. Raises UserError."""
    from safetensors.torch import save

    state, tensors = model.state_dict(), {}
    for ours, theirs, transposed in tensors_of(model.args["num_layers"]):
        tensor = state[ours].t().contiguous() if transposed else state[ours]
        tensors[f"transformer.{theirs}"] = tensor
    content = save(tensors, {"format": "pt"})
    try:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise UserError(f"{folder} is not empty; name a folder that is new")
        write_whole(f"{folder}/model.safetensors", lambda file: file.write(content))
        for name, text in their_tokenizer(encoding).items():
            write_text(f"{folder}/{name}", text)
        config = their_config(model.args, encoding.eot_token)
        write_text(f"{folder}/config.json", json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; name another folder") from None


def their_tokenizer(encoding):
    """{name: text} of vocab.json and merges.txt, which write a byte that is no printable character
    as one from U+0100 on."""
    tokens = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {byte: chr(byte) for byte in printable}
    shown |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    word = lambda token: "".join(shown[byte] for byte in token)  # noqa: E731
    vocabulary = {word(token): i for token, i in tokens.items()} | {END: encoding.eot_token}
    pairs = [" ".join(map(word, pair)) for pair in pairs_of(tokens)]
    return {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *pairs, ""]),
    }


def their_config(args, end):
    """config.json, a dict, for LanguageModel's arguments. end: the id of <|endoftext|>."""
    sizes = {theirs: args[ours] for ours, theirs in SIZES.items()}
    end = end if end < args["vocab_size"] else None
    ends = dict(bos_token_id=end, eos_token_id=end)
    dropout = dict(embd_pdrop=args["dropout"], resid_pdrop=args["dropout"], attn_pdrop=0.0)
    return SAME | sizes | ends | dropout | dict(architectures=["GPT2LMHeadModel"])
