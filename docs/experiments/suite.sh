#!/usr/bin/env bash
# Speed on one GPU: experiments 5, 3, 1, 6 and 6 small, the first three beside nanoGPT.
#
#     docs/experiments/suite.sh NANOGPT [--setting value ...]
#
# NANOGPT is a checkout of it. Each part may take an equal share of the time that is left, and prints
# as it ends. Settings given here win over those below.
#
#     ALL_SECONDS=235   for all of them
#     PYTHON=python
set -euo pipefail

if (($# < 1)); then
    echo "usage: docs/experiments/suite.sh NANOGPT [--setting value ...]" >&2
    exit 2
fi
peer=$(realpath "$1")
shift
cd "$(dirname "$0")/../.."

parts=(exp5 exp3 exp1 exp6 exp6_small)
left=${#parts[@]}
for config in "${parts[@]}"; do
    limit=$(((${ALL_SECONDS:-235} - SECONDS) / left))
    left=$((left - 1))
    script=(bench.py "config/$config.py")
    if [[ $config != exp6* ]]; then
        script=(docs/experiments/baseline.py "config/$config.py" --peer "$peer")
    fi
    timeout "$limit" "${PYTHON:-python}" "${script[@]}" --steps 40 \
        --dtype bfloat16 "$@" || echo "$config: exit code $?"
done
