#!/usr/bin/env bash
# One training run through DeepSpeed's launcher (pdsh) on the 96 GPUs of the hostfile, started on the first node.
# Rings go between nodes, Ulysses stays inside a node; further flags go to examples/train_gpt.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec deepspeed --hostfile "${HOSTFILE:-scripts/hostfile/hostfile}" examples/train_gpt.py \
    --deepspeed_config examples/configs/zero3.json --preset 1b --dtype bf16 --seqlen 786432 \
    --global-batch 1 --micro-batch 1 --activation-checkpointing --keep-attention \
    --kernel sdpa_flash --strategy usp --ulysses 8 --ring 12 --mask causal_document \
    --doc-lengths prolong512k "$@"
