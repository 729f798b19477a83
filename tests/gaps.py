"""What each kernel declares it cannot do, over the product of the tables, library installed or not.

Asked on tensors of the CPU and on tensors that say they are an H100's and hold nothing, so that every machine
finds the same list. It is committed as ``tests/kernels/gaps.json``: a gap that is new or gone is a change
that a reader of the diff sees.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from cases import N, families
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lcab_plugin import kernels, masks
from lcab_plugin.kernels import KernelOptions
from lcab_plugin.kernels.contract import Kernel

FILE = Path(__file__).parent / "kernels" / "gaps.json"
UPDATE = "python -m pytest tests/kernels/test_conformance.py -k declared_gaps --update-gaps"

MASKS = families() | {"half of the rows": masks.causal(N).local([range(N // 2, N)], [range(N)])}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (16, 32, 64, 96, 128, 192, 256)
HEADS = ((4, 4), (8, 2), (4, 1))
CALLS: dict[str, dict[str, Any]] = {
    "forward": {},
    "backward": {"needs_backward": True},
    "deterministic backward": {"needs_backward": True, "deterministic": True},
    "soft cap": {"softcap": 30.0},
    "half the value head_dim": {"narrow": True, "needs_backward": True},
}
AXES = {
    "masks": tuple(MASKS),
    "dtypes": tuple(str(d).removeprefix("torch.") for d in DTYPES),
    "head_dims": HEAD_DIMS,
    "heads": tuple(f"{h}:{kv}" for h, kv in HEADS),
    "calls": tuple(CALLS),
}
# for tensors larger than the product's
LARGE = "cuDNN's backward indexes with 32 bits, and a tensor of this call has 2^31 elements or more"
BESIDES = {
    "flex": {"FlexAttention indexes with 32 bits, and a tensor of this call spans 2^31 elements or more"},
    "cudnn": {LARGE},
    "sdpa_cudnn": {LARGE},
}
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=85_000_000_000,
    shared_memory_per_block_optin=232_448,
)


class Cell(NamedTuple):
    """One point of the product, in the order of ``AXES``."""

    mask: str
    dtype: str
    head_dim: int
    heads: str
    call: str


Gaps = dict[str, dict[str, list[dict[str, Any]]]]


def declared() -> Gaps:
    """``{kernel: {device: [gap, ...]}}`` of this package's kernels; without a gap a device's list is empty.

    A gap: its reason, how many cells of the product give it, and the values of every axis that occur among
    them (left out where all do).
    """
    return {name: {d: _gaps(kernels.get(name), d) for d in ("cpu", "cuda")} for name in kernels._TABLE}


def reasons(kernel: str, device: str) -> set[str]:
    """The committed reasons of a kernel, and those outside of the product."""
    return {gap["reason"] for gap in json.loads(FILE.read_text())[kernel][device]} | BESIDES.get(
        kernel, set()
    )


def template(reason: str, q: Tensor, v: Tensor) -> str:
    """A reason without the values of its call, so that one gap is one line; limits it names stay."""
    values = {"dtype": str(q.dtype).removeprefix("torch."), "head_dim": q.shape[-1]}
    if v.shape[-1] != q.shape[-1]:
        reason = re.sub(rf"\b(value head_dim|not) {v.shape[-1]}\b", r"\1 <value head_dim>", reason)
    for name, value in values.items():
        reason = re.sub(rf"(?<!value )\b(head_dim|not|query's) {value}\b", rf"\1 <{name}>", reason)
    return reason


def supported(kernel: Kernel, device: str) -> list[Cell]:
    """The cells a kernel does not refuse on the CPU's or on an H100's tensors."""
    return [cell for cell, reason in _answers(kernel, device) if reason is None]


def _gaps(kernel: Kernel, device: str) -> list[dict[str, Any]]:
    found: dict[str, list[Cell]] = {}
    for cell, reason in _answers(kernel, device):
        if reason is not None:
            found.setdefault(reason, []).append(cell)
    return [_summary(reason, cells) for reason, cells in found.items()]


def _answers(kernel: Kernel, device: str) -> Iterator[tuple[Cell, str | None]]:
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=(H100.major, H100.minor)),
        mock.patch("torch.cuda.get_device_name", return_value=H100.name),
        mock.patch("torch.cuda.get_device_properties", return_value=H100),
    ):
        for cell, arguments in _product(device):
            reason = kernel.unsupported(*arguments)
            yield cell, None if reason is None else template(reason, arguments[0], arguments[2])


@cache
def _product(device: str) -> list[tuple[Cell, tuple[Any, ...]]]:
    """(cell, arguments of ``unsupported``) of every cell."""
    cells = []
    for (dtype, dt), dim, (heads, hs) in itertools.product(
        zip(AXES["dtypes"], DTYPES, strict=True), HEAD_DIMS, zip(AXES["heads"], HEADS, strict=True)
    ):
        for mask, m in MASKS.items():
            q, k, v, narrow = _tensors(device, dt, dim, hs, m.q_len)
            for call, asked in CALLS.items():
                options = KernelOptions(dim**-0.5, asked.get("softcap"), asked.get("deterministic", False))
                value = narrow if "narrow" in asked else v
                arguments = (q, k, value, m, options, asked.get("needs_backward", False))
                cells.append((Cell(mask, dtype, dim, heads, call), arguments))
    return cells


@cache
def _tensors(device: str, dtype: torch.dtype, dim: int, heads: tuple[int, int], q_len: int) -> list[Tensor]:
    """q, k, v and a narrow v, whose values nobody reads."""
    shapes = [(1, q_len, heads[0], dim), *((1, N, heads[1], d) for d in (dim, dim, dim // 2))]
    if device == "cpu":
        return [torch.empty(s, dtype=dtype) for s in shapes]
    with FakeTensorMode():
        return [torch.empty(s, dtype=dtype, device=device) for s in shapes]


def _summary(reason: str, cells: list[Cell]) -> dict[str, Any]:
    summary: dict[str, Any] = {"reason": reason, "cells": len(cells)}
    for axis, at, values in zip(AXES, zip(*cells, strict=True), AXES.values(), strict=True):
        occurring = [value for value in values if value in at]
        if len(occurring) < len(values):
            summary[axis] = occurring
    return summary


def write(gaps: Gaps) -> None:
    """One gap a line, so that a diff shows which."""
    lines = []
    for kernel, devices in gaps.items():
        parts = []
        for device, found in devices.items():
            rows = ",\n   ".join(json.dumps(gap, ensure_ascii=False) for gap in found)
            parts.append(f'  "{device}": [\n   {rows}\n  ]' if found else f'  "{device}": []')
        lines.append(f' "{kernel}": {{\n' + ",\n".join(parts) + "\n }")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def difference(committed: Gaps, found: Gaps) -> list[str]:
    """What changed, one sentence a gap."""
    out = []
    for name in sorted({*committed, *found}):
        for device in ("cpu", "cuda"):
            old, new = (
                {json.dumps(g) for g in side.get(name, {}).get(device, [])} for side in (committed, found)
            )
            out += [f"{name} on {device}: new gap {gap}" for gap in sorted(new - old)]
            out += [f"{name} on {device}: no longer {gap}" for gap in sorted(old - new)]
    return out
