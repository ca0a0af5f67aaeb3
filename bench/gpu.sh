#!/usr/bin/env bash
# Everything that needs a GPU, in one go: bench/gpu.sh, at most 8 minutes.
#
#   OUT=folder     for logs and rows (default bench/results/gpu)
#   PYTHON=python  with torch, triton and rkif's dev dependencies
#   TOTAL=480      seconds for everything: late stages are cut short or left out, and that is said
#
# Every stage has a limit of its own and a log of its own; a stage that fails stops no other. The exit status
# is that of the correctness: tests, sweep and sanitizer. The goals are printed, not enforced.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
PYTHON=${PYTHON:-python}
TOTAL=${TOTAL:-480}
ROWS=$OUT/gpu.jsonl
mkdir -p "$OUT"
unset TRITON_INTERPRET
declare -A STATUS
STAGES=()

# stage NAME SECONDS COMMAND...: run it, keep its output and its exit status.
stage() {
    local name=$1 limit=$2 start=$SECONDS left=$((TOTAL - SECONDS))
    shift 2
    if ((left < 10)); then
        skip "$name" "no time left"
        return
    fi
    ((limit > left)) && limit=$left
    echo "== $name (at most $limit s): $*"
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    STATUS[$name]=$?
    STAGES+=("$name")
    tail -n "${TAIL:-6}" "$OUT/$name.log"
    echo "== $name: exit ${STATUS[$name]} after $((SECONDS - start)) s"
}

# skip NAME REASON: leave a stage out, and say so.
skip() {
    STATUS[$1]="skipped: $2"
    STAGES+=("$1")
    echo "== $1 skipped: $2"
}

environment() {
    nvidia-smi -L
    nvidia-smi --query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv
    "$PYTHON" - <<'PY'
import platform

import torch

from bench.machine import commit
from bench.rows import versions
from rkif_kernels.backend import available

print(platform.platform(), versions(), "CUDA", torch.version.cuda, "commit", commit())
print(torch.cuda.get_device_properties(0), available(torch.device("cuda")))
raise SystemExit(not torch.cuda.is_available())
PY
}
export -f environment
export PYTHON

if ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh: error: PyTorch finds no CUDA device" >&2
    exit 1
fi
WORKERS=()
"$PYTHON" -c 'import xdist' 2>/dev/null && WORKERS=(-n 6)

TAIL=12 stage environment 60 bash -c environment
stage kernel-tests 150 "$PYTHON" -m pytest -x -q "${WORKERS[@]}" tests/test_kernels.py tests/test_counting.py tests/test_ops.py \
    tests/test_single_pass.py tests/test_launches.py
stage sweep 90 "$PYTHON" -m bench sweep --device cuda --seconds 60
TAIL=3 stage suite-large 110 "$PYTHON" -m bench run --device cuda --dtype float32 --implementation rkif. --out "$ROWS"
TAIL=3 stage suite-quick 120 "$PYTHON" -m bench run --device cuda --quick --out "$ROWS"
TAIL=30 stage profile-13b 60 "$PYTHON" -m bench profile-13b --device cuda --layers 40 --out "$ROWS"
TAIL=30 stage profile-13b-bf16 60 "$PYTHON" -m bench profile-13b --device cuda --layers 40 --dtype bfloat16 --out "$ROWS"

SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
for tool in memcheck racecheck; do
    if [ -z "$SANITIZER" ]; then
        skip "$tool" "no compute-sanitizer here"
    else
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 45 "$SANITIZER" --tool "$tool" --error-exitcode 7 \
            "$PYTHON" -m bench sweep --device cuda --backend triton --cases 3 --seed 1
    fi
done
stage other-tests 120 "$PYTHON" -m pytest -q "${WORKERS[@]}" tests/test_fuser.py tests/test_fuse.py tests/test_bench.py tests/test_checkpoint_fuse.py tests/test_less_memory.py

# The long suite, where its model and tasks were brought along; it goes on where it was cut off.
if [ -d models/smollm2 ] && [ -d data/cl15 ]; then
    for suite in long standard; do
        stage "continual-$suite" "${CONTINUAL:-240}" "$PYTHON" -m bench continual --suite "$suite" \
            --config "bench/configs/$suite-smollm2.yaml" --jobs 4 --out "$OUT/continual"
    done
    cp bench/results/continual.jsonl "$OUT/"
else
    skip continual "no models/smollm2 or no data/cl15"
fi

echo
if [ -f "$ROWS" ]; then
    "$PYTHON" -m bench goals "$ROWS" | tee "$OUT/goals.txt"
    "$PYTHON" -m bench table "$ROWS" >"$OUT/table.txt"
fi
for name in "${STAGES[@]}"; do
    printf '%-18s %s\n' "$name" "${STATUS[$name]/#0/ok}"
done | tee "$OUT/stages.txt"
echo "took $SECONDS s; logs and rows in $OUT"
# What says that the kernels are right must have run and passed; the sanitizer may be missing, not complain.
for name in kernel-tests sweep; do
    grep -qE "^$name +ok$" "$OUT/stages.txt" || exit 1
done
! grep -qE '^([a-z]+-tests|memcheck|racecheck) +[1-9]' "$OUT/stages.txt"
