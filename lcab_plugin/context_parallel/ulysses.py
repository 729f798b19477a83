"""Ulysses (DeepSpeed, arXiv 2309.14509): an all-to-all turns token shards into head shards and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.topology import Axis
from lcab_plugin.errors import LcabError
from lcab_plugin.layout import View


def require_heads(heads: int, kv_heads: int, degree: int) -> None:
    """Check that whole heads can be dealt evenly to the Ulysses ranks.

    Key/value heads fewer than the degree are sent to every rank whose query heads read them.

    Raises:
        LcabError: names the heads, the degree and the degrees that fit.
    """

    def fits(u: int) -> bool:
        return heads % u == 0 and (kv_heads % u == 0 or u % kv_heads == 0)

    if not fits(degree):
        fitting = ", ".join(str(u) for u in range(1, heads + 1) if fits(u))
        raise LcabError(
            f"{heads} query heads and {kv_heads} key/value heads cannot be dealt evenly to {degree} Ulysses "
            f"ranks; degrees that fit: {fitting}"
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

    def slices(self, total_heads: int) -> list[slice]:
        """The heads of a tensor with ``total_heads`` that each rank works on."""
        size = self.axis.size
        if total_heads % size == 0:
            each = total_heads // size
            return [slice(i * each, (i + 1) * each) for i in range(size)]
        return [slice(i * total_heads // size, i * total_heads // size + 1) for i in range(size)]

    def to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Scatter heads, gather tokens; one all-to-all for all tensors."""
        per_tensor = [self.slices(x.shape[2]) for x in tensors]
        sends = [
            torch.cat([x[:, :, s[i]].flatten() for x, s in zip(tensors, per_tensor, strict=True)])
            for i in range(self.axis.size)
        ]
        shapes = [
            [
                (x.shape[0], t, s[0].stop - s[0].start, x.shape[3])
                for x, s in zip(tensors, per_tensor, strict=True)
            ]
            for t in self.tokens
        ]
        received = self._exchange(sends, shapes)
        return [self._sorted(torch.cat(parts, 1)) for parts in zip(*received, strict=True)]

    def to_tokens(self, tensors: Sequence[Tensor], heads: Sequence[int]) -> list[Tensor]:
        """The transpose: gather heads, scatter tokens. ``heads`` are the tensors' total heads; what several
        ranks hold of one key/value head is added up."""
        parts = [self._unsorted(x).split(self.tokens, 1) for x in tensors]
        sends = [torch.cat([p[i].flatten() for p in parts]) for i in range(self.axis.size)]
        own = self.tokens[self.axis.index]
        shapes = [[(x.shape[0], own, *x.shape[2:]) for x in tensors]] * self.axis.size
        received = self._exchange(sends, shapes)
        return [
            self._assembled(pieces, total)
            for pieces, total in zip(zip(*received, strict=True), heads, strict=True)
        ]

    def _assembled(self, pieces: Sequence[Tensor], heads: int) -> Tensor:
        if heads % self.axis.size == 0:
            return torch.cat(list(pieces), 2)
        out = pieces[0].new_zeros(*pieces[0].shape[:2], heads, pieces[0].shape[3])
        for s, piece in zip(self.slices(heads), pieces, strict=True):
            out[:, :, s] += piece
        return out

    def _exchange(
        self, sends: list[Tensor], shapes: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """Flat buffers to every rank; returns the tensors of those shapes from every rank."""
        numels = [[torch.Size(shape).numel() for shape in per_rank] for per_rank in shapes]
        flat = collectives.all_to_all(sends, [sum(n) for n in numels], self.group)
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


class ToHeads(torch.autograd.Function):
    """q, k, v of this rank's tokens -> of this rank's heads."""

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.to_heads((q, k, v)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x: HeadExchange = ctx.exchange
        return None, *x.to_tokens(grads, (x.heads, x.kv_heads, x.kv_heads))


class ToTokens(torch.autograd.Function):
    """The attention output of this rank's heads -> of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, out: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.to_tokens((out,), (exchange.heads,))[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.exchange.to_heads((grad,))[0]
