#!/usr/bin/env bash
# The tests and measurements that need a GPU: bench/gpu.sh [tests] [speed] [continual]; all three by default.
#
#   tests     all tests with compiled kernels, sweeps of random inputs and edge cases, compute-sanitizer
#   speed     the suite, the 13B profile, launch configurations, ncu, checkpoints on disk, training steps
#   continual the long suite on SmolLM2-135M-Instruct, and the standard suite with all its parameters; they need
#             models/smollm2 and data/cl15
#
#   OUT=folder     for rows and logs (default bench/results/gpu; of a trial run: a new folder in /tmp)
#   PYTHON=python3 with torch, triton and rkif's dev dependencies
#   SECONDS_EACH   time limit of a part in seconds (540); stages that exceed it are cut short or skipped, and reported
#   DEVICE=cpu     a small trial run of the same stages on the CPU; its figures are not results, so its rows go to OUT only
#
# Every stage has its own time limit, and a failed stage does not stop the others. Output goes to OUT/log.txt, rows
# to bench/results, copies of the rows to OUT. The fastest launch configurations go to
# rkif_kernels/backends/triton/launches.json, a copy to OUT. The exit status is 0 if the tests, the sweeps and the
# sanitizer pass. The goals are printed, and do not affect it.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
SECONDS_EACH=${SECONDS_EACH:-540}
if [ "$DEVICE" = cuda ]; then
    OUT=${OUT:-bench/results/gpu}
    RESULTS=bench/results
else
    OUT=${OUT:-$(mktemp -d)}
    RESULTS=$OUT
fi
mkdir -p "$OUT"
export RKIF_BENCH_RESULTS=$RESULTS
unset TRITON_INTERPRET
declare -A STATUS
STAGES=()
DEADLINE=0

# stage NAME SECONDS COMMAND...: run a command, keep its output and its exit status.
stage() {
    local name=$1 limit=$2 start=$SECONDS left=$((DEADLINE - SECONDS)) log
    shift 2
    if ((left < 15)); then
        skip "$name" "no time left"
        return
    fi
    ((limit > left)) && limit=$left
    echo "== $name (at most $limit s): $*"
    log=$(mktemp)
    timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1
    STATUS[$name]=$?
    STAGES+=("$name")
    tail -n "${TAIL:-6}" "$log"
    echo "== $name: exit ${STATUS[$name]} after $((SECONDS - start)) s"
    { echo "== $name: $*"; cat "$log"; } >>"$OUT/log.txt"
    rm -f "$log"
}

# skip NAME REASON: skip a stage, and report it.
skip() {
    STATUS[$1]="skipped: $2"
    STAGES+=("$1")
    echo "== $1 skipped: $2"
}

bench() {
    "$PYTHON" -m bench "$@"
}

environment() {
    if [ "$DEVICE" = cuda ]; then
        nvidia-smi -L
        nvidia-smi --query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv
    fi
    "$PYTHON" - <<'PY'
import platform

import torch

from bench.common.machine import commit
from bench.common.rows import versions
from rkif_kernels.backends.choose import available

print(platform.platform(), versions(), "CUDA", torch.version.cuda, "commit", commit())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), available(torch.device("cuda")))
PY
}
export -f bench environment
export PYTHON DEVICE

# The imports of all stages are checked before the first stage starts.
"$PYTHON" - <<'PY' || exit 1
import importlib.util
import sys

needed = "torch triton numpy safetensors huggingface_hub filelock pydantic yaml rich typer matplotlib".split()
needed += "transformers peft accelerate datasets trl optuna pytest pytest_benchmark hypothesis".split()
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"bench/gpu.sh: error: {sys.executable} has no {', '.join(missing)}: pip install -e '.[dev]'")
PY

if [ "$DEVICE" = cuda ]; then
    if ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
        echo "bench/gpu.sh: error: PyTorch finds no CUDA device" >&2
        exit 1
    fi
    TRIED=(--write) TESTS=() SWEEP=40 LAYERS=40
    LARGE=(--dtype float32 --implementation rkif.triton) QUICK=(--quick)
    DISK=(--layers 12 --rounds 1) STEPS=(--batch-size 8 --length 256)
    LONG=(--suite long --config bench/configs/long-smollm2.yaml --jobs 6)
    FULL=(--suite standard --config bench/configs/standard-smollm2-full.yaml --order standard-1 --jobs 3)
    FULL+=(--method sequential --method replay --method recurrent_kif)
    NEEDED=models/smollm2 INTERPRETED=
else
    TRIED=(--shape smoke) TESTS=(--collect-only) SWEEP=5 LAYERS=1
    LARGE=(--quick --dtype float32 --shape smoke) QUICK=(--quick --shape smoke)
    DISK=(--layers 1 --rounds 1) STEPS=(--batch-size 1 --length 8 --rounds 1)
    LONG=(--suite standard --method sequential --order standard-1 --seed 7)
    FULL=(--suite standard --config bench/configs/standard-minilm.yaml --method per_task --order standard-1 --seed 7)
    NEEDED=models/minilm INTERPRETED=TRITON_INTERPRET=1
