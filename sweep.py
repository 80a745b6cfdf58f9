"""A grid of runs, each an ordinary run of train.py, and what they say.

    python sweep.py config/exp6_small.py --learning_rate 4e-3,8e-3,1.6e-2 --seed 0,1,2 [--jobs 2]

Several values with commas between them make the grid. The same command goes on with a sweep that
was interrupted, and does what is left; more values extend it. Each run lies in a folder of its own,
out/NAME-sweep/...; what happens to it is in its log.txt, and `python report.py out/NAME-sweep`
shows the table.
"""

import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

import report
from config import Config, load_grid
from lab.console import ROOT, UserError, command, cpu_cores, progress, run, stop_signals
from lab.data import Dataset, batches_of
from lab.folder import Lock, read_json, write_text
from lab.gpt2 import open_weights
from lab.grid import Trial, folder_name, label
from lab.machine import Machine, choose_device, ranks_of
from lab.settings import fields_of, setting, split_words, types_of
from lab.weights import settle_dtype, with_shape_of

# settings that are the sweep's own, or that it gives to its runs itself
OWN = "out_dir", "resume", "dry_run", "jobs", "print", "dtype"


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


# --- the grid


def jobs_of(argv):
    """(the sweep's folder, its first run's Options, the Jobs) of a command line. Raises UserError
    with all problems in one line."""
    fields = fields_of(Config).items()
    names = [name for name, f in fields if name not in OWN and tuple not in types_of(f)]
    configs = load_grid(argv, "sweep.py", Options, names)
    first, ((path, *_), given, _) = configs[0], split_words(Options, argv)
    top = first.out_dir if "out_dir" in given else os.path.join("out", f"{first.name}-sweep")
    old = read_json(f"{top}/sweep.json")
    vary = list(old.get("vary", []))
    vary += [n for n in names if n not in vary and len({getattr(c, n) for c in configs}) > 1]
    if not vary:
        raise UserError("no setting has several values; try --seed 0,1,2")
    if first.eval_only:
        raise UserError("eval_only is one run's: use train.py; report.py shows a sweep's figures")
    configs = settle_all(configs, old.get("config", {}).get("dtype"))

    # the runs that are there, with the values that have begun to vary only now
    there = {name: old["config"] | run for name, run in old.get("runs", {}).items()}
    known = {label({k: run[k] for k in vary}): name for name, run in there.items()}
    jobs, problems = {}, []
    dataset, weights = functools.cache(Dataset), functools.cache(open_weights)
    told = [name for name in given if name not in OWN] + ["dtype", "out_dir"]
    for config in configs:
        settings = {name: getattr(config, name) for name in vary}
        name = known.get(label(settings)) or folder_name(settings)
        config = config.changed(out_dir=os.path.join(top, name))
        try:
            if config.init_from:
                config = with_shape_of(config, weights(config.init_from))
            train = dataset(config.dataset, config.data_dir).split("train")
            batches, steps = batches_of(config, train)
        except UserError as error:
            problems.append(str(error))
            continue
        trial = Trial(config.out_dir, settings, steps, config)
        words = [path, *(f"--{name}={getattr(config, name)}" for name in told), "--resume"]
        jobs[config.out_dir] = Job(trial, words)
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return top, configs[0].changed(out_dir=top), list(jobs.values())


def settle_all(configs, kept):
    """Configs with one compute dtype for all that leave it to the machine: the one that the sweep
    began with, if any. Printed commands may run elsewhere, and choose there."""
    first = configs[0]
    if first.dtype != "auto" or (first.print and not kept):
        return configs
    machine = Machine(choose_device(first, ranks_of({})), torch.float32)
    dtype = settle_dtype(first, machine, kept).dtype
    return [config.changed(dtype=dtype) for config in configs]


