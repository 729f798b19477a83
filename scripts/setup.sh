# Sourced by quickstart.sh and test.sh: `setup EXTRAS` makes .venv, installs lcab_plugin with those extras and puts
# the virtual environment first in PATH. A second call with the same pins returns at once.
# PYTHON names the interpreter that makes the virtual environment (python3).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

stop() {
    echo "error: $*" >&2
    exit 1
}

preflight() {
    local python="$1"
    command -v "$python" >/dev/null || stop "no $python on this machine; install Python 3.10 or newer, or set PYTHON to one."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        stop "$("$python" --version) is too old; lcab_plugin needs Python 3.10 or newer: set PYTHON to one."
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$python has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)."
}

setup() {
    local extras="$1" python="${PYTHON:-python3}" pins="$ROOT/scripts/requirements-ci.txt" stamp log
    preflight "$python"
    # The stamp names what was installed: other pins, dependencies, extras or another Python install again.
    stamp="$VENV/installed-$({ echo "$extras"; "$python" --version; cat "$pins" "$ROOT/pyproject.toml"; } |
        "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')"
    log="$VENV/install.log"
    if [[ ! -e "$stamp" ]]; then
        "$python" -c 'import shutil, sys; sys.exit(shutil.disk_usage(sys.argv[1]).free < 4e9)' "$ROOT" ||
            stop "less than 4 GB free below $ROOT; the virtual environment needs up to 3 GB."
        echo "installing lcab_plugin[$extras] into .venv: one or two minutes the first time (log: .venv/install.log)"
        [[ -x "$VENV/bin/python" ]] || "$python" -m venv "$VENV"
        if ! "$VENV/bin/python" -m pip install --progress-bar off --constraint "$pins" \
            --editable "$ROOT[$extras]" >"$log" 2>&1 </dev/null; then
            tail -n 20 "$log" >&2
            stop "the installation failed; the whole log is $log"
        fi
        touch "$stamp"
    fi
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
    # A build that was killed leaves a lock in the shared folder of torch's extensions and every later run waits for it.
    export TORCH_EXTENSIONS_DIR="$VENV/torch_extensions"
    cd "$ROOT"
}
