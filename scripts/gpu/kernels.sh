#!/usr/bin/env bash
# Every kernel that runs on this GPU: conformance, sanitizer, tuned launches, speeds.
#
#   scripts/gpu/kernels.sh OUT [STEP ...]
#
# Steps: probe conformance gpu_tests sanitize tune grid untuned autotuned block_sparse (all if left out).
#
# Records stream into the folder OUT as they come; a step that is run again goes on where its records end.
# PYTHON names the interpreter (python3), with lcab_plugin, pytest and pytest-xdist importable from it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ $# -ge 1 ]] || { echo "usage: scripts/gpu/kernels.sh OUT [STEP ...]" >&2; exit 2; }
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
    for name in ${KERNELS:-$(available)}; do
        { timeout "${CONFORMANCE_SECONDS:-400}" "$PYTHON" -m pytest -q -n "${WORKERS:-2}" -p no:cacheprovider --tb=short \
            -rf tests/kernels/test_conformance.py -k "$name and not sdpa_$name" \
            --record-verified "$OUT/verified-$name.json" > "$OUT/conformance-$name.log" 2>&1 \
            || echo "exit status $? (124: its time ended)" >> "$OUT/conformance-$name.log"; } &
    done
    wait
    tail -n 2 "$OUT"/conformance-*.log
}

# Captured graphs, compiled functions, specialised launches against portable ones, tuning.
gpu_tests() {
    timeout 300 "$PYTHON" -m pytest -q -n "${WORKERS:-2}" -p no:cacheprovider --tb=short -rf \
        tests/kernels/test_triton_cuda.py tests/bench/test_tune.py > "$OUT/triton.log" 2>&1 \
        || echo "exit status $? (124: its time ended)" >> "$OUT/triton.log"
    tail -n 2 "$OUT/triton.log"
}

# Shapes that fill no block; every launch of a forward and a backward, specialised (16 bits) and portable (float32);
# a question whose keys are split over query heads; rows of many intervals.
# racecheck reports the byte by which Triton hands idle warps their task (read where a kernel is declared, written there
# and at its warp_specialize), a barrier of the whole program between: none of those is a race.
sanitize() {
    local tool
    for tool in memcheck racecheck; do
        { timeout "${SANITIZE_SECONDS:-200}" compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -c '
import torch, lcab_plugin as lcab
from lcab_plugin import masks
for dim, dtype in ((128, torch.bfloat16), (64, torch.float16), (64, torch.float32)):
    for mask, heads, kv_heads in (
        (masks.causal(200), 4, 2),
        (masks.share_question([60, 70, 70]), 4, 2),
        (masks.sliding_window(200, 9, 50), 4, 2),
        (masks.share_question([400, 600, 600]), 8, 1),
        (masks.block_sparse(640, 64, 0.5), 4, 2),
        (masks.block_sparse(640, 64, 0.5), 2, 2),
    ):
        shapes = ((1, mask.q_len, h, dim) for h in (heads, kv_heads, kv_heads))
        q, k, v = (torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes)
        out = lcab.attention(q, k, v, mask, kernel="triton")
        torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
torch.cuda.synchronize()' > "$OUT/$tool.log" 2>&1
        echo "$tool: exit status $?, $(grep "ERROR SUMMARY\|RACECHECK SUMMARY" "$OUT/$tool.log")"; } &
    done
    wait
}

tune() {
    lcab tune --seqlens 4096,16384,65536 --seconds 0.5 | tee "$OUT/tune.txt"
}

# The paper's setting, then backwards whose single call takes a second.
grid() {
    local kernels="${KERNELS:-triton,sdpa_flash,cudnn,fa4}"
    lcab bench kernels --kernels "$kernels" --masks "$MASKS" --cell-seconds "${CELL_SECONDS:-0.25}" \
        --baseline torch_flex --out "$OUT/grid.jsonl" --resume
    lcab bench kernels --kernels "$kernels" --masks causal,full,prefix_lm_causal --seqlens 65536 --passes bwd \
        --cell-seconds 2 --baseline torch_flex --out "$OUT/grid-64k.jsonl" --resume
}

# Lengths that nothing was tuned on, and other documents.
untuned() {
    lcab bench kernels --kernels "${KERNELS:-triton,sdpa_flash,cudnn,fa4}" --seqlens 12345,40000 --seed 1 \
        --masks causal,full,causal_document,sliding_window_causal,share_question --cell-seconds 0.25 \
        --baseline torch_flex --out "$OUT/untuned.jsonl" --resume
}

# FlexAttention at its best: block sizes measured for each mask, tensor descriptors. A minute of compiling a row.
autotuned() {
    lcab bench kernels --kernels triton,torch_flex_autotuned --masks "${AUTOTUNED:-causal,causal_document}" \
        --seqlens 16384 --cell-seconds 0.3 --baseline torch_flex --out "$OUT/autotuned.jsonl" --resume
}

# Block-sparse masks, in blocks of 64 and 128 tokens.
block_sparse() {
    lcab bench kernels --kernels triton --masks block_sparse --blocks 64,128 --keeps 0.1,0.5 --seqlens 16384,49152 \
        --cell-seconds 0.25 --baseline torch_flex --out "$OUT/block_sparse.jsonl" --resume
}

STEPS="probe conformance gpu_tests sanitize tune grid untuned autotuned block_sparse"
for step in "${@:-$STEPS}"; do
    for one in $step; do
        declare -F "$one" > /dev/null || { echo "no step is called $one" >&2; exit 2; }
        echo "== $one"
        "$one"
    done
done