def claim(top, config, jobs, this_command, lock):
    """Own the sweep's folder, and write sweep.json: its runs so far with what varies and how many
    steps they take, the settings of the first, the command. Raises UserError."""
    trials = {os.path.basename(job.trial.folder): job.trial for job in jobs}
    vary = list(jobs[0].trial.settings)
    try:
        os.makedirs(top, exist_ok=True)
        lock.take(f"{top}/.lock", top, "wait for it, or choose another --out_dir")
        for trial in trials.values():  # one that a killed sweep has left may still go on
            if os.path.exists(f"{trial.folder}/.lock"):
                with Lock() as left:
                    left.take(f"{trial.folder}/.lock", trial.folder, "wait for its end, or end it")
        old = read_json(f"{top}/sweep.json")
        fixed = old.get("config", {}) | {name: getattr(config, name) for name in vary}
        if old and (differ := config.differences(fixed)):
            raise UserError(
                f"{top} holds another sweep ({'; '.join(differ)}), `{old['command']}`; choose "
                "another --out_dir"
            )
        runs = {name: trial.settings for name, trial in trials.items()}
        steps = {name: trial.steps for name, trial in trials.items()}
        # the runs of before have the settings that have begun to vary
        adopted = {name: old["config"] | run for name, run in old.get("runs", {}).items()}
        runs = {name: {k: run[k] for k in vary} for name, run in adopted.items()} | runs
        metadata = dict(command=this_command, vary=vary, runs=runs)
        metadata |= dict(steps=old.get("steps", {}) | steps, config=config.plain())
        write_text(f"{top}/sweep.json", json.dumps(metadata, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write into {top}: {error.strerror}; fix that") from None


# --- the runs


def go(jobs, at_once, stop):
    """Run what is left, to its end or to a signal; the runs then save and stop, too."""
    waiting = [job for job in jobs if not job.trial.is_over()]
    running, looked = {}, 0.0  # {slot: (Job, its process)}, when all were looked at
    total, done = sum(job.trial.steps for job in jobs), sum(job.trial.done for job in jobs)
    bar = progress(total, "sweep", initial=done, unit="step")
    while running or (waiting and not stop):
        # start what may run
        for slot in range(at_once):
            if waiting and slot not in running and not stop:
                job = waiting.pop(0)
                running[slot] = job, start(job, slot, at_once)

        # see what has ended
        time.sleep(0.2)
        for slot, (job, process) in list(running.items()):
            if stop:
                process.terminate()  # does nothing where it has ended, or been told
            if process.poll() is not None:
                del running[slot]
                job.trial.look(process.returncode)
                bar.write(f"{label(job.trial.settings)}: {job.trial.state}", file=sys.stderr)

        # now and then, how far the others are
        if time.monotonic() - looked > 5:
            for job, _ in running.values():
                job.trial.look()
            looked = time.monotonic()
            bar.set_postfix_str(f"{len(waiting)} runs waiting", refresh=False)
            bar.update(sum(job.trial.done for job in jobs) - bar.n)
    bar.close()


def start(job, slot, at_once):
    """Start a run as a process of its own, its output into its log.txt."""
    folder, device, env = job.trial.folder, job.trial.config.device, dict(os.environ)
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
        return subprocess.Popen(words, env=env, **streams)


# --- the command


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    top, config, jobs = jobs_of(argv)
    this_command = command("sweep.py", *argv)

    def finished():
        return sum(job.trial.loss is not None for job in jobs)

    plan = (
        f"sweep   {len(jobs)} runs in {top}, {finished()} of them finished; {config.jobs} at a time"
    )
    if config.dry_run:
        return print(plan)
    with stop_signals() as stop, Lock() as lock:
        claim(top, config, jobs, this_command, lock)
        if config.print:
            return print("\n".join(command("train.py", *job.words) for job in jobs))
        print(plan, flush=True)
        go(jobs, config.jobs, stop)
    if stop and finished() < len(jobs):
        print(
            f"stopped: {finished()} of {len(jobs)} runs are finished; resume with: {this_command}"
        )
        return 1
    report.main([top])
    return int(finished() < len(jobs))


if __name__ == "__main__":
    run(main, strict="--print" in sys.argv)
