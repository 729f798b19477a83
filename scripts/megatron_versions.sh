#!/usr/bin/env bash
# The tests of the Megatron adapter and of the patches against releases of megatron-core other than the one that CI installs:
#   ./scripts/megatron_versions.sh              0.14, 0.15 and the newest
#   ./scripts/megatron_versions.sh all          every minor release from 0.12, and the newest
#   ./scripts/megatron_versions.sh 0.13 0.17.1  the newest patch release of 0.13, and 0.17.1
# Each is installed without its dependencies into a temporary folder that comes first on PYTHONPATH. PYTHON names an
# interpreter that can run the tests; left out, the one of scripts/test.sh. Prints a row of a Markdown table for each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${PYTHON:-}" ]]; then
    source scripts/setup.sh
    setup deepspeed,megatron,transformers,triton,dev
    PYTHON=python
fi
case "${1:-}" in
"") set -- 0.14 0.15 newest ;;
all) set -- 0.12 0.13 0.14 0.15 0.16 0.17 0.18 newest ;;
esac

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
failed=0
printf '| megatron-core | |\n|---|---|\n'
for version in "$@"; do
    at="$folder/$version" log="$folder/$version.log"
    case "$version" in
    newest) wanted="megatron-core" ;;
    *.*.*) wanted="megatron-core==$version" ;;
    *) wanted="megatron-core==$version.*" ;;
    esac
    if ! "$PYTHON" -m pip install --quiet --no-deps --ignore-requires-python --target "$at" "$wanted" >"$log" 2>&1; then
        result="not installed: $(tail -n 1 "$log")"
        failed=1
    else
        found="$(PYTHONPATH="$at" "$PYTHON" -W ignore -c 'import megatron.core; print(megatron.core.__version__)' 2>/dev/null)" ||
            found="$version, which cannot be imported"
        version="$found"
        status=0
        PYTHONPATH="$at" timeout --kill-after 20 "${LIMIT:-1200}" "$PYTHON" -m pytest -q -p no:cacheprovider \
            tests/adapters/test_megatron*.py tests/patches >"$log" 2>&1 || status=$?
        result="$(grep -E '^[0-9]+ (passed|failed|skipped|error)|, [0-9]+ (passed|failed).* in ' "$log" | tail -n 1)" || true
        if ((status != 0)); then
            failed=1
            cat "$log" >&2
            [[ "$status" != 124 && "$status" != 137 ]] || result="not finished in ${LIMIT:-1200} s"
        fi
    fi
    printf '| %s | %s |\n' "$version" "${result:-failed with status $status}"
done
exit "$failed"
