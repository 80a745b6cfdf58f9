"""Settings: one dataclass, a config file of plain assignments held against it, and the command line made from it.

A config file holds assignments only and runs in an empty namespace; `--name value` on the command line wins over
it. Everything that is wrong with both is listed at once.
"""

from lab.console import ROOT, UserError, command, first_line

import ast
import dataclasses
import difflib
import os
import re
import sys
import types
from dataclasses import dataclass
from typing import ClassVar


def setting(default, help, low=None, below=None, choices=None, path=False):
    """A dataclass field with its reason and unit, and the values that it allows: low <= value <
    below, or one of choices. path: a leading ~ stands for the user's home."""
    metadata = {"help": help, "low": low, "below": below, "choices": choices, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Config:
    """All settings of a run. Lengths are in tokens, batch sizes in sequences of max_seq_len tokens."""

    name: ClassVar[str] = ""  # the config file's, without .py
    doc: ClassVar[str] = ""  # its docstring: the question, and what is expected

    # data
    dataset: str = setting("wikitext-103", "folder under data_dir that prepare.py wrote")
    data_dir: str = setting("data", "where the data sets lie", path=True)
    out_dir: str = setting("", "this run's own folder (default: out/<name of the config file>)", path=True)
    # model
    max_seq_len: int = setting(512, "context, tokens", low=1)
    d_model: int = setting(256, "width of the residual stream", low=1)
    num_heads: int = setting(8, "attention heads; must divide d_model", low=1)
    d_ff: int = setting(1024, "width of the MLP", low=1)
    num_layers: int = setting(8, "blocks", low=1)
    dropout: float = setting(0.1, "on the embedding sum and on each residual branch", low=0, below=1)
    block: str = setting("gpt2", "gpt2, the notebook's, or modern, experiment 6's", choices=("gpt2", "modern"))
    unigram_bias: bool = setting(False, "begin with the head's bias at the log frequencies of the training tokens")
    # training
    batch_size: int = setting(32, "sequences an optimizer step, over all ranks and micro-batches", low=1)
    micro_batch_size: int = setting(
        0, "sequences a forward pass and rank (0: what memory allows, on a CPU 1,024 tokens)", low=0
    )
    epochs: int = setting(1, "passes over the training tokens", low=1)
    max_steps: int = setting(0, "end after so many optimizer steps (0: no limit but the epochs)", low=0)
    max_hours: float = setting(0.0, "end cleanly after so many hours, resumes included (0: no limit)", low=0)
    patience: int = setting(0, "end after so many evaluations without a new best (0: never)", low=0)
    learning_rate: float = setting(4e-4, "AdamW's learning rate after warm-up", low=0)
    min_learning_rate: float = setting(0.0, "where the schedule ends", low=0)
    warmup_steps: int | None = setting(
        None, "steps of linear warm-up (None: 200, or a tenth of the run where that is less)", low=0
    )
    lr_schedule: str = setting("cosine", "after the warm-up; a trapezoid falls over the last 40 % of the steps",
                               choices=("cosine", "trapezoid", "constant"))
    optimizer: str = setting("adamw", "muon: Muon for the blocks' matrices, AdamW for the rest",
                             choices=("adamw", "muon"))
    muon_learning_rate: float = setting(0.02, "Muon's after warm-up; follows the same schedule", low=0)
    weight_decay: float = setting(0.1, "on matrices and embeddings, not on biases and gains", low=0)
    beta1: float = setting(0.9, "AdamW's", low=0, below=1)
    beta2: float = setting(0.95, "AdamW's; 0.95 as GPT-3's and nanoGPT's", low=0, below=1)
    adam_eps: float = setting(1e-8, "AdamW's epsilon; 1e-5 leaves words that hardly occur where they are", low=0)
    grad_clip: float = setting(1.0, "largest gradient norm (0: no clipping)", low=0)
    # rhythm
    eval_interval: int = setting(0, "evaluate every so many steps as well as after each epoch (0: epochs only)", low=0)
    save_interval: int = setting(500, "write last.pt every so many steps as well as before evaluations (0: not)", low=0)
    save_minutes: float = setting(10.0, "and every so many minutes (0: not)", low=0)
    log_interval: int = setting(10, "steps between lines of metrics.jsonl", low=1)
    # system
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps; auto is CUDA where there is one, else the CPU")
    dtype: str = setting(
        "auto",
        "of the matmuls; auto: bfloat16 where it is native, float16 with a scaler on older GPUs, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compile: bool | None = setting(None, "torch.compile the blocks (None: on CUDA only)")
    rank_timeout: float = setting(10.0, "minutes that ranks wait for one another before they give up", low=0.01)
    seed: int = setting(0, "of the weights, the data order and dropout", low=0, below=2**32)
    resume: bool = setting(False, "go on from out_dir's last checkpoint; with none there, begin")
    eval_only: bool = setting(False, "print the best checkpoint's figures and stop")
    split: str = setting("val", "what --eval_only looks at", choices=("val", "test"))
    eval_stride: int = setting(0, "--eval_only: a second figure, from windows that move by so many tokens", low=0)
    tensorboard: bool = setting(False, "write TensorBoard's files into out_dir as well, if it is installed")
    dry_run: bool = setting(False, "print the plan and stop")
    # notebook
    sample_prompts: tuple = setting(
        ("The history of India is", "In mathematics,", "The cat sat on the"),
        "texts that the model continues at each new best, for the notebook's entry (): none",
    )
    expected_ppl: tuple = setting((), "what the experiment expects: (low, high) validation perplexity a token")
    recorded_ppl: float = setting(0.0, "what the notebook recorded when it was first run (0: nothing)", low=0)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
WORDS |= {"none": None, "auto": None}


def kinds(name):
    """The types that setting `name` takes, as a tuple."""
    return getattr(FIELDS[name].type, "__args__", (FIELDS[name].type,))


def from_text(name, text):
    """The value that `text` on the command line means for setting `name`; text that fits no type is left as it is."""
    if bool in kinds(name):
        return WORDS.get(text.lower(), text)
    if kinds(name) == (str,):
        return text
    if type(None) in kinds(name) and text.lower() in ("none", "auto"):
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def as_meant(name, value):
    """A value as setting `name` holds it: 1e3 for an int, a list for a tuple, 1 for True, ~ for a home."""
    allowed = kinds(name)
    if isinstance(value, float) and float not in allowed and value.is_integer():
        return int(value)
    if isinstance(value, list) and tuple in allowed:
        return tuple(value)
    if isinstance(value, int) and bool in allowed and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and FIELDS[name].metadata["path"]:
        return os.path.expanduser(value)
    return value


def problems_of(values):
    """Everything wrong with a dict of settings, each as a phrase; an empty list if nothing is. Puts
    the values into the form that the settings hold."""
    problems, good = [], {}
    for name, value in list(values.items()):
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            problems.append(f"unknown setting {name}" + (f" (did you mean {near[0]}?)" if near else " (see --help)"))
            continue
        allowed, limits = kinds(name), FIELDS[name].metadata
        value = values[name] = as_meant(name, value)
        fits = isinstance(value, allowed) or (float in allowed and isinstance(value, int))
        if not fits or (isinstance(value, bool) and bool not in allowed):
            wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
            problems.append(f"{name} takes {wanted}, not {value!r}")
        elif limits["choices"] and value not in limits["choices"]:
            near = difflib.get_close_matches(value, limits["choices"], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            problems.append(f"{name} is one of {', '.join(limits['choices'])}, not {value!r}{hint}")
        elif value is None:
            good[name] = value
        elif limits["low"] is not None and not limits["low"] <= value < (limits["below"] or float("inf")):
            below = f" and below {limits['below']}" if limits["below"] else ""
            problems.append(f"{name} must be finite, at least {limits['low']}{below}, not {value}")
        else:
            good[name] = value
    c = Config(**good)
    numbers = all(isinstance(value, (int, float)) for value in c.expected_ppl)
    expected = numbers and len(c.expected_ppl) == 2 and 1 <= c.expected_ppl[0] <= c.expected_ppl[1]
    device = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", c.device)
    for names, fine, phrase in (
        ("d_model num_heads", c.d_model % c.num_heads == 0,
         f"num_heads {c.num_heads} does not divide d_model {c.d_model}"),
        ("d_model num_heads block", c.block != "modern" or c.d_model % (2 * c.num_heads) == 0,
         f"block modern turns pairs, and num_heads {c.num_heads} leaves a head of d_model {c.d_model} an odd size"),
        ("batch_size micro_batch_size", c.micro_batch_size <= c.batch_size,
         f"micro_batch_size {c.micro_batch_size} is larger than batch_size {c.batch_size}"),
        ("learning_rate", c.learning_rate > 0, "learning_rate must be above 0"),
        ("learning_rate min_learning_rate", c.min_learning_rate <= c.learning_rate,
         f"min_learning_rate {c.min_learning_rate} is above learning_rate {c.learning_rate}"),
        ("max_steps warmup_steps", not c.max_steps or not c.warmup_steps or c.warmup_steps < c.max_steps,
         f"warmup_steps {c.warmup_steps} leaves nothing of max_steps {c.max_steps}"),
        ("expected_ppl", not c.expected_ppl or expected, f"expected_ppl is (low, high), not {c.expected_ppl}"),
        ("sample_prompts", all(isinstance(prompt, str) for prompt in c.sample_prompts),
         f"sample_prompts is a tuple of texts, not {c.sample_prompts}"),
        ("device", device, f"device is auto, cpu, cuda, cuda:N or mps, not {c.device!r}"),
    ):
        if not fine and all(name in good or name not in values for name in names.split()):
            problems.append(phrase)
    return problems


def read_file(path):
    """(a config file's assignments as a dict, its docstring). Names that begin with _ are the
    file's own, and so are modules, functions and classes."""
    own = types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            source = file.read()
    except (OSError, UnicodeDecodeError) as error:
        folder = os.path.dirname(__file__)
        known = sorted(n for n in os.listdir(folder) if n.endswith(".py") and n != "__init__.py")
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read config {path}: {why}; there are {', '.join(known)} in config/") from None
    namespace = {}
    try:
        exec(compile(source, path, "exec"), namespace)
    except Exception as error:
        raise UserError(f"config {path} does not run: {first_line(error)}; mend that line") from None
    doc = namespace.get("__doc__") or ""
    settings = {k: v for k, v in namespace.items() if not k.startswith("_") and not isinstance(v, own)}
    return settings, doc


def show_help(script, more):
    """Print the usage, `more` that the script takes by itself, and every setting with its default and reason."""
    print(f"usage: python {script} config/NAME.py [--setting value | --setting=value ...]\n{more}")
    print("A bare --setting of type bool means True. Settings, with their defaults:\n")
    for name, field in FIELDS.items():
        choices = field.metadata["choices"]
        chosen = f" [{' | '.join(choices)}]" if choices else ""
        print(f"  --{name} {field.default!r}\n        {field.metadata['help']}{chosen}")


def load_config(argv, script="train.py", more=""):
    """The Config that a command line asks for: a config file, then --name value or --name=value over it.

    argv is without the script's name. Raises UserError with all problems in one line; --help prints and exits 0.
    """
    if "--help" in argv or "-h" in argv:
        show_help(script, more)
        sys.exit(0)
    path, over, problems, words = None, {}, [], list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if path is not None:
                problems.append(f"{word} is neither a setting nor its value")
            path = path or word
            continue
        name, equals, text = word[2:].partition("=")
        if not equals:  # a bool may stand bare, so it takes the next word only if that is a bool's
            bare = name in FIELDS and bool in kinds(name)
            if words and not words[0].startswith("--") and (not bare or words[0].lower() in WORDS):
                text = words.pop(0)
            elif bare:
                text = "True"
            else:
                problems.append(f"--{name} needs a value")
                continue
        over[name] = from_text(name, text) if name in FIELDS else text
    if path is None:
        small = command(script, ROOT / "config/demo.py")
        raise UserError(f"no config given; `{small}` runs the small one, and config/ has the others")
    values, doc = read_file(path)
    values |= over
    problems += problems_of(values)
    if problems:
        raise UserError(f"{path} and the command line: {'; '.join(problems)}")
    config = Config(**values)
    config.name, config.doc = os.path.splitext(os.path.basename(path))[0], doc
    config.out_dir = config.out_dir or os.path.join("out", config.name)
    return config
