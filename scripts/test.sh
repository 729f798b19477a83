#!/usr/bin/env bash
# Lint, types and tests, with its own set-up. `./scripts/test.sh --nightly` runs the slow tier as well;
# every argument goes to pytest (./scripts/test.sh -k masks).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup deepspeed,megatron,transformers,triton,dev

ruff check .
ruff format --check .
mypy
exec pytest "$@"
