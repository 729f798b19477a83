"""The records of `lcab bench kernels`, one a cell (kernel, mask, length, pass), and how every benchmark's
records are read and become a CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lcab_plugin.training import records

SCHEMA = records.SCHEMA  # the log's own: a reader checks one number

Record = dict[str, Any]

# FLOPs of a pass over the forward's, 4 x area x heads x head_dim: the backward has five products to two.
PASSES = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}

# What a cell was asked to be, then how it ended, then what was measured, then where.
_IDENTITY = (
    "kernel",
    "mask",
    "parameters",
    "digest",
    "seqlen",
    "batch",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
    "pass",
    "hardware",
)
FIELDS = (
    "schema",
    "kernel",
    "version",
    "backend",
    "mask",
    "parameters",
    "digest",
    "area",
    "fraction",
    "computed",
    "seqlen",
    "batch",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
    "pass",
    "status",
    "reason",
    "fatal",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "min_ms",
    "repeats",
    "relative_ci",
    "tflops",
    "ns_per_1000_cells",
    "relative_to_causal",
    "causal_in_turn",
    "baseline",
    "ratio",
    "peak_memory_gib",
    "peak_reserved_gib",
    "peak_rss_gib",
    "peak_memory_note",
    "error_out",
    "error_dq",
    "error_dk",
    "error_dv",
    "error_samples",
    "host_us",
    "first_call_s",
    "noise_empty_ms",
    "noise_same_relative",
    "hardware",
    "torch",
    "lcab_plugin",
    "git",
    "date",
)


def key(record: Record, identity: Sequence[str] = _IDENTITY) -> tuple[Any, ...]:
    """What makes two records the same cell."""
    values = (record[name] for name in identity)
    return tuple(json.dumps(x, sort_keys=True) if isinstance(x, dict) else x for x in values)


def mask_label(mask: str, parameters: Record) -> str:
    """A mask as tables and charts call it: its family, of block_sparse with the block and the kept share."""
    if mask != "block_sparse" or parameters.get("block") is None:
        return mask
    return f"{mask} block {parameters['block']} keep {parameters['keep']:g}"


def settled(record: Record) -> bool:
    """Whether a resumed run leaves the cell alone: it was measured, or it took the device down with it."""
    return record["status"] == "ok" or bool(record.get("fatal"))


def read(path: Path, identity: Sequence[str] = _IDENTITY) -> list[Record]:
    """The cells of a file, of each the latest; none where there is no file.

    Raises:
        LcabError: a line is no record.
    """
    if not path.exists():
        return []
    latest = {key(r, identity): r for r in records.read(path) if r["type"] == "cell"}
    return list(latest.values())


def write_csv(cells: Iterable[Record], path: Path, fields: Sequence[str] = FIELDS) -> None:
    """One row a cell; None is an empty field, what holds several values (parameters, degrees) is JSON."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        for cell in cells:
            several = {name: json.dumps(x) for name, x in cell.items() if isinstance(x, (dict, list))}
            writer.writerow({**cell, **several})
    beside.replace(path)


def rates(step: str, median_ms: float, pairs: int, head_dim: int) -> Record:
    """``tflops`` (TFLOP/s) over the visible ``pairs`` of all heads, and ``ns_per_1000_cells``: the time of
    1000 of them, by which masks of different area compare."""
    if not pairs or not median_ms:
        return {"tflops": None, "ns_per_1000_cells": None}
    flops = 4 * pairs * head_dim * PASSES[step]
    return {"tflops": flops / (median_ms * 1e9), "ns_per_1000_cells": median_ms * 1e9 / pairs}
