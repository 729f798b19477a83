#!/usr/bin/env bash
# GPT training on the GPUs of one machine through DeepSpeed and Megatron: step time, memory, parity of losses,
# longest sequence.
#
#   scripts/gpu/training.sh OUT [STEP ...]     steps: probe smoke parity speed longest (these if left out;
#                                              on one GPU probe speed parity longest) and launchers: the
#                                              examples as their users start them
#
# Records stream into OUT/<run>/metrics.jsonl as they come, or failed.txt with the reason; after every step
# ARCHIVE (OUT/training.tgz) holds all of them, at the end with the tables. A step that is run again goes on
# where its records end. Each is given SMOKE_, PARITY_, SPEED_ or LONGEST_SECONDS, and all together end within
# ALL_SECONDS (525). PYTHON names the interpreter (python3), with lcab_plugin, deepspeed and megatron importable
# from it; WORLD the number of GPUs; KERNELS those to train with, ours first; ONLY a regular expression that
# the names of runs must match. ALLOC is PyTorch's allocator configuration for the longest sequences. One GPU
# trains with strategy none: by kernel, framework and ZeRO stage. cuDNN and FlashAttention 4 are among the
# kernels where they can be had.
# Where there is no GPU the same runs train a tiny model over gloo: a rehearsal, which measures nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ $# -ge 1 ]] || { echo "usage: scripts/gpu/training.sh OUT [probe smoke parity speed longest launchers]" >&2; exit 2; }
OUT="$1"; shift
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
ARCHIVE="${ARCHIVE:-$OUT/training.tgz}"
PYTHON="${PYTHON:-python3}" ALL_SECONDS="${ALL_SECONDS:-525}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Collectives go over NVLink itself: multicast needs a fabric set-up that a container may lack, and hangs without.
export NCCL_NVLS_ENABLE=0
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" # Megatron makes gloo groups too; one machine has no other
GPUS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
WORLD="${WORLD:-$((GPUS ? GPUS : 2))}"
if ((WORLD > 1)); then
    STRATEGY=ring_p2p ORDER="probe smoke parity speed longest"
else
    STRATEGY=none ORDER="probe speed parity longest"
fi
if ((GPUS)); then
    ((GPUS >= WORLD && WORLD >= 1)) || { echo "$WORLD processes need as many GPUs; there are $GPUS" >&2; exit 2; }
    SURE=triton,sdpa_flash OTHERS=cudnn,fa4
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" # first values of the model are copied on the CPU
else
    echo "no GPU: a rehearsal over gloo" >&2
    SURE=sdpa_flash,naive OTHERS=
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" DS_ACCELERATOR=cpu
fi
# A kernel that cannot run would fail run by run, each with a new start of the ranks.
KERNELS="$("$PYTHON" -c 'import sys
from lcab_plugin.errors import LcabError
from lcab_plugin.kernels import get
given, sure, others = ([name for name in names.split(",") if name] for names in sys.argv[1:])
try:
    for name in given or sure:
        if reason := get(name).unavailable():
            sys.exit(f"kernel {name!r} cannot run here: {reason}")
except LcabError as error:  # no kernel has that name
    sys.exit(str(error))
print(",".join(given or [*sure, *(name for name in others if not get(name).unavailable())]))' \
    "${KERNELS:-}" "$SURE" "$OTHERS")" || exit 2

probe() {
    "$PYTHON" -c 'import deepspeed, megatron.core, torch, triton
print("torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
print("deepspeed", deepspeed.__version__, "megatron-core", megatron.core.__version__)' 2> "$OUT/probe.err" \
        | tee "$OUT/versions.txt" || { tail -n 3 "$OUT/probe.err"; return 1; }
    echo "the DeepSpeed configs take torch's AdamW (torch_adam): nothing is compiled but Triton's kernels"
    "$PYTHON" -m lcab_plugin.cli doctor > "$OUT/doctor.txt" 2>&1
    if ((GPUS)); then
        nvidia-smi | tee "$OUT/nvidia-smi.txt"
        nvidia-smi topo -m > "$OUT/topology.txt"
    fi
}

# Its own share of the time, or what is left of all but what the tables take.
runs() {
    local left=$((ALL_SECONDS - SECONDS - 30))
    "$PYTHON" scripts/gpu/training_cells.py "$1" "$OUT" --seconds "$(($2 < left ? $2 : left))" --world "$WORLD" \
        --kernels "$KERNELS" --only "${ONLY:-}" "${@:3}"
}

smoke() { runs smoke "${SMOKE_SECONDS:-80}"; }
parity() { runs parity "${PARITY_SECONDS:-175}"; }
speed() { runs speed "${SPEED_SECONDS:-150}"; }
# Segments that grow: without them steps of 32,768 tokens reserve up to 19% more than they use.
longest() {
    PYTORCH_CUDA_ALLOC_CONF="${ALLOC-expandable_segments:True}" runs longest "${LONGEST_SECONDS:-$ALL_SECONDS}"
}

launchers() {
    local status=0 flags=(--steps 3 --strategy "$STRATEGY" --kernel "${KERNELS%%,*}" --eval-batches 0 --out "$OUT")
    rm -rf "$OUT"/launchers-*
    timeout 60 "$PYTHON" -m deepspeed.launcher.runner --num_gpus "$WORLD" examples/train_gpt.py "${flags[@]}" \
        --name launchers-deepspeed > "$OUT/launchers-deepspeed.log" 2>&1 || status=1
    timeout 60 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$WORLD" \
        examples/train_gpt_megatron.py "${flags[@]}" --name launchers-torchrun \
        > "$OUT/launchers-torchrun.log" 2>&1 || status=1
    tail -n 2 "$OUT"/launchers-*.log
    return "$status"
}

# Everything small in one file; gradients stay here.
keep() {
    find "$OUT" -type f ! -name '*.pt' ! -name 'training.tgz*' -printf '%P\0' \
        | tar czf "$ARCHIVE.part" -C "$OUT" --null -T - && mv "$ARCHIVE.part" "$ARCHIVE"
}

failed=()
for step in "${@:-$ORDER}"; do
    for one in $step; do
        case "$one" in
            probe | smoke | parity | speed | longest | launchers) ;;
            *) echo "no step is called $one" >&2; exit 2 ;;
        esac
        echo "== $one"
        "$one" || failed+=("$one")
        keep
    done
done
"$PYTHON" scripts/gpu/training_table.py "$OUT" > "$OUT/table.log" 2>&1 || tail -n 3 "$OUT/table.log"
keep
cat "$OUT/table.md"
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
