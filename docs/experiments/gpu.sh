#!/usr/bin/env bash
# What only a GPU can show, part by part, on a machine with one GPU.
#
#     docs/experiments/gpu.sh PART [--setting value ...]
#
#     check     240 s   the tests of `make test-cuda`
#     speed     420 s   ms per step of each config, beside nanoGPT's; tokens/s of sampling
#     stream    120 s   an epoch of experiment 5 with its residual stream in bfloat16
#     baseline  540 s   an epoch of experiments 5, 7, 6, 3, 6_small and 7_small, at their best rates
#     long     4200 s   the long runs
#     collect           out/gpu.tar.gz: all that the others left but weights
#     all               these in turn
#
# A part ends after so many seconds, with a checkpoint of the run that it was in. The same command
# goes on there: what is done has its output in out/gpu/PART/NAME.txt, which is shown instead.
# Remove that file to do it again. The exit code is 1 while something is missing. Settings given
# here go to every run and win over those below.
#
#     LIMIT=570      seconds, instead of the part's own
#     PEER=nanoGPT   a checkout of nanoGPT; without it speed times ours alone
#     PYTHON=python3
#     TOY=1          all of it at toy size on a CPU, to see that it runs
#
# Data sets are datasets.py's. Settings are compared on choose, since WikiText's validation is
# looked at for the final runs alone. docs/experiments.md has the results.
# shellcheck disable=SC2329 # functions are called by their names
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}
PEER=${PEER:-nanoGPT}
export PYTHONUNBUFFERED=1
parts=(check speed stream baseline long collect)
declare -A limits=([check]=240 [speed]=420 [stream]=120 [baseline]=540 [long]=4200 [collect]=60)

case ${1:-} in
    check | speed | stream | baseline | long | collect) parts=("$1") ;;
    all) ;;
    *)
        echo "usage: docs/experiments/gpu.sh PART [--setting value ...]: ${parts[*]} or all" >&2
        exit 2
        ;;
esac
shift

steps=40 tokens=500
extra=("$@")
if [[ -n ${TOY:-} ]]; then
    steps=2 tokens=20
    extra=(--device cpu --dtype float32 --batch_size 4 --max_seq_len 32 --d_model 16 --num_heads 2
        --d_ff 64 --num_layers 2 --max_steps 6 "$@")
fi

# --- how it is done

missing=0
trap 'exit 130' INT TERM # or else the next run would begin

timed() { # COMMAND ...: at its part's end it gets SIGTERM, after which a run saves and stops
    local left=$((deadline - SECONDS)) # SECONDS: since this script began
    ((left > 0)) || return 124
    timeout --foreground --kill-after=60 "$left" "$@"
}

once() { # NAME COMMAND ...: unless it is done; its output is out/gpu/NAME.txt
    local name=$1 log=out/gpu/$1.txt code=0
    shift
    echo "== $name"
    if [[ -e $log ]]; then
        cat "$log"
        return
    fi
    mkdir -p "$(dirname "$log")"
    echo "$*" >"$log.part"
    timed "$@" 2>&1 | tee -ia "$log.part" || code=$?
    if ((code == 0)); then
        mv "$log.part" "$log"
        return
    fi
    echo "$name is missing: exit code $code (124: no time left)"
    missing=1
    return 1
}

# torch chooses some kernels by timing them, and its cache keeps the choice: a compilation must have
# the GPU to itself.
compile() { # CONFIG: not in out/gpu, since torch's cache stays behind on this machine, too
    [[ ! -e out/compile/$1/final.json ]] || return 0
    timed "$PYTHON" train.py "config/$1.py" --dataset choose --dtype bfloat16 --dropout 0 \
        --max_steps 20 --sample_prompts "()" --out_dir "out/compile/$1" --resume "${extra[@]}"
}

sweep() { # NAME CONFIG --setting value,value ...
    local name=$1 config=$2
    shift 2
    [[ -e out/gpu/$name.txt ]] || compile "$config"
    once "$name" "$PYTHON" sweep.py "config/$config.py" --dataset choose --dtype bfloat16 \
        --dropout 0 --max_steps 1000 --log_interval 50 \
        --sample_prompts "()" --out_dir "out/gpu/$name" "$@" "${extra[@]}" && return
    [[ ! -d out/gpu/$name ]] || "$PYTHON" report.py "out/gpu/$name" # what there is
    return 1
}

