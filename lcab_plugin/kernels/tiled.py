"""Runs any mask through a library whose one call is a batch of equal full or top-left causal rectangles.

A kernel file gives the two native calls; see ``lowering.tiles`` for the cut.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lcab_plugin.kernels.contract import KernelOptions, NativeCall
from lcab_plugin.kernels.lowering import Tiles, tiles
from lcab_plugin.kernels.merge import RowSum, Softmax
from lcab_plugin.masks import AttentionMask


class Native(Protocol):
    """A library's dense call over ``[b, heads, tokens, d]`` (views of ``[b, tokens, heads, d]``)."""

    def tile_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        """``out [b, h, tq, dv]`` and ``lse [b, h, tq]``; ``causal``: row r sees keys 0..r (top-left)."""

    def tile_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        options: KernelOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``dq, dk, dv`` from an ``out`` and ``lse`` of a softmax over these keys and perhaps others."""


def explain(mask: AttentionMask) -> list[NativeCall]:
    """The native calls of a forward under ``mask``."""
    raise NotImplementedError


def forward(
    native: Native, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
) -> tuple[Tensor, Tensor]:
    """``out, lse`` of the contract, one native call per batch of equal tiles."""
    total = Softmax(q, v)
    for tile in tiles(mask):
        operands = [_tile(x, tile, rows) for x, rows in ((q, tile.rows), (k, tile.keys), (v, tile.keys))]
        out, lse = native.tile_forward(*operands, tile.kind != "full", options)
        lse = lse.flip(2) if tile.kind == "anti_causal" else lse
        lse = lse.unflatten(0, (q.shape[0], tile.count)).transpose(1, 2).flatten(2, 3)
        total.add(tile.rows, _untile(out, tile, q.shape[0]), lse, fresh=tile.fresh)
    return total.result()


def backward(
    native: Native,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: AttentionMask,
    options: KernelOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` of the contract, one native call per batch of equal tiles."""
    sums = RowSum(q), RowSum(k), RowSum(v)
    for tile in tiles(mask):
        ranges = tile.rows, tile.keys, tile.keys
        tile_lse = _tile(lse.transpose(1, 2).unsqueeze(-1), tile, tile.rows).squeeze(-1)
        grads = native.tile_backward(
            _tile(dout, tile, tile.rows),
            *(_tile(x, tile, rows) for x, rows in zip((q, k, v), ranges, strict=True)),
            _tile(out, tile, tile.rows),
            tile_lse,
            tile.kind != "full",
            options,
        )
        for total, rows, grad in zip(sums, ranges, grads, strict=True):
            total.add(rows, _untile(grad, tile, q.shape[0]))
    dq, dk, dv = (total.result() for total in sums)
    return dq, dk, dv


def _tile(x: Tensor, tile: Tiles, rows: range) -> Tensor:
    """The operand of a batch of tiles, ``[b * count, heads, tile rows, d]``; a view wherever one exists."""
    x = x[:, rows.start : rows.stop].unflatten(1, (tile.count, -1))
    if tile.kind == "anti_causal":  # libraries know only the other triangle
        x = x.flip(2)
    return x.flatten(0, 1).transpose(1, 2)


def _untile(x: Tensor, tile: Tiles, batch: int) -> Tensor:
    """``[b * count, heads, tile rows, d]`` back to ``[b, rows, heads, d]``."""
    x = x.flip(2) if tile.kind == "anti_causal" else x
    return x.transpose(1, 2).unflatten(0, (batch, tile.count)).flatten(1, 2)
