"""Group cast (MagiAttention, arXiv 2505.13211): each rank receives only the key/value rows its queries see.

Every rank reads from mask and layout who needs which rows, so nothing is negotiated. The peers are dealt to
stages by their distance along the axis; a stage is one uneven all-to-all, begun before the block in front of
it is computed, and this rank's own keys are the first block. Received rows are not kept for backward, which
asks for them again and sends their gradients home, in the dtype of accumulation, the same way (group reduce).

Blocks have a price: each is launched, their softmaxes are merged and their gradients of the queries added up,
over as much memory as the queries take. Where little arrives there is one stage, awaited, and one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lcab_plugin.context_parallel.collectives import AllToAllExchange
from lcab_plugin.context_parallel.gradients import home, sums_for
from lcab_plugin.context_parallel.topology import Axis
from lcab_plugin.kernels.contract import KernelOptions, accumulation_dtype
from lcab_plugin.kernels.merge import RowSum, Softmax
from lcab_plugin.layout import Layout, View
from lcab_plugin.masks import AttentionMask
from lcab_plugin.masks.geometry import Ints, expand, runs
from lcab_plugin.operation import Operation, Saved, Sums

STAGES = 2  # a transfer to hide behind the own keys and one behind the first; more cost more, smaller blocks
SHARDS = 4  # rows of one stage, in whole shards: what bounds the memory where a mask needs almost everything
# Bytes that arrive at a rank over those of its queries, at most, for which waiting is less than merging: an
# H100 merges a query's row in about the time in which NVLink brings a third as many bytes.
AT_ONCE = 0.25
# And bytes that NVLink brings in 40 us: a block more, its kernel aside, takes the host 100 us and more.
FEW = 8 * 2**20


class GroupCast:
    """Group cast along ``axis`` around ``inner``, a ``Local``: what arrives is no rank's whole rows, so an
    operation that moves keys by rank cannot stand inside. Two stages' rows live at a time; ``stages`` is how
    many there are at most, None for as many as keep them within a few shards."""

    def __init__(self, inner: Operation, axis: Axis, stages: int | None = None) -> None:
        self.inner, self.axis, self.stages = inner, axis, stages

    def forward(
        self, total: Softmax, q: Tensor, k: Tensor, v: Tensor, view: View, options: KernelOptions
    ) -> None:
        cast = self._cast(q, k, v, view)
        cast.start(0)
        if cast.at_once:
            key, value, rows = cast.joined(view)
            self.inner.forward(total, q, key, value, rows, options)  # type: ignore[arg-type]
            return
        self.inner.forward(total, q, k, v, view, options)
        for i, stage in enumerate(cast.stages):
            key, value = cast.wait(i)
            cast.start(i + 1)
            if stage.keys:
                rows = _Rows(view, stage.keys)
                self.inner.forward(total, q, key, value, rows, options)  # type: ignore[arg-type]

    def backward(self, sums: Sums, saved: Saved, view: View, options: KernelOptions) -> None:
        cast = self._cast(saved.q, saved.k, saved.v, view)
        if not cast.stages:
            self.inner.backward(sums, saved, view, options)
            return
        way_home = _Reduce(self.axis, cast.stages, sums)
        if cast.at_once:
            cast.start(0)
            key, value, rows = cast.joined(view)
            grads = sums_for(key, value)
            parts = sums[0], grads[0], grads[1]
            self.inner.backward(parts, saved._replace(k=key, v=value), rows, options)  # type: ignore[arg-type]
            own, arrived = zip(*(cast.apart(grad.result()) for grad in grads), strict=True)
            way_home.start(0, arrived)
            for total, grad in zip(sums[1:], own, strict=True):
                total.add(range(grad.shape[1]), grad)
            way_home.wait(0)
            return
        mine = _zeros(saved.k, saved.v)
        # a part of the own keys hides the first arrival, the other the last gradients' way home
        before, after = _halves(view.keys.rows(view.k_ranks))
        split = sum(map(len, before))

        def block(k: Tensor, v: Tensor, keys: tuple[range, ...], grads: Sequence[RowSum]) -> None:
            if keys:
                parts = sums[0], grads[0], grads[1]
                here = saved._replace(k=k, v=v)
                self.inner.backward(parts, here, _Rows(view, keys), options)  # type: ignore[arg-type]

        cast.start(0)
        block(saved.k[:, split:], saved.v[:, split:], after, [RowSum.into(x[:, split:]) for x in mine])
        for i, stage in enumerate(cast.stages):
            k, v = cast.wait(i)
            cast.start(i + 1)
            grads = sums_for(k, v)
            block(k, v, stage.keys, grads)
            if i > 0:
                way_home.wait(i - 1)
            way_home.start(i, [grad.result() for grad in grads])
        block(saved.k[:, :split], saved.v[:, :split], before, [RowSum.into(x[:, :split]) for x in mine])
        for total, grad in zip(sums[1:], mine, strict=True):
            total.add(range(grad.shape[1]), grad)
        way_home.wait(len(cast.stages) - 1)

    def _cast(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> _Cast:
        if self.stages is None and at_once(
            most_arriving(self.axis, view) * (_width(k) + _width(v)) * k.element_size(),
            fewest_queries(self.axis, view) * _width(q) * q.element_size(),
        ):
            return _Cast(self.axis, plan(self.axis, view, 1), k, v, at_once=True)
        return _Cast(self.axis, plan(self.axis, view, self.stages), k, v)


def at_once(arriving: float, queries: float) -> bool:
    """Whether to await all keys and compute one block, by the bytes that arrive and those of the queries."""
    return arriving <= max(FEW, AT_ONCE * queries)


def _zeros(*like: Tensor) -> list[Tensor]:
    """Where gradients of tensors like these are summed."""
    return [torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in like]


def _halves(rows: tuple[range, ...]) -> tuple[tuple[range, ...], tuple[range, ...]]:
    """``rows`` in two, between the two ranges nearest the middle; one range alone is cut there."""
    if len(rows) == 1:
        middle = rows[0].start + len(rows[0]) // 2
        rows = range(rows[0].start, middle), range(middle, rows[0].stop)
    ends = np.cumsum([len(r) for r in rows])
    cut = int(np.abs(2 * ends - ends[-1:]).argmin()) + 1 if len(rows) else 0
    return rows[:cut], rows[cut:]


@dataclass(frozen=True)
class _Rows:
    """The queries of ``view`` against the key rows ``keys`` alone."""

    view: View
    keys: tuple[range, ...]

    def local(self) -> AttentionMask:
        return self.view.mask.local(self.view.layout.rows(self.view.q_ranks), self.keys)


@dataclass(frozen=True)
class Stage:
    """One uneven all-to-all of one rank; ``peer`` counts along the axis.

    Attributes:
        sends: per peer, the ranges of this rank's local rows that it needs, ascending; of one range are rows
            that stand together on both sides.
        receives: per peer, the lengths of the ranges that arrive from it, ascending in position.
        order: of the arriving ranges, counted peer by peer, those that ascend in position.
        keys: the global positions of the arriving rows, ascending.
    """

    sends: tuple[tuple[range, ...], ...]
    receives: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    keys: tuple[range, ...]


class _Cast:
    """K/V rows on their way to the ranks that need them."""

    def __init__(
        self, axis: Axis, stages: tuple[Stage, ...], k: Tensor, v: Tensor, *, at_once: bool = False
    ) -> None:
        self.stages, self._tensors = stages, (k, v)
        self.at_once = at_once and bool(stages)  # what arrives and what is here is one block
        self._places: list[tuple[int, int, int, range]] = []  # of that block
        self._exchange: AllToAllExchange | None = None
        if stages and axis.group is not None:
            self._exchange = AllToAllExchange(axis.group, "keys and values", len(stages))

    def start(self, i: int) -> None:
        if self._exchange is not None and i < len(self.stages):
            stage = self.stages[i]
            width = sum(_width(x) for x in self._tensors)
            parts = [x[:, r.start : r.stop] for rows in stage.sends for r in rows for x in self._tensors]
            self._exchange.start(
                _flat(parts, self._tensors[0]),
                [width * sum(map(len, rows)) for rows in stage.sends],
                [width * sum(lengths) for lengths in stage.receives],
            )

    def wait(self, i: int) -> tuple[Tensor, Tensor]:
        """The rows of stage ``i``, ``[b, rows, h, d]``, ascending in position."""
        assert self._exchange is not None
        stage = self.stages[i]
        lengths = [n for peer in stage.receives for n in peer]
        keys, values = _unflat(self._exchange.wait(), lengths, self._tensors)
        key, value = (
            torch.cat([parts[at] for at in stage.order], 1)
            if len(parts) > 1
            else (parts[0] if parts else x[:, :0])
            for parts, x in zip((keys, values), self._tensors, strict=True)
        )
        return key, value

    def joined(self, view: View) -> tuple[Tensor, Tensor, _Rows]:
        """The rows of the only stage and the own ones, ascending in position."""
        arrived, self._places = self.wait(0), _places(view.keys.rows(view.k_ranks), self.stages[0].keys)
        key, value = (
            torch.cat([(own, other)[at][:, a:b] for at, a, b, _ in self._places] or [own], 1)
            for own, other in zip(self._tensors, arrived, strict=True)
        )
        return key, value, _Rows(view, tuple(rows for *_, rows in self._places))

    def apart(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as `joined` gave them: the own ones, and those that arrived."""
        pieces = joined.split([b - a for _, a, b, _ in self._places], 1)
        own, arrived = (
            [piece for piece, place in zip(pieces, self._places, strict=True) if place[0] == side]
            for side in (0, 1)
        )
        return torch.cat(own or [joined[:, :0]], 1), torch.cat(arrived or [joined[:, :0]], 1)


