"""`lcab kernels`."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from rich.text import Text

from lcab_plugin.cli import output


def kernels(as_json: output.AsJson = False) -> None:
    """Every kernel: whether it runs on this machine, or the reason it does not."""
    rows = kernel_rows()
    if as_json:
        output.print_json(rows)
        return
    output.show(
        output.table(
            None,
            ["kernel", "here", "version", "verified on", "what it is"],
            [
                (
                    Text(row["name"], style="bold"),
                    Text("no: " + row["reason"], style="red")
                    if row["reason"]
                    else Text("yes", style="green"),
                    row["version"] or "-",
                    row["verified"],
                    row["about"],
                )
                for row in rows
            ],
        )
    )


def kernel_rows() -> list[dict[str, Any]]:
    """Of every kernel: name, reason (None: it runs here), version (None: not installed), verified, about."""
    from lcab_plugin import kernels as table

    rows = []
    for name, reason in table.availability().items():
        kernel = table.get(name)
        about = (inspect.getdoc(sys.modules[type(kernel).__module__]) or "").split("\n\n")[0]
        rows.append(
            {
                "name": name,
                "reason": reason,
                "version": None if reason else kernel.version(),
                "verified": kernel.verified,
                "about": " ".join(about.split()),
            }
        )
    return rows
