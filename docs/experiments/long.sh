#!/usr/bin/env bash
# One experiment at its real size.
#
#     docs/experiments/long.sh CONFIG EPOCHS [--setting value ...]
#
# It trains on 1.05e8 tokens of English Wikipedia articles an epoch, not WikiText-103's own training
# text, and is measured on WikiText's validation (data set wikipedia, see datasets.py). The run is
# out/long/CONFIG-EPOCHS, and the same command goes on with it. Settings given here win over those
# below. After RUN_SECONDS (no limit where that is not given) it is stopped, with a checkpoint and
# exit code 124. Two commands side by side save time: one compiles while the other trains.
#
# One epoch of each, with what tune.sh found best: experiment 6's in its configs, the notebook's
# side, which stays as it is written, on the command line. These were run (docs/experiments.md).
#
#     docs/experiments/long.sh exp6 1
#     docs/experiments/long.sh exp6_small 1
#     docs/experiments/long.sh exp5 1 --dropout 0 --learning_rate 1e-3
#     docs/experiments/long.sh exp3 1 --dropout 0 --learning_rate 4e-3
#
# These were not; for BEST, tune.sh has runs that are left.
#
#     docs/experiments/long.sh exp6 5
#     docs/experiments/long.sh exp6_small 10
#     docs/experiments/long.sh exp5 5 --dropout 0 --learning_rate BEST
#     docs/experiments/long.sh exp3 10 --dropout 0 --learning_rate BEST
#     docs/experiments/long.sh exp2 10
#     docs/experiments/long.sh exp4 15
#
# What is kept: python -m docs.experiments.collect out/long/*/
# From another machine it comes as one tar of figures, and the weights in pieces of 16 MiB:
#
#     python -m docs.experiments.collect out/long/*/ --to out/kept --weights
#     tar -czf figures.tar.gz -C out/kept --exclude=best.pt .
#     (cd out/kept && tar -cf - */best.pt) | split -d -b 16M - weights.tar.
#     cat weights.tar.* | tar -xf -    # there
set -euo pipefail
cd "$(dirname "$0")/../.."

if (($# < 2)); then
    echo "usage: docs/experiments/long.sh CONFIG EPOCHS [--setting value ...]" >&2
    exit 2
fi
config=$1
epochs=$2
shift 2

# SIGTERM ends a run after its step. 0 seconds are no limit. A checkpoint is 12 bytes a parameter,
# so that it is written seldom.
exec timeout --foreground --kill-after=60 "${RUN_SECONDS:-0}" \
    "${PYTHON:-python}" train.py "config/$config.py" --dataset wikipedia --epochs "$epochs" \
    --dtype bfloat16 --log_interval 50 --save_interval 2000 \
    --out_dir "out/long/$config-$epochs" --resume "$@"
