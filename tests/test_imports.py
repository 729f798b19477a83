"""Which way the arrows point, held by reading every file's imports, and shown to catch planted mistakes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lcab_plugin"

# What each part of the package may import from the other parts.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "masks": {"errors"},
    "kernels": {"errors", "masks"},
    "balance": {"masks"},
    "layout": {"errors", "masks", "balance"},
    "recompute": {"errors"},
    "operation": {"errors", "masks", "layout", "kernels", "recompute"},
    "torch_op": {"errors", "masks", "operation", "kernels"},
    "attention": {"errors", "masks", "operation", "torch_op", "kernels"},
    "context_parallel": {"errors", "masks", "layout", "operation", "kernels", "recompute"},
}
ARROWS["planner"] = {"errors", "masks", "layout", "kernels", "context_parallel"}
ARROWS["config"] = {*ARROWS}
ARROWS["patching"] = {"errors"}
ARROWS["adapters"] = {*ARROWS}
ARROWS["training"] = {*ARROWS}
ARROWS["bench"] = {*ARROWS}
ARROWS["report"] = {*ARROWS}
ARROWS["study"] = {*ARROWS}
ARROWS["cli"] = {*ARROWS}
ARROWS["__init__"] = {*ARROWS} - {
    "patching",
    "planner",
    "adapters",
    "training",
    "bench",
    "report",
    "study",
    "cli",
}

# a kernel may import these; context_parallel too
KERNELS_SHARED = {"contract", "cudnn_limits", "lowering", "merge", "segments", "tiled"}
FRAMEWORKS = {"deepspeed", "megatron", "transformers"}
NO_ENVIRONMENT = {
    "masks",
    "kernels",
    "balance",
    "layout",
    "operation",
    "torch_op",
    "attention",
    "context_parallel",
    "config",
}
HEAVY = ["rich", "typer", "pydantic", "matplotlib", "jinja2", "triton", *sorted(FRAMEWORKS)]


def _type_checking(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below ``node`` that run, at import or later."""
    for child in ast.iter_child_nodes(node):
        if not _type_checking(child):
            yield child
            yield from _running(child)


