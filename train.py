"""The loop: batches, steps, evaluations, checkpoints.

    python train.py config/exp5.py [--setting value ...]
    torchrun --nproc_per_node=2 train.py config/exp5.py

A run is a pure function of its config. Batch i follows from (seed, i), the learning rate from the
step, dropout from (seed, step, rank). Ranks and micro-batches only slice a batch. So the number of
processes changes the speed and nothing else, and a resumed run is the same run.
"""

from lab.console import UserError, command, progress, run, stop_signals

import os
import sys
import time

import torch

from config import load_config
from lab import checkpoint
from lab.data import Batches, Dataset, load_tokenizer, log_frequencies
from lab.evaluate import evaluate, figures_text
from lab.folder import Folder, describe, restarted
from lab.generate import continue_texts
from lab.gpt2 import open_weights
from lab.machine import open_machine
from lab.notebook import chinchilla, perplexity, verdict
from lab.optimizer import warmup_of
from lab.state import State
from lab.trainer import Trainer, micro_batch_size
from model import LanguageModel

SAMPLE_TOKENS = 60  # of each prompt's continuation, for the notebook


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config = load_config(argv)
    with open_machine(config) as machine:
        if config.eval_only:
            return eval_only(config, machine)
        quiet = machine.rank > 0
        with stop_signals(quiet) as stop, Folder(config.out_dir, machine) as folder:
            return train(config, machine, folder, stop, resume_command(argv, machine))


def resume_command(argv, machine):
    """The command that goes on with this run."""
    words = [word for word in argv if word != "--resume"]
    processes = machine.local_world if machine.world > 1 else 1
    return command("train.py", *words, "--resume", processes=processes)


def train(config, machine, folder, stop, again):
    """Run a config to its end or to a signal. Returns the process's exit code.

    stop: a list that is empty until a signal comes. again: the command that resumes. Raises
    UserError before the first step for whatever the user must mend.
    """
    # what is to be trained, and on what
    dataset = Dataset(config.dataset, config.data_dir)
    splits = {name: dataset.split(name) for name in dataset.counts}
    weights = starting_weights(config, machine, dataset)
    batches, total_steps = batches_of(config, splits["train"])
    sums = dataset.sums()
    ours = ("data_dir", "out_dir", "device")  # may differ from rank to rank
    settings = {k: v for k, v in config.plain().items() if k not in ours}
    machine.agree(settings | {"data": sums})

    # the plan comes before anything that takes memory or writes
    with torch.device("meta"):
        planned = LanguageModel(**config.model_args(dataset.vocab_size))
    machine.say(plan(config, machine, dataset, planned, batches, total_steps))
    if config.dry_run:
        return 0
    model = build_model(config, machine, planned, splits["train"].tokens)
    if weights:
        model.load_state_dict(weights)
        del weights

    # what to go on from
    found, finished = machine.from_rank_0(lambda: folder.open(config, sums, again))
    state = State(config, batches, total_steps)
    if found:
        state.load_state_dict(found["state"])
        machine.keep_dtype(config, found)
    config.dtype = str(machine.dtype)[6:]  # what the run leaves says which it was
    over = state.why_over()
    if over and finished and not state.evaluation_is_due():
        machine.say(f"{folder.path} is finished: {over}; its best checkpoint is {folder.best}")
        return 0
    trainer = Trainer(config, machine, model, batches, total_steps)
    if found:
        trainer.load_state_dict(found)
        del found  # or its copy of the weights would stay
    about = describe(config, dataset, model, batches, total_steps)
    folder.begin(state, about, config.tensorboard)
    return Run(config, folder, stop, dataset, trainer, state).go(again)


