"""The settings of a run: one dataclass and its rules.

A config file holds assignments only and runs in an empty namespace; `--name value` on the command
line wins over it. Everything that is wrong with both is listed at once.
"""

import copy
import itertools
import os
import re
import sys
import types
from dataclasses import asdict, dataclass
from typing import ClassVar

from lab.console import ROOT, UserError, command, first_line
from lab.settings import check, fields_of, setting, show_help, split_words


@dataclass
class Config:
    """All settings of a run. Lengths are in tokens, batch sizes in sequences of max_seq_len tokens.
    Those that are `free` may change when a run is resumed: they extend it or steer the machine."""

    name: ClassVar[str] = ""  # the config file's, without .py
    doc: ClassVar[str] = ""  # its docstring: the question, and what is expected
    named: ClassVar[frozenset] = frozenset()  # the settings that it or the command line names

    dataset: str = setting(
        "wikitext-103", "folder under data_dir that prepare.py wrote", group="data"
    )
    data_dir: str = setting("data", "where the data sets lie", path=True, free=True)
    out_dir: str = setting("", "the run's folder (default: out/NAME)", path=True, free=True)

    max_seq_len: int = setting(512, "context, tokens", low=1, group="model")
    d_model: int = setting(256, "width of the residual stream", low=1)
    num_heads: int = setting(8, "attention heads; must divide d_model", low=1)
    d_ff: int = setting(1024, "width of the MLP", low=1)
    num_layers: int = setting(8, "blocks", low=1)
    dropout: float = setting(0.1, "on the embedding sum and on each branch", low=0, below=1)
    block: str = setting(
        "gpt2", "the original notebook's, or experiment 6's", choices=("gpt2", "modern")
    )
    head_bias: bool = setting(True, "a bias over the vocabulary; transformers' GPT-2 has none")
    unigram_bias: bool = setting(False, "begin it at the log frequencies of the training tokens")
    init_from: str = setting(
        "", "weights to begin with, and their shape: best.pt, gpt2, a folder", path=True
    )

    batch_size: int = setting(
        32, "sequences per step, over all ranks and micro-batches", low=1, group="training"
    )
    micro_batch_size: int = setting(
        0, "sequences per forward pass (0: what memory allows)", low=0, free=True
    )
    epochs: int = setting(1, "passes over the training tokens", low=1, free=True)
    max_steps: int = setting(0, "end after so many steps (0: no limit)", low=0, free=True)
    max_hours: float = setting(0.0, "end after so many hours (0: no limit)", low=0, free=True)
    patience: int = setting(
        0, "end after so many evaluations without a new best (0: never)", low=0, free=True
    )
    learning_rate: float = setting(4e-4, "AdamW's, after warm-up", low=0)
    min_learning_rate: float = setting(0.0, "where the schedule ends", low=0)
    warmup_steps: int = setting(
        200, "of linear warm-up, at most a tenth of the run's steps", low=0, free=True
    )
    lr_schedule: str = setting(
        "cosine",
        "after warm-up; a trapezoid falls over the last 40 % of the steps",
        choices=("cosine", "trapezoid", "constant"),
    )
    optimizer: str = setting(
        "adamw",
        "muon: Muon for the blocks' matrices, AdamW for the rest",
        choices=("adamw", "muon"),
    )
    muon_learning_rate: float = setting(0.02, "Muon's, on the same schedule", low=0)
    weight_decay: float = setting(0.1, "on matrices and embeddings alone", low=0)
    beta1: float = setting(0.9, "AdamW's", low=0, below=1)
    beta2: float = setting(0.95, "AdamW's; 0.95 as GPT-3's and nanoGPT's", low=0, below=1)
    adam_eps: float = setting(1e-8, "AdamW's; 1e-5 leaves rare words where they are", low=0)
    grad_clip: float = setting(1.0, "largest norm of the gradient (0: any)", low=0)

    eval_interval: int = setting(
        0,
        "steps between evaluations, besides each epoch's (0: none)",
        low=0,
        free=True,
        group="intervals",
    )
    save_interval: int = setting(500, "steps between checkpoints (0: any)", low=0, free=True)
    save_minutes: float = setting(10.0, "minutes between checkpoints (0: any)", low=0, free=True)
    log_interval: int = setting(10, "steps between lines of metrics.jsonl", low=1, free=True)

    device: str = setting(
        "auto", "auto (CUDA, else the CPU), cpu, cuda, cuda:N or mps", free=True, group="system"
    )
    dtype: str = setting(
        "auto",
        "of the matmuls; auto: a resumed run's own, else the fastest that is safe",
        choices=("auto", "float32", "bfloat16", "float16"),
        free=True,
    )
    compile: bool | None = setting(None, "torch.compile the blocks (None: on CUDA)", free=True)
    cuda_graph: bool | None = setting(
        None, "a step as one CUDA graph (None: on one GPU; True: over ranks, too)", free=True
    )
    rank_timeout: float = setting(
        10.0, "minutes that ranks wait for one another", low=0.01, free=True
    )
    seed: int = setting(0, "of the weights, the data order and dropout", low=0, below=2**32)
    resume: bool = setting(
        False, "go on from out_dir's last checkpoint, if there is one", free=True
    )
    eval_only: bool = setting(False, "print the best checkpoint's figures and stop", free=True)
    split: str = setting("val", "of --eval_only", choices=("val", "test"), free=True)
    eval_stride: int = setting(
        0, "of --eval_only: also with windows that move by so many tokens", low=0, free=True
    )
    dry_run: bool = setting(False, "print the plan and stop", free=True)

    sample_prompts: tuple = setting(
        ("The history of India is", "In mathematics,", "The cat sat on the"),
        "texts that the model continues at each new best, for the entry",
        free=True,
        group="notebook",
    )
    expected_ppl: tuple = setting((), "(low, high) that validation is expected in", free=True)
    recorded_ppl: float = setting(0.0, "the original notebook's result (0: none)", low=0, free=True)

    def model_args(self, vocab_size):
        """What LanguageModel is made with."""
        names = "max_seq_len d_model num_heads d_ff num_layers dropout block head_bias".split()
        return dict(vocab_size=vocab_size) | {name: getattr(self, name) for name in names}

    def changed(self, **values):
        """A copy of this Config, with other values for some settings."""
        other = copy.copy(self)
        vars(other).update(values)
        return other

    def plain(self):
        """The settings as a dict of what JSON and a checkpoint can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def differences(self, old):
        """What makes the run of `old`, a dict as plain() gives it, another experiment: phrases."""
        new, fields = self.plain(), fields_of(self)
        # a setting that is younger than the run had its default's effect
        old = {name: field.default for name, field in fields.items()} | old
        fixed = [name for name in sorted(new) if not fields[name].metadata["free"]]
        return [f"{k} was {old[k]!r}, now {new[k]!r}" for k in fixed if old[k] != new[k]]

    def conflicts(self):
        """What settings say against each other: [(their names, what is wrong as a phrase)]."""
        c = self
        known = not c.init_from  # or the shape is not known yet
        heads = f"num_heads {c.num_heads} does not divide d_model {c.d_model}"
        is_range = len(c.expected_ppl) == 2 and all(type(x) in (int, float) for x in c.expected_ppl)
        is_range = is_range and 1 <= c.expected_ppl[0] <= c.expected_ppl[1]
        has_text = all(isinstance(prompt, str) for prompt in c.sample_prompts)
        rules = [
            ("d_model num_heads", known and c.d_model % c.num_heads, heads),
            (
                "d_model num_heads block",
                known and c.block == "modern" and c.d_model % (2 * c.num_heads),
                f"{heads} into heads of an even size, as block modern wants",
            ),
            (
                "unigram_bias head_bias init_from",
                c.unigram_bias and (c.init_from or not c.head_bias),
                "unigram_bias cannot be combined with init_from or with head_bias False; use "
                "--unigram_bias False",
            ),
            (
                "batch_size micro_batch_size",
                c.micro_batch_size > c.batch_size,
                f"micro_batch_size {c.micro_batch_size} is larger than batch_size {c.batch_size}",
            ),
            ("learning_rate", c.learning_rate == 0, "learning_rate must be above 0"),
            (
                "learning_rate min_learning_rate",
                c.min_learning_rate > c.learning_rate,
                f"min_learning_rate {c.min_learning_rate} is above learning_rate {c.learning_rate}",
            ),
            (
                "split eval_stride eval_only",
                (c.eval_stride or c.split != "val") and not c.eval_only,
                "split and eval_stride belong to --eval_only",
            ),
            (
                "expected_ppl",
                c.expected_ppl and not is_range,
                f"expected_ppl is (low, high), not {c.expected_ppl}",
            ),
            (
                "sample_prompts",
                not has_text,
                f"sample_prompts is a tuple of texts, not {c.sample_prompts}",
            ),
            (
                "device",
                not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", c.device),
                f"device is auto, cpu, cuda, cuda:N or mps, not {c.device!r}",
            ),
            (
                "cuda_graph dtype",
                c.cuda_graph and c.dtype == "float16",
                "cuda_graph cannot be combined with float16, whose scaler looks at each step",
            ),
        ]
        return [(names.split(), phrase) for names, is_wrong, phrase in rules if is_wrong]


def read_config(path):
    """(a config file's assignments as a dict, its docstring). Names that begin with _ are the
    file's own, and so are modules, functions and classes. Raises UserError."""
    own = types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            source = file.read()
    except (OSError, UnicodeDecodeError) as error:
        names = os.listdir(os.path.dirname(__file__))
        known = sorted(n for n in names if n.endswith(".py") and not n.startswith("_"))
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"cannot read config {path}: {why}; config/ has {', '.join(known)}"
        ) from None
    namespace = {}
    try:
        exec(compile(source, path, "exec"), namespace)
    except Exception as error:
        why = first_line(error)
        raise UserError(f"config {path} does not run: {why}; mend that line") from None
    doc = namespace.pop("__doc__", None) or ""
    shown = {k: v for k, v in namespace.items() if not k.startswith("_")}
    return {k: v for k, v in shown.items() if not isinstance(v, own)}, doc


