"""Runs any mask through a library whose one call is flash-attn's: variable-length segments with a window.

A kernel file gives the two native calls; gathering, merging, the batch and the softmax of more keys than a
call was given are handled here, once for every such library.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from lcab_plugin.kernels.contract import KernelOptions, NativeCall
from lcab_plugin.kernels.lowering import VarlenCall, cells_in_blocks, varlen_calls
from lcab_plugin.kernels.merge import RowSum, Softmax
from lcab_plugin.masks import AttentionMask


class Segments:
    """The segments of one native call on the device, repeated for every row of the batch.

    ``cu_q, cu_k``: int32 [segments + 1], where each segment's rows and keys begin. ``max_q, max_k``: the
    longest. ``left, right``: flash-attn's window, bottom-right aligned in every segment, -1 for no limit.
    ``span``: the longest of keys, or of rows and keys under a window. FlashAttention 2 and cuDNN judge a
    window against the longest keys they are told, and cut wrongly where a segment has more rows than that.
    ``square``: every segment has as many keys as rows, where both alignments of a window are the same.
    ``rows, keys``: which tokens of the flattened batch they are.
    """

    def __init__(self, call: VarlenCall, mask: AttentionMask, batch: int, device: torch.device) -> None:
        segments = torch.from_numpy(call.segments.copy())
        shift = torch.tensor([mask.q_len, mask.q_len, mask.k_len, mask.k_len])
        segments = (segments + shift * torch.arange(batch)[:, None, None]).flatten(0, 1)
        lengths = segments[:, 1::2] - segments[:, 0::2]
        self.left, self.right = call.left, call.right
        self.max_q, self.max_k = (int(x) for x in lengths.max(0).values)
        windowed = (self.left, self.right) != (-1, -1)
        self.span = max(self.max_q, self.max_k) if windowed else self.max_k
        self.square = bool((lengths[:, 0] == lengths[:, 1]).all())
        cu = torch.nn.functional.pad(lengths.cumsum(0), (0, 0, 1, 0)).to(torch.int32)
        self.cu_q, self.cu_k = (c.contiguous().to(device) for c in cu.unbind(1))
        self.rows = _rows(segments[:, :2], device)
        self.keys = _rows(segments[:, 2:], device)


class Native(Protocol):
    """A library's variable-length call. Every row of every segment sees at least one of its keys."""

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Segments, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        """``out [t, h, dv]``, ``lse [h, t]`` (natural log) of ``q [t, h, d], k, v [tk, kv_heads, d]``."""

    def varlen_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        plan: Segments,
        options: KernelOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``dq, dk, dv`` from ``out`` and ``lse [h, t]`` of a softmax over these keys and perhaps others."""


def explain(mask: AttentionMask, blocks: tuple[int, int]) -> list[NativeCall]:
    """The native calls of a forward under ``mask`` by a library that computes ``blocks`` of (rows, keys)."""
    return [_explain(call, blocks) for call in varlen_calls(mask)]


def _explain(call: VarlenCall, blocks: tuple[int, int]) -> NativeCall:
    shapes = call.segments[:, 1::2] - call.segments[:, ::2]
    seen, computed = cells_in_blocks(shapes, call.left, call.right, blocks)
    names = {(-1, -1): "full", (-1, 0): "causal"}
    what = names.get((call.left, call.right), f"window ({call.left}, {call.right})")
    return NativeCall(
        what=f"varlen {what}" + (", keys gathered" if call.gathered else ""),
        count=len(shapes),
        area=int(seen.sum()),
        computed=int(computed.sum()),
        copied=call.copied[0] + 2 * call.copied[1],
        merged=0 if call.fresh else call.rows,
        rectangle=int(shapes.prod(axis=1).sum()),
    )


def forward(
    native: Native, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
) -> tuple[Tensor, Tensor]:
    """``out, lse`` of the contract, one native call per layer of segments."""
    batch = q.shape[0]
    q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))  # segments of every row of the batch
    total = Softmax(q, v)
    for call in varlen_calls(mask):
        plan = _segments(call, mask, batch, q.device)
        taken = _take(q, plan.rows), _take(k, plan.keys), _take(v, plan.keys)
        out, lse = native.varlen_forward(*taken, plan, options)
        total.add(plan.rows, out.unsqueeze(0), lse.unsqueeze(0), fresh=call.fresh)
    out, lse = total.result()
    return out[0].unflatten(0, (batch, -1)), lse[0].unflatten(1, (batch, -1)).transpose(0, 1)


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
    """``dq, dk, dv`` of the contract, one native call per layer of segments."""
    batch = q.shape[0]
    q, k, v, out, dout = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, out, dout))
    lse = lse.transpose(1, 2).flatten(0, 1).unsqueeze(0)  # [1, b * t, h]
    sums = RowSum(q), RowSum(k), RowSum(v)
    for call in varlen_calls(mask):
        plan = _segments(call, mask, batch, q.device)
        ranges = plan.rows, plan.keys, plan.keys
        grads = native.varlen_backward(
            _take(dout, plan.rows),
            _take(q, plan.rows),
            _take(k, plan.keys),
            _take(v, plan.keys),
            _take(out, plan.rows),
            _take(lse, plan.rows).t().contiguous(),
            plan,
            options,
        )
        for total, rows, grad in zip(sums, ranges, grads, strict=True):
            total.add(rows, grad.unsqueeze(0))
    dq, dk, dv = (total.result()[0].unflatten(0, (batch, -1)) for total in sums)
    return dq, dk, dv


class SegmentsKernel(Native):
    """The contract's forward and backward of a kernel whose every mask goes through these calls."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        return forward(self, q, k, v, mask, options)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: AttentionMask,
        options: KernelOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward(self, dout, q, k, v, out, lse, mask, options)


@lru_cache(maxsize=64)  # may hold an index of all tokens on the device
def _segments(call: VarlenCall, mask: AttentionMask, batch: int, device: torch.device) -> Segments:
    return Segments(call, mask, batch, device)


def _rows(ranges: Tensor, device: torch.device) -> range | Tensor:
    """Row ranges [n, 2] as one range where they lie end to end, else as an index on the device."""
    if bool((ranges[1:, 0] == ranges[:-1, 1]).all()):
        return range(int(ranges[0, 0]), int(ranges[-1, 1]))
    lengths = ranges[:, 1] - ranges[:, 0]
    ends = lengths.cumsum(0)
    offset = ranges[:, 0] - (ends - lengths)
    return (torch.arange(int(ends[-1])) + offset.repeat_interleave(lengths)).to(device)


def _take(x: Tensor, rows: range | Tensor) -> Tensor:
    """Rows of ``x [1, t, ...]`` as ``[rows, ...]``, from a 16-byte boundary on: libraries load that wide."""
    taken = x[0, rows.start : rows.stop] if isinstance(rows, range) else x[0].index_select(0, rows)
    return taken if taken.data_ptr() % 16 == 0 else taken.clone()
