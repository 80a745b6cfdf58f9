"""A grid of runs, each an ordinary run of train.py, and what they say.

    python sweep.py config/exp6_small.py --learning_rate 4e-3,8e-3,1.6e-2 --seed 0,1,2 [--jobs 2]

Several values with commas between them make the grid. The same command resumes a sweep that was
interrupted. Each run lies in a folder of its own, out/NAME-sweep/..., with its output in log.txt,
and `python report.py out/NAME-sweep` shows the table.
"""

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
from lab.console import ROOT, UserError, command, cpu_cores, progress, run, stop_signals
from lab.data import Dataset, batches_of
from lab.folder import read_bytes, read_json, write_text
from lab.machine import Machine, choose_device, ranks_of
from lab.notebook import SavedRun
from lab.settings import fields_of, setting, split_words, types_of
from lab.weights import settle

# settings that are the sweep's own, or that it gives to its runs itself
OWN = "out_dir", "resume", "dry_run", "jobs", "print"
open_dataset = functools.cache(Dataset)  # its hashes are taken once for all runs


@dataclass
class Options(Config):
    """A run's settings, and how to go through the grid."""

    jobs: int = setting(1, "runs at a time, over the GPUs or the cores there are", low=1, free=True)
    print: bool = setting(False, "print the runs' commands, a line each, and stop", free=True)


def jobs_of(argv):
    """(the sweep's folder, its first run's Options, what sweep.json is to hold, {a run's folder:
    its words for train.py}) of a command line. Raises UserError."""
    fields = fields_of(Config).items()
    whole = (*OWN, "question")  # a comma in these is part of the value, as in tuples
    names = [name for name, f in fields if name not in whole and tuple not in types_of(f)]
    configs = load_grid(argv, "sweep.py", Options, names)
    first, ((path, *_), given) = configs[0], split_words(Options, argv)
    if len(configs) == 1:
        raise UserError("no setting has several values; try --seed 0,1,2")
    top = first.out_dir if "out_dir" in given else os.path.join("out", f"{first.name}-sweep")
    old = read_json(f"{top}/sweep.json")
    # the seed always, so that more of them may be added
    vary = {name for name in names if len({getattr(config, name) for config in configs}) > 1}
    vary = [name for name in names if name in vary.union({"seed"}, old.get("vary", ()))]

    # one dtype for all; printed commands may run on another machine, which then chooses
    device = torch.device("cpu") if first.print else choose_device(first, ranks_of({}))
    machine = Machine(device, torch.float32)
    dtype = old.get("config", {}).get("dtype", "auto")
    told = [name for name in given if name not in (*OWN, "dtype")] + ["dtype", "out_dir"]
    jobs, runs, steps = {}, {}, 0
    for config in configs:
        settings = {name: getattr(config, name) for name in vary}
        name = folder_name(settings)
        runs[name] = settings
        kept = dtype if config.dtype == "auto" else config.dtype
        config = config.changed(out_dir=os.path.join(top, name), dtype=kept)
        settled, _ = settle(config, machine)
        if not first.print:
            config = config.changed(dtype=settled.dtype)
        dtype = config.dtype
        train = open_dataset(config.dataset, config.data_dir).split("train")
        steps += batches_of(settled, train)[1]
        jobs[config.out_dir] = [path, *(f"--{n}={getattr(config, n)}" for n in told), "--resume"]
    sweep = dict(
        command=command("sweep.py", *argv),
        vary=vary,
        runs=runs,
        steps=steps,
        config=first.plain() | dict(dtype=dtype),
    )
    return top, first, sweep, jobs


def folder_name(settings):
    """A name for the folder of a run with these settings. One that no file system would take is
    cut short, and ends in a hash of the whole."""
    name = quote(",".join(f"{k}={value}" for k, value in settings.items()), safe="=,+")
    whole = hashlib.sha256(name.encode()).hexdigest()
    return name if len(name) < 200 else f"{name[:180]}-{whole[:8]}"


def claim(top, sweep):
    """Write sweep.json: the command, what varies, each run's values of that, the steps of all, and
    the other settings. Raises UserError, OSError."""
    os.makedirs(top, exist_ok=True)
    old = read_json(f"{top}/sweep.json")
    fixed = [name for name in (*report.SETTINGS, "dtype") if name not in sweep["vary"]]
    now = {"what varies": sweep["vary"]} | {name: sweep["config"][name] for name in fixed}
    was = now | {"what varies": old.get("vary", sweep["vary"])} | old.get("config", {})
    changed = [name for name in now if was[name] not in (now[name], "auto")]
    if changed:
        phrases = [f"{name} was {was[name]}, now {now[name]}" for name in changed]
        raise UserError(
            f"{top} holds another sweep, `{old['command']}`: {'; '.join(phrases)}; choose "
            "another --out_dir"
        )
    sweep["runs"] = old.get("runs", {}) | sweep["runs"]
    write_text(f"{top}/sweep.json", json.dumps(sweep, indent=2) + "\n")


def steps_done(folders):
    """How many steps the runs in some folders have taken."""
    return sum(SavedRun(folder).last["step"] for folder in folders)


def go(jobs, config, stop, total):
    """Run what is left, to its end or to a signal; the runs then save and stop, too. total: the
    steps of all."""
    waiting = [folder for folder in jobs if not SavedRun(folder).counts]
    running = {}  # {slot: (a run's folder, its process)}
    bar, looked = progress(total, "sweep", initial=steps_done(jobs), unit="step"), time.monotonic()
    while running or (waiting and not stop):
        # start what may run
        for slot in range(config.jobs):
            if waiting and slot not in running and not stop:
                folder = waiting.pop(0)
                running[slot] = folder, start(folder, jobs[folder], config, slot)
        time.sleep(0.5)
        if time.monotonic() - looked > 5:  # seldom, since it reads the runs' files
            bar.update(steps_done(jobs) - bar.n)
            looked = time.monotonic()

        # pass a signal on; a run that has had it takes no harm
        for _, process in running.values() if stop else ():
            process.terminate()

        # what has ended
        for slot, (folder, process) in list(running.items()):
            if process.poll() is not None:
                del running[slot]
                saved, left = SavedRun(folder), len(waiting) + len(running)
                why = read_bytes(f"{folder}/log.txt").decode(errors="replace").splitlines()[-1]
                state = saved.state if saved.counts else f"{saved.state}: {why}"
                bar.clear()
                print(f"{saved.name}: {state}; {left} to go", file=sys.stderr)
    bar.close()


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
    top, config, sweep, jobs = jobs_of(argv)
    steps = sweep["steps"]
    plan = f"sweep   {len(jobs)} runs of {steps:,} steps in all, in {top}; {config.jobs} at a time"
    if config.dry_run:
        return print(plan)
    stop = stop_signals()
    claim(top, sweep)
    if config.print:
        return print("\n".join(command("train.py", *words) for words in jobs.values()))
    print(plan, flush=True)
    go(jobs, config, stop, steps)
    done = sum(saved.counts for saved in map(SavedRun, jobs))
    if stop and done < len(jobs):
        print(f"stopped: {done} of {len(jobs)} runs are finished; resume: {sweep['command']}")
        return 1
    if done:
        report.main([top])
    return int(done < len(jobs))


if __name__ == "__main__":
    run(main, strict="--print" in sys.argv)