def load_config(argv=None, script="train.py", cls=Config):
    """The Config that a command line asks for: a config file, then its words over it.

    argv: without the script's name; None for the process's own. cls: Config, or a class with more
    settings. Raises UserError with all problems in one line; --help prints and exits 0.
    """
    return load_grid(argv, script, cls)[0]


def load_grid(argv, script, cls, lists=()):
    """The Configs of a command line as load_config() takes it, but that each setting of `lists` may
    have several values with commas between them: a Config for each combination, those that differ
    in the last one next to each other. Raises UserError with the problems of all in one line."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        more = ",value" if lists else ""
        usage = f"[--setting value{more} | --setting=value{more} ...]"
        show_help(cls, f"python {script} config/NAME.py {usage}")
    alone, over, problems = split_words(cls, argv, lists)
    if not alone:
        small = command(script, ROOT / "config/demo.py")
        raise UserError(
            f"no config given; `{small}` runs the small one, and config/ has the others"
        )
    path, *extra = alone
    problems += [f"{word} is neither a setting nor its value" for word in extra]
    values, doc = read_config(path)
    choices = [value if name in lists else [value] for name, value in over.items()]
    configs = []
    for chosen in itertools.product(*choices):
        values |= dict(zip(over, chosen, strict=True))
        config, wrong, right = check(cls, values)
        problems += wrong
        # a rule speaks where none of its settings is wrong by itself
        for names, phrase in config.conflicts():
            if all(name in right or name not in values for name in names):
                problems.append(phrase)
        config.named = frozenset(values)
        config.name, config.doc = os.path.splitext(os.path.basename(path))[0], doc
        config.out_dir = config.out_dir or os.path.join("out", config.name)
        configs.append(config)
    if problems:
        raise UserError(f"{path} and the command line: {'; '.join(dict.fromkeys(problems))}")
    return configs
