"""Records as the benchmarks and training runs write them, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lcab_plugin import masks

Record = dict[str, Any]

RUN: Record = {
    "type": "run",
    "schema": 1,
    "lcab_plugin": "0.1.0",
    "torch": "2.13.0",
    "device": "a machine",
    "command": ["lcab", "bench", "kernels", "--out", "k.jsonl", "--resume"],
}
_SHAPE = {"batch": 1, "heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "fp32"}
_WHERE = {"hardware": "a machine", "torch": "2.13.0", "lcab_plugin": "0.1.0", "git": None}


def _mask(name: str, n: int) -> Record:
    mask = masks.from_name(name, n)
    return {"mask": name, "parameters": {}, "digest": mask.digest, "area": mask.area, "seqlen": n}


def kernel_cell(kernel: str, n: int, ms: float | None, **changes: Any) -> Record:
    """A cell of `lcab bench kernels`; without a time, one that is unsupported."""
    cell = {"type": "cell", "schema": 1, "kernel": kernel, **_mask("causal", n), **_SHAPE, **_WHERE}
    cell |= {"pass": "fwd", "status": "ok" if ms else "unsupported", "reason": None if ms else f"no | {n}"}
    if ms is not None:
        flops = 4 * cell["area"] * 8 * 64
        times = {"median_ms": ms, "p10_ms": ms * 0.9, "p90_ms": ms * 1.2, "repeats": 5}
        cell |= {**times, "tflops": flops / ms / 1e9, "error_out": 1e-7, "peak_memory_gib": 0.5}
    return {**cell, "time": 1.0, **changes}


def cp_cell(strategy: str, world: int, ms: float, **changes: Any) -> Record:
    """A cell of `lcab bench cp`."""
    cell = {"type": "cell", "schema": 1, "strategy": strategy, "degrees": {"ring": world}, "kernel": "naive"}
    cell |= {**_mask("causal", 1024), **_SHAPE, **_WHERE, "world": world, "backend": "gloo", "pass": "fwd"}
    cell |= {"layout": "zigzag", "status": "ok", "reason": None, "median_ms": ms, "p10_ms": ms, "p90_ms": ms}
    cell |= {"tflops_per_rank": 1 / ms, "efficiency": 0.5, "sent_bytes": 2**20, "closed_form_bytes": 2**20}
    return {**cell, "time": 1.0, **changes}


def training_run(kernel: str, losses: list[float], **changes: Any) -> list[Record]:
    """The records of a training run, with an evaluation and a recall at its end."""
    attention = {"kernel": kernel, "strategy": "none", "layout": "zigzag", "mask": "causal"}
    run = {**RUN, "command": ["examples/train_gpt.py"], "attention": attention, "name": kernel, "world": 2}
    run |= {"seqlen": 64, "global_batch": 2, "dtype": "fp32", "data_digest": "d", "model": {"layers": 2}}
    measured = {"step_ms": 10.0, "tokens_per_s": 100.0, "peak_memory_gib": 0.5, "mfu": None, "lr": 0.1}
    steps = [
        {"type": "step", "step": i, "loss": loss, "grad_norm": 1.0, "batch_digest": str(i), **measured}
        for i, loss in enumerate(losses)
    ]
    table = {"from": [0, 1, 2], "loss": [5.0, 4.0, None], "accuracy": [0.1, 0.2, None], "tokens": [2, 2, 0]}
    recall = {
        "samples": 4,
        "distance": [8, 16],
        "accuracy": [0.75, 0.5],
        "loss": [1.0, 2.0],
        "tokens": [4, 4],
    }
    memory = {"peak_rss_gib": [0.4, 0.6], "activations_gib": [None, None]}
    evaluated = {"type": "eval", "step": len(losses) - 1, "loss": 4.5, "by_document_position": table}
    end = {"type": "end", "step": len(losses) - 1, "loss": losses[-1], "recall": recall, "memory": memory}
    return [{**run, **changes}, *steps, evaluated, end]


def parity(status: str = "pass", reason: str | None = None) -> Record:
    """A comparison of one cell with its baseline."""
    cell = {"mask": "causal", "kernel": "naive", "strategy": "none", "layout": None, "role": "baseline"}
    cells = [{"name": "b", "cell": cell, "status": "pass"}]
    dev = dict.fromkeys(("loss", "loss_later", "grad_norm", "grad_norm_later", "gradient"), 1e-07)
    other = {**cell, "kernel": "triton", "role": None}
    cells.append({"name": "c", "cell": other, "status": status, "reason": reason, "deviations": dev})
    settings = {"world": 2, "steps": 3, "dtype": "fp32"}
    return {"settings": settings, "passed": status == "pass", "environment": dict(RUN), "cells": cells}


def write(path: Path, lines: list[Record]) -> Path:
    """A file of records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
