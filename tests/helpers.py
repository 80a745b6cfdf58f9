"""What tests share: a small data set and config, what a run leaves, processes to kill, and how near
to each other two results in floating point must be."""

import contextlib
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import load_config
from lab.data import Batches, Dataset
from lab.folder import load_checkpoint, read_lines, save_checkpoint
from lab.machine import Machine
from lab.trainer import Trainer
from lab.weights import new_model

ROOT = Path(__file__).parent.parent
CPU = Machine(torch.device("cpu"), torch.float32)
RANKS = (
    "-m torch.distributed.run --nproc_per_node=2 --master_port=0 --rdzv-backend=c10d "
    "--rdzv-endpoint=localhost:0"
).split()
MODERN = "--block modern --optimizer muon --lr_schedule trapezoid".split()  # experiment 6's
# A step's tokens, 8 x 16 at most: the longest sum that ranks and micro-batches take in parts.
TOKENS = 8 * 16

# Muon's five Newton-Schulz steps multiply the smallest singular values by this, and with them
# their rounding errors
MUON = 3.4445**5


def near(dtype, terms):
    """How far, relatively, a sum of so many terms may be off, or a chain of so many roundings.

    Each addition rounds by at most eps / 2 of the sum so far. Even and independent, all of these
    together have a standard deviation of eps * sqrt(terms) / 6: this is six of them. It holds for
    any processor, since a sum in another order, in lanes or in blocks, has less. Where terms have
    both signs it is relative to the sum of their sizes.
    """
    return torch.finfo(dtype).eps * math.sqrt(terms)


def assert_near(one, two, tolerance):
    """Every number of `one` is that of `two`, but for `tolerance` of the largest of `two`."""
    one, two = one.detach().double(), two.detach().double()
    assert one.shape == two.shape and two.abs().max() > 0
    error = ((one - two).abs().max() / two.abs().max()).item()
    assert error <= tolerance, f"off by {error:.2g} of the largest; allowed is {tolerance:.2g}"


def assert_same_curve(one, two, terms, steps=None, moved=None, condition=1.0, dtype=torch.float32):
    """Two runs gave one curve, up to rounding: `one` and `two` (n,), taken over `steps` steps (n
    where none are given) whose sums have `terms` terms.

    Each value is such a sum, in float32. And the updates have moved it by `moved` (as far as the
    curve goes, where that is not given): where an update is off by some share of itself, the move
    is. Updates are made in dtype, and their errors are `condition` times those of the gradients.
    Behind the last value are the roundings of all steps.
    """
    one, two = np.array(one), np.array(two)
    moved = np.ptp(one) if moved is None else moved
    roundings = terms * (steps or len(one))
    tolerance = near(torch.float32, roundings) * np.abs(one)
    tolerance += near(dtype, roundings) * condition * moved
    assert (tolerance < moved / 2).all(), "with this tolerance a run that learns nothing would pass"
    np.testing.assert_array_less(np.abs(two - one), tolerance)


def assert_same_curves(one, two, steps, condition=1):
    """Runs in these folders, of so many steps, learnt alike up to rounding: training, validation
    and gradients."""
    moved = np.ptp([line["train_loss"] for line in metrics(one)])  # of the validation, too
    for key, far in dict(train_loss=moved, grad_norm=None, val_loss=moved).items():
        of_evaluations = key == "val_loss"
        curves = ([line[key] for line in metrics(folder, of_evaluations)] for folder in (one, two))
        assert_same_curve(*curves, TOKENS, steps, far, condition)


# --- a data set, a config, and what a run leaves


VOCAB = 512  # of the tests' data: the head of gpt2's 50,257 words would take most of a small step