class Run:
    """A run: the loop, and what happens now and then."""

    def __init__(self, config, folder, stop, dataset, trainer, state):
        self.config, self.folder, self.stop = config, folder, stop
        self.dataset, self.trainer, self.state = dataset, trainer, state
        self.machine = trainer.machine
        hidden = self.machine.rank > 0
        self.bar = progress(
            state.total_steps, "training", initial=state.step, unit="step", disable=hidden
        )

    def go(self, again):
        """Train, and tell how it ended. Returns the process's exit code."""
        over = self.loop()
        self.bar.close()
        if over == "no finite steps":
            return self.give_up()
        self.save()
        final = self.last_figures() if over and self.state.best else {}
        if not over or final is None:
            last = self.folder.last_is()
            self.machine.say(f"stopped at step {self.state.step:,}, {last}; go on with: {again}")
            return 1
        self.tell_end(over, final)
        if not self.folder.finish(self.state, final):
            self.machine.say(
                f"{self.folder.path} could not be written to the last: {self.folder.last_is()}; "
                f"free some space, then: {again}"
            )
            return 1
        return 0

    def loop(self):
        """Take steps until the run is over. Returns why it is, "" after a signal."""
        state, trainer, machine = self.state, self.trainer, self.machine
        busy, steps = 0.0, 0  # seconds and steps since the last line of the log
        while True:
            # before a step: an evaluation may be due, and the run may be over
            if state.evaluation_is_due():
                self.save()
                if not self.evaluate():
                    return ""
            if over := state.why_over():
                return over

            # one step
            began = time.perf_counter()
            lr = trainer.lr(state.step)
            loss, norm = trainer.step(state.step)
            state.pending.append((loss, norm))
            state.step += 1
            log_is_due = state.log_is_due()
            if log_is_due:
                state.count(machine)  # waits for the device, so that the clock is true
            busy, steps = busy + time.perf_counter() - began, steps + 1
            self.bar.update()

            # once in a while: a line of the log
            if log_is_due:
                speed = steps * trainer.batches.step_tokens / busy
                self.log(lr, norm.item(), speed)
                busy, steps = 0.0, 0

            # the ranks agree on a signal and on the time
            stopping, state.elapsed_s = machine.largest(bool(self.stop), state.clock())

            # once in a while, and at a signal: a checkpoint
            save_is_due = state.save_is_due()
            if stopping or save_is_due:
                self.save()
            counted = log_is_due or save_is_due
            if counted and state.skipped_in_a_row >= trainer.patience():
                return "no finite steps"
            if stopping:
                return ""

    def log(self, lr, norm, speed):
        """Write a line of metrics.jsonl, and show it beside the bar."""
        loss = self.state.train_loss()
        self.folder.log(self.state, train_loss=loss, lr=lr, grad_norm=norm, tokens_per_s=speed)
        text = f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)

    def save(self):
        """Write last.pt."""
        self.state.count(self.machine)

        def contents():
            state, data = self.state.state_dict(), self.dataset.sums()
            rest = dict(self.trainer.state_dict(), state=state, data=data)
            return self.contents() | rest

        self.folder.save(self.state, contents)
        self.state.saved_s = self.state.elapsed_s

    def contents(self):
        """What every checkpoint holds: tensors, dicts, lists, strings and numbers only."""
        model = self.trainer.model
        return dict(
            model=model.state_dict(),
            model_args=model.args,
            tokenizer=self.dataset.tokenizer,
            separator=self.dataset.separator,
            step=self.state.step,
            config=self.config.plain(),
            device=self.machine.device.type,
        )

    def figures_of(self, split):
        """evaluate() on a split; None if a signal came."""
        return evaluate(
            self.trainer.model,
            self.dataset.split(split),
            self.machine,
            self.trainer.micro,
            stopped=lambda: bool(self.stop),
        )

    def evaluate(self):
        """Evaluate, and write down what came of it. Returns whether it came to its end."""
        figures = self.figures_of("val")
        if figures is None:
            return False
        state, folder = self.state, self.folder
        kept = ("loss", "stderr", "ppl", "ppl_word", "bits_per_byte")
        figures = {f"val_{name}": figures[name] for name in kept}
        train_loss, better = state.evaluated(figures)
        written = better and folder.save_best(lambda: self.contents() | {"metrics": figures})
        if written:  # the best is what best.pt holds
            state.best = dict(step=state.step, **figures)
        samples = self.samples() if better else {}
        folder.log(state, train_loss=train_loss, **figures, best=better, **samples)
        self.bar.clear()
        self.machine.say(
            f"epoch {state.epoch:.4g} | step {state.step:,} | train loss {train_loss:.4f} | "
            f"val loss {figures['val_loss']:.4f} | val perplexity {perplexity(figures['val_ppl'])}"
            + (f" | best so far, saved to {folder.best}" if written else "")
        )
        folder.write_entry()
        return True

    def samples(self):
        """{"samples": [[prompt, continuation]]} of sample_prompts, on rank 0."""
        prompts = self.config.sample_prompts
        if self.machine.rank > 0 or not prompts or self.dataset.tokenizer != "gpt2":
            return {}
        try:
            encoding = load_tokenizer()
        except UserError as error:  # data prepared elsewhere, and no way to tiktoken's files here
            self.machine.say(f"warning: no samples for the notebook: {error}", file=sys.stderr)
            return {}
        separator = self.dataset.separator
        args = self.trainer.model, encoding, prompts, separator, SAMPLE_TOKENS
        return {"samples": continue_texts(*args)}

    def last_figures(self):
        """{split: figures} of the best checkpoint on validation and test; None if a signal came."""
        best = self.machine.from_rank_0(lambda: checkpoint.load(self.folder.best))
        self.trainer.model.load_state_dict(best["model"])
        found = {}
        for split in self.dataset.counts:
            if split != "train":
                found[split] = self.figures_of(split)
                if found[split] is None:
                    return None
        return found

    def tell_end(self, over, final):
        """Print how the run ended."""
        state, say, config = self.state, self.machine.say, self.config
        say(f"finished: {over}")
        if state.skipped:
            say(
                f"{state.skipped:,} of {state.step:,} steps had no finite loss or gradient and "
                "were skipped"
            )
        if state.best:
            say(f"best at step {state.best['step']:,}, in {self.folder.best}")
        for split, figures in final.items():
            say(figures_text(split, figures, self.dataset.separator))
        if state.best and config.expected_ppl:
            low, high = config.expected_ppl
            met = verdict(config.expected_ppl, state.best["val_ppl"])
            say(f"expected {low:g} to {high:g}: {met}")
        if config.recorded_ppl:
            say(f"the notebook recorded {perplexity(config.recorded_ppl)}")

    def give_up(self):
        """Say that too many steps had to be skipped. Returns the exit code."""
        self.machine.say(
            f"error: {self.state.skipped_in_a_row} steps in a row, the last at "
            f"{self.state.step:,}, had no finite loss or gradient, and none of them changed the "
            "weights; try a lower --learning_rate, a longer --warmup_steps or --dtype float32, "
            "with another --out_dir",
            file=sys.stderr,
        )
        return 1