def imported(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports; ``from a import b`` counts as ``a.b``."""
    package = module.split(".")
    for node in _running(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def _arrow(parts: list[str], name: str) -> str | None:
    """Why ``lcab_plugin.<parts>`` may not import ``name``, a module of ours or something inside one."""
    source, target = parts[0], [*name.split(".")[1:], "", ""][:2]
    if target[0] not in ARROWS:  # the package itself, or a name of its own such as __version__
        return None
    if target[0] != source and target[0] not in ARROWS[source]:
        return f"{source} must not import {target[0]}"
    if target[0] == "kernels" and target[1] not in ("", *KERNELS_SHARED):
        if source == "kernels" and parts[1] not in ("__init__", target[1]):
            return "a kernel imports another kernel"
        if source == "context_parallel":
            return "context_parallel must not name a kernel"
    return None


def _framework(parts: list[str], name: str) -> str | None:
    framework = name.split(".")[0]
    if framework in FRAMEWORKS and parts[:2] != ["adapters", framework]:
        return f"only adapters/{framework}.py imports {framework}"
    return None


def violations(package: Path) -> list[str]:
    """Every broken arrow of the package in that folder, as ``file:line: why``."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        collectives = parts == ["context_parallel", "collectives"]

        def report(line: int, why: str, path: Path = path) -> None:
            found.append(f"{path.relative_to(package.parent)}:{line}: {why}")

        for line, name in imported(tree, ".".join([PACKAGE, *parts])):
            ours = name.split(".")[0] == PACKAGE
            why = _arrow(parts, name) if ours else _framework(parts, name)
            if why:
                report(line, f"{why} ({name})")
            if name.startswith("torch.distributed") and not collectives:
                report(line, "only context_parallel/collectives.py touches torch.distributed")
            if parts[0] in NO_ENVIRONMENT and name in ("os.environ", "os.getenv"):
                report(line, f"{parts[0]} reads an environment variable")
        for node in _running(tree):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                if name == "torch.distributed" and not collectives:
                    report(node.lineno, "only context_parallel/collectives.py touches torch.distributed")
                if name in ("os.environ", "os.getenv") and parts[0] in NO_ENVIRONMENT:
                    report(node.lineno, f"{parts[0]} reads an environment variable")
    return found


def test_the_arrows_hold() -> None:
    assert violations(ROOT / PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("masks/slices.py", "import lcab_plugin.kernels", "masks must not import kernels"),
        ("masks/slices.py", "from ..layout import Layout", "masks must not import layout"),
        ("kernels/naive.py", "from lcab_plugin.kernels.sdpa_flash import KERNEL", "another kernel"),
        ("kernels/naive.py", "from lcab_plugin.kernels import sdpa_flash", "another kernel"),
        ("kernels/naive.py", "from . import sdpa_flash", "another kernel"),
        ("kernels/naive.py", "import torch.distributed as dist", "touches torch.distributed"),
        (
            "kernels/lowering.py",
            "import lcab_plugin.context_parallel",
            "must not import context_parallel",
        ),
        (
            "layout.py",
            "def f():\n    from lcab_plugin.config import AttentionConfig",
            "must not import config",
        ),
        (
            "context_parallel/ring.py",
            "from lcab_plugin.kernels.naive import KERNEL",
            "must not name a kernel",
        ),
        ("context_parallel/ring.py", "from lcab_plugin.kernels import get", "must not name a kernel"),
        (
            "context_parallel/ring.py",
            "import torch\ntorch.distributed.barrier()",
            "touches torch.distributed",
        ),
        ("context_parallel/ring.py", "from torch import distributed", "touches torch.distributed"),
        ("context_parallel/ring.py", "import os\nos.environ['RING']", "reads an environment variable"),
        ("config.py", "from os import getenv", "reads an environment variable"),
        ("adapters/deepspeed.py", "import megatron.core", "only adapters/megatron.py imports megatron"),
        ("adapters/deepspeed.py", "import lcab_plugin.training", "adapters must not import training"),
        ("training/data.py", "import deepspeed", "only adapters/deepspeed.py imports deepspeed"),
        (
            "bench/parity.py",
            "import importlib\nimportlib.import_module('lcab_plugin.cli')",
            "must not import cli",
        ),
        ("__init__.py", "from lcab_plugin import adapters", "must not import adapters"),
    ],
)
def test_a_broken_arrow_is_found(tmp_path: Path, file: str, source: str, why: str) -> None:
    planted = tmp_path / PACKAGE / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(source)
    found = violations(tmp_path / PACKAGE)
    assert len(found) == 1
    assert why in found[0]
    assert found[0].startswith(f"{PACKAGE}/{file}:{source.count(chr(10)) + 1}:")


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    allowed = {
        "context_parallel/collectives.py": "import torch.distributed as dist",
        "context_parallel/ring.py": "from lcab_plugin.kernels.merge import Softmax",
        "kernels/__init__.py": "from lcab_plugin.kernels.contract import Kernel",
        "kernels/naive.py": "from lcab_plugin.kernels.contract import KernelOptions\nimport math",
        "attention.py": "if TYPE_CHECKING:\n    from torch.distributed import ProcessGroup",
        "adapters/deepspeed.py": "import deepspeed\nfrom lcab_plugin.config import AttentionConfig",
    }
    for file, source in allowed.items():
        path = tmp_path / PACKAGE / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert violations(tmp_path / PACKAGE) == []


def test_importing_the_package_loads_nothing_optional() -> None:
    # In a fresh interpreter: what torch itself brings is not ours.
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import lcab_plugin\n"
        f"print(*(m for m in {HEAVY} if m in sys.modules and m not in before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.stdout.split(), result.stderr) == ([], "")


@pytest.mark.parametrize("folder", [PACKAGE, "examples", "tests"])
def test_files_stay_small(folder: str) -> None:
    lengths = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in (ROOT / folder).rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > 450} == {}
