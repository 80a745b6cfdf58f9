"""A grid of runs, each an ordinary run of train.py, and what they say.

    python sweep.py config/exp6_small.py --learning_rate 4e-3,8e-3,1.6e-2 --seed 0,1,2 [--jobs 2]

Several values with commas between them make the grid. The same command goes on with a sweep that
was interrupted, and does what is left. Each run lies in a folder of its own, out/NAME-sweep/...;
what happens to it is in its log.txt, and `python report.py out/NAME-sweep` shows the table.
"""

import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from urllib.parse import quote

import torch

import report
from config import Config, load_grid
from lab.console import ROOT, UserError, command, cpu_cores, progress, run, stop_signals
from lab.data import Dataset, batches_of
from lab.dtype import choose_dtype
from lab.folder import Lock, read_json, write_text
from lab.grid import Trial, label
from lab.machine import Machine, choose_device, ranks_of
from lab.settings import fields_of, setting, split_words, types_of

# settings that are the sweep's own, or that it gives to its runs itself
OWN = "out_dir", "resume", "dry_run", "jobs", "print"
open_dataset = functools.cache(Dataset)  # its sums are taken once for all runs


@dataclass
class Options(Config):
    """A run's settings, and how to go through the grid."""

    jobs: int = setting(1, "runs at a time, over the GPUs or the cores there are", low=1, free=True)
    print: bool = setting(False, "print the runs' commands, a line each, and stop", free=True)


@dataclass
class Job:
    """What is to be run of a Trial."""

    trial: Trial
    words: list  # train.py's command line
    steps: int
    step_tokens: int


# --- the grid


def jobs_of(argv):
    """(the sweep's folder, its first run's Options, the Jobs) of a command line. Raises UserError
    with all problems in one line."""
    fields, problems = fields_of(Config).items(), []
    names = [name for name, f in fields if name not in OWN and tuple not in types_of(f)]
    configs = load_grid(argv, "sweep.py", Options, names)
    first, ((path, *_), given, _) = configs[0], split_words(Options, argv)
    vary = [name for name in names if len({getattr(config, name) for config in configs}) > 1]
    if not vary:
        problems.append("no setting has several values; try --seed 0,1,2")

    top = first.out_dir if "out_dir" in given else os.path.join("out", f"{first.name}-sweep")
    settle_dtype(configs, top)
    jobs = {}
    for config in configs:
        settings = {name: getattr(config, name) for name in vary}
        config.out_dir = os.path.join(top, quote(label(settings), safe="=,+"))
        told = [name for name in given if name not in (*OWN, "dtype")] + ["dtype", "out_dir"]
        words = [path, *(f"--{name}={getattr(config, name)}" for name in told), "--resume"]
        try:
            train = open_dataset(config.dataset, config.data_dir).split("train")
            batches, steps = batches_of(config, train)
            trial = Trial(config.out_dir, settings, config.plain())
            jobs[config.out_dir] = Job(trial, words, steps, batches.step_tokens)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return top, first, list(jobs.values())


def settle_dtype(configs, top):
    """Choose one dtype for all runs that leave it to the machine, or keep the one that the sweep
    began with. Printed commands may run elsewhere, and choose there."""
    kept = read_json(f"{top}/sweep.json").get("config", {}).get("dtype", "auto")
    for config in configs:
        if config.dtype == "auto":
            if kept == "auto" and not config.print:
                machine = Machine(choose_device(config, ranks_of({})), torch.float32)
                kept = str(choose_dtype(config, machine)[0])[6:]
            config.dtype = kept


