"""`lcab bench cp`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lcab_plugin.cli import bench_options as options
from lcab_plugin.cli import output
from lcab_plugin.cli.bench_progress import ended, progress
from lcab_plugin.cli.parse import integers, names, shape

if TYPE_CHECKING:
    from lcab_plugin.bench.cells import Record
    from lcab_plugin.bench.cp import Settings

_COLUMNS = [
    "strategy",
    "layout",
    ">median ms",
    ">p10",
    ">p90",
    ">repeats",
    ">efficiency",
    ">kernels ms",
    ">exposed ms",
    ">TFLOP/s/rank",
    ">sent MiB",
    ">by formula",
    ">imbalance",
    ">peak GiB",
]


def bench_cp(
    strategies: options.Strategies = None,
    layouts: options.Layouts = None,
    masks: Annotated[
        str | None,
        typer.Option(help="causal, causal_document and sliding_window_causal if left out."),
    ] = None,
    seqlens: Annotated[
        str | None, typer.Option(help="Global lengths; 8192 a GPU (2048 on a CPU) if left out.")
    ] = None,
    passes: Annotated[str | None, typer.Option(help="Of fwd, bwd, fwd+bwd; all if left out.")] = None,
    world: options.World = None,
    ulysses: options.Ulysses = None,
    inner_ring: options.InnerRing = None,
    placement: options.Placement = None,
    kernel: options.RankKernel = None,
    heads: options.Heads = None,
    head_dim: options.HeadDim = None,
    dtype: options.Dtype = None,
    batch: options.Batch = 1,
    documents: options.Documents = "pile",
    seed: options.Seed = 0,
    device: options.RankDevice = "auto",
    cell_seconds: options.CellSeconds = None,
    baseline: Annotated[
        str, typer.Option(help="single: plain attention on one process takes its turn; none: it does not.")
    ] = "single",
    timeout: options.Timeout = 600.0,
    out: options.Out = None,
    as_json: output.AsJson = False,
) -> None:
    """Time context-parallel strategies x layouts x masks x lengths x passes on one group of processes.

    A repeat begins on all ranks together and takes what its slowest rank takes. The strategies of a mask,
    length and pass are measured in turn with plain attention on one process (efficiency: its time over ranks
    times theirs) and with their own kernel calls, made again without communication (exposed: the time that is
    left: waiting, packing, merging). Bytes are those of the rank that sends most, counted and by the closed
    form of docs/context_parallel.md. What cannot run is a row with its reason. Records are appended to --out
    as they come; the CSV beside it holds them all.

    lcab bench cp --world 8 starts its processes on this machine; over several, start them by torchrun:
    torchrun --nnodes 2 --nproc-per-node 8 ... -m lcab_plugin.cli bench cp --out cp.jsonl
    """
    from lcab_plugin.bench import cp as bench
    from lcab_plugin.bench import cp_launch

    chosen_device, ranks = cp_launch.device_and_world(device, world)
    start = bench.Settings(**bench.defaults(chosen_device, ranks))
    changes: dict[str, Any] = {
        "strategies": names("--strategies", strategies),
        "layouts": names("--layouts", layouts),
        "masks": names("--masks", masks),
        "seqlens": integers("--seqlens", seqlens, ","),
        "passes": names("--passes", passes),
        "ulysses": ulysses,
        "inner_ring": inner_ring,
        "placement": placement,
        "kernel": kernel,
        "cell_seconds": cell_seconds,
        "documents": documents,
        "seed": seed,
        "baseline": baseline,
        "timeout": timeout,
        "shape": shape(start.shape, heads, head_dim, dtype, batch),
    }
    settings = options.changed(start, changes)
    path = options.records_path(out, "cp")
    records, stopped = measured(settings, path)
    if records is None:
        return
    if as_json:
        output.print_json(records)
    else:
        if records:
            _print(records, settings)
        ended(path, stopped)
    raise typer.Exit(130 if stopped else 0)


def measured(settings: Settings, path: Path, before: int = 0) -> tuple[list[Record] | None, bool]:
    """What was measured, on ranks started here or as one of torchrun's (None on all but the first), and
    whether the user stopped it. ``before``: cells that are done already."""
    from lcab_plugin.bench import cp_launch

    if cp_launch.launched_world(os.environ) is not None:
        return cp_launch.take_part(settings, path), False
    found: list[Record] = []
    try:
        with progress(settings, path, before) as (watch, done):

            def cell(record: Record) -> None:
                found.append(record)
                done()

            cp_launch.measure(settings, path, watch, cell)
    except KeyboardInterrupt:
        return found, True
    return found, False


def _print(records: list[Record], settings: Settings) -> None:
    """A table for every mask, length and pass, and the reasons of what is missing."""
    typer.echo(
        f"{settings.world} ranks, {records[0]['backend']}, threads of each: {records[0]['threads']}, kernel "
        f"{settings.kernel}, {settings.shape.heads}:{settings.shape.kv_heads} heads, head_dim "
        f"{settings.shape.head_dim}, {settings.shape.dtype}\n"
    )
    for mask, seqlen in settings.groups:
        for step in settings.passes:
            here = [r for r in records if (r["mask"], r["seqlen"], r["pass"]) == (mask, seqlen, step)]
            if not here:  # stopped before it
                continue
            order = {row: i for i, row in enumerate(settings.rows(mask))}
            here.sort(key=lambda r: order[r["strategy"], r["layout"]])
            title = f"{mask}, {seqlen} tokens, {step}"
            output.show(output.table(title, _COLUMNS, map(_row, here)))
    reasons = {(r["strategy"], r["layout"], r["status"], r["reason"]): None for r in records if r["reason"]}
    for strategy, layout, status, reason in reasons:
        typer.echo(f"{strategy}{f' {layout}' if layout else ''} {status}: {reason}")


def _row(record: Record) -> list[Text]:
    degrees = record["degrees"] or {}
    split = "x".join(str(n) for n in degrees.values()) if len(degrees) > 1 else ""
    start = [Text(f"{record['strategy']} {split}".strip(), style="bold"), Text(record["layout"] or "-")]
    if record["status"] != "ok":
        style = "bold red" if record["status"] == "error" else "yellow"
        return [*start, Text(record["status"], style=style), *(Text("-") for _ in _COLUMNS[3:])]
    mib = [None if record[n] is None else record[n] / 2**20 for n in ("sent_bytes", "closed_form_bytes")]
    numbers = [
        *((record[name], ".4g") for name in ("median_ms", "p10_ms", "p90_ms")),
        (record["repeats"], "d"),
        (record["efficiency"], ".3f"),
        (record["kernels_ms"], ".4g"),
        (record["exposed_ms"], ".3g"),
        (record["tflops_per_rank"], ".3g"),
        *((number, ".4g") for number in mib),
        (record["imbalance"], ".3f"),
        (record["peak_memory_gib"], ".3g"),
    ]
    return [*start, *(Text("-" if number is None else format(number, how)) for number, how in numbers)]
