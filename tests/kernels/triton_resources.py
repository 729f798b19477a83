"""What every Triton configuration takes of a GPU, by compiling it for sm_80 and sm_90 without one.

``python tests/kernels/triton_resources.py`` writes the table, ``triton_resources.json``, for the Triton that
is installed; the tests compile again and compare.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from lcab_plugin.kernels.triton import backward, forward, hopper, hopper_backward, hopper_forward, tuning
from lcab_plugin.kernels.triton.tuning import Config

TABLE = Path(__file__).with_suffix(".json")
KERNELS = {"forward": forward.forward_kernel, "dq": backward.dq_kernel, "dkv": backward.dkv_kernel}
SPECIALISED = {
    "forward": hopper_forward.forward_kernel,
    "dq": hopper_backward.dq_kernel,
    "dkv": hopper_backward.dkv_kernel,
}
STREAMED = {"forward": ("K", "V"), "dq": ("K", "V"), "dkv": ("Q", "DOUT")}
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes a block may use (CUDA C++ programming guide, table 27)


def cells() -> Iterator[tuple[str, int, str, int, Config, bool]]:
    """(pass, head_dim, dtype, architecture, configuration, whether a default) of every configuration."""
    for arch, dtype, table in (
        (90, "bf16", tuning.HOPPER),
        (80, "bf16", tuning.AMPERE),
        (90, "bf16", tuning.AMPERE),  # tensors that the tensor memory accelerator cannot read
        (80, "fp32", tuning.FLOAT32),
        (90, "fp32", tuning.FLOAT32),
    ):
        for (which, width), configs in table.items():
            for i, config in enumerate(dict.fromkeys(configs)):
                yield which, width, dtype, arch, config, config in configs[:2] and i < 2


def name(which: str, width: int, dtype: str, arch: int, config: Config) -> str:
    """The cell's key in the table."""
    tma = " tma" * config.tma + " specialised" * config.specialised
    blocks = f"{config.rows}x{config.keys} {config.warps} warps {config.stages} stages{tma}"
    return f"sm_{arch} {dtype} {which} d{width}: {blocks}"


def compile_cell(which: str, width: int, dtype: str, arch: int, config: Config) -> dict[str, Any]:
    """Registers and local memory a thread, shared memory a block (bytes), and tensor-core instructions."""
    compiled = (
        _specialised(which, width, dtype, config)
        if config.specialised
        else _portable(which, width, dtype, arch, config)
    )
    registers, local = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers,
        "local": local,
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "serialised": config.specialised and _serialised(ptx),
    }


def _portable(which: str, width: int, dtype: str, arch: int, config: Config) -> Any:
    kernel = KERNELS[which]
    constants = {
        "BM": config.rows,
        "BN": config.keys,
        "D": width,
        "DP": width,
        "DV": width,
        "DVP": width,
        "KEPT": 1,
        "SOFTCAP": False,
        "UPCAST": False,
        "TMA": config.tma,
    }
    streamed = STREAMED[which] if config.tma else ()
    rows = {name: config.keys if name in ("K", "V") else config.rows for name in streamed}
    descriptors = {name: f"tensordesc<{dtype}[1, {n}, 1, {width}]>" for name, n in rows.items()}
    signature, attributes = _signature(kernel.arg_names, dtype, descriptors, constants)
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True},
    )


def _specialised(which: str, width: int, dtype: str, config: Config) -> Any:
    kernel, by_keys = SPECIALISED[which], which == "dkv"
    own, block = (config.keys, config.rows) if by_keys else (config.rows, config.keys)
    constants = {"META": hopper.Meta(not by_keys, block, config.stages, 1, False, width, width, own)}
    descriptors = {}
    for names, n in ((("K", "V", "DK", "DV"), config.keys), (("Q", "OUT", "DOUT", "DQ"), config.rows)):
        layout = hopper.tile_layout(n, width)
        descriptors |= dict.fromkeys(names, f"tensordesc<{dtype}{[1, n, 1, width]},{layout!r}>")
    if by_keys:
        numbers = f"tensordesc<fp32{[1, block]},{hopper.row_layout()!r}>"
        descriptors |= {"LSE": numbers, "DELTA": numbers}
    signature, attributes = _signature(kernel.arg_names, dtype, descriptors, constants)
    return triton.compile(
        GluonASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options=hopper.LAUNCH,
    )


def _signature(
    arguments: list[str], dtype: str, descriptors: dict[str, str], constants: dict[str, Any]
) -> tuple[dict[str, str], dict[tuple[int], Any]]:
    """The types of a launch with 16-byte aligned tensors, as Triton's own launcher derives them."""
    aligned: list[list[Any]] = [["tt.divisibility", 16]]
    signature, attributes = {}, {}
    for i, argument in enumerate(arguments):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in descriptors:
            signature[argument] = descriptors[argument]
        elif argument in ("LSE", "LSE2", "DELTA", "DK_SUMS", "DV_SUMS"):
            signature[argument], attributes[(i,)] = "*fp32", aligned
        elif argument.isupper():
            signature[argument], attributes[(i,)] = f"*{dtype}", aligned
        elif argument in ("parts", "lines", "runs", "starts", "stops"):
            signature[argument], attributes[(i,)] = "*i32", aligned
        elif argument.startswith(("scale", "cap")):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if argument.endswith(("_batch", "_stride", "_head")) and argument not in forward.COUNTS:
                attributes[(i,)] = aligned
    return signature, attributes


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (spills) a thread, read by the wheel's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


def _serialised(ptx: str) -> bool:
    """Whether the assembler waits between warpgroup products that were to overlap: for registers, say."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.search(r"\(C75\d\d\)", report) is not None


if __name__ == "__main__":
    rows = {name(*cell[:5]): compile_cell(*cell[:5]) for cell in cells()}
    TABLE.write_text(json.dumps({"triton": triton.__version__, "configurations": rows}, indent=1) + "\n")
