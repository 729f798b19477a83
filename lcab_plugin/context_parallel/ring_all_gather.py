"""All-gather context parallelism (Llama 3, arXiv 2407.21783): every rank sees all keys at once.

Keys and values are gathered again in backward rather than kept, so what is saved stays O(own shard); their
gradients are reduce-scattered in float32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.gradients import sums_for
from lcab_plugin.context_parallel.topology import Axis
from lcab_plugin.kernels.contract import KernelOptions
from lcab_plugin.kernels.merge import Softmax
from lcab_plugin.layout import Layout, View
from lcab_plugin.operation import Operation, Saved, Sums


class RingAllGather:
    """Gathers keys and values along ``axis``, then runs ``inner`` once."""

    def __init__(self, inner: Operation, axis: Axis) -> None:
        self.inner, self.axis = inner, axis

    def forward(
        self, total: Softmax, q: Tensor, k: Tensor, v: Tensor, view: View, options: KernelOptions
    ) -> None:
        k, v = self._gather(k, view), self._gather(v, view)
        self.inner.forward(total, q, k, v, self.axis.all_keys(view), options)

    def backward(self, sums: Sums, saved: Saved, view: View, options: KernelOptions) -> None:
        k, v = self._gather(saved.k, view), self._gather(saved.v, view)
        dk, dv = sums_for(k, v)
        here = saved._replace(k=k, v=v)
        self.inner.backward((sums[0], dk, dv), here, self.axis.all_keys(view), options)
        for total, grad in zip(sums[1:], (dk, dv), strict=True):
            own = self._reduce_scatter(grad.result(), view)
            total.add(range(own.shape[1]), own)

    def _gather(self, x: Tensor, view: View) -> Tensor:
        """``x [b, t, h, d]`` of every rank of the axis, in ascending position."""
        if self.axis.size == 1 or self.axis.group is None:
            return x
        padded, order, _ = _slots(view.keys, _shards(self.axis, view), x.device)
        if x.shape[1] < padded:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padded - x.shape[1]))
        x = collectives.all_gather(x, self.axis.group).transpose(0, 1).flatten(1, 2)
        return x if order is None else x.index_select(1, order)

    def _reduce_scatter(self, x: Tensor, view: View) -> Tensor:
        """The transpose of ``_gather``: this rank's rows of ``x``, summed over the axis."""
        if self.axis.size == 1 or self.axis.group is None:
            return x
        shards = _shards(self.axis, view)
        padded, _, places = _slots(view.keys, shards, x.device)
        if places is not None:
            x = x.index_select(1, places)
        own = collectives.reduce_scatter(
            x.unflatten(1, (self.axis.size, padded)).transpose(0, 1), self.axis.group
        )
        return own[:, : sum(map(view.keys.length, shards[self.axis.index]))]


def _shards(axis: Axis, view: View) -> tuple[tuple[int, ...], ...]:
    return tuple(axis.at(view.k_ranks, i) for i in range(axis.size))


@lru_cache(maxsize=64)
def _slots(
    layout: Layout, shards: tuple[tuple[int, ...], ...], device: torch.device
) -> tuple[int, Tensor | None, Tensor | None]:
    """Rows every shard is padded to; the padded row of each position in ascending order; and which position
    in that order every padded row has, any where it is padding, which nobody reads. None and None where the
    padded rows are in order already."""
    positions = [
        torch.cat([torch.arange(r.start, r.stop) for r in layout.rows(ranks)] or [torch.empty(0).long()])
        for ranks in shards
    ]
    padded = max(map(len, positions))
    slots = torch.cat([i * padded + torch.arange(len(p)) for i, p in enumerate(positions)])
    order = slots[torch.cat(positions).argsort()]
    if len(order) == padded * len(shards) and bool((order[1:] > order[:-1]).all()):
        return padded, None, None
    places = torch.zeros(padded * len(shards), dtype=torch.int64)
    places[order] = torch.arange(len(order))
    return padded, order.to(device), places.to(device)
