"""The part of `lcab bench kernels`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from lcab_plugin.bench.cells import PASSES, mask_label
from lcab_plugin.report import grids
from lcab_plugin.report.grids import Quantity
from lcab_plugin.report.section import Heading, Section, Text
from lcab_plugin.report.sources import latest
from lcab_plugin.report.tables import listing
from lcab_plugin.training.schema import Record

IDENTITY = (
    *("kernel", "mask", "parameters", "digest", "seqlen", "batch", "heads", "kv_heads", "head_dim"),
    *("dtype", "pass", "hardware"),
)
_ERRORS = ("error_out", "error_dq", "error_dk", "error_dv")
COLUMNS = {
    "kernel": "kernel",
    "version": "version",
    "mask": "mask",
    "seqlen": ">tokens",
    "pass": "pass",
    "dtype": "dtype",
    "status": "status",
    "reason": "reason",
    "median_ms": ">median ms",
    "p10_ms": ">p10 ms",
    "p90_ms": ">p90 ms",
    "repeats": ">repeats",
    "relative_ci": ">relative ci",
    "tflops": ">TFLOP/s",
    "ns_per_1000_cells": ">ns/1000 pairs",
    "ratio": ">time/baseline",
    "peak_memory_gib": ">peak GiB",
    "peak_reserved_gib": ">reserved GiB",
    "peak_rss_gib": ">resident GiB",
    "error_out": ">error out",
    "error_dq": ">error dq",
    "error_dk": ">error dk",
    "error_dv": ">error dv",
    "hardware": "hardware",
    "torch": "torch",
    "git": "commit",
}


def worst_error(record: Record) -> float | None:
    """The largest deviation from float64 of a cell's results."""
    return max((e for name in _ERRORS if (e := record.get(name)) is not None), default=None)


def _tflops(record: Record) -> float | None:
    return record.get("tflops")


SPEED = Quantity("TFLOP/s", _tflops, band=grids.per_time(_tflops))
MEMORY = Quantity("peak GiB", lambda r: r.get("peak_memory_gib"), better=-1, log=10)
RESIDENT = Quantity("peak GiB", lambda r: r.get("peak_rss_gib"), better=-1)
ERROR = Quantity("relative error", worst_error, better=0)
PASS_WORDS = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward and backward"}


def shape_words(record: Record) -> str:
    """Where and on what a cell was measured."""
    return (
        f"{record['hardware']}, {record['heads']}:{record['kv_heads']} heads, head_dim {record['head_dim']}, "
        f"{record['dtype']}, batch {record['batch']}"
    )


def section(found: Iterable[Record]) -> Section:
    """Of the cells of all files."""
    cells = [{**r, "mask": mask_label(r["mask"], r.get("parameters") or {})} for r in latest(found, IDENTITY)]
    made = Section("kernels", "Kernels")
    made.blocks.append(
        Text(
            "One device, the public attention call. TFLOP/s count the exact area of the mask, so a kernel "
            "that computes hidden pairs is slower by them."
        )
    )
    style = grids.styles(sorted(r["kernel"] for r in cells))
    cells.sort(key=lambda r: (shape_words(r), list(PASSES).index(r["pass"]) if r["pass"] in PASSES else 9))
    for i, (words, of_shape) in enumerate(groupby(cells, shape_words), start=1):
        made.blocks.append(Heading(words))
        for step, group in groupby(list(of_shape), lambda r: r["pass"]):
            _add_pass(made, f"kernels-{i}-{step.replace('+', '-')}", step, list(group), style)
    made.blocks.append(listing("kernels-cells", f"All {len(cells)} cells", COLUMNS, cells))
    return made


def _add_pass(made: Section, name: str, step: str, cells: Sequence[Record], style: dict[str, int]) -> None:
    """Matrices and charts of one pass of one shape."""
    words, cells = PASS_WORDS.get(step, step), grids.by_mask(cells, _kernel)
    by_length: dict[int, list[Record]] = {}
    for cell in cells:
        by_length.setdefault(cell["seqlen"], []).append(cell)
    lengths = sorted(by_length, key=lambda n: (len({r["mask"] for r in by_length[n]}), n), reverse=True)
    grid = grids.Grid(_mask, _kernel)
    for n in lengths:
        table = grids.matrix(f"{name}-{n}", f"TFLOP/s, {words}, {n} tokens", by_length[n], grid, SPEED)
        table.folded = n != lengths[0]
        made.blocks.append(table)
    made.figure(
        grids.panels(cells, _mask, _kernel, "seqlen", SPEED, style),
        f"Throughput, {words}; the band of a line is the 10th to the 90th percentile",
    )
    memory = grids.panels(cells, _mask, _kernel, "seqlen", MEMORY, style)
    made.figure(memory, f"Peak device memory, {words}")
    if not memory:
        resident = grids.panels(cells, _mask, _kernel, "seqlen", RESIDENT, style)
        made.figure(resident, f"Peak memory resident on the host, all of the process, {words}")
    caption = f"Largest relative error against float64 over all lengths, {words}"
    made.blocks.append(grids.matrix(f"{name}-errors", caption, worst(cells, _kernel), grid, ERROR))


def _mask(record: Record) -> str:
    return record["mask"]


def _kernel(record: Record) -> str:
    return record["kernel"]


def worst(cells: Iterable[Record], line: grids.Name) -> list[Record]:
    """Of every line and mask the cell with the largest error; one that was not measured if none was."""
    kept: dict[tuple[str, str], Record] = {}
    for cell in cells:
        at = line(cell), cell["mask"]
        if at not in kept or (worst_error(cell) or -1.0) > (worst_error(kept[at]) or -1.0):
            kept[at] = cell
    return list(kept.values())
