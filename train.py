"""The loop: batches, steps, evaluations, checkpoints.

    python train.py config/exp5.py [--setting value ...]
    torchrun --nproc_per_node=2 train.py config/exp5.py

A run is a pure function of its config. Batch i follows from (seed, i), the learning rate from the
step, dropout from (seed, step, rank). Ranks and micro-batches only slice a batch: they change the
speed and dropout's masks, and nothing else. A resumed run equals an uninterrupted one.
"""

import contextlib
import math
import os
import sys
import time

import torch

from config import load_config
from lab.console import UserError, command, progress, run, stop_signals
from lab.data import Dataset, batches_of
from lab.evaluate import evaluate, figures_text
from lab.folder import Folder, load_checkpoint
from lab.generate import continue_texts
from lab.gpt2 import open_weights
from lab.machine import open_machine
from lab.notebook import facts, invite, show, verdict, write_entry
from lab.optimizer import warmup_of
from lab.state import State
from lab.trainer import Trainer, micro_batch_size
from lab.weights import build_model, check_vocabulary, settle, settle_dtype, with_context
from model import LanguageModel

SAMPLE_TOKENS = 60  # of each prompt's continuation, for the notebook
NOT_FINITE = "the loss or its gradient is not finite"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config = load_config(argv)
    machine = open_machine(config)
    if config.eval_only:
        return eval_only(config, machine)
    stop = stop_signals(quiet=machine.rank > 0)
    with contextlib.ExitStack() as locks:
        folder = Folder(config.out_dir, machine, locks)
        words = [word for word in argv if word != "--resume"]
        this_command = command("train.py", *words, processes=machine.local_world)
        return train(config, machine, folder, stop, this_command)


def train(config, machine, folder, stop, this_command):
    """Run a config to its end or to a signal. Returns the process's exit code.

    stop: a list that is empty until a signal comes. Raises UserError before the first step for
    whatever the user must fix.
    """
    # what is to be trained, and on what
    dataset = Dataset(config.dataset, config.data_dir)
    splits = {name: dataset.split(name) for name in dataset.counts}
    config, weights = settle(config, machine, dataset)
    batches, total_steps = batches_of(config, splits["train"])
    hashes = dataset.hashes()
    machine.agree([config.plain(), hashes])

    # the plan comes before anything that takes memory or writes
    with torch.device("meta"):
        planned = LanguageModel(**config.model_args(dataset.vocab_size))
    metadata = describe(config, dataset, planned, batches, total_steps)
    machine.say(plan_text(metadata, config, machine, planned))
    tell_time(metadata, config, machine, planned)
    if config.dry_run:
        return 0
    if config.sample_prompts != ():
        # if the tokenizer is not to be had, then here and not hours later
        machine.from_rank_0(lambda: bool(dataset.encoding()))
    model = build_model(config, machine, planned, splits["train"].tokens)
    if weights:
        model.load_state_dict(weights)

    # what to go on from
    resume_command = f"{this_command} --resume"
    checkpoint, finished = machine.from_rank_0(lambda: folder.open(config, hashes, resume_command))
    state = State(config, batches, total_steps)
    if checkpoint:
        state.load_state_dict(checkpoint["state"])
    over = state.why_over()
    if over and finished and not state.evaluation_is_due():
        machine.say(f"{folder.path} is finished: {over}; its best checkpoint is {folder.best}")
        return 0
    trainer = Trainer(config, machine, model, batches, total_steps)
    if checkpoint:
        trainer.load_state_dict(checkpoint)
        was, now = checkpoint["optimizers"][0]["param_groups"][0]["lr"], trainer.lr(state.step)
        if finished and now > was:
            machine.say(
                f"the learning rate goes back up, from {was:.2e} to {now:.2e}; where it is not to, "
                "begin another run with all its steps, or with --lr_schedule constant"
            )
    del checkpoint, weights  # or their copies of the weights would stay
    machine.from_rank_0(lambda: folder.begin(state, metadata | {"command": this_command}))
    folder.write("conclusion.md", invite, folder.path)
    return Run(config, folder, stop, dataset, trainer, state).go(resume_command)


def describe(config, dataset, model, batches, total_steps):
    """What the run is, a dict for run.json."""
    own = {name: getattr(config, name) for name in ("name", "doc", "file", "given", "departs")}
    data = dict(
        source=dataset.source["name"],
        tokenizer=dataset.tokenizer,
        separator=dataset.separator,
        splits={split: vars(counts) for split, counts in dataset.counts.items()},
    )
    return own | dict(
        config=config.plain() | {"warmup_steps": warmup_of(config, total_steps)},
        steps=total_steps,
        step_tokens=batches.step_tokens,
        parameters=model.count(),
        flops_per_token=model.flops_per_token(),
        vocab_size=dataset.vocab_size,
        data=data,
    )


