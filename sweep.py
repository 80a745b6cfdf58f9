"""A grid of runs, each an ordinary run of train.py, and what they say.

    python sweep.py config/exp6_small.py --learning_rate 4e-3,8e-3,1.6e-2 --seed 0,1,2 [--jobs 2]

Several values with commas between them make the grid. The same command resumes a sweep that was
interrupted. Each run lies in a folder of its own, out/NAME-sweep/..., with its output in log.txt,
and `python report.py out/NAME-sweep` shows the table.
"""

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from urllib.parse import quote

import torch

import report
from config import Config, load_grid
from lab.console import ROOT, UserError, command, cpu_cores, run, stop_signals
from lab.data import Dataset, batches_of
from lab.folder import read_json, take_lock, write_text
from lab.grid import Trial, label
from lab.machine import Machine, choose_device, ranks_of
from lab.notebook import invite
from lab.settings import fields_of, setting, split_words, types_of
from lab.weights import settle

# settings that are the sweep's own, or that it gives to its runs itself
OWN = "out_dir", "resume", "dry_run", "jobs", "print"
# a single run may be resumed with others of these, but the runs of a sweep are to be compared
SHARED = "dtype", "epochs", "max_steps", "max_hours", "patience"
open_dataset = functools.cache(Dataset)  # its hashes are taken once for all runs


@dataclass
class Options(Config):
    """A run's settings, and how to go through the grid."""

    jobs: int = setting(1, "runs at a time, over the GPUs or the cores there are", low=1, free=True)
    print: bool = setting(False, "print the runs' commands, a line each, and stop", free=True)


def jobs_of(argv):
    """(the sweep's folder, its first run's Options, [(Trial, its words for train.py)]) of a command
    line. Raises UserError."""
    fields = fields_of(Config).items()
    names = [name for name, f in fields if name not in OWN and tuple not in types_of(f)]
    configs = load_grid(argv, "sweep.py", Options, names)
    first, ((path, *_), given) = configs[0], split_words(Options, argv)
    varied = {name for name in names if len({getattr(config, name) for config in configs}) > 1}
    if not varied:
        raise UserError("no setting has several values; try --seed 0,1,2")
    # a run that an earlier command began, with fewer settings varied, keeps its folder
    top = first.out_dir if "out_dir" in given else os.path.join("out", f"{first.name}-sweep")
    old = read_json(f"{top}/sweep.json")
    vary = [name for name in names if name in varied.union(old.get("vary", ()))]
    folders = {label(settings): name for name, settings in runs_of(old, vary).items()}

    # one dtype for all; printed commands may run on another machine, which then chooses
    device = torch.device("cpu") if first.print else choose_device(first, ranks_of({}))
    machine, dtype = Machine(device, torch.float32), old.get("config", {}).get("dtype", "auto")
    told = [name for name in given if name not in (*OWN, "dtype")] + ["dtype", "out_dir"]
    jobs = {}
    for config in configs:
        settings = {name: getattr(config, name) for name in vary}
        name = folders.get(label(settings)) or folder_name(settings)
        kept = dtype if config.dtype == "auto" else config.dtype
        config = config.changed(out_dir=os.path.join(top, name), dtype=kept)
        settled, _ = settle(config, machine)
        if not config.print:
            dtype = settled.dtype
            config = config.changed(dtype=dtype)
        first = first if jobs else config
        _, steps = batches_of(settled, open_dataset(config.dataset, config.data_dir).split("train"))
        words = [path, *(f"--{name}={getattr(config, name)}" for name in told), "--resume"]
        jobs[name] = Trial(config.out_dir, settings, steps), words
    return top, first, list(jobs.values())


def folder_name(settings):
    """A name for the folder of a run with these settings. One that no file system would take is
    cut short, and ends in a hash of the whole; sweep.json has the settings."""
    name = quote(label(settings), safe="=,+")
    whole = hashlib.sha256(name.encode()).hexdigest()
    return name if len(name) < 200 else f"{name[:180]}-{whole[:8]}"


def runs_of(sweep, vary):
    """{folder: settings} of the runs in a sweep.json. Names in vary to which its command gave one
    value have that."""
    config = sweep.get("config", {})
    common = {name: config.get(name, getattr(Config, name)) for name in vary}
    return {folder: common | settings for folder, settings in sweep.get("runs", {}).items()}


