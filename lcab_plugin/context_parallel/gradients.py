"""Gradients of keys and values: where they are summed, and the group over which they go home."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.collectives import Group
from lcab_plugin.context_parallel.topology import Axis
from lcab_plugin.kernels.contract import accumulation_dtype
from lcab_plugin.kernels.merge import RowSum


@dataclass(frozen=True)
class TwoWayAxis(Axis):
    """An axis with a second group of its ranks, over which gradients travel while keys do over the first:
    NCCL runs what is sent over one communicator one after another, so keys would wait behind gradients."""

    home: Group | None = None


def home(axis: Axis) -> Group | None:
    """The group that gradients travel over along ``axis``; None where it is the keys' own."""
    return axis.home if isinstance(axis, TwoWayAxis) else None


def with_homes(axes: dict[str, Axis], names: Iterable[str]) -> dict[str, Axis]:
    """The same axes, those called ``names`` with a second group. Collective over the world, once."""
    out = dict(axes)
    for name in names:
        axis = axes[name]
        if axis.size > 1:
            second = collectives.beside(axis.group, f"{name}, gradients")
            out[name] = TwoWayAxis(axis.name, axis.size, axis.stride, axis.index, axis.group, second)
    return out


def sums_for(*tensors: Tensor) -> list[RowSum]:
    """A sum for the gradient of each tensor, in the dtype of accumulation; it has no memory of its own until
    it needs some: a kernel's gradient of a whole block is taken as it is."""
    return [
        RowSum(torch.empty(1, dtype=accumulation_dtype(x.dtype), device=x.device).expand(x.shape))
        for x in tensors
    ]