fi
WORKERS=()
"$PYTHON" -c 'import xdist' 2>/dev/null && WORKERS=(-n "$(($(nproc) / 2 + 1))")
KERNELS=(tests/kernels/test_scores.py tests/kernels/test_merge.py tests/kernels/test_counting.py tests/kernels/test_ops.py tests/kernels/test_single_pass.py tests/kernels/test_launches.py)
SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
NCU=$(command -v ncu || ls /usr/local/cuda/bin/ncu 2>/dev/null)

tests() {
    stage kernel-tests 200 "$PYTHON" -m pytest -x -q "${WORKERS[@]}" "${TESTS[@]}" "${KERNELS[@]}"
    stage sweep $((SWEEP + 30)) bash -c "bench sweep --device $DEVICE --seconds $SWEEP"
    if [ "$DEVICE" = cuda ]; then
        stage sweep-graphs $((SWEEP + 30)) bash -c "bench sweep --device cuda --backend triton --graphs --seconds $SWEEP"
    else
        skip sweep-graphs "graphs need CUDA"
    fi
    for tool in memcheck racecheck initcheck; do
        if [ -z "$SANITIZER" ]; then
            skip "$tool" "no compute-sanitizer found"
        else
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 75 "$SANITIZER" --tool "$tool" --error-exitcode 7 \
                "$PYTHON" -m bench sweep --device cuda --backend triton --cases 2 --seed 1
        fi
    done
    stage other-tests 400 "$PYTHON" -m pytest -q --continue-on-collection-errors "${WORKERS[@]}" "${TESTS[@]}" tests \
        "${KERNELS[@]/#/--ignore=}"
}

speed() {
    TAIL=3 stage suite-large 140 bash -c "bench run --device $DEVICE ${LARGE[*]}"
    TAIL=30 stage profile-13b 60 bash -c "bench profile-13b --device $DEVICE --layers $LAYERS"
    TAIL=30 stage profile-13b-bf16 60 bash -c "bench profile-13b --device $DEVICE --layers $LAYERS --dtype bfloat16"
    if [ -z "$NCU" ]; then
        skip ncu "no ncu found"
    else
        # The number of launches is enough for one whole call of each operation. Then ncu ends the process.
        for what in observe:2 threshold:10 fuse:30; do
            TAIL=60 stage "ncu-${what%:*}" 40 "$NCU" --target-processes all --clock-control none --kill yes \
                --kernel-name 'regex:^_.*_kernel$' --launch-count "${what#*:}" --section SpeedOfLight \
                --section MemoryWorkloadAnalysis --section Occupancy --section WarpStateStats --section LaunchStats \
                "$PYTHON" -m bench run --device cuda --only "${what%:*}" --shape one-64Mi --dtype float32 \
                --implementation rkif.triton --quick --out "$(mktemp -d)/rows.jsonl"
        done
    fi
    TAIL=40 stage overhead 75 bash -c "bench overhead --device $DEVICE ${STEPS[*]}"
    TAIL=12 stage checkpoints 90 bash -c "bench checkpoints --device $DEVICE --folder $(mktemp -d) ${DISK[*]}"
    TAIL=3 stage suite-quick 120 bash -c "bench run --device $DEVICE ${QUICK[*]}"
    # The last stage: it changes the launch configurations.
    TAIL=40 stage launches 100 bash -c "$INTERPRETED bench launches --device $DEVICE ${TRIED[*]}"
    cp rkif_kernels/backends/triton/launches.json "$OUT" 2>/dev/null
}

continual() {
    if [ ! -d "$NEEDED" ] || [ ! -d data/cl15 ]; then
        skip continual "no $NEEDED or no data/cl15"
        return
    fi
    # Started again in the same folder, both continue interrupted runs.
    stage continual 370 bash -c "bench continual ${LONG[*]}"
    stage continual-full 170 bash -c "bench continual ${FULL[*]}"
}

TAIL=12 DEADLINE=$((SECONDS + 60)) stage environment 60 bash -c environment
for part in "${@:-tests speed continual}"; do
    for name in $part; do
        DEADLINE=$((SECONDS + SECONDS_EACH))
        case $name in
            tests | speed | continual) "$name" ;;
            *) echo "bench/gpu.sh: error: no such part: $name (tests, speed, continual)" >&2; exit 2 ;;
        esac
        cp "$RESULTS"/{gpu,checkpoints,overhead,launches,continual}.jsonl "$OUT" 2>/dev/null
    done
done

echo
if [ -f "$RESULTS/gpu.jsonl" ]; then
    bench goals "$RESULTS/gpu.jsonl"
    bench table "$RESULTS/gpu.jsonl" >>"$OUT/log.txt"
fi
for name in "${STAGES[@]}"; do
    printf '%-18s %s\n' "$name" "${STATUS[$name]/#0/ok}"
done | tee "$OUT/stages.txt"
echo "took $SECONDS s; rows and log in $OUT"
# Tests, sweeps and sanitizer must pass; only the sanitizer and the sweep of graphs may be skipped.
! grep -E '^([a-z]+-tests|sweep(-graphs)?|memcheck|racecheck|initcheck) ' "$OUT/stages.txt" | grep -qvE ' (ok|skipped: (no compute|graphs).*)$'
