"""`lcab kernels`."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from lcab_plugin.cli import output

if TYPE_CHECKING:
    from lcab_plugin.kernels import Kernel

_SHORT = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_FLAGS = {"backward": "bwd", "deterministic": "det", "lse": "lse", "softcap": "cap", "value_dim": "dv"}
_LEGEND = """\
bwd: backward; det: bitwise repeatable backward on request; lse: gives the logarithm of the softmax's sum;
cap: logit soft cap; dv: a value head_dim other than the query's. A refused call raises with the reason."""


def kernels(as_json: output.AsJson = False) -> None:
    """Every kernel: whether it runs on this machine, or the reason it does not, and what it can do."""
    rows = kernel_rows()
    if as_json:
        output.print_json(rows)
        return
    output.show(output.table(None, ["kernel", "here", "verified on"], map(_here, rows)))
    columns = ["kernel", "masks: native", "others by", "dtypes", "head dims", *_FLAGS.values()]
    output.show(output.table(None, columns, [_can(row) for row in rows if "native" in row]))
    typer.echo(_LEGEND)


def kernel_rows() -> list[dict[str, Any]]:
    """Of every kernel: name, reason (None: it runs here), version (None: it does not run here), what its
    ``Features`` declare, verified, about."""
    from lcab_plugin import kernels as table

    rows = []
    for name, reason in table.availability().items():
        row: dict[str, Any] = {"name": name, "reason": reason, "version": None}
        try:
            kernel = table.get(name)
        except ImportError:  # a third party's, and the reason says so
            rows.append(row | {"verified": table.verified(name)})
            continue
        row["version"] = None if reason else kernel.version()
        rows.append(row | _declared(kernel) | {"verified": table.verified(name), "about": _about(kernel)})
    return rows


def _declared(kernel: Kernel) -> dict[str, Any]:
    features = kernel.features
    return {
        "devices": list(features.devices),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in features.dtypes],
        "head_dims": features.head_dims,
        "native": features.native,
        "lowering": features.lowering,
        "backward": features.backward,
        "deterministic": features.deterministic,
        "lse": True,  # the contract: no kernel without it
        "softcap": features.softcap,
        "value_dim": features.value_dim,
    }


def _about(kernel: Kernel) -> str:
    text = inspect.getdoc(sys.modules[type(kernel).__module__]) or ""
    return " ".join(text.split("\n\n")[0].split())


def _here(row: dict[str, Any]) -> list[Text]:
    here = Text("no: " + row["reason"], "red") if row["reason"] else Text(f"yes: {row['version']}", "green")
    return [Text(row["name"], "bold"), here, Text(row["verified"])]


def _can(row: dict[str, Any]) -> list[Text]:
    dtypes = " ".join(_SHORT.get(dtype, dtype) for dtype in row["dtypes"])
    texts = [row["native"], row["lowering"], dtypes, row["head_dims"]]
    marks = ["yes" if row[flag] else "-" for flag in _FLAGS]
    return [Text(row["name"], "bold"), *map(Text, texts + marks)]