def claim(top, config, trials, this_command, locks):
    """Own the sweep's folder, and write sweep.json: the command, the settings of the first run, and
    for all runs what varies and their steps. Raises UserError."""
    new, vary = config.plain(), list(trials[0].settings)
    try:
        os.makedirs(top, exist_ok=True)
        fix = "wait for it, or choose another --out_dir"
        locks.enter_context(take_lock(f"{top}/.lock", top, fix))
        old = read_json(f"{top}/sweep.json")
        before = new | old.get("config", {}) | {name: new[name] for name in vary}
        shared = [name for name in SHARED if before[name] not in ("auto", new[name])]
        changed = [f"{name} was {before[name]}, now {new[name]}" for name in shared]
        if changed := config.differences(before) + changed:
            raise UserError(
                f"{top} holds another sweep, `{old['command']}`: {'; '.join(changed)}; choose "
                "another --out_dir"
            )
        runs = {os.path.basename(trial.folder): trial.settings for trial in trials}
        steps = {os.path.basename(trial.folder): trial.steps for trial in trials}
        runs, steps = runs_of(old, vary) | runs, old.get("steps", {}) | steps
        sweep = dict(command=this_command, vary=vary, runs=runs, steps=steps, config=new)
        write_text(f"{top}/sweep.json", json.dumps(sweep, indent=2) + "\n")
        invite(top)
    except OSError as error:
        raise UserError(f"cannot write into {top}: {error.strerror}; fix that") from None


def go(jobs, config, stop):
    """Run what is left, to its end or to a signal; the runs then save and stop, too."""
    # runs that were trained further by hand stay as they are
    waiting = [job for job in jobs if not (job[0].best or job[0].is_longer)]
    running, told = {}, False  # running: {slot: (Trial, its process)}
    while running or (waiting and not stop):
        # start what may run
        for slot in range(config.jobs):
            if waiting and slot not in running and not stop:
                trial, words = waiting.pop(0)
                running[slot] = trial, start(trial.folder, words, config, slot)
        time.sleep(0.5)

        # pass a signal on, once: a second would end a run without its checkpoint
        if stop and not told:
            told = True
            for _, process in running.values():
                process.terminate()

        # what has ended
        for slot, (trial, process) in list(running.items()):
            if process.poll() is not None:
                del running[slot]
                state = Trial(trial.folder, trial.settings, trial.steps).state
                left = len(waiting) + len(running)
                print(f"{label(trial.settings)}: {state}; {left} to go", file=sys.stderr)


def start(folder, words, config, slot):
    """Start a run as a process of its own, its output into its log.txt."""
    env = dict(os.environ)
    if config.jobs > 1:
        there = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = (env.get("CUDA_VISIBLE_DEVICES") or there).split(",")
        if config.device in ("auto", "cuda"):
            env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        env.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // config.jobs)))
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/log.txt", "ab") as log:
        log.write(f"\n$ {command('train.py', *words)}\n".encode())
        log.flush()
        program = [sys.executable, str(ROOT / "train.py"), *words]
        streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        # in a session of its own: the terminal's Ctrl-C comes to the sweep alone
        return subprocess.Popen(program, env=env, start_new_session=True, **streams)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    top, config, jobs = jobs_of(argv)
    this_command, steps = command("sweep.py", *argv), sum(trial.steps for trial, _ in jobs)
    plan = f"sweep   {len(jobs)} runs of {steps:,} steps in all, in {top}; {config.jobs} at a time"
    if config.dry_run:
        return print(plan)
    stop = stop_signals()
    with contextlib.ExitStack() as locks:
        claim(top, config, [trial for trial, _ in jobs], this_command, locks)
        if config.print:
            return print("\n".join(command("train.py", *words) for _, words in jobs))
        print(plan, flush=True)
        go(jobs, config, stop)
    now = [Trial(trial.folder, trial.settings, trial.steps) for trial, _ in jobs]
    done = sum(bool(trial.best) for trial in now)
    if stop and done < len(now):
        print(f"stopped: {done} of {len(now)} runs are finished; resume with: {this_command}")
        return 1
    report.main([top])
    return int(done < len(now))


if __name__ == "__main__":
    run(main, strict="--print" in sys.argv)