def make_dataset(folder, name="tiny", train=3000, val=700, vocab_size=VOCAB, seed=1):
    """A prepared data set of 400 ids that follow from one another, so that there is something to
    learn."""
    random = np.random.RandomState(seed)
    splits = {}
    (folder / name).mkdir(parents=True)
    for split, length in dict(train=train, val=val).items():
        ids = (random.randint(0, 50, length).cumsum() % 400).astype("<u2")
        ids.tofile(folder / name / f"{split}.bin")
        counts = dict(tokens=length, words=length // 2, bytes=3 * length, rows=10)
        splits[split] = counts | dict(sha256=hashlib.sha256(ids).hexdigest())
    meta = dict(tokenizer="gpt2", vocab_size=vocab_size, separator="none", splits=splits)
    meta["source"] = {"name": "a test"}
    (folder / name / "meta.json").write_text(json.dumps(meta))


TINY = """
dataset = "tiny"
max_seq_len = 16
d_model = 8
num_heads = 2
d_ff = 16
num_layers = 2
dropout = 0.2
batch_size = 6
epochs = 2
learning_rate = 1e-2
warmup_steps = 5
device = "cpu"
dtype = "float32"
log_interval = 1
sample_prompts = ()
"""


def rows_of(batches, i, rank=0, world=1):
    """The rows of batch i that a rank trains on, (rows, max_seq_len + 1) int64."""
    tokens = torch.from_numpy(batches.tokens.view(np.int16))
    starts = torch.from_numpy(batches.starts(i, rank, world))
    return Trainer.rows(SimpleNamespace(tokens=tokens, batches=batches), starts).numpy()


def load_tokens(name, split, data_dir="data"):
    """A split's ids, (n,) uint16."""
    return Dataset(name, data_dir).split(split).tokens


def trainer_of(words, total_steps, machine=CPU, graph=False, cls=Trainer):
    """The Trainer of a run with a config's words, at its beginning. graph: cuda_graph, whatever the
    device."""
    config = load_config(words).changed(cuda_graph=graph)
    tokens = load_tokens(config.dataset, "train")
    batches = Batches(tokens, config.max_seq_len, config.batch_size, config.seed)
    model = new_model(config, VOCAB).to(machine.device)
    return cls(config, machine, model, batches, total_steps)


def metrics(out="out/tiny", evaluations=False):
    lines = [json.loads(line) for line in open(f"{out}/metrics.jsonl", encoding="utf-8")]
    return [line for line in lines if ("val_loss" in line) == evaluations]


def weights(path):
    return load_checkpoint(path)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_the_same_run(one, two, curves=True):
    whole, cut = load_checkpoint(f"{one}/last.pt"), load_checkpoint(f"{two}/last.pt")
    assert same(whole["model"], cut["model"])
    assert same(weights(f"{one}/best.pt"), weights(f"{two}/best.pt"))
    for mine, theirs in zip(whole["optimizers"], cut["optimizers"], strict=True):
        for state in mine["state"]:
            assert same(mine["state"][state], theirs["state"][state])
    for evaluations in (False, True) if curves else ():
        a, b = metrics(one, evaluations), metrics(two, evaluations)
        for line in a + b:
            line.pop("elapsed_s"), line.pop("tokens_per_s", None)
        assert a == b


# --- what goes wrong


class refuse_float64(TorchDispatchMode):
    """Within it an operation that gives a float64 tensor fails, as on MPS."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{function} gives float64, which MPS does not have")
        return result


def before_each_pass(do):
    """Call do(whether it trains) as each forward pass of a model over the tests' data begins, for
    as long as a `with` lasts."""

    def hook(module, _):
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == VOCAB:
            do(module.training)

    return torch.nn.modules.module.register_module_forward_pre_hook(hook)


@contextlib.contextmanager
def limited(what, limit):
    """Within the `with`, this process has a limit of the kernel's, such as RLIMIT_FSIZE."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def forbid(words, path="out/tiny/last.pt"):
    """Make words impossible to a checkpoint's model: where one of them comes next the loss is
    infinite, though the gradients that the head forms are finite. Returns the checkpoint."""
    checkpoint = load_checkpoint(path)
    checkpoint["model"]["head_bias"][words] = -math.inf
    save_checkpoint(checkpoint, path)
    return checkpoint


# --- processes


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition, process=None, pause=0.02):
    """Wait for condition() to hold, and return what it gave."""
    end = time.monotonic() + 90
    while not (value := condition()):
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(pause)
    return value


@contextlib.contextmanager
def started(command, stderr=subprocess.PIPE, **kwargs):
    """A process; whatever becomes of the test, it and what it started are killed."""
    with subprocess.Popen(
        command, stderr=stderr, text=True, start_new_session=True, **kwargs
    ) as process:
        everybody = [process.pid]
        try:
            yield process
        finally:
            everybody += children(process.pid) if process.poll() is None else []
            for pid in everybody if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)


def step_of(out):
    """The highest step in a run's metrics.jsonl, 0 without one."""
    return max((line["step"] for line in read_lines(f"{out}/metrics.jsonl")), default=0)
