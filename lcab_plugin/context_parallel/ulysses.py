"""Ulysses (DeepSpeed, arXiv 2309.14509): an all-to-all turns token shards into head shards and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.topology import Axis
from lcab_plugin.errors import LcabError
from lcab_plugin.kernels.contract import accumulation_dtype
from lcab_plugin.layout import Layout, View
from lcab_plugin.recompute import once


def fits(heads: int, kv_heads: int, degree: int) -> bool:
    """Whether ``degree`` ranks can share the heads: whole groups (a key/value head and the query heads that
    read it), at least one a rank, or equal parts of groups."""
    return kv_heads >= degree or (degree % kv_heads == 0 and heads % degree == 0)


def require_heads(heads: int, kv_heads: int, degree: int, ranks: int) -> None:
    """Check that heads can be dealt to ``degree`` Ulysses ranks, of ``ranks`` in the group.

    Raises:
        LcabError: names the heads, the degree, those that fit, and one with a ring that makes ``ranks``.
    """
    if fits(heads, kv_heads, degree):
        return
    fitting = [u for u in range(1, heads + 1) if fits(heads, kv_heads, u)]
    best = max(u for u in fitting if u < degree and ranks % u == 0)
    raise LcabError(
        f"{heads} query heads and {kv_heads} key/value heads cannot be dealt to {degree} Ulysses ranks "
        f"without cutting a group of {heads // kv_heads} query heads unevenly; degrees that fit: "
        f"{', '.join(map(str, fitting))}; on {ranks} ranks: strategy 'usp' with ulysses={best}, "
        f"ring={ranks // best}"
    )


def deal(heads: int, kv_heads: int, degree: int) -> tuple[list[slice], list[slice]]:
    """The query heads and the key/value heads of every Ulysses rank.

    Whole groups where there is one for every rank: ranks have as many, or one more. With fewer key/value
    heads than ranks each rank has an equal part of one group, and its key/value head.
    """
    if kv_heads >= degree:
        edges = [kv_heads * i // degree for i in range(degree + 1)]
        group = heads // kv_heads
        return [slice(a * group, b * group) for a, b in pairwise(edges)], list(map(slice, edges, edges[1:]))
    each, sharing = heads // degree, degree // kv_heads
    return (
        [slice(i * each, (i + 1) * each) for i in range(degree)],
        [slice(i // sharing, i // sharing + 1) for i in range(degree)],
    )


@dataclass(frozen=True)
class Side:
    """The queries, or the keys, of an exchange.

    Attributes:
        heads: all of them, and ``slices``: those that each rank works on.
        tokens: how many each rank holds.
        order, places: a shard's rows ascend, but shards interleave (zigzag), and kernels want all of them
            ascending: how to sort them laid end to end, and where each shard's are then (None: sorted).
    """

    heads: int
    slices: list[slice]
    tokens: list[int]
    order: Tensor | None
    places: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, layout: Layout, ranks: tuple[int, ...], x: Tensor, slices: list[slice]) -> Side:
        """Of tensors like ``x [b, own tokens, all heads, d]``, sharded over ``ranks`` by ``layout``."""
        order, places = layout.ascending(ranks, x.device), layout.places(ranks, x.device)
        return cls(x.shape[2], slices, [layout.length(r) for r in ranks], order, places)

    def shard(self, x: Tensor, i: int) -> Tensor:
        """The rows of rank ``i`` of the ascending ``x [b, t, ...]``."""
        if self.places is not None:
            return x.index_select(1, self.places[i])
        return x.narrow(1, sum(self.tokens[:i]), self.tokens[i])


class HeadExchange:
    """Between ``[b, own tokens, all heads, d]`` and ``[b, tokens of the axis, own heads, d]``; ``view``: of
    this rank's queries and keys."""

    def __init__(self, axis: Axis, view: View, q: Tensor, k: Tensor) -> None:
        assert axis.group is not None
        self.axis, self.group = axis, axis.group
        view = axis.all_rows(view)
        q_slices, kv_slices = deal(q.shape[2], k.shape[2], axis.size)
        self.queries = Side.of(view.layout, view.q_ranks, q, q_slices)
        self.keys = Side.of(view.keys, view.k_ranks, k, kv_slices)

    def to_heads(self, tensors: Sequence[Tensor], sides: Sequence[Side]) -> list[Tensor]:
        """Scatter heads, gather tokens; all tensors, each of which is of a side, at once."""
        ranks, own = range(self.axis.size), self.axis.index
        whole = [
            x.new_empty(x.shape[0], sum(s.tokens), _count(s.slices[own]), x.shape[3])
            for x, s in zip(tensors, sides, strict=True)
        ]
        parts = [
            x.split(s.tokens, 1) for x, s in zip(whole, sides, strict=True)
        ]  # by the rank they come from
        for x, s, part in zip(tensors, sides, parts, strict=True):
            part[own].copy_(x[:, :, s.slices[own]])
        receives = [[collectives.landing(part[i]) for part in parts] for i in ranks]
        sends = [
            [x[:, :, s.slices[i]].contiguous() for x, s in zip(tensors, sides, strict=True)]
            if i != own
            else []
            for i in ranks
        ]
        collectives.all_to_all(sends, receives, self.group)
        for i in ranks:
            if i != own:
                collectives.settle([part[i] for part in parts], receives[i])
        return [
            x if s.order is None else x.index_select(1, s.order) for x, s in zip(whole, sides, strict=True)
        ]

    def to_tokens(self, tensors: Sequence[Tensor], sides: Sequence[Side]) -> list[Tensor]:
        """The transpose: gather heads, scatter tokens. What several ranks hold of one key/value head is added
        up."""
        ranks, own = range(self.axis.size), self.axis.index
        shards = [[s.shard(x, i) for x, s in zip(tensors, sides, strict=True)] for i in ranks]
        receives = [
            [
                x.new_empty(x.shape[0], s.tokens[own], _count(s.slices[i]), x.shape[3])
                for x, s in zip(tensors, sides, strict=True)
            ]
            if i != own
            else shards[own]
            for i in ranks
        ]
        sends = [[x.contiguous() for x in shards[i]] if i != own else [] for i in ranks]
        collectives.all_to_all(sends, receives, self.group)
        return [_assembled(x, side) for x, side in zip(zip(*receives, strict=True), sides, strict=True)]


def _assembled(pieces: Sequence[Tensor], side: Side) -> Tensor:
    """All heads of the own tokens from every rank's."""
    if side.heads >= len(pieces):
        return torch.cat(list(pieces), 2)
    first = pieces[0]
    shape = (*first.shape[:2], side.heads, first.shape[3])
    out = first.new_zeros(shape, dtype=accumulation_dtype(first.dtype))
    for s, piece in zip(side.slices, pieces, strict=True):
        out[:, :, s] += piece
    return out.to(first.dtype)


def _count(heads: slice) -> int:
    return int(heads.stop - heads.start)


class ToHeads(torch.autograd.Function):
    """q, k, v of this rank's tokens -> of this rank's heads."""

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        sides = exchange.queries, exchange.keys, exchange.keys
        return once(lambda: tuple(exchange.to_heads((q, k, v), sides)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x: HeadExchange = ctx.exchange
        return None, *x.to_tokens(grads, (x.queries, x.keys, x.keys))


class ToTokens(torch.autograd.Function):
    """The attention output of this rank's heads -> of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, out: Tensor) -> Tensor:
        ctx.exchange = exchange
        return once(lambda: tuple(exchange.to_tokens((out,), (exchange.queries,))))[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.exchange.to_heads((grad,), (ctx.exchange.queries,))[0]
