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
from triton.compiler import ASTSource

from lcab_plugin.kernels.triton import tuning
from lcab_plugin.kernels.triton.backward import dkv_kernel, dq_kernel
from lcab_plugin.kernels.triton.forward import forward_kernel
from lcab_plugin.kernels.triton.tuning import Config

TABLE = Path(__file__).with_suffix(".json")
KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
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
    tma = " tma" if config.tma else ""
    blocks = f"{config.rows}x{config.keys} {config.warps} warps {config.stages} stages{tma}"
    return f"sm_{arch} {dtype} {which} d{width}: {blocks}"


def compile_cell(which: str, width: int, dtype: str, arch: int, config: Config) -> dict[str, Any]:
    """Registers and local memory a thread, shared memory a block (bytes), and tensor-core instructions."""
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
    signature, attributes = _signature(kernel.arg_names, which, dtype, config, constants)
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )
    registers, local = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers,
        "local": local,
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
    }


def _signature(
    arguments: list[str], which: str, dtype: str, config: Config, constants: dict[str, Any]
) -> tuple[dict[str, str], dict[tuple[int], Any]]:
    """The types of a launch with 16-byte aligned tensors, as Triton's own launcher derives them."""
    aligned: list[list[Any]] = [["tt.divisibility", 16]]
    signature, attributes = {}, {}
    for i, argument in enumerate(arguments):
        if argument in constants:
            signature[argument] = "constexpr"
        elif config.tma and argument in STREAMED[which]:
            rows = config.keys if argument in ("K", "V") else config.rows
            signature[argument] = f"tensordesc<{dtype}[1, {rows}, 1, {constants['DP']}]>"
        elif argument in ("LSE", "LSE2", "DELTA"):
            signature[argument], attributes[(i,)] = "*fp32", aligned
        elif argument.isupper():
            signature[argument], attributes[(i,)] = f"*{dtype}", aligned
        elif argument in ("lines", "runs", "starts", "stops"):
            signature[argument], attributes[(i,)] = "*i32", aligned
        elif argument.startswith(("scale", "cap")):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if argument.endswith(("_batch", "_stride", "_head")):
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


if __name__ == "__main__":
    rows = {name(*cell[:5]): compile_cell(*cell[:5]) for cell in cells()}
    TABLE.write_text(json.dumps({"triton": triton.__version__, "configurations": rows}, indent=1) + "\n")
