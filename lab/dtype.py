"""The dtype of the matmuls: as configured or, on a CPU, the one that was measured to be faster."""

import contextlib
import json
import os
import time

import torch

from lab.data import VOCAB_SIZE
from lab.folder import read_json, write_text
from lab.kernels import causal_attention

ROWS = 192  # tokens whose work is measured
WORDS = -(-VOCAB_SIZE // 64) * 64  # as the head pads them


def choose_dtype(config, machine):
    """(the dtype of a run's matmuls, why, as a phrase, "" where there is nothing to say)."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype), ""
    if machine.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16, ""
    if machine.device.type != "cpu" or not has_bfloat16():
        return torch.float32, ""
    # a CPU that has the instruction may still be slower with it
    times = measured(config, machine.device_name())
    faster = times["bfloat16"] < 0.9 * times["float32"]
    why = "measured: float32 {float32:.0f} ms, bfloat16 {bfloat16:.0f} ms".format(**times)
    return torch.bfloat16 if faster else torch.float32, why


def has_bfloat16():
    """Whether the CPU multiplies bfloat16 by itself. Emulated it is slower than float32."""
    supported = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    known = [getattr(torch.cpu, name, lambda: False) for name in supported]
    return any(instruction() for instruction in known)


def measured(config, processor):
    """{dtype: milliseconds} of what a model of this shape spends its time on. Measured once for a
    processor, a version of torch and a shape, and kept in ~/.cache/daybook/dtype.json."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(folder, "daybook", "dtype.json")
    names = "d_model", "num_heads", "d_ff", "num_layers"
    shape = " ".join(str(getattr(config, name)) for name in names)
    key = f"{processor}, torch {torch.__version__}, shape {shape}"
    known = read_json(path)
    if key not in known:
        known[key] = measure(config)
        with contextlib.suppress(OSError):  # it is measured again next time
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_text(path, json.dumps(known, indent=2) + "\n")
    return known[key]


def measure(config):
    """{dtype: milliseconds} of ROWS tokens, the least of three rounds."""
    work = {dtype: pieces(config, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    least = {}
    for _ in range(3):  # in turn, since the processor may have other work
        for dtype, (block, head) in work.items():
            now = config.num_layers * milliseconds(block) + milliseconds(head)
            least[dtype] = min(now, least.get(dtype, now))
    return least


def milliseconds(function):
    """How long a function takes."""
    began = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - began)


def pieces(config, dtype):
    """(a function that does about what a block does, forward and backward, one for the head):
    matmuls and softmaxes of the model's shapes, in dtype."""
    D, heads, F = config.d_model, config.num_heads, config.d_ff
    # wider ones give the same answer and may not fit into memory; heads that do not divide the
    # width get a line of their own later
    if max(D, F) > 4096 or D % heads:
        D, heads, F = 1024, 8, 4096

    x, wide, logits = (torch.randn(ROWS, n).to(dtype) for n in (D, F, WORDS))
    # weights of a trained model's size: where a softmax meets large numbers, tiny ones come out,
    # which take a CPU many times as long
    shapes = (D, 3 * D), (D, D), (D, F), (F, D), (WORDS, D)
    qkv, out, up, down, word = (torch.randn(shape).mul(0.05).to(dtype) for shape in shapes)
    gradient = torch.empty_like(word)
    room = torch.empty(32, WORDS)

    def block():
        for _ in range(3):  # a backward pass takes two times as many operations
            q, k, v = (x @ qkv).view(1, ROWS, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
            causal_attention(q, k, v)
            for left, right in ((x, out), (x, up), (wide, down)):
                left @ right

    def head():
        torch.mm(x, word.t(), out=logits)
        for part in logits.split(32):
            part.copy_(torch.softmax(room.copy_(part), 1))
        torch.mm(logits.t(), x, out=gradient)
        logits @ word

    return block, head
