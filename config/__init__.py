"""The settings of a run: one dataclass and its rules. A config file holds assignments, over which
`--name value` on the command line wins. All that is wrong with both is listed at once."""

import copy
import itertools
import os
import runpy
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType
from typing import ClassVar

from lab.console import ROOT, UserError, command, first_line
from lab.settings import check, fields_of, setting, show_help, split_words

free = partial(setting, free=True)  # a resumed run may have another value

DEVICES = "auto", "cpu", "cuda", "mps"
DTYPES = "auto", "float32", "bfloat16", "float16"
SCHEDULES = "cosine", "trapezoid", "constant"

# Settings that a config's docstring describes. A run that changes one is another experiment.
SPOKEN_OF = (
    "dataset max_seq_len d_model num_heads d_ff num_layers dropout block head_bias unigram_bias "
    "init_from batch_size epochs max_steps max_hours"
).split()


@dataclass
class Config:
    """All settings of a run. Lengths are in tokens, batch sizes in sequences of max_seq_len tokens.
    Those that are `free` extend a run or steer the machine; the others make the experiment."""

    name: ClassVar[str] = ""  # the config file's, without .py
    file: ClassVar[str] = ""  # its path, as the command line has it
    doc: ClassVar[str] = ""  # its docstring: the question, and what is expected
    named: ClassVar[frozenset] = frozenset()  # the settings that it or the command line names
    given: ClassVar[dict] = {}  # what the command line names: {name: the file's value}

    dataset: str = setting("wikitext-103", "folder in data_dir that prepare.py wrote", group="data")
    data_dir: str = free("data", "where the data sets lie", path=True)
    out_dir: str = free("", "the run's own folder (default: out/<the config's name>)", path=True)

    max_seq_len: int = setting(512, "context, in tokens", low=1, group="model")
    d_model: int = setting(256, "width of the residual stream", low=1)
    num_heads: int = setting(8, "attention heads; must divide d_model", low=1)
    d_ff: int = setting(1024, "width of the MLP", low=1)
    num_layers: int = setting(8, "number of blocks", low=1)
    dropout: float = setting(0.1, "of the embedding sum and each residual branch", low=0, below=1)
    block: str = setting("gpt2", "modern: experiment 6's block", choices=("gpt2", "modern"))
    head_bias: bool = setting(True, "add a bias over the vocabulary; GPT-2 has none")
    unigram_bias: bool = setting(False, "begin with the head's bias at the log token frequencies")
    init_from: str = setting("", "weights to begin with: best.pt or a folder of GPT-2's", path=True)

    batch_size: int = setting(32, "sequences per step, over all ranks", low=1, group="training")
    micro_batch_size: int = free(0, "sequences per forward pass and rank (0: what fits)", low=0)
    epochs: int = free(1, "passes over the tokens (0: what makes a million, at most 20)", low=0)
    max_steps: int = free(0, "end after this many optimizer steps (0: no limit)", low=0)
    max_hours: float = free(0.0, "end after this many hours, resumes included (0: no limit)", low=0)
    patience: int = free(0, "end after this many evaluations without a best (0: never)", low=0)
    learning_rate: float = setting(4e-4, "AdamW's, after the warm-up", low=1e-30)
    min_learning_rate: float = setting(0.0, "AdamW's, at the end of the schedule", low=0)
    warmup_steps: int = free(200, "linear warm-up, at most a tenth of the run's steps", low=0)
    lr_schedule: str = setting("cosine", "trapezoid: falls over the last 40 %", choices=SCHEDULES)
    optimizer: str = setting("adamw", "muon: for the blocks' matrices", choices=("adamw", "muon"))
    muon_learning_rate: float = setting(0.02, "Muon's; it follows the same schedule", low=0)
    weight_decay: float = setting(0.1, "of matrices; of embeddings, too, without Muon", low=0)
    beta1: float = setting(0.9, "AdamW's", low=0, below=1)
    beta2: float = setting(0.95, "AdamW's; 0.95 is GPT-3's and nanoGPT's", low=0, below=1)
    adam_eps: float = setting(1e-8, "AdamW's; 1e-5 keeps embeddings of rare words still", low=1e-30)
    grad_clip: float = setting(1.0, "largest gradient norm (0: no clipping)", low=0)

    eval_interval: int = free(0, "steps per evaluation (0: epochs only)", low=0, group="intervals")
    save_interval: int = free(0, "steps between checkpoints, too (0: none by steps)", low=0)
    save_minutes: float = free(5.0, "minutes between checkpoints (0: never by time)", low=0)
    log_interval: int = free(10, "steps between lines of metrics.jsonl", low=1)

    device: str = free("auto", "auto: CUDA if any", choices=DEVICES, group="system")
    dtype: str = free("auto", "of the matmuls; auto: the fastest here", choices=DTYPES)
    compile: bool | None = free(None, "torch.compile the model (None: on CUDA only)")
    cuda_graph: bool | None = free(None, "step as a CUDA graph, but in float16 (None: on one GPU)")
    rank_timeout: float = free(10.0, "minutes that ranks wait for one another", low=0.01)
    seed: int = setting(0, "of the weights, the data order and dropout", low=0, below=2**32)
    resume: bool = free(False, "go on from out_dir's last checkpoint, if there is one")
    eval_only: bool = free(False, "print the best checkpoint's figures and stop")
    split: str = free("val", "--eval_only: which split", choices=("val", "test"))
    dry_run: bool = free(False, "print the plan and stop")

    question: str = free("", "what this run asks, instead of its config's", group="notebook")
    sample_prompts: tuple | None = free(
        ("The history of India is", "In mathematics,", "The cat sat on the"),
        "what each new best continues, for the entry (None: the validation text; (): nothing)",
    )
    expected_ppl: tuple = free((), "expected validation perplexity per token: (low, high)")
    recorded_ppl: float = free(0.0, "what the original notebook recorded (0: nothing)", low=0)

    def model_args(self, vocab_size):
        """What LanguageModel is made with."""
        names = "max_seq_len d_model num_heads d_ff num_layers dropout block head_bias".split()
        return dict(vocab_size=vocab_size) | {name: getattr(self, name) for name in names}

    @property
    def departs(self):
        """Whether the command line makes this another experiment than the docstring speaks of."""
        other = {item for item in self.given.items() if getattr(self, item[0]) != item[1]}
        return any(name in SPOKEN_OF for name, _ in other - {("dataset", "mine")})  # own.py's

    def changed(self, **values):
        """A copy with these values, of the same name, docstring and named settings."""
        new = copy.copy(self)
        vars(new).update(values)
        return new

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

    def problems(self):
        """What settings say against each other, as phrases."""
        c = self
        parts = c.num_heads * (2 if c.block == "modern" else 1)  # modern turns pairs of a head
        texts = all(isinstance(prompt, str) for prompt in c.sample_prompts or ())
        expected = [ppl for ppl in c.expected_ppl if isinstance(ppl, (int, float))]
        is_range = len(expected) == len(c.expected_ppl) in (0, 2) and expected == sorted(expected)
        rules = [
            (
                c.d_model % parts and not c.init_from,  # or else other weights give the shape
                f"d_model {c.d_model} is no multiple of num_heads ({parts} for block {c.block})",
            ),
            (c.unigram_bias and not c.head_bias, "unigram_bias needs head_bias True"),
            (c.min_learning_rate > c.learning_rate, "min_learning_rate is above learning_rate"),
            (not is_range, f"expected_ppl {c.expected_ppl} is not low, high"),
            (not texts, f"sample_prompts {c.sample_prompts} are not all texts"),
            (c.split != "val" and not c.eval_only, "split needs --eval_only"),
        ]
        return [phrase for wrong, phrase in rules if wrong]


