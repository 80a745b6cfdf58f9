"""What users and disks get wrong, each with the line that train.py must end in: by
test_failures.py in one process, by torture.py as whole commands. Every case runs in a folder of
its own with a data set, tiny.py and a run in out/done."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch


class Malice:
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)


def config(text):
    return lambda: Path("tiny.py").write_bytes(text if isinstance(text, bytes) else text.encode())


def token_file(change):
    def spoil():
        path = Path("data/tiny/train.bin")
        path.write_bytes(change(path.read_bytes()))

    return spoil


def meta(text):
    return lambda: Path("data/tiny/meta.json").write_text(text)


def test_split(tokens):
    """Give the data set a test split of the training split's first tokens; None: without its
    file."""

    def spoil():
        path, ids = Path("data/tiny/meta.json"), np.fromfile("data/tiny/train.bin", "<u2")[:tokens]
        about = json.loads(path.read_text())
        counts = dict(
            tokens=len(ids), words=1, bytes=1, rows=1, sha256=hashlib.sha256(ids).hexdigest()
        )
        path.write_text(json.dumps(about | {"splits": about["splits"] | {"test": counts}}))
        if tokens:
            ids.tofile("data/tiny/test.bin")

    return spoil


def prepared_anew():
    from helpers import make_dataset

    vocab_size = json.loads(Path("data/tiny/meta.json").read_text())["vocab_size"]
    shutil.rmtree("data/tiny")
    make_dataset(Path("data"), vocab_size=vocab_size, seed=2)


def checkpoints(last, prev=None):
    """Put bytes, or an object to save, in the place of the finished run's last.pt and prev.pt
    (None removes)."""

    def spoil():
        for name, content in (("last", last), ("prev", prev)):
            path = Path(f"out/done/{name}.pt")
            if callable(content):
                path.write_bytes(content(path.read_bytes()))
            elif isinstance(content, bytes):
                path.write_bytes(content)
            elif content is None:
                path.unlink()
            else:
                torch.save(content, path)

    return spoil


def flipped(data):
    """The middle of every KiB with a bit flipped."""
    data = bytearray(data)
    for i in range(512, len(data), 1024):
        data[i] ^= 1
    return bytes(data)


def fill_disk_name():
    Path("out/file").write_text("in the way")


SWAPPED = (np.arange(3000, dtype="<u2") % 400).tobytes()
EMPTY = {"model": {}, "model_args": {}, "step": 1}
RESUME = ["--out_dir", "out/done", "--resume", "--max_steps", "9"]

# name: (what is done to the folder, words after `train.py`, what the one line says)
CASES = {
    "no config": (None, [], "no config given"),
    "no such config": (None, ["none.py"], "cannot read config none.py"),
    "config is a folder": (None, ["data"], "cannot read config data"),
    "config with a syntax error": (config("d_model ="), ["tiny.py"], "SyntaxError"),
    "config with an unknown name": (config("droput = 0.1"), ["tiny.py"], "did you mean dropout"),
    "config with a name of ours": (config("seed = FIELDS"), ["tiny.py"], "NameError"),
    "config that runs a command": (
        config("import os\nos.remove('none')"),
        ["tiny.py"],
        "FileNotFoundError",
    ),
    "config of another type": (config("epochs = '3'"), ["tiny.py"], "epochs takes int"),
    "config that is no text": (config(b"\xff\xfe\x00"), ["tiny.py"], "not UTF-8"),
    "config that raises": (config("seed = 1 / 0"), ["tiny.py"], "ZeroDivisionError"),
    "config that raises in two lines": (
        config("raise ValueError('one\\ntwo')"),
        ["tiny.py"],
        "ValueError: one",
    ),
    "setting misspelt": (None, ["tiny.py", "--d_modle", "8"], "did you mean d_model"),
    "setting without a value": (None, ["tiny.py", "--seed"], "--seed needs a value"),
    "setting of another type": (None, ["tiny.py", "--epochs", "1.5"], "epochs takes int"),
    "setting that no literal is": (None, ["tiny.py", "--epochs", "{[]}"], "epochs takes int"),
    "setting not a number": (
        None,
        ["tiny.py", "--learning_rate", "nan"],
        "learning_rate takes float",
    ),
    "setting out of range": (None, ["tiny.py", "--dropout", "1"], "dropout must be"),
    "batch of nothing": (None, ["tiny.py", "--batch_size", "0"], "batch_size must be"),
    "a stray word": (None, ["tiny.py", "exp5"], "exp5 is neither a setting"),
    "heads that do not divide": (None, ["tiny.py", "--num_heads", "3"], "does not divide"),
    "warm-up longer than the run": (None, ["tiny.py", "--warmup_steps", "63"], "--warmup_steps 6"),
    "micro-batch larger than the batch": (
        None,
        ["tiny.py", "--micro_batch_size", "7"],
        "larger than batch_size",
    ),
    "no such choice": (None, ["tiny.py", "--lr_schedule", "cosin"], "did you mean cosine"),
    "no such device": (None, ["tiny.py", "--device", "tpu"], "device is auto"),
    "no GPU": (None, ["tiny.py", "--device", "cuda"], "no cuda device"),
    "context longer than the data": (
        None,
        ["tiny.py", "--max_seq_len", "3000"],
        "not one window of 3000",
    ),
    "data not prepared": (None, ["tiny.py", "--dataset", "wikitext-2"], "prepare.py wikitext-2`"),
    "tokens truncated": (
        token_file(lambda data: data[:3000]),
        ["tiny.py"],
        "bytes where meta.json says",
    ),
    "tokens of odd length": (
        token_file(lambda data: data[:-1]),
        ["tiny.py"],
        "bytes where meta.json says",
    ),
    "tokens empty": (token_file(lambda data: b""), ["tiny.py"], "bytes where meta.json says"),
    "tokens past the vocabulary": (
        token_file(lambda data: b"\xff\xff" + data[2:]),
        ["tiny.py"],
        "another SHA-256",
    ),
    "tokens swapped": (token_file(lambda data: SWAPPED), ["tiny.py"], "another SHA-256"),
    "tokens missing": (lambda: Path("data/tiny/train.bin").unlink(), ["tiny.py"], "0 bytes where"),
    "test split missing": (test_split(None), ["tiny.py"], "test.bin has 0 bytes where"),
    "test split of one token": (test_split(1), ["tiny.py"], "test.bin holds one token"),
    "meta.json torn": (meta('{"tokenizer": "gpt2", "voc'), ["tiny.py"], "is damaged"),
    "meta.json another program's": (
        meta(json.dumps({"vocab_size": 65, "itos": {}})),
        ["tiny.py"],
        "is damaged",
    ),
    "meta.json without counts": (
        meta(
            json.dumps(
                dict(
                    tokenizer="",
                    vocab_size=9,
                    separator="",
                    source={},
                    splits={"train": {}, "val": {}},
                )
            )
        ),
        ["tiny.py"],
        "is damaged",
    ),
    "data prepared anew under a run": (
        prepared_anew,
        ["tiny.py", *RESUME],
        "train split was another",
    ),
    "folder holds a run": (None, ["tiny.py", "--out_dir", "out/done"], "holds a run already"),
    "another experiment": (
        None,
        ["tiny.py", *RESUME, "--dropout", "0.5"],
        "dropout was 0.2, now 0.5",
    ),
    "out_dir is a file": (
        fill_disk_name,
        ["tiny.py", "--out_dir", "out/file"],
        "cannot write into out/file",
    ),
    "both checkpoints empty": (checkpoints(b"", b""), ["tiny.py", *RESUME], "no whole checkpoints"),
    "both checkpoints truncated": (
        checkpoints(lambda data: data[:-1], lambda data: data[: len(data) // 2]),
        ["tiny.py", *RESUME],
        "no whole checkpoints",
    ),
    "both checkpoints with flipped bits": (
        checkpoints(flipped, flipped),
        ["tiny.py", *RESUME],
        "no whole checkpoints",
    ),
    "checkpoint with a malicious pickle": (
        checkpoints({"model": Malice()}),
        ["tiny.py", *RESUME],
        "no whole checkp",
    ),
    "checkpoint another program's": (
        checkpoints({"weights": 1}),
        ["tiny.py", *RESUME],
        "no whole checkpoints",
    ),
    "checkpoint without an optimizer": (
        checkpoints(EMPTY),
        ["tiny.py", *RESUME],
        "no whole checkpoints",
    ),
}
