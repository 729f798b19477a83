#!/usr/bin/env bash
# The main job on a fresh machine: the same tiny GPT trained with every kernel and strategy, by two processes on this
# machine's CPU, compared step by step. Arguments go to `lcab parity` (./scripts/quickstart.sh --dtype bf16).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup deepspeed

exec lcab parity --kernels naive,sdpa_flash --strategies none,ulysses,ring_p2p,ring_all_gather \
    --world 2 --steps 20 "$@"