def plan_text(metadata, config, machine, model):
    """What is about to be trained, as text. metadata: describe()'s. model: without memory."""
    micro = micro_batch_size(config, model, machine)
    memory = model.memory_bytes(micro, machine.dtype, machine.device.type) / 1e9
    source = f"from {config.init_from}" if config.init_from else f"with seed {config.seed}"
    lines = {
        "run": f"{config.out_dir} on {machine}",
        "weights": "" if config.resume else f"initialised {source}",
        **facts(metadata),
        "memory": f"about {max(memory, 0.1):,.1f} GB per rank, beside Python and torch themselves, "
        f"with {micro} sequences per forward pass",
    }
    return "\n".join(f"{name:10}  {line}" for name, line in lines.items() if line)


def tell_time(metadata, config, machine, planned):
    """Print how long a run takes on a CPU, by the time of a forward and backward pass. planned: its
    model, without memory."""
    micro = micro_batch_size(config, planned, machine)
    memory = planned.memory_bytes(micro, machine.dtype, "cpu")
    if machine.device.type != "cpu" or memory > machine.memory():
        return
    model, times = LanguageModel(**planned.args), []
    rows = torch.zeros(micro, config.max_seq_len, dtype=torch.int64)
    while len(times) < 4 and sum(times) < 3:  # the first ones also ask for memory
        began = time.perf_counter()
        with machine.autocast():
            loss = model(rows, rows)
        loss.backward()
        times.append(time.perf_counter() - began)
    tokens = metadata["steps"] * metadata["step_tokens"]
    seconds = min(times) * tokens / rows.numel() / machine.world
    limit = 3600 * config.max_hours
    ends = f", and max_hours ends it after {config.max_hours:g}" if 0 < limit < seconds else ""
    size, unit = (3600, "hours") if seconds > 7200 else (60, "min") if seconds > 120 else (1, "s")
    told = f"{math.ceil(seconds / size):,} {unit} of forward and backward passes"
    machine.say(f"time        about {told} on this machine{ends}")


