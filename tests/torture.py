"""Breaks the trainer on purpose and counts what is lost: `make torture`, fifteen minutes at most.

python tests/torture.py [--kills 110] [--seed N]

Whole commands, real SIGKILLs, a real full disk. Prints a table: tried, survived, lost; exit code 1
if anything is lost.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import helpers
from helpers import RANKS, ROOT, assert_the_same_run, started, step_of

from lab.folder import load_checkpoint

TRAIN = [sys.executable, str(ROOT / "train.py")]
LIMIT = 14 * 60  # seconds, then what is left is not tried
CHAIN = 10  # kills of one run


def trains(*words, code=0, launch=()):
    """Run train.py with words; its output. AssertionError for another exit code."""
    command = [sys.executable, *launch, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def kill_at_random(command, folder, chances):
    """Start a run again and again and kill it up to a quarter of a second after its first step,
    every other time when the next save has begun. How many kills hit a save, and the worst count
    of steps that one cost."""
    amid, worst, reached, part = 0, 0, 0, Path(folder, "last.pt.part")
    begins = "going on from", "no checkpoint in"
    for i in range(CHAIN):
        with started(command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE) as child:
            line = next(line for line in child.stdout if line.startswith(begins))
            worst = max(worst, reached - int(line.split()[-1].replace(",", "")))
            helpers.until(lambda: step_of(folder) > reached, child)  # noqa: B023
            time.sleep(chances.random() / 4)  # no synchronisation: the moment is to be any
            if i % 2:
                helpers.until(part.exists, child, pause=0.0005)  # half of a save's time
            assert child.poll() is None, "the run ended before it could be killed"
            child.kill()
            child.wait()
        amid += part.exists()
        reached = step_of(folder)
    return amid, worst


def kills(count, chances, deadline):
    """Runs killed again and again, which must end as the undisturbed run: (tried, survived,
    lost, amid saves)."""
    words = "tiny.py --epochs 99 --max_steps 600 --eval_interval 200 --save_interval 1".split()
    trains(*words, "--out_dir", "out/whole")

    def chain(i):
        if time.monotonic() > deadline:
            return 0, 0, 0, 0
        command = [*words, "--out_dir", f"out/cut{i}", "--resume"]
        try:
            moments = random.Random(chances + i)
            amid, worst = kill_at_random([*TRAIN, *command], f"out/cut{i}", moments)
            trains(*command)
            assert_the_same_run("out/whole", f"out/cut{i}")
            assert worst <= 1, f"a kill cost {worst} steps"
        except AssertionError as error:
            print(f"chain {i}: {str(error)[-300:]}")
            return CHAIN, 0, CHAIN, 0
        shutil.rmtree(f"out/cut{i}")
        return CHAIN, CHAIN, 0, amid

    with ThreadPoolExecutor(2) as pool:
        results = pool.map(chain, range(-(-count // CHAIN)))
        return [sum(column) for column in zip(*results, strict=True)]


def ranks_killed(count, chances):
    """SIGKILLs of one of two ranks, each of which ends the run, and after each --resume: (tried,
    survived, lost)."""
    words = "tiny.py --max_steps 1000 --epochs 99 --eval_interval 100 --save_interval 5".split()
    words += ["--out_dir", "out/ranks", "--resume"]
    killed = 0
    try:
        for _ in range(count):
            step = step_of("out/ranks")
            command = [sys.executable, *RANKS, str(ROOT / "train.py"), *words]
            with started(command, stdout=subprocess.DEVNULL) as child:
                helpers.until(lambda step=step: step_of("out/ranks") > step + 50, child)
                os.kill(helpers.children(child.pid)[chances.randrange(2)], 9)
                killed += 1
                errors = child.communicate(timeout=120)[1]
            assert child.returncode == 1, errors
        trains(*words, launch=RANKS)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        print(f"ranks: {str(error)[-2000:]}")
        return killed, 0, killed
    return killed, killed, 0


def full_disks():
    """Runs into a tmpfs too small for three checkpoints, resumed when it has grown: (tried,
    survived, lost)."""
    survived, sizes = 0, (3, 7, 13, 16)
    words = ["tiny.py", "--max_steps", "30", "--eval_interval", "10", "--save_interval", "4"]
    trains(*words, "--out_dir", "out/roomy")
    for size in sizes:
        folder = Path(f"out/small{size}")
        folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder)]
        if subprocess.run(mount).returncode:
            print("a full disk: not tried, since mounting a tmpfs is not allowed here")
            return 0, 0, 0
        try:
            done = trains(*words, "--out_dir", str(folder), code=1)
            assert "the run goes on" in done.stderr and "Traceback" not in done.stderr, done.stderr
            for path in folder.glob("*.pt"):
                load_checkpoint(path)
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
            trains(*words, "--out_dir", str(folder), "--resume")
            assert_the_same_run("out/roomy", str(folder), curves=False)
            survived += 1
        except AssertionError as error:
            print(f"a disk of {size} MB: {str(error)[-500:]}")
        finally:
            subprocess.run(["umount", str(folder)])
    return len(sizes), survived, len(sizes) - survived


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=110)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    args = parser.parse_args()
    deadline, rows = time.monotonic() + LIMIT, []
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        # full_disks() counts on checkpoints of several MB
        helpers.make_dataset(Path("data"), vocab_size=50257)
        Path("tiny.py").write_text(helpers.TINY)
        rows.append(("full disk", *full_disks()))
        rows.append(("rank killed under torchrun", *ranks_killed(5, random.Random(args.seed))))
        *row, amid = kills(args.kills, args.seed, deadline)
        rows.append((f"SIGKILL, {amid} of them amid a save", *row))
        os.chdir(ROOT)
    print(f"\n{'':36} {'tried':>8} {'survived':>8} {'lost':>8}")
    for name, *numbers in rows:
        print(f"{name:36} " + " ".join(f"{number:8}" for number in numbers))
    return int(any(lost for *_, lost in rows))


if __name__ == "__main__":
    sys.exit(main())