def read_config(path):
    """(a config file's assignments as a dict, its docstring). Names that begin with _ are the
    file's own, and so are modules, functions and classes. Raises UserError."""
    try:
        namespace = runpy.run_path(path)
    except Exception as error:
        known = ", ".join(sorted(file.name for file in (ROOT / "config").glob("[!_]*.py")))
        why = first_line(error)
        raise UserError(f"config {path} does not run ({why}); config/ has {known}") from None
    shown = {k: v for k, v in namespace.items() if not k.startswith("_")}
    values = {k: v for k, v in shown.items() if not (callable(v) or isinstance(v, ModuleType))}
    return values, namespace["__doc__"] or ""


def load_config(argv=None, script="train.py", cls=Config):
    """The Config, or cls, that a command line asks for: a config file, then the command line's own
    values. argv: as split_words() takes it. Raises UserError with all problems in one line; --help
    prints and exits 0."""
    alone, texts = split_words(cls, argv)
    # --eval_only needs none, since what counts is the checkpoint's
    path, *extra = alone or [str(ROOT / "config/own.py")]
    if "help" in texts:
        file = check(cls, read_config(path)[0])[0] if alone else cls()
        show_help(file, f"python {script} config/NAME.py [--setting value ...]")
    values, doc = read_config(path)
    config, problems = check(cls, values | texts)
    if not alone and not config.eval_only:
        small = command(script, ROOT / "config/demo.py")
        problems.append(f"no config given; `{small}` runs the small one")
    if config.eval_only and script != "train.py":
        problems.append("eval_only belongs to train.py")
    problems += [f"{word} is neither a setting nor its value" for word in extra]
    if problems:
        raise UserError("; ".join(problems))

    config.name, config.doc = os.path.splitext(os.path.basename(path))[0], doc
    config.file, config.named = path, frozenset(values | texts)
    of_file, _ = check(cls, values)
    config.given = {name: getattr(of_file, name) for name in texts}
    for name in ("expected_ppl", "recorded_ppl"):
        if config.departs and name not in texts:  # it was said of the experiment of the file
            setattr(config, name, getattr(cls, name))
    config.out_dir = config.out_dir or os.path.join("out", config.name)
    return config


def load_grid(argv, script, cls, names):
    """The Configs of a command line where each setting of `names` may have several values with
    commas between them: one for each combination, the last varied first. See load_config()."""
    alone, texts = split_words(cls, argv)
    words = []
    for name, text in texts.items():
        parts = text.split(",") if name in names else [text]
        words.append([f"--{name}={part}" for part in parts])
    return [load_config([*alone, *chosen], script, cls) for chosen in itertools.product(*words)]
