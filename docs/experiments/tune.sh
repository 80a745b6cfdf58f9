#!/usr/bin/env bash
# Which settings are best: 19 runs of 1,000 steps of 32 x 512 tokens, each schedule ending there.
#
#     docs/experiments/tune.sh [--setting value ...]
#
# They train on 1.05e8 tokens of English Wikipedia articles, not WikiText-103's own training text,
# and are compared on other articles (data set choose, see datasets.py): WikiText's validation is
# looked at for the final runs alone. Of rates within a standard error take the lowest, since long
# runs want lower ones. Settings given here go to every run and win over those below.
#
#     JOBS=2            runs at a time: one compiles while another trains
#     RUN_SECONDS=300   a run that takes longer is stopped, with a checkpoint
#     ALL_SECONDS=3600  all runs are stopped so, and no more begun
#
# Each result is printed as it comes, and a table of all at the end; the exit code is 1 while runs
# are missing. Ctrl-C stops the runs with a checkpoint, too. The same command goes on where they
# were stopped; those that are finished stay as they are.
set -euo pipefail
cd "$(dirname "$0")/../.."

JOBS=${JOBS:-2}
RUN_SECONDS=${RUN_SECONDS:-300}
ALL_SECONDS=${ALL_SECONDS:-3600}
mkdir -p out/tune

one() { # NAME CONFIG [--setting value ...]
    local name=$1 config=$2
    shift 2
    local log=out/tune/$name.log
    local seconds=$((ALL_SECONDS - SECONDS)) # SECONDS: since this script began
    if ((seconds <= 0)); then
        echo "$name: no time left"
        return
    fi
    if ((seconds > RUN_SECONDS)); then
        seconds=$RUN_SECONDS
    fi
    # SIGTERM ends a run after its step, with a checkpoint
    timeout --foreground --kill-after=30 "$seconds" \
        "${PYTHON:-python}" train.py "config/$config.py" --dataset choose --max_steps 1000 \
        --dtype bfloat16 --log_interval 50 --save_interval 0 \
        --sample_prompts "()" --out_dir "out/tune/$name" --resume "$@" >>"$log" 2>&1 || true
    if [[ -e out/tune/$name/final.json ]]; then
        echo "$name: $(grep '^val ' "$log" | tail -n 1)"
    else
        echo "$name: $(tail -n 1 "$log" | cut -d ";" -f 1) ($log)"
    fi
}

# A run a line: name, config, settings. The first of each config compiles, and torch's cache serves
# the others. A compilation chooses some kernels by timing them: on a busy GPU it can choose badly.
runs=0
while read -r name config settings; do
    runs=$((runs + 1))
    while (($(jobs -rp | wc -l) >= JOBS)); do
        wait -n || true
    done
    # shellcheck disable=SC2086 # settings are several words
    one "$name" "$config" $settings "$@" &
done <<'END'
small            exp6_small  --weight_decay 0.1
exp3-6e-4        exp3        --dropout 0 --learning_rate 6e-4
exp6-3e-3        exp6        --weight_decay 0.1 --learning_rate 3e-3
exp5-1e-3        exp5        --dropout 0 --learning_rate 1e-3
small-4e-3       exp6_small  --weight_decay 0.1 --learning_rate 4e-3
small-1.6e-2     exp6_small  --weight_decay 0.1 --learning_rate 1.6e-2
small-muon-0.01  exp6_small  --weight_decay 0.1 --muon_learning_rate 0.01
small-muon-0.04  exp6_small  --weight_decay 0.1 --muon_learning_rate 0.04
small-decay-0.03 exp6_small  --weight_decay 0.03
small-decay-0.3  exp6_small  --weight_decay 0.3
small-dropout    exp6_small  --weight_decay 0.1 --dropout 0.1
exp3-1e-3        exp3        --dropout 0 --learning_rate 1e-3
exp3-2e-3        exp3        --dropout 0 --learning_rate 2e-3
exp3-3e-3        exp3        --dropout 0 --learning_rate 3e-3
exp3-4e-3        exp3        --dropout 0 --learning_rate 4e-3
exp6-6e-3        exp6        --weight_decay 0.1 --learning_rate 6e-3
exp6-1.2e-2      exp6        --weight_decay 0.1 --learning_rate 1.2e-2
exp5-2e-3        exp5        --dropout 0 --learning_rate 2e-3
exp5-4e-3        exp5        --dropout 0 --learning_rate 4e-3
END
wait

finished=$(find out/tune -name final.json | wc -l)
echo "$finished of $runs runs are finished"
"${PYTHON:-python}" report.py out/tune/*/ --recorded False --picture out/tune.png
((finished == runs)) # or exit code 1
