#!/usr/bin/env bash
# Context parallelism on the GPUs of one machine, one process a GPU over NCCL: conformance, speeds, a trace.
#
#   scripts/gpu/context_parallel.sh OUT [STEP ...]     steps: probe conformance bench peers trace (all if left out)
#
# Records stream into the folder OUT as they come. PYTHON names the interpreter (python3), with lcab_plugin,
# pytest and pytest-xdist importable from it; WORLD the number of processes (the GPUs there are). Where there is no GPU the same
# steps run over gloo on tiny shapes: a rehearsal of the script, which measures nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ $# -ge 1 ]] || { echo "usage: scripts/gpu/context_parallel.sh OUT [probe conformance bench peers trace]" >&2; exit 2; }
OUT="$1"; shift
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
# Collectives go over NVLink itself: multicast needs a fabric set-up that a container may lack, and hangs without.
export NCCL_NVLS_ENABLE=0
GPUS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
WORLD="${WORLD:-$((GPUS > 1 ? GPUS : 2))}"
CELL_SECONDS="${CELL_SECONDS:-2}"
if ((GPUS)); then
    ((GPUS >= WORLD && WORLD >= 2)) || {
        echo "context parallelism needs 2 GPUs or more, one for each of $WORLD processes; this machine has $GPUS" >&2
        exit 2
    }
    KERNEL="${KERNEL:-triton}" SHAPE=(--heads 64:8 --head-dim 128 --dtype bf16)
    read -ra PER_GPU <<< "${TOKENS_PER_GPU:-8192 32768}"
else
    echo "no GPU: a rehearsal over gloo" >&2
    KERNEL="${KERNEL:-sdpa_flash}" SHAPE=(--heads 4:2 --head-dim 16 --dtype fp32) PER_GPU=(128) CELL_SECONDS=0.05
fi
# full and causal, packed documents either way (lengths sampled like the Pile's), a window
MASKS="${MASKS:-full,causal,full_document,causal_document,sliding_window_causal}"

ranks() {
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$WORLD" "$@"
}

probe() {
    "$PYTHON" -m lcab_plugin.cli doctor | tee "$OUT/doctor.txt"
    "$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "NCCL",
        torch.cuda.nccl.version() if torch.cuda.is_available() else None)' | tee "$OUT/versions.txt"
    if ((GPUS)); then
        nvidia-smi topo -m > "$OUT/topology.txt"
    fi
}

# Masks x strategies x layouts over NCCL at degrees 2, 4 and 8 (ranks share GPUs where there are fewer), in
# bfloat16 too, against float64 on one device, WORKERS tests at a time; a rehearsal lists them.
conformance() {
    local how=(--cp-device cuda -rfs --durations 0 -n "${WORKERS:-4}")
    ((GPUS)) || how=(--collect-only)
    timeout "${CONFORMANCE_SECONDS:-500}" "$PYTHON" -m pytest -v -p no:cacheprovider --tb=short --nightly "${how[@]}" \
        tests/context_parallel/test_conformance.py tests/context_parallel/test_kernels.py \
        -k "${CONFORMANCE_CELLS:-not composition}" > "$OUT/conformance.log" 2>&1
    local status=$?
    ((status == 0)) || echo "exit status $status (124: its time ended)" >> "$OUT/conformance.log"
    tail -n 3 "$OUT/conformance.log"
    return "$status"
}

# Every strategy, forward and backward, beside one GPU alone, whose time over WORLD is the ideal.
bench() {
    local tokens status=0
    for tokens in "${PER_GPU[@]}"; do
        ranks -m lcab_plugin.cli bench cp --kernel "$KERNEL" "${SHAPE[@]}" --masks "$MASKS" \
            --seqlens "$((tokens * WORLD))" --passes fwd,bwd --baseline single \
            ${LAYOUTS:+--layouts "$LAYOUTS"} ${STRATEGIES:+--strategies "$STRATEGIES"} \
            --cell-seconds "$CELL_SECONDS" --timeout 120 --out "$OUT/cp-$tokens-per-gpu.jsonl" \
            > "$OUT/cp-$tokens-per-gpu.txt" 2>&1 || status=1
        tail -n 3 "$OUT/cp-$tokens-per-gpu.txt"
    done
    return "$status"
}

# The same tensors through other packages (scripts/requirements-peers.txt), those that are installed. Several of
# them know no grouped heads.
peers() {
    local shape=(--heads 32:32 "${SHAPE[@]:2}")
    ((GPUS)) || shape=("${SHAPE[@]}")
    ranks -m lcab_plugin.cli bench peers --kernel "$KERNEL" "${shape[@]}" \
        --masks causal,causal_document,sliding_window_causal --seqlens "$((PER_GPU[-1] * WORLD))" \
        --cell-seconds "$CELL_SECONDS" --timeout 120 --out "$OUT/peers.jsonl" > "$OUT/peers.txt" 2>&1
    local status=$?
    tail -n 3 "$OUT/peers.txt"
    return "$status"
}

# What runs beside what: one forward and backward of each strategy, a trace of rank 0 for chrome://tracing.
trace() {
    ranks scripts/gpu/context_parallel_trace.py "$OUT" "$KERNEL" "${SHAPE[1]}" "${SHAPE[3]}" \
        "$((PER_GPU[-1] * WORLD))" > "$OUT/trace.txt" 2>&1
    local status=$?
    grep -E "^[a-z0-9_]+: |Error" "$OUT/trace.txt"
    return "$status"
}

failed=()
for step in "${@:-probe conformance bench peers trace}"; do
    for one in $step; do
        case "$one" in
            probe | conformance | bench | peers | trace) ;;
            *) echo "no step is called $one" >&2; exit 2 ;;
        esac
        echo "== $one"
        "$one" || failed+=("$one")
    done
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