# --- before the loop


def batches_of(config, train):
    """(the run's Batches, its number of steps). Raises UserError where there is nothing to do."""
    tokens, context = train.tokens, config.max_seq_len
    if len(tokens) <= context:
        raise UserError(
            f"{config.dataset} has {len(tokens):,} training tokens, not one window of {context}; "
            "prepare more text, or use a smaller --max_seq_len"
        )
    batches = Batches(tokens, context, config.batch_size, config.seed)
    total_steps = batches.epoch_end(config.epochs)
    if config.max_steps:
        total_steps = min(total_steps, config.max_steps)
    if warmup_of(config, total_steps) >= total_steps:
        raise UserError(
            f"warmup_steps {config.warmup_steps} leaves nothing of the run's {total_steps} steps; "
            f"use --warmup_steps {total_steps // 10}"
        )
    return batches, total_steps


def plan(config, machine, dataset, model, batches, total_steps):
    """What is about to be trained, as text: the true counts, the data, Chinchilla's ratio, steps,
    FLOPs, memory."""
    n, flops, tokens = model.count(), model.flops_per_token(), len(batches.tokens)
    step_tokens, run_tokens = batches.step_tokens, total_steps * batches.step_tokens
    micro = micro_batch_size(config, model, machine)
    memory = model.memory_bytes(micro, machine.dtype, machine.device.type) / 1e9
    lines = {
        "run": f"{config.out_dir} on {machine}",
        "weights": f"begin as those of {config.init_from or f'seed {config.seed}'}",
        "parameters": f"{n['total']:,}: embeddings {n['embeddings']:,}, head bias "
        f"{n['head_bias']:,}, blocks {n['blocks']:,}",
        "data": f"{config.dataset}: {tokens:,} training tokens, "
        f"{dataset.counts['val'].tokens:,} validation tokens",
        "ratio": f"{tokens / n['total']:.2f} tokens a parameter an epoch, "
        f"{run_tokens / n['total']:.2f} in the run",
        "": f"Chinchilla's is 20: {chinchilla(n['total'], tokens)}",
        "steps": f"{total_steps:,} of {config.batch_size} x {config.max_seq_len} = "
        f"{step_tokens:,} tokens, {batches.windows / config.batch_size:,.1f} an epoch, in forward "
        f"passes of {micro} sequences a rank",
        "compute": f"{flops:,} FLOPs a token, {flops * step_tokens:.3g} a step, "
        f"{flops * run_tokens:.3g} in the run",
        "memory": f"about {memory:,.1f} GB a rank, beside Python and torch themselves",
    }
    return "\n".join(f"{name:10}  {line}" for name, line in lines.items())


