"""Runs any mask through a library whose one call is a batch of equal full or top-left causal rectangles.

A kernel file gives the two native calls, and two more where its library can add a mask to the scores of every
tile; see ``lowering.tiles`` for the cut.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lcab_plugin.kernels.contract import KernelOptions, NativeCall, accumulation_dtype
from lcab_plugin.kernels.lowering import Tiles, cells_in_blocks, tiles
from lcab_plugin.kernels.merge import RowSum, Softmax
from lcab_plugin.masks import AttentionMask

_WORDS = {"full": "full", "causal": "causal", "anti_causal": "causal, reversed", "band": "added mask"}


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


class BandNative(Protocol):
    """The same call with ``added [tokens of q, tokens of k]`` (0 or -inf) on the scores, shared by the batch.

    Tiles overlap in ``k`` and ``v``: views whose batch stride is less than a tile.
    """

    def band_forward(
        self, q: Tensor, k: Tensor, v: Tensor, added: Tensor, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse`` as of ``tile_forward``."""

    def band_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        added: Tensor,
        options: KernelOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``dq, dk, dv`` as of ``tile_backward``."""


def explain(
    mask: AttentionMask, blocks: tuple[int, int] = (128, 128), *, bands: bool = False, ragged: bool = False
) -> list[NativeCall]:
    """The native calls of a forward under ``mask``, for a library that works in ``blocks`` of (rows, keys).

    ``ragged``: the library computes no cell past a tile's own end.
    """
    plan = tiles(mask, bands)
    shapes = np.array([tile.shape for tile in plan], dtype=np.int64).reshape(-1, 2)
    kinds = np.array([tile.kind for tile in plan], dtype="U11")
    width = shapes[:, 1] - shapes[:, 0]
    band = kinds == "band"
    # a causal tile is top-left aligned, a window bottom-right; a reversed one takes as many blocks
    right = np.where(kinds == "full", -1, np.where(band, 0, -width))
    seen, _ = cells_in_blocks(shapes, np.where(band, width, -1), right, blocks)
    _, computed = cells_in_blocks(shapes, -1, np.where(band, -1, right), blocks, ragged)
    return [
        NativeCall(
            what=f"{_WORDS[tile.kind]} {' x '.join(map(str, tile.shape))}",
            count=tile.count,
            area=area * tile.count,
            computed=cells * tile.count,
            copied=len(tile.rows) + 2 * len(tile.keys) if tile.kind == "anti_causal" else 0,
            merged=0 if tile.fresh else len(tile.rows),
        )
        for tile, area, cells in zip(plan, seen.tolist(), computed.tolist(), strict=True)
    ]


def forward(
    native: Native,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    options: KernelOptions,
    bands: BandNative | None = None,
) -> tuple[Tensor, Tensor]:
    """``out, lse`` of the contract, one native call per batch of equal tiles.

    ``bands``: the kernel itself, where its library can add a mask to the scores.
    """
    plan, batch = tiles(mask, bands is not None), q.shape[0]
    if _row_by_row(plan, batch):
        each = [slice(i, i + 1) for i in range(batch)]
        results = [forward(native, q[i], k[i], v[i], mask, options, bands) for i in each]
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])
    total = Softmax(q, v)
    for tile in plan:
        operands = _tile(q, tile, 0), _tile(k, tile, 1), _tile(v, tile, 1)
        if bands is not None and tile.kind == "band":
            out, lse = bands.band_forward(*operands, _added(tile.shape, q.dtype, q.device), options)
        else:
            out, lse = native.tile_forward(*operands, tile.kind != "full", options)
        lse = _untile(lse.unsqueeze(-1), tile, 0, batch).squeeze(-1).transpose(1, 2)
        total.add(tile.rows, _untile(out, tile, 0, batch), lse, fresh=tile.fresh)
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
    bands: BandNative | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` of the contract, one native call per batch of equal tiles."""
    plan, batch = tiles(mask, bands is not None), q.shape[0]
    if _row_by_row(plan, batch):
        each = [slice(i, i + 1) for i in range(batch)]
        grads = [
            backward(native, dout[i], q[i], k[i], v[i], out[i], lse[i], mask, options, bands) for i in each
        ]
        dq, dk, dv = (torch.cat(parts) for parts in zip(*grads, strict=True))
        return dq, dk, dv
    sums = RowSum(q), RowSum(k), RowSum(v)
    lse = lse.transpose(1, 2).unsqueeze(-1)
    for tile in plan:
        dout_t, q_t, out_t, lse_t = (_tile(x, tile, 0) for x in (dout, q, out, lse))
        k_t, v_t = _tile(k, tile, 1), _tile(v, tile, 1)
        operands = dout_t, q_t, k_t, v_t, out_t, lse_t.squeeze(-1)
        if bands is not None and tile.kind == "band":
            parts = bands.band_backward(*operands, _added(tile.shape, q.dtype, q.device), options)
        else:
            parts = native.tile_backward(*operands, tile.kind != "full", options)
        for total, axis, part in zip(sums, (0, 1, 1), parts, strict=True):
            total.add(tile.keys if axis else tile.rows, _untile(part, tile, axis, batch))
    dq, dk, dv = (total.result() for total in sums)
    return dq, dk, dv


def _row_by_row(plan: tuple[Tiles, ...], batch: int) -> bool:
    """Whether to go through the batch row by row: overlapping tiles of several rows have no common view."""
    return batch > 1 and any(tile.kind == "band" for tile in plan)


def _tile(x: Tensor, tile: Tiles, axis: int) -> Tensor:
    """The operand of a batch of tiles, ``[b * count, heads, length, d]``; a view wherever one exists.

    ``axis``: 0 where its tokens are queries, 1 where they are keys.
    """
    tokens = tile.keys if axis else tile.rows
    x = x[:, tokens.start : tokens.stop]
    if tile.count == 1:
        x = x.transpose(1, 2)
    else:
        x = x.unfold(1, tile.shape[axis], tile.steps[axis]).movedim(-1, 2).flatten(0, 1).transpose(1, 2)
    return x.flip(2) if tile.kind == "anti_causal" else x  # libraries know only the other triangle


def _untile(x: Tensor, tile: Tiles, axis: int, batch: int) -> Tensor:
    """``[b * count, heads, length, d]`` back to ``[b, tokens, heads, d]``: sums where tiles share tokens."""
    length, step = tile.shape[axis], tile.steps[axis]
    x = x.flip(2) if tile.kind == "anti_causal" else x
    if tile.count == 1:
        return x.transpose(1, 2)
    x = x.transpose(1, 2).unflatten(0, (batch, tile.count))
    if length == step:
        return x.flatten(1, 2)
    tokens = (tile.count - 1 - (-length // step)) * step  # up to a whole number of steps
    total = x.new_zeros(batch, tokens, *x.shape[3:], dtype=accumulation_dtype(x.dtype))
    for at in range(0, length, step):  # the same part of every tile: these lie end to end
        part = x[:, :, at : at + step]
        into = total[:, at : at + tile.count * step].unflatten(1, (tile.count, step))
        into[:, :, : part.shape[2]] += part
    return total[:, : len(tile.keys)]


@lru_cache(maxsize=16)  # at most BAND_ROWS x (BAND_ROWS + MAX_BAND) each
def _added(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What hides the keys outside r..r + width of row r of a band, added to the scores."""
    seen = torch.ones(shape, dtype=torch.bool, device=device).triu().tril(shape[1] - shape[0])
    return torch.zeros(shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
