"""`lcab tune`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lcab_plugin.cli import output
from lcab_plugin.cli.bench_progress import left
from lcab_plugin.cli.parse import integers, shape

if TYPE_CHECKING:
    from lcab_plugin.bench.tune import Finding


def tune(
    heads: Annotated[str, typer.Option(help="Query and key/value heads.")] = "64:8",
    head_dim: Annotated[int, typer.Option(help="Of queries, keys and values.")] = 128,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    seqlens: Annotated[
        str, typer.Option(help="Lengths; each stands for those up to it.")
    ] = "4096,16384,65536",
    seconds: Annotated[float, typer.Option(help="Running time of one configuration at most.")] = 2.0,
    as_json: output.AsJson = False,
) -> None:
    """Measure the Triton kernel's launch configurations on this GPU and keep what beats the shipped ones.

    Findings are added to ~/.cache/lcab_plugin/triton.json; delete the file to go back. They are looked up by
    GPU, Triton, pass, head_dim, dtype, GQA ratio, class of mask and length, and never measured on the way. On
    several machines, copy the file rather than tune each: ranks that launch differently round differently.
    """
    from lcab_plugin.bench import tune as tuner
    from lcab_plugin.bench.settings import Shape

    tensors = shape(Shape(), heads, head_dim, dtype, 1)
    lengths = integers("--seqlens", seqlens, ",") or ()
    findings: list[Finding] = []
    total, began, stopped = tuner.launches(lengths), time.monotonic(), False
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        for finding in tuner.run(tensors, lengths, seconds):
            findings.append(finding)
            speedup = finding.median_ms[finding.default] / finding.median_ms[finding.best]
            found = f": {speedup:.2f}x by {finding.best}" if speedup > 1 else ""
            so_far = left(len(findings), total, time.monotonic() - began, "launches")
            console.print(f"{finding.key}{found}{so_far}", markup=False)
    except KeyboardInterrupt:
        stopped = True
    path = tuner.write(findings)
    if as_json:
        output.print_json(
            [
                {
                    "key": f.key,
                    "best": list(f.best),
                    "median_ms": {str(tuple(c)): ms for c, ms in f.median_ms.items()},
                    "failed": {str(tuple(c)): why for c, why in f.failed.items()},
                }
                for f in findings
            ]
        )
        raise typer.Exit(130 if stopped else 0)
    lines = []
    for f in findings:
        times = " ".join(f"{ms:.3f}" for ms in f.median_ms.values())
        lines.append((f.which, f.mask, str(f.seqlen), times, str(tuple(f.best))))
    columns = [
        "pass",
        "mask",
        ">tokens",
        "ms, the shipped default first",
        "kept: rows, keys, warps, stages, TMA",
    ]
    output.show(output.table(None, columns, lines))
    if stopped:
        typer.echo(f"Stopped after {len(findings)} of {total} launches, which are kept.")
    typer.echo(f"Findings: {path}")
    raise typer.Exit(130 if stopped else 0)