def _places(own: Sequence[range], arrived: Sequence[range]) -> list[tuple[int, int, int, range]]:
    """Of every range of positions, ascending: whether it was here (0) or arrived (1), its first row there and
    the one after its last, and its positions."""
    found = []
    for at, ranges in enumerate((own, arrived)):
        begin = 0
        for rows in ranges:
            found.append((at, begin, begin + len(rows), rows))
            begin += len(rows)
    return sorted(found, key=lambda place: place[3].start)


class _Reduce:
    """Gradients of received rows on their way home, where they are added to ``sums``."""

    def __init__(self, axis: Axis, stages: tuple[Stage, ...], sums: Sums) -> None:
        self._stages, self._totals = stages, sums[1:]
        self._exchange: AllToAllExchange | None = None
        if stages and axis.group is not None:
            self._exchange = AllToAllExchange(axis.group, "gradients", len(stages), over=home(axis))
        self._grads: Sequence[Tensor] = ()

    def start(self, i: int, grads: Sequence[Tensor]) -> None:
        """Send the gradients of the rows that arrived in stage ``i``, in that order."""
        assert self._exchange is not None
        stage, self._grads = self._stages[i], grads
        lengths = np.array([n for peer in stage.receives for n in peer], dtype=np.int64)
        begin = np.zeros_like(lengths)  # where each arriving range stands among the ascending rows
        order = list(stage.order)
        begin[order] = np.cumsum(lengths[order]) - lengths[order]
        width = sum(map(_width, grads))
        parts = [
            x[:, a : a + n] for a, n in zip(begin.tolist(), lengths.tolist(), strict=True) for x in grads
        ]
        self._exchange.start(
            _flat(parts, grads[0]),
            [width * sum(peer) for peer in stage.receives],
            [width * sum(map(len, rows)) for rows in stage.sends],
        )

    def wait(self, i: int) -> None:
        """Add what the peers computed for this rank's rows in stage ``i``."""
        assert self._exchange is not None
        ranges = [r for rows in self._stages[i].sends for r in rows]
        arrived = _unflat(self._exchange.wait(), list(map(len, ranges)), self._grads)
        for total, parts in zip(self._totals, arrived, strict=True):
            for rows, part in zip(ranges, parts, strict=True):
                total.add(rows, part)


