"""The loop: batches, steps, evaluations, checkpoints.

    python train.py config/exp5.py [--setting value ...]
    torchrun --nproc_per_node=2 train.py config/exp5.py

A run is a pure function of its config. Batch i follows from (seed, i), the learning rate from the
step, dropout from (seed, step, rank). Ranks and micro-batches only slice a batch. So the number of
processes changes the speed and nothing else, and a resumed run is the same run.
"""

import os
import sys
import time

import torch

from config import load_config
from lab import checkpoint
from lab.console import UserError, command, progress, run, stop_signals
from lab.data import Dataset, load_tokenizer
from lab.evaluate import evaluate, figures_text
from lab.folder import Folder, describe
from lab.generate import continue_texts
from lab.machine import open_machine
from lab.notebook import perplexity, verdict
from lab.state import State
from lab.trainer import Trainer, micro_batch_size
from model import LanguageModel
from plan import batches_of, build_model, load_model, plan_text, starting_weights

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
    machine.say(plan_text(config, machine, dataset, planned, batches, total_steps))
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
        self.best_figures = None  # on validation, where the best evaluation was this process's
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
        state, folder, whole = self.state, self.folder, figures
        kept = ("loss", "stderr", "ppl", "ppl_word", "bits_per_byte")
        figures = {f"val_{name}": figures[name] for name in kept}
        train_loss, better = state.evaluated(figures)
        written = better and folder.save_best(lambda: self.contents() | {"metrics": figures})
        if written:  # the best is what best.pt holds
            state.best = dict(step=state.step, **figures)
            self.best_figures = whole
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
                known = self.best_figures if split == "val" else None
                found[split] = known or self.figures_of(split)
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
