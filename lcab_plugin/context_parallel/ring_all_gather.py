"""All-gather context parallelism (Llama 3, arXiv 2407.21783): every rank sees all keys at once.

Keys and values are gathered again in backward rather than kept, so what is saved stays O(own shard); their
gradients are reduce-scattered in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
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

# On a CPU, shards of at most so many pieces (contiguous, zigzag) travel straight to and from their places:
# gloo's collectives have whole tensors copied before and after. NCCL's own are as fast as that.
RANGES = 2


class RingAllGather:
    """Gathers keys and values along ``axis``, then runs ``inner`` once."""

    def __init__(self, inner: Operation, axis: Axis) -> None:
        self.inner, self.axis = inner, axis

    def forward(
        self, total: Softmax, q: Tensor, k: Tensor, v: Tensor, view: View, options: KernelOptions
    ) -> None:
        k, v = self._gather((k, v), view)
        self.inner.forward(total, q, k, v, self.axis.all_keys(view), options)

    def backward(self, sums: Sums, saved: Saved, view: View, options: KernelOptions) -> None:
        k, v = self._gather((saved.k, saved.v), view)
        dk, dv = sums_for(k, v)
        here = saved._replace(k=k, v=v)
        self.inner.backward((sums[0], dk, dv), here, self.axis.all_keys(view), options)
        for total, own in zip(sums[1:], self._reduce_scatter((dk.result(), dv.result()), view), strict=True):
            total.add(range(own.shape[1]), own)

    def _gather(self, tensors: Sequence[Tensor], view: View) -> Sequence[Tensor]:
        """Each ``x [b, t, h, d]`` of every rank of the axis, in ascending position."""
        if self.axis.size == 1 or self.axis.group is None:
            return tensors
        shards = _shards(self.axis, view)
        places = _places(view.keys, shards) if tensors[0].is_cpu else None
        if places is not None:
            return self._gather_in_place(tensors, places)
        padded, order, _ = _slots(view.keys, shards, tensors[0].device)
        whole = []
        for x in tensors:
            if x.shape[1] < padded:
                x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padded - x.shape[1]))
            x = collectives.all_gather(x, self.axis.group).transpose(0, 1).flatten(1, 2)
            whole.append(x if order is None else x.index_select(1, order))
        return whole

    def _gather_in_place(self, tensors: Sequence[Tensor], places: Places) -> list[Tensor]:
        """Every range of rows straight to where it belongs."""
        assert self.axis.group is not None
        own, sizes = places[self.axis.index], [len(r) for r in places[self.axis.index]]
        whole = [x.new_empty(x.shape[0], len(places) * x.shape[1], *x.shape[2:]) for x in tensors]
        for x, out in zip(tensors, whole, strict=True):
            for rows, part in zip(own, x.split(sizes, 1), strict=True):
                out[:, rows.start : rows.stop] = part
        sends = [part.contiguous() for x in tensors for part in x.split(sizes, 1)]
        parts = [[out[:, r.start : r.stop] for out in whole for r in ranges] for ranges in places]
        receives = [[collectives.landing(part) for part in ranges] for ranges in parts]
        collectives.all_to_all([sends] * len(places), receives, self.axis.group, "all_gather")
        for i, (ranges, arrived) in enumerate(zip(parts, receives, strict=True)):
            if i != self.axis.index:
                collectives.settle(ranges, arrived)
        return whole

    def _reduce_scatter(self, tensors: Sequence[Tensor], view: View) -> list[Tensor]:
        """The transpose of ``_gather``: this rank's rows of each, summed over the axis."""
        if self.axis.size == 1 or self.axis.group is None:
            return list(tensors)
        shards = _shards(self.axis, view)
        ranges = _places(view.keys, shards) if tensors[0].is_cpu else None
        if ranges is not None:
            return self._reduce_in_place(tensors, ranges)
        padded, _, places = _slots(view.keys, shards, tensors[0].device)
        reduced = []
        for x in tensors:
            x = x if places is None else x.index_select(1, places)
            own = collectives.reduce_scatter(
                x.unflatten(1, (self.axis.size, padded)).transpose(0, 1), self.axis.group
            )
            reduced.append(own[:, : sum(map(view.keys.length, shards[self.axis.index]))])
        return reduced

    def _reduce_in_place(self, tensors: Sequence[Tensor], places: Places) -> list[Tensor]:
        """Every range of rows from where it lies; what arrives is added up in the order of the ranks."""
        assert self.axis.group is not None
        mine = [torch.cat([x[:, r.start : r.stop] for r in places[self.axis.index]], 1) for x in tensors]
        sends = [[x[:, r.start : r.stop].contiguous() for x in tensors for r in ranges] for ranges in places]
        sizes = [len(r) for r in places[self.axis.index]]
        arrived = [
            [x if i == self.axis.index else torch.empty_like(x) for x in mine] for i in range(len(places))
        ]
        parts = [[part for x in from_rank for part in x.split(sizes, 1)] for from_rank in arrived]
        receives = [[collectives.landing(part) for part in of_rank] for of_rank in parts]
        collectives.all_to_all(sends, receives, self.axis.group, "reduce_scatter")
        for i in range(len(places)):
            if i != self.axis.index:
                collectives.settle(parts[i], receives[i])
        summed = arrived[0]
        for others in arrived[1:]:
            for total, x in zip(summed, others, strict=True):
                total += x
        return summed


def _shards(axis: Axis, view: View) -> tuple[tuple[int, ...], ...]:
    return tuple(axis.at(view.k_ranks, i) for i in range(axis.size))


Places = tuple[tuple[range, ...], ...]  # of every shard, where its rows lie among all of them, ascending


@lru_cache(maxsize=64)
def _places(layout: Layout, shards: tuple[tuple[int, ...], ...]) -> Places | None:
    """None where shards differ in length, which collectives pad, or are in more pieces than RANGES."""
    held = [layout.rows(ranks) for ranks in shards]
    if max(map(len, held)) > RANGES or len({sum(map(len, ranges)) for ranges in held}) > 1:
        return None
    found: list[list[range]] = [[] for _ in held]
    begin = 0
    for rows, i in sorted(
        ((r, i) for i, ranges in enumerate(held) for r in ranges), key=lambda x: x[0].start
    ):
        found[i].append(range(begin, begin + len(rows)))
        begin += len(rows)
    return tuple(map(tuple, found))


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
