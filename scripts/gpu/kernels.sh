#!/usr/bin/env bash
# Every kernel that runs on this GPU: conformance, sanitizer, tuned launches, speeds.
#
#   scripts/gpu/kernels.sh OUT [STEP ...]      steps: probe conformance sanitize tune goals grid (all if left out)
#
# Records stream into the folder OUT as they come; a step that is run again goes on where its records end.
# PYTHON names the interpreter (python3), with lcab_plugin and pytest importable from it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ $# -ge 1 ]] || { echo "usage: scripts/gpu/kernels.sh OUT [probe conformance sanitize tune goals grid]" >&2; exit 2; }
OUT="$1"; shift
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
MASKS=causal,full,full_document,causal_document,sliding_window,sliding_window_causal,share_question
MASKS+=,causal_blockwise,prefix_lm_causal,prefix_lm_document,global_sliding_window,block_causal_document

lcab() { "$PYTHON" -m lcab_plugin.cli "$@"; }

available() {
    lcab kernels --json | "$PYTHON" -c '
import json, sys
print(*(k["name"] for k in json.load(sys.stdin) if not k["reason"] and k["name"] not in ("naive", "sdpa_math")))'
}

probe() {
    lcab kernels --json > "$OUT/kernels.json"
    lcab doctor | tee "$OUT/doctor.txt"
}

# A few processes a kernel, all kernels at once: compilation is what takes long.
conformance() {
    local name
    for name in $(available); do
        timeout "${CONFORMANCE_SECONDS:-400}" "$PYTHON" -m pytest -q -n 4 -p no:cacheprovider --tb=short -rf \
            tests/kernels/test_conformance.py -k "$name and not sdpa_$name" --record-verified "$OUT/verified-$name.json" \
            > "$OUT/conformance-$name.log" 2>&1 &
    done
    timeout 300 "$PYTHON" -m pytest -q -p no:cacheprovider --tb=short -rf tests/kernels/test_triton_cuda.py \
        tests/bench/test_tune.py > "$OUT/triton.log" 2>&1 &
    wait
    tail -n 1 "$OUT"/conformance-*.log "$OUT/triton.log"
}

sanitize() {
    local tool
    for tool in memcheck racecheck; do
        timeout 200 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -p no:cacheprovider \
            tests/kernels/test_triton_cuda.py -k "grid or repeatable" > "$OUT/$tool.log" 2>&1
        echo "$tool: exit status $?, $(grep "ERROR SUMMARY" "$OUT/$tool.log")"
    done
}

tune() {
    lcab tune --seqlens 4096,16384,65536 --seconds 0.5 | tee "$OUT/tune.txt"
}

# Lengths that nothing was tuned on among them, and other documents.
goals() {
    local kernels=triton,sdpa_flash,cudnn,fa4,torch_flex_autotuned
    lcab bench kernels --kernels "$kernels" --masks "$MASKS" --seqlens 8192,12345,16384,40000 \
        --cell-seconds 0.3 --baseline torch_flex --out "$OUT/goals.jsonl" --resume
    lcab bench kernels --kernels triton,torch_flex --masks causal_document,share_question,block_causal_document \
        --seqlens 16384 --seed 1 --cell-seconds 0.3 --baseline torch_flex --out "$OUT/goals-seed1.jsonl" --resume
}

grid() {
    lcab bench kernels --masks "$MASKS" --cell-seconds "${CELL_SECONDS:-0.4}" --out "$OUT/grid.jsonl" --resume
}

for step in "${@:-probe conformance sanitize tune goals grid}"; do
    for one in $step; do
        declare -F "$one" > /dev/null || { echo "no step is called $one" >&2; exit 2; }
        echo "== $one"
        "$one"
    done
done
