#!/usr/bin/env bash
# What a GPU computes, how exactly and how fast, in at most eight minutes (benchmarks/README.md):
#
#     PYTHON=python3.11 OUT=results bash benchmarks/gpu.sh          an interpreter that has tensorflow[and-cuda]
#     WHEELS=folder OUT=results bash benchmarks/gpu.sh              first installs all wheels of a folder, from nowhere else
#     bash benchmarks/gpu.sh --cpu                                  small sizes on the processor: to see that it works
#
# Writes OUT/gpu.json (every number) and OUT/gpu.md, which is printed. A step that fails or takes too long is left out.
set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
CPU=()
LONGEST=465 # seconds of all steps
PATIENCE=1
case "${1:-}" in
    "") ;;
    --cpu) CPU=(--cpu) LONGEST=3600 PATIENCE=8 ;; # a processor may be slow, and busy
    *) echo "usage: [PYTHON=…] [WHEELS=…] [OUT=…] bash benchmarks/gpu.sh [--cpu]" >&2; exit 2 ;;
esac
mkdir -p "$OUT" || exit 2
rm -f "$OUT"/*.json "$OUT"/*.npz "$OUT"/nvidia-smi.txt
failed=0

# step SECONDS NAME WORD…: one step, its messages in OUT/NAME.log
step() {
    local limit=$(($1 * PATIENCE)) name=$2 start=$SECONDS status=0
    shift 2
    [ "$limit" -le $((LONGEST - SECONDS)) ] || limit=$((LONGEST - SECONDS))
    if [ "$limit" -lt 5 ]; then
        failed=1
        echo "$name: left out, no time is left" >&2
        return
    fi
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
    if [ "$status" -eq 0 ]; then
        echo "$name: $((SECONDS - start)) s" >&2
    else
        failed=1
        echo "$name: failed with status $status after $((SECONDS - start)) s (124: too long), see $OUT/$name.log" >&2
        tail -n 3 "$OUT/$name.log" >&2
    fi
}

if [ -n "${WHEELS:-}" ]; then
    step 30 venv "$PYTHON" -m venv "$OUT/venv"
    PYTHON=$OUT/venv/bin/python
    step 150 wheels "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" "$WHEELS"/*.whl
fi
if [ "${#CPU[@]}" -eq 0 ]; then
    timeout 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$OUT/nvidia-smi.txt" \
        || { echo "no NVIDIA GPU answers here (nvidia-smi); --cpu computes small sizes on the processor" >&2; exit 1; }
fi

gpu() { # gpu SECONDS NAME STEP OPTION…
    local limit=$1 name=$2 what=$3
    shift 3
    step "$limit" "$name" "$PYTHON" benchmarks/gpu.py "$what" "$OUT" ${CPU[@]+"${CPU[@]}"} "$@"
}

gpu 40 about about
gpu 60 exact exact
gpu 75 parity parity
gpu 70 rows rows
gpu 50 rows_bfloat16 rows --precision bfloat16
gpu 40 twins twins
if [ "${#CPU[@]}" -eq 0 ]; then # no processor has TF32
    gpu 55 parity_tf32 parity --tf32
    gpu 50 rows_tf32 rows --tf32
    gpu 30 twins_tf32 twins --tf32
fi
timeout 15 "$PYTHON" benchmarks/gpu.py report "$OUT" || failed=1
echo "$SECONDS s; every number: $OUT/gpu.json" >&2
exit "$failed"