def prompts_from(tokens, encoding):
    """Three texts of a few words from evenly spread places of a split's tokens (n,) uint16."""
    places = [tokens[len(tokens) * i // 3 :][:12] for i in range(3)]
    texts = [encoding.decode(ids[ids != encoding.eot_token].tolist()) for ids in places]
    # the places may lie amid a character or a word
    return [text.strip("\ufffd").partition(" ")[2] or text for text in texts]


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

    def go(self, resume_command):
        """Train, and tell how it ended. Returns the process's exit code."""
        over = self.loop()
        self.bar.close()
        state, folder, say = self.state, self.folder, self.machine.say
        if over == NOT_FINITE:
            skipped = state.skipped_in_a_row
            steps = f" in {skipped} steps in a row, which changed no weight" if skipped else ""
            say(
                f"error: step {state.step:,}: {NOT_FINITE}{steps}; try a lower --learning_rate, a "
                "longer --warmup_steps or --dtype float32, with another --out_dir",
                file=sys.stderr,
            )
            return 1
        self.save()
        if not over or not folder.finish(state, self.tell_end(over)):
            step, last = state.step, folder.last_is()
            say(f"stopped at step {step:,}, {last}; resume with: {resume_command}")
            return 1
        folder.write("notebook.md", write_entry, folder.path)
        return 0

    def loop(self):
        """Take steps until the run is over. Returns why it is, "" after a signal."""
        state, trainer, machine = self.state, self.trainer, self.machine
        busy, steps = 0.0, 0  # seconds and steps since the last line of the log
        while True:
            # before a step: an evaluation may be due, and the run may be over
            if state.evaluation_is_due():
                self.save()
                if not math.isfinite(self.evaluate()):
                    return NOT_FINITE
            if over := state.why_over():
                return over

            # one step
            began = time.perf_counter()
            lr = trainer.lr(state.step)
            state.pending.append(trainer.step(state.step))
            state.step += 1
            log_is_due = state.step % self.config.log_interval == 0
            if log_is_due:
                norm = state.pending[-1][1]
                state.count(machine)  # waits for the device, so that the clock is true
            busy, steps = busy + time.perf_counter() - began, steps + 1
            self.bar.update()

            # once in a while: a line of the log
            if log_is_due:
                loss, speed = state.train_loss(), steps * trainer.batches.step_tokens / busy
                figures = dict(train_loss=loss, lr=lr, grad_norm=norm.item(), tokens_per_s=speed)
                self.folder.log(state, **figures)
                shown = f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s"
                self.bar.set_postfix_str(shown, refresh=False)
                busy, steps = 0.0, 0

            # the ranks agree on a signal and on the time
            stopping, clocks = machine.reduce(bool(self.stop), state.clock())
            state.elapsed_s = clocks / machine.world

            # once in a while, and at a signal: a checkpoint
            save_is_due = state.save_is_due()
            if stopping or save_is_due:
                self.save()
            counted = log_is_due or save_is_due
            if counted and state.skipped_in_a_row >= trainer.most_skipped:
                return NOT_FINITE
            if stopping:
                return ""

    def save(self):
        """Write last.pt."""
        state, data = self.state, self.dataset.hashes()
        state.count(self.machine)
        more = self.trainer.state_dict() | dict(state=state.state_dict(), data=data)
        self.folder.save(state, self.contents() | more)
        state.saved_s = state.elapsed_s

    def contents(self):
        """What every checkpoint holds: tensors, dicts, lists, strings and numbers only."""
        model = self.trainer.model
        return dict(
            model=model.state_dict(),
            model_args=model.args,
            tokenizer=self.dataset.tokenizer,
            tokenizer_text=self.dataset.tokenizer_text,
            separator=self.dataset.separator,
            step=self.state.step,
            config=self.config.plain(),
        )

    def evaluate_split(self, split):
        """evaluate() on a split."""
        machine, micro = self.machine, self.trainer.micro
        return evaluate(self.trainer.model, self.dataset.split(split), machine, micro)

    def evaluate(self):
        """Evaluate, and write down what came of it. Returns the loss."""
        whole = self.evaluate_split("val")
        state, folder = self.state, self.folder
        kept = ("loss", "stderr", "ppl", "ppl_word", "bits_per_byte")
        figures = {f"val_{name}": whole[name] for name in kept}

        # the best is what best.pt holds
        checkpoint = self.contents() | {"metrics": figures}
        lowest = state.best.get("val_loss", math.inf)
        best = whole["loss"] < lowest and folder.save_best(checkpoint)
        train_loss = state.evaluated(figures, best)
        samples = self.samples() if best else {}
        folder.log(state, train_loss=train_loss, **figures, best=best, **samples)

        # what the user sees of it
        self.bar.clear()
        self.machine.say(
            f"epoch {state.epoch:.4g} | step {state.step:,} | train loss {train_loss:.4f} | "
            f"val loss {figures['val_loss']:.4f} | val perplexity {show(figures['val_ppl'])}"
            + (f" | best so far, saved to {folder.best}" if best else "")
        )
        folder.write("notebook.md", write_entry, folder.path)
        return whole["loss"]

    def samples(self):
        """{"samples": [[prompt, continuation]]} of sample_prompts, on rank 0."""
        prompts, dataset = self.config.sample_prompts, self.dataset
        if self.machine.rank > 0 or prompts == ():
            return {}
        encoding = dataset.encoding()
        if prompts is None:
            prompts = prompts_from(dataset.split("val").tokens, encoding)
        args = self.trainer.model, encoding, prompts, dataset.separator, SAMPLE_TOKENS
        return {"samples": continue_texts(*args)}

    def tell_end(self, over):
        """Print how the run ended. Returns {split: figures} of the best checkpoint."""
        state, say, final = self.state, self.machine.say, {}
        say(f"finished: {over}")
        if state.skipped:
            say(f"{state.skipped:,} of {state.step:,} steps were skipped: {NOT_FINITE}")
        if not state.best:
            return final
        say(f"best at step {state.best['step']:,}, in {self.folder.best}")
        best = self.machine.from_rank_0(lambda: load_checkpoint(self.folder.best))
        self.trainer.model.load_state_dict(best["model"])
        for split in [name for name in self.dataset.counts if name != "train"]:
            final[split] = self.evaluate_split(split)
            say(figures_text(split, final[split], self.dataset.separator))
        if sentence := verdict(self.config.plain(), state.best["val_ppl"]):
            say(sentence)
        return final


def eval_only(config, machine):
    """Print the figures, on a split, of the best checkpoint in out_dir, on its data set and in its
    context if the command line names no other; of init_from's weights where there is none. Raises
    UserError."""
    path, named = f"{config.out_dir}/best.pt", config.given
    if config.init_from and not os.path.exists(path):
        path, named = config.init_from, config.named
    checkpoint = open_weights(path)
    args, old = checkpoint["model_args"], checkpoint.get("config", {})
    name = config.dataset if "dataset" in named else old.get("dataset", config.dataset)
    dataset = Dataset(name, config.data_dir)
    split = dataset.split(config.split)
    check_vocabulary(checkpoint, dataset, path)

    # the weights, with the context that is asked for, in the dtype that they were evaluated in
    context = config.max_seq_len if "max_seq_len" in named else args["max_seq_len"]
    model = LanguageModel.from_checkpoint(with_context(checkpoint, context)).to(machine.device)
    dtype = config.dtype if "dtype" in named else "auto"
    config = config.changed(dtype=dtype, d_model=args["d_model"])
    config = settle_dtype(config, machine, old)

    micro = micro_batch_size(config, model, machine)
    machine.say(f"{path}, step {checkpoint['step']:,}, on {machine}")
    figures = evaluate(model, split, machine, micro)
    if not math.isfinite(figures["loss"]):
        raise UserError(f"{path} gives a loss of {figures['loss']}; name another checkpoint")
    machine.say(figures_text(config.split, figures, dataset.separator))
    return 0


if __name__ == "__main__":
    run(main)