train() { # NAME CONFIG [--setting value ...]: a run of full length, and text from it
    local name=long/$1 config=$2 data=wikipedia script=(train.py)
    shift 2
    [[ $name != *-stream ]] || script=(docs/experiments/stream.py train.py)
    [[ $config != exp7* ]] || data=wikipedia-8192
    once "$name" "$PYTHON" "${script[@]}" "config/$config.py" --dataset "$data" \
        --dtype bfloat16 --log_interval 50 --out_dir "out/gpu/$name" --resume "$@" \
        "${extra[@]}" || return
    [[ $name == *-stream ]] || once "$name-text" "$PYTHON" sample.py --out_dir "out/gpu/$name" \
        --start "The cat sat on the" --max_new_tokens "$tokens"
}

best() { # FOLDER ...: the first setting of that whose run ended with the fewest bits per byte
    "$PYTHON" -c '
import json, pathlib, sys
ends = [path for folder in sys.argv[1:] for path in pathlib.Path(folder).glob("final.json")]
bits = lambda path: json.loads(path.read_text())["val"]["bits_per_byte"]
print(min(ends, key=bits).parent.name.partition(",")[0])' "$@"
}

# --- what is done

check() {
    once check/all env TEST_CUDA=1 "$PYTHON" -m pytest -n 6 -vv --durations 5 tests/test_cuda.py
}

speed() {
    local config dropout words
    for config in exp5 exp3 exp6 exp7 exp1 exp6_small exp7_small; do
        for dropout in 0 0.1; do
            [[ $config-$dropout != exp[67]*-0.1 ]] || continue # nanoGPT has no such block
            words=(bench.py "config/$config.py")
            if [[ $config != exp[67]* && -e $PEER/model.py ]]; then
                words=(docs/experiments/baseline.py "config/$config.py" --peer "$PEER")
            fi
            once "speed/$config-$dropout" "$PYTHON" "${words[@]}" --dtype bfloat16 \
                --dropout "$dropout" --steps "$steps" "${extra[@]}"
        done
        [[ $config == exp3 ]] || continue # the most wanted figures come first
        once speed/exp5-stream "$PYTHON" docs/experiments/stream.py bench.py config/exp5.py \
            --dtype bfloat16 --dropout 0 --steps "$steps" "${extra[@]}"
        [[ -e out/gpu/speed/sampling.txt ]] || compile exp5
        once speed/sampling "$PYTHON" sample.py --out_dir out/compile/exp5 \
            --start "The cat sat on the" --max_new_tokens "$tokens"
    done
}

# It lands where the loss stays within 0.005 of exp5-1's.
stream() {
    train exp5-stream exp5 --epochs 1 --dropout 0 --learning_rate 4e-3
}

# What README's table holds: one epoch each, at the best rates.
baseline() {
    train exp5-1 exp5 --epochs 1 --dropout 0 --learning_rate 4e-3
    train exp7-1 exp7 --epochs 1
    train exp6-1 exp6 --epochs 1
    train exp3-1 exp3 --epochs 1 --dropout 0 --learning_rate 4e-3
    train exp6_small-1 exp6_small --epochs 1
    train exp7_small-1 exp7_small --epochs 1
}

# A run must end while this machine is held, since its weights stay behind. On an H100 experiment 6
# takes 72 s an epoch, exp6_small 45 s, experiment 4 about 50 s, experiment 2 30 s with its
# evaluation, experiment 1 1.6 s.
long() {
    train exp6_small-10 exp6_small --epochs 10
    train exp1-300 exp1 --dataset wikipedia-2 --epochs 300
    train exp2-10 exp2 --epochs 10
    train exp4-9 exp4 --epochs 9
    sweep long/decay exp6_small --weight_decay 0.03,0.1,0.3 --max_steps 0 --epochs 10 &&
        train exp6-15 exp6 --epochs 15 "--$(best out/gpu/long/decay/*/)"
    train exp6-5 exp6 --epochs 5
}

collect() {
    if [[ ! -d out/gpu ]]; then
        echo "nothing is measured yet; run another part first" >&2
        missing=1
        return
    fi
    tar -czf out/gpu.tar.gz --exclude="*.pt" --exclude="*.pt.*" -C out gpu
    du -h out/gpu.tar.gz
}

for part in "${parts[@]}"; do
    deadline=$((SECONDS + ${LIMIT:-${limits[$part]}}))
    "$part" || true # what is missing has been told
done
exit "$missing"