def claim(top, config, jobs, again, lock):
    """Own the sweep's folder, and write sweep.json: its runs so far with what varies, the settings
    of the first, the command. Raises UserError."""
    runs = {os.path.basename(job.trial.folder): job.trial.settings for job in jobs}
    vary = list(jobs[0].trial.settings)
    try:
        os.makedirs(top, exist_ok=True)
        lock.take(f"{top}/.lock", top, "wait for it, or choose another --out_dir")
        for trial in (job.trial for job in jobs if os.path.exists(f"{job.trial.folder}/.lock")):
            with Lock() as left:  # what a killed sweep has left may still be saving
                left.take(f"{trial.folder}/.lock", trial.folder, "wait for its end", seconds=30)
            trial.look()
        old = read_json(f"{top}/sweep.json")
        fixed = old.get("config", {}) | {name: getattr(config, name) for name in vary}
        if old and (vary != old["vary"] or config.differences(fixed)):
            raise UserError(
                f"{top} holds another sweep, `{old['command']}`; choose another --out_dir"
            )
        about = dict(command=again, vary=vary, runs=old.get("runs", {}) | runs)
        about["config"] = config.plain()
        write_text(f"{top}/sweep.json", json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write into {top}: {error.strerror}; mend that") from None


# --- the runs


def go(jobs, at_once, stop):
    """Run what is left, to its end or to a signal; the runs then save and stop, too."""
    waiting = [job for job in jobs if job.trial.state != "finished"]
    running, timed = {}, False  # {slot: (Job, its process)}, whether the time has been told
    total, done = sum(job.steps for job in jobs), sum(job.trial.done for job in jobs)
    bar = progress(total, "sweep", initial=done, unit="step")
    while running or (waiting and not stop):
        # start what may run
        for slot in range(at_once):
            if waiting and slot not in running and not stop:
                job = waiting.pop(0)
                running[slot] = job, start(job, slot, at_once)
        time.sleep(0.5)

        # see how far they are
        for slot, (job, process) in list(running.items()):
            if stop:
                process.terminate()  # does nothing where it has ended, or been told
            code = process.poll()
            job.trial.look()
            if code is not None:
                del running[slot]
                if not stop:
                    explain(job.trial, code)
                bar.write(f"{label(job.trial.settings)}: {job.trial.state}", file=sys.stderr)

        # the live line, and once the time
        bar.set_postfix_str(f"{len(waiting)} runs waiting", refresh=False)
        bar.update(sum(job.trial.done for job in jobs) - bar.n)
        speed = next((s for job in jobs if (s := job.trial.run.speed())), None)
        if speed and not timed:
            timed = True
            tokens = sum((job.steps - job.trial.done) * job.step_tokens for job in jobs)
            minutes = f"{tokens / speed / at_once / 60:,.0f} min at {speed:,.0f} tokens/s a run"
            bar.write(f"time    {minutes}, and the evaluations", file=sys.stderr)
    bar.close()


def start(job, slot, at_once):
    """Start a run as a process of its own, its output into its log.txt."""
    folder, device, env = job.trial.folder, job.trial.config["device"], dict(os.environ)
    if at_once > 1:
        there = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = (env.get("CUDA_VISIBLE_DEVICES") or there).split(",")
        if device in ("auto", "cuda"):
            env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        env.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // at_once)))
    os.makedirs(folder, exist_ok=True)
    words = [sys.executable, str(ROOT / "train.py"), *job.words]
    with open(f"{folder}/log.txt", "ab") as log:
        log.write(f"\n$ {command('train.py', *job.words)}\n".encode())
        log.flush()
        streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        return subprocess.Popen(words, env=env, preexec_fn=end_with_the_sweep, **streams)


def end_with_the_sweep():
    """In a run's process: if the sweep is killed, Linux tells the run to save and stop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def explain(trial, code):
    """Write into a run's log why it has no result, where it could not do so itself."""
    if trial.state != "finished" and not trial.state.startswith("failed"):
        with open(f"{trial.folder}/log.txt", "a") as log:
            log.write(f"error: it ended with exit code {code} and without a best checkpoint\n")
        trial.look()


# --- the command


def plan(top, config, jobs):
    """What is about to be run, as text."""
    done = sum(job.trial.state == "finished" for job in jobs)
    tokens = sum(job.steps * job.step_tokens for job in jobs)
    return (
        f"sweep   {len(jobs)} runs in {top}, {done} of them finished; {config.jobs} at a time, "
        f"{config.dtype}\ntokens  {tokens:,} in all"
    )


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    top, config, jobs = jobs_of(argv)
    again = command("sweep.py", *argv)
    if config.dry_run:
        return print(plan(top, config, jobs))
    with stop_signals() as stop, Lock() as lock:
        claim(top, config, jobs, again, lock)
        if config.print:
            return print("\n".join(command("train.py", *job.words) for job in jobs))
        print(plan(top, config, jobs), flush=True)
        go(jobs, config.jobs, stop)
    done = sum(job.trial.state == "finished" for job in jobs)
    if stop and done < len(jobs):
        print(f"stopped: {done} of {len(jobs)} runs are finished; go on with: {again}")
        return 1
    report.main([top])
    return int(done < len(jobs))


if __name__ == "__main__":
    run(main, strict="--print" in sys.argv)