def _width(x: Tensor) -> int:
    """Elements of one row of ``x [b, t, h, d]``."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def _flat(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([x.flatten() for x in parts]) if parts else like.new_empty(0)


def _unflat(flat: Tensor, lengths: Sequence[int], like: Sequence[Tensor]) -> list[list[Tensor]]:
    """Per tensor of ``like [b, t, h, d]``, its row blocks of those lengths in ``flat``, which holds for each
    block one tensor's rows after the other's."""
    pieces = iter(flat.split([n * _width(x) for n in lengths for x in like]))
    blocks = [[next(pieces).view(x.shape[0], n, *x.shape[2:]) for x in like] for n in lengths]
    return [[block[i] for block in blocks] for i in range(len(like))]


def plan(axis: Axis, view: View, stages: int | None = None) -> tuple[Stage, ...]:
    """What this rank sends and receives, stage by stage; no stage where no rank of the axis needs another's
    rows. Known without communication, and cached."""
    return _plan(view.mask, view.layout, view.keys, *_shards(axis, view), axis.index, stages)


def most_arriving(axis: Axis, view: View) -> int:
    """Rows that arrive at the rank of the axis at which most do."""
    return _most_arriving(view.mask, view.layout, view.keys, *_shards(axis, view))


def fewest_queries(axis: Axis, view: View) -> int:
    """Query rows of the rank of the axis that has fewest."""
    return min(sum(map(view.layout.length, ranks)) for ranks in _shards(axis, view)[0])


def _shards(axis: Axis, view: View) -> tuple[Shards, Shards]:
    """The ranks whose queries, and whose keys, each position of the axis holds."""
    positions = range(axis.size)
    return tuple(axis.at(view.q_ranks, i) for i in positions), tuple(
        axis.at(view.k_ranks, i) for i in positions
    )


Shards = tuple[tuple[int, ...], ...]  # the ranks whose rows each position of the axis holds


@lru_cache(maxsize=64)
def _plan(
    mask: AttentionMask,
    layout: Layout,
    keys: Layout,
    q_shards: Shards,
    k_shards: Shards,
    index: int,
    stages: int | None,
) -> tuple[Stage, ...]:
    held = _Held(keys, k_shards)
    needs = [held.pieces(mask.needed_keys(layout.rows(ranks))) for ranks in q_shards]
    shard = max(sum(map(keys.length, ranks)) for ranks in k_shards)
    return tuple(_stage(needs, index, distances) for distances in _dealt(needs, shard, stages))


@lru_cache(maxsize=64)
def _most_arriving(
    mask: AttentionMask, layout: Layout, keys: Layout, q_shards: Shards, k_shards: Shards
) -> int:
    held = _Held(keys, k_shards)
    most = 0
    for i, ranks in enumerate(q_shards):
        pieces = held.pieces(mask.needed_keys(layout.rows(ranks)))
        others = pieces[pieces[:, 0] != i]
        most = max(most, int((others[:, 2] - others[:, 1]).sum()))
    return most


def _dealt(needs: Sequence[Ints], shard: int, stages: int | None) -> list[list[int]]:
    """The distances along the axis at which rows are needed, dealt to stages of about equal volume; the same
    on every rank, as every rank takes part in every stage."""
    size = len(needs)
    rows = np.zeros((size, size), dtype=np.int64)  # of each distance, by each rank
    for i, need in enumerate(needs):
        np.add.at(rows[i], (i - need[:, 0]) % size, need[:, 2] - need[:, 1])
    rows[:, 0] = 0
    most = rows.max(0)
    total = int(most.sum())
    count = stages or max(STAGES, -(-total // (SHARDS * shard)))
    active = np.flatnonzero(most)
    middle = 2 * np.cumsum(most)[active] - most[active]
    stage = middle * count // (2 * total) if total else active
    return [active[stage == s].tolist() for s in np.unique(stage)]


def _stage(needs: Sequence[Ints], index: int, distances: Sequence[int]) -> Stage:
    """The stage in which every rank receives from the ranks that are these distances before it."""
    size = len(needs)
    targets = {(index + d) % size for d in distances}
    mine = _arriving(needs, index, distances)
    own = _moved(mine)
    by_peer = np.argsort(own[:, 0], kind="stable")
    sends = []
    for i in range(size):
        theirs = _moved(_arriving(needs, i, distances)) if i in targets else own[:0]
        sends.append(_ranges(theirs[theirs[:, 0] == index][:, 1:]))
    return Stage(
        tuple(sends),
        tuple(tuple((r[:, 2] - r[:, 1]).tolist()) for r in (own[own[:, 0] == i] for i in range(size))),
        tuple(np.argsort(by_peer).tolist()),
        _ranges(mine[:, 1:3]),
    )


def _arriving(needs: Sequence[Ints], index: int, distances: Sequence[int]) -> Ints:
    """Of what the rank at ``index`` needs (`_Held.pieces`) what comes in this stage."""
    need, comes = needs[index], np.zeros(len(needs), dtype=bool)
    comes[[(index - d) % len(needs) for d in distances]] = True
    return need[comes[need[:, 0]]]


def _moved(pieces: Ints) -> Ints:
    """What moves as one: pieces that follow one another both where they arrive and where they are held. int64
    [n, 3] of (position, local start, local stop)."""
    breaks = (pieces[1:, 0] != pieces[:-1, 0]) | (pieces[1:, 3] != pieces[:-1, 4])
    first, last = runs(breaks, len(pieces))
    return np.column_stack([pieces[first, 0], pieces[first, 3], pieces[last, 4]])


def _ranges(edges: Ints) -> tuple[range, ...]:
    return tuple(range(start, stop) for start, stop in edges.tolist())


class _Held:
    """Which position of the axis holds which keys, as ascending ranges."""

    def __init__(self, layout: Layout, shards: Shards) -> None:
        rows = [layout.rows(ranks) for ranks in shards]
        edges = np.array([(i, r.start, r.stop) for i, held in enumerate(rows) for r in held], dtype=np.int64)
        owner, start, stop = edges.reshape(-1, 3).T
        end = np.cumsum(stop - start)
        first = np.searchsorted(owner, owner)  # each range's first sibling
        local = end - (stop - start) - (end - (stop - start))[first]
        order = np.argsort(start)
        self._owner, self._start, self._stop, self._local = (x[order] for x in (owner, start, stop, local))

    def pieces(self, keys: Sequence[range]) -> Ints:
        """The parts of the ascending ranges ``keys`` that one position holds in consecutive rows: int64
        [n, 5] of (position, start, stop, local start, local stop), ascending."""
        edges = np.array([(r.start, r.stop) for r in keys], dtype=np.int64).reshape(-1, 2)
        first = np.searchsorted(self._stop, edges[:, 0], side="right")
        last = np.searchsorted(self._start, edges[:, 1], side="left")
        owner, at = expand(first, np.maximum(last - first, 0))
        start = np.maximum(edges[owner, 0], self._start[at])
        stop = np.minimum(edges[owner, 1], self._stop[at])
        local = self._local[at] + start - self._start[at]
        return np.stack([self._owner[at], start, stop, local, local + stop - start], axis=1)
