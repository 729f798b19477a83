#!/usr/bin/env bash
# One training run through Megatron-core on the 96 GPUs of the hostfile: an agent of torchrun on every node, started
# by ssh; they meet at the first node. Further flags go to examples/train_gpt_megatron.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
hostfile="${HOSTFILE:-scripts/hostfile/hostfile}"
mapfile -t hosts < <(awk '!/^#/ && NF {print $1}' "$hostfile")
slots=$(sed -n 's/^[^#].*slots=\([0-9]*\).*/\1/p' "$hostfile" | head -n 1) # the same on every node
agent=(python -m torch.distributed.run --nnodes "${#hosts[@]}" --nproc-per-node "$slots"
    --rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:${PORT:-29500}" --rdzv-id "train-$$"
    examples/train_gpt_megatron.py --preset 1b --dtype bf16 --seqlen 786432
    --global-batch 1 --micro-batch 1 --recompute full --keep-attention --distributed-optimizer
    --kernel sdpa_flash --strategy usp --ulysses 8 --ring 12 --mask causal_document
    --doc-lengths prolong512k "$@")
settings=("PATH=$PATH") # what ssh does not take along
for name in $(compgen -e | grep -E '^(NCCL_|OMP_NUM_THREADS$)' || true); do settings+=("$name=${!name}"); done
agents=()
stop() { kill "${agents[@]}" 2>/dev/null || true; }
trap stop EXIT
for host in "${hosts[@]}"; do
    # -tt: an agent whose connection ends gets a hang-up, and ends its ranks
    ssh -tt -o BatchMode=yes "$host" "cd $(printf %q "$PWD") && env $(printf '%q ' "${settings[@]}" "${agent[@]}")" </dev/null &
    agents+=($!)
done
wait -n "${agents[@]}" # the first that ends, well or not, ends the run: all ranks end together
