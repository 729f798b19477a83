"""Ulysses (DeepSpeed, arXiv 2309.14509): an all-to-all turns token shards into head shards and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.topology import Axis
from lcab_plugin.errors import LcabError
from lcab_plugin.kernels.contract import accumulation_dtype
from lcab_plugin.layout import View
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


class HeadExchange:
    """Between ``[b, own tokens, all heads, d]`` and ``[b, tokens of the axis, own heads, d]``."""

    def __init__(self, axis: Axis, view: View, q: Tensor, k: Tensor) -> None:
        assert axis.group is not None
        self.axis, self.group = axis, axis.group
        shards = [axis.at(view.q_ranks, i) for i in range(axis.size)]
        self.tokens = [sum(map(view.layout.length, ranks)) for ranks in shards]
        # each shard's rows ascend, but shards interleave (zigzag); kernels want all of them ascending
        self.order = view.layout.ascending(tuple(r for ranks in shards for r in ranks), q.device)
        self.heads, self.kv_heads = q.shape[2], k.shape[2]
        q_slices, kv_slices = deal(self.heads, self.kv_heads, axis.size)
        self._slices = {self.heads: q_slices, self.kv_heads: kv_slices}

    def slices(self, total_heads: int) -> list[slice]:
        """The heads of a tensor with ``total_heads``, queries' or keys', that each rank works on."""
        return self._slices[total_heads]

    def to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Scatter heads, gather tokens; one all-to-all for all tensors."""
        per_tensor = [self.slices(x.shape[2]) for x in tensors]
        sends = [
            [x[:, :, s[i]] for x, s in zip(tensors, per_tensor, strict=True)] for i in range(self.axis.size)
        ]
        own = [_count(s[self.axis.index]) for s in per_tensor]
        shapes = [
            [(x.shape[0], t, n, x.shape[3]) for x, n in zip(tensors, own, strict=True)] for t in self.tokens
        ]
        received = self._exchange(sends, shapes)
        return [self._sorted(torch.cat(parts, 1)) for parts in zip(*received, strict=True)]

    def to_tokens(self, tensors: Sequence[Tensor], heads: Sequence[int]) -> list[Tensor]:
        """The transpose: gather heads, scatter tokens. ``heads`` are the tensors' total heads; what several
        ranks hold of one key/value head is added up."""
        parts = [self._unsorted(x).split(self.tokens, 1) for x in tensors]
        sends = [[p[i] for p in parts] for i in range(self.axis.size)]
        own = self.tokens[self.axis.index]
        per_tensor = [self.slices(total) for total in heads]
        shapes = [
            [(x.shape[0], own, _count(s[i]), x.shape[3]) for x, s in zip(tensors, per_tensor, strict=True)]
            for i in range(self.axis.size)
        ]
        received = self._exchange(sends, shapes)
        return [
            self._assembled(pieces, total)
            for pieces, total in zip(zip(*received, strict=True), heads, strict=True)
        ]

    def _assembled(self, pieces: Sequence[Tensor], heads: int) -> Tensor:
        """All ``heads`` of the own tokens from every rank's."""
        if heads >= self.axis.size:
            return torch.cat(list(pieces), 2)
        first = pieces[0]
        shape = (*first.shape[:2], heads, first.shape[3])
        out = first.new_zeros(shape, dtype=accumulation_dtype(first.dtype))
        for s, piece in zip(self.slices(heads), pieces, strict=True):
            out[:, :, s] += piece
        return out.to(first.dtype)

    def _exchange(
        self, sends: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """Tensors to every rank; returns those of the given shapes from every rank."""
        sizes = [[x.numel() for x in per_rank] for per_rank in sends]
        packed = sends[0][0].new_empty(sum(map(sum, sizes)))
        at = 0
        for x in (x for per_rank in sends for x in per_rank):  # a slice of heads is copied once, to its place
            packed[at : at + x.numel()].view(x.shape).copy_(x)
            at += x.numel()
        numels = [[torch.Size(shape).numel() for shape in per_rank] for per_rank in shapes]
        flat = collectives.all_to_all(packed, list(map(sum, sizes)), list(map(sum, numels)), self.group)
        return [
            [x.view(shape) for x, shape in zip(buffer.split(n), per_rank, strict=True)]
            for buffer, n, per_rank in zip(flat, numels, shapes, strict=True)
        ]

    def _sorted(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(1, self.order)

    def _unsorted(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        x = x.contiguous()
        return torch.empty_like(x).index_copy_(1, self.order, x)


def _count(heads: slice) -> int:
    return int(heads.stop - heads.start)


class ToHeads(torch.autograd.Function):
    """q, k, v of this rank's tokens -> of this rank's heads."""

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return once(lambda: tuple(exchange.to_heads((q, k, v))))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x: HeadExchange = ctx.exchange
        return None, *x.to_tokens(grads, (x.heads, x.kv_heads, x.kv_heads))


class ToTokens(torch.autograd.Function):
    """The attention output of this rank's heads -> of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, out: Tensor) -> Tensor:
        ctx.exchange = exchange
        return once(lambda: tuple(exchange.to_tokens((out,), (exchange.heads,))))[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.exchange.to_heads((grad,))[0]
