#!/usr/bin/env bash
# What scripts/gpu/*.sh need beside PyTorch, Triton and numpy, for a GPU machine that reaches no package index:
#
#   scripts/gpu/packages.sh OUT [frameworks cudnn fa4]       # here; all three if left out
#   mkdir site && for f in OUT/*.tar.xz; do tar xJf $f -C site; done       # there
#   PYTHONPATH=$PWD/site:$PWD/site/nvidia_cutlass_dsl/dsl_packages scripts/gpu/training.sh RESULTS
#
# DeepSpeed without its compiled operators, megatron-core and their small dependencies; cuDNN's frontend;
# FlashAttention 4 with the compiler that it calls. For Python FOR (3.12) on Linux, x86-64; versions are those
# that CI installs and those that the results in docs/results were made with. PYTHON names the interpreter (python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ $# -ge 1 ]] || { echo "usage: scripts/gpu/packages.sh OUT [frameworks cudnn fa4]" >&2; exit 2; }
mkdir -p "$1"
OUT="$(cd "$1" && pwd)"; shift
PYTHON="${PYTHON:-python3}" FOR="${FOR:-3.12}"
read -ra PARTS <<< "${*:-frameworks cudnn fa4}"
for one in "${PARTS[@]}"; do
    case "$one" in
        frameworks | cudnn | fa4) ;;
        *) echo "no part is called $one" >&2; exit 2 ;;
    esac
done
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# pip takes the newest of these that a package was built for.
platforms=()
for glibc in 17 24 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)

fetch() { # FOLDER PACKAGE...
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --constraint scripts/requirements-ci.txt \
        --implementation cp --python-version "$FOR" "${platforms[@]}" --dest "$@"
}

pack() { # NAME
    mkdir "$work/$1/site"
    # not by `pip install --target`: some share a folder, which it replaces
    for wheel in "$work/$1"/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$work/$1/site"; done
    tar cf - -C "$work/$1/site" . | xz --threads=1 --x86 --lzma2=preset=9,dict=256MiB > "$work/$1.tar.xz"
    mv "$work/$1.tar.xz" "$OUT" # whole or not at all
    ls -lh "$OUT/$1.tar.xz"
}

for one in "${PARTS[@]}"; do
    mkdir "$work/$one"
    case "$one" in
        frameworks)
            fetch "$work/$one" megatron-core pydantic pydantic_core annotated-types typing-inspection hjson \
                py-cpuinfo einops
            # DeepSpeed is published as source; without operators its wheel is of any platform
            DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --constraint scripts/requirements-ci.txt \
                --wheel-dir "$work/$one" deepspeed
            ;;
        cudnn) fetch "$work/$one" nvidia-cudnn-frontend==1.32.0 ;;
        fa4)
            cutlass=nvidia-cutlass-dsl
            fetch "$work/$one" flash-attn-4==4.0.0b36 quack-kernels==0.6.5 apache-tvm-ffi==0.1.15.post2 \
                torch-c-dlpack-ext==0.1.5 einops $cutlass==4.8.1 $cutlass-libs-{base,core,cu13}==4.8.1
            ;;
    esac
    pack "$one"
done
