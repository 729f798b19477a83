"""`lcab doctor`."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import typer
from rich.text import Text

from lcab_plugin.cli import output
from lcab_plugin.cli.kernels import kernel_rows

# Optional libraries that something here asks for, and what that is.
_OPTIONAL = {
    "deepspeed": "training through DeepSpeed: pip install 'lcab-plugin[deepspeed]'",
    "triton": "our own kernel: pip install 'lcab-plugin[triton]'",
}

# One process of its own: a gloo that cannot find this machine's address must not take the command along.
_GLOO = """
import tempfile, torch, torch.distributed as d
with tempfile.TemporaryDirectory() as folder:
    d.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    d.all_reduce(torch.ones(1))
    d.destroy_process_group()
"""

Line = dict[str, Any]


def doctor(as_json: output.AsJson = False) -> None:
    """What this machine has, one line each, with what to do where something is missing.

    Exit status 1 if training on this machine cannot work at all (no working process group, no kernel).
    """
    lines = [_python(), _torch(), *_accelerator(), _gloo(), *map(_compiler, ("g++", "ninja"))]
    lines += [_optional(name, use) for name, use in _OPTIONAL.items()]
    lines += [
        _line(f"kernel {row['name']}", not row["reason"], row["reason"] or row["version"])
        for row in kernel_rows()
    ]
    if as_json:
        output.print_json(lines)
    else:
        marks = {True: Text("ok", style="green"), False: Text("no", style="yellow")}
        output.show(
            output.table(
                None,
                ["", "what", "found, or what to do"],
                [(marks[x["ok"]], x["what"], Text(x["text"])) for x in lines],
            )
        )
    kernels = [x["ok"] for x in lines if x["what"].startswith("kernel ")]
    if not any(kernels) or not all(x["ok"] for x in lines if x["what"] in ("python", "gloo")):
        raise typer.Exit(1)


def _line(what: str, ok: bool, text: str) -> Line:
    return {"what": what, "ok": ok, "text": text}


def _python() -> Line:
    return _line("python", sys.version_info >= (3, 10), f"{platform.python_version()}, {sys.executable}")


def _torch() -> Line:
    import torch

    return _line("torch", True, f"{torch.__version__}, {torch.get_num_threads()} CPU threads")


def _accelerator() -> list[Line]:
    import torch

    if not torch.cuda.is_available():
        built = (
            "this torch is a CPU build"
            if torch.version.cuda is None
            else "no device is visible to this torch"
        )
        return [_line("CUDA", False, f"{built}; kernels and collectives run on the CPU (gloo)")]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [_line("CUDA", True, f"{torch.version.cuda}, {', '.join(devices)}"), _line("NCCL", True, nccl)]


def _gloo() -> Line:
    try:
        run = subprocess.run([sys.executable, "-c", _GLOO], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return _line(
            "gloo", False, "a process group of one hangs; set GLOO_SOCKET_IFNAME to an interface that is up"
        )
    if run.returncode:
        last = (run.stderr.strip() or "no message").splitlines()[-1]
        return _line("gloo", False, f"{last}; set GLOO_SOCKET_IFNAME to an interface that is up")
    return _line("gloo", True, "an all-reduce ran")


def _compiler(name: str) -> Line:
    path = shutil.which(name)
    return _line(name, path is not None, path or "only to build CUDA or C++ extensions; CPU runs build none")


def _optional(name: str, use: str) -> Line:
    try:
        return _line(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return _line(name, False, f"not installed; for {use}")
