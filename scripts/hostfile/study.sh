#!/usr/bin/env bash
# A study over the nodes of the hostfile, started on the first of them:
#
#   scripts/hostfile/study.sh examples/studies/context_parallel.yaml torchrun
#   scripts/hostfile/study.sh examples/studies/training.yaml deepspeed
#
# Every node needs this checkout and its Python at the same path, and an ssh login without a password from the first
# node. The study starts one agent a node, goes on after an interrupt, and skips what is finished.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec python -m lcab_plugin.cli study "${1:?give a study file}" \
    --launcher "${2:-torchrun}" --hostfile "${HOSTFILE:-scripts/hostfile/hostfile}"