def starting_weights(config, machine, dataset):
    """The weights that a run begins with, a state_dict on the CPU; None for its seed's, and where
    it goes on from its own. With init_from the config takes their shape. Raises UserError."""
    if not config.init_from:
        return None
    if config.resume or restarted():
        own = machine.from_rank_0(lambda: checkpoint.shape_of(config.out_dir))
        if own:
            config.take_shape(own)  # what was named otherwise is for the folder to refuse
            return None
    model, _ = load_model(config.init_from, dataset)
    theirs = config.take_shape(model.args)
    weights = model.state_dict()
    positions = weights.get("position_embedding.weight")
    if positions is None or config.max_seq_len <= len(positions):
        theirs.pop("max_seq_len", None)  # rotary positions have no end, learned ones can be cut
    if theirs:
        differ = ", ".join(f"{k} {v}, not {getattr(config, k)}" for k, v in theirs.items())
        mend = " ".join(f"--{k} {v}" for k, v in theirs.items())
        raise UserError(f"{config.init_from} has {differ}; leave that out, or use {mend}")
    if positions is not None:
        weights["position_embedding.weight"] = positions[: config.max_seq_len]
    return weights


def load_model(where, dataset):
    """(the model of open_weights(where), on the CPU; its checkpoint's dict). Raises UserError if
    it reads other ids than the data set's."""
    found = open_weights(where)
    model = LanguageModel.from_checkpoint(found)
    theirs = found.get("tokenizer"), model.args["vocab_size"]
    if theirs != (dataset.tokenizer, dataset.vocab_size):
        raise UserError(
            f"{where} was trained with another tokenizer than {dataset.name}'s; choose another "
            "--dataset"
        )
    return model, found


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
    try:
        if wanted > there:
            raise MemoryError
        return new_model(config, planned.args["vocab_size"], tokens).to(machine.device)
    except (MemoryError, RuntimeError) as error:
        # what torch's allocators say
        words = ("out of memory", "allocate memory", "alloc_cpu")
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        raise UserError(
            f"to train this model takes about {wanted / 1e9:,.1f} GB, and {kind} has "
            f"{there / 1e9:,.1f} GB a rank; use a smaller --d_model, --d_ff or --num_layers"
        ) from None


# --- instead of it


def eval_only(config, machine):
    """Print the figures, on a split, of the best checkpoint in out_dir; of init_from's weights
    where there is none. Raises UserError."""
    path = f"{config.out_dir}/best.pt"
    if config.init_from and not os.path.exists(path):
        path = config.init_from
    dataset = Dataset(config.dataset, config.data_dir)
    split = dataset.split(config.split)
    model, found = load_model(path, dataset)
    context = model.args["max_seq_len"]
    if config.eval_stride > context:
        raise UserError(
            f"eval_stride {config.eval_stride} leaves tokens out: the context is {context}"
        )
    model.to(machine.device)
    micro = micro_batch_size(config, model, machine)
    machine.say(f"{path}, step {found['step']:,}, on {machine}")
    for stride in (0, config.eval_stride) if config.eval_stride else (0,):
        figures = evaluate(model, split, machine, micro, stride)
        machine.say(figures_text(config.split, figures, dataset.separator))
    return 0


if __name__ == "__main__":
    run(main)
