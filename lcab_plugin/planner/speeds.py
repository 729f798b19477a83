"""How fast a kernel does its work: eight costs for each pass, fitted to records or assumed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lcab_plugin.planner.hardware import HARDWARE, Hardware
from lcab_plugin.planner.shape import ITEMSIZE, Model
from lcab_plugin.planner.work import Work

Floats = NDArray[np.float64]

PASSES = {"fwd": 1.0, "bwd": 2.5}  # FLOPs over the forward's: five products to two

# What is fitted, and its unit: seconds of a launch, of a native call; seconds a FLOP computed, seconds more a
# FLOP that the mask hides, seconds a FLOP of the segments' rectangles beyond; seconds a byte of q, k, v and
# out, and of rows copied or merged; seconds a cell computed, whatever the head_dim: its exponential.
COSTS = ("launch", "call", "computed", "hidden", "outside", "tensors", "moved", "cells")

# Taken where a kernel was never measured: shares of the peak within those of the kernels measured on an H100
# (docs/results/2026-11-23-h100: 0.35 to 0.60 forward, 0.29 to 0.48 backward), 30 us a call.
ASSUMED_SHARE, ASSUMED_CALL = {"fwd": 0.45, "bwd": 0.35}, 30e-6


@dataclass(frozen=True)
class Heads:
    """The heads a kernel call has, and of what."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @classmethod
    def of(cls, model: Model) -> Heads:
        """Of a model's attention, all of them."""
        return cls(1, model.heads, model.kv_heads, model.head_dim, model.itemsize)


@dataclass(frozen=True)
class Speed:
    """Costs of a kernel, in the order of ``COSTS``, by pass; ``origin``: measured, scaled or assumed."""

    fwd: tuple[float, ...]
    bwd: tuple[float, ...]
    origin: str

    def seconds(self, step: str, work: Work, heads: Heads) -> float:
        """Of one kernel call that does ``work`` in every head; 0 where nothing is visible."""
        if not work.area:
            return 0.0
        amounts = features(step, work, heads)
        return sum(cost * amount for cost, amount in zip(getattr(self, step), amounts, strict=True))

    def scaled(self, compute: float, stream: float, origin: str) -> Speed:
        """On a device that computes ``compute`` times as fast and moves bytes ``stream`` times as fast."""
        by = np.array([1, 1, compute, compute, compute, stream, stream, compute])
        fwd, bwd = (tuple((np.array(costs) / by).tolist()) for costs in (self.fwd, self.bwd))
        return replace(self, fwd=fwd, bwd=bwd, origin=origin)


def features(step: str, work: Work, heads: Heads) -> tuple[float, ...]:
    """Amounts of ``COSTS``."""
    flops = 4 * heads.batch * heads.heads * heads.head_dim * PASSES[step]
    row = heads.batch * heads.head_dim * heads.itemsize
    return (
        1.0,
        work.calls,
        work.computed * flops,
        (work.computed - work.area) * flops,
        work.outside * flops,
        2 * (work.rows * heads.heads + work.keys * heads.kv_heads) * row,
        work.moved * heads.heads * row,
        work.computed * heads.batch * heads.heads,
    )


def assumed(hardware: Hardware, dtype: str) -> Speed:
    """Of a kernel that nobody measured."""

    def costs(step: str) -> tuple[float, ...]:
        flop = 1 / (ASSUMED_SHARE[step] * hardware.peak_of(dtype))
        return 0.0, ASSUMED_CALL, flop, 0.0, 0.0, 1 / hardware.stream, 1 / hardware.stream, 0.0

    return Speed(costs("fwd"), costs("bwd"), "assumed")


def table(hardware: Hardware, dtype: str, fitted: dict[str, Speed] | None = None) -> dict[str, Speed]:
    """The speed of every kernel somebody measured: those ``fitted`` to records of this hardware, else what
    ships here, of this hardware or scaled from another GPU by peak and memory bandwidth."""
    from lcab_plugin.planner.measured import MEASURED  # made of Speeds

    made: dict[str, Speed] = {}
    if hardware.device == "cuda" and ITEMSIZE[dtype] == 2:
        for gpu, speeds in MEASURED.items():
            base = HARDWARE[gpu]
            compute, stream = hardware.peak / base.peak, hardware.stream / base.stream
            if compute == stream == 1:
                made |= speeds
                continue
            for name, speed in speeds.items():
                made.setdefault(name, speed.scaled(compute, stream, f"{gpu}'s scaled to {hardware.name}"))
    return made | (fitted or {})


def least_squares(amounts: Floats, seconds: Floats) -> Floats:
    """Costs >= 0 whose predictions are nearest to ``seconds`` in relative error, outliers counting by their
    distance and not its square (iteratively reweighted; Lawson and Hanson's active sets inside).

    ``amounts``: [records, costs], ``seconds``: [records].
    """
    relative = amounts / seconds[:, None]
    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0] = 1.0
    relative = relative / scale
    weight = np.ones(len(seconds))
    for _ in range(8):
        costs = _nonnegative(relative * weight[:, None], weight)
        weight = 1 / np.sqrt(np.maximum(np.abs(relative @ costs - 1), 0.03))
    return costs / scale


def _nonnegative(a: Floats, b: Floats) -> Floats:
    """The ``x >= 0`` that minimises ``|a x - b|``."""
    n = a.shape[1]
    x, free = np.zeros(n), np.zeros(n, dtype=bool)
    for _ in range(3 * n):
        gradient = np.where(free, -np.inf, a.T @ (b - a @ x))
        if gradient.max() <= 1e-10 * np.abs(a.T @ b).max():
            break
        free[gradient.argmax()] = True
        x = _inside(a, b, x, free)
    return x


def _inside(a: Floats, b: Floats, x: Floats, free: NDArray[np.bool_]) -> Floats:
    """The least squares over the ``free`` ones, of which those that would fall below 0 are taken out."""
    while free.any():
        best = np.zeros_like(x)
        best[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        falling = free & (best <= 0)
        if not falling.any():
            return best
        step = float((x[falling] / np.maximum(x[falling] - best[falling], 1e-300)).min())
        x = x + step * (best - x)
        free &= x > 1e-14 * max(float(x.max()), 1e-300)
        x = np.where(free, x, 0.0)
    return np.zeros_like(x)
