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
from lcab_plugin.kernels.lowering import VarlenCall, varlen_calls
from lcab_plugin.kernels.merge import RowSum, Softmax
from lcab_plugin.masks import AttentionMask


class Segments:
    """The segments of one native call on the device, repeated for every row of the batch.

    ``cu_q, cu_k``: int32 [segments + 1], where each segment's rows and keys begin. ``max_q, max_k``: the
    longest. ``left, right``: flash-attn's window, bottom-right aligned in every segment, -1 for no limit.
    ``rows, keys``: which tokens of the flattened batch they are.
    """

    def __init__(self, call: VarlenCall, mask: AttentionMask, batch: int, device: torch.device) -> None:
        segments = torch.from_numpy(call.segments.copy())
        shift = torch.tensor([mask.q_len, mask.q_len, mask.k_len, mask.k_len])
        segments = (segments + shift * torch.arange(batch)[:, None, None]).flatten(0, 1)
        lengths = segments[:, 1::2] - segments[:, 0::2]
        self.left, self.right = call.left, call.right
        self.max_q, self.max_k = (int(x) for x in lengths.max(0).values)
        cu = torch.nn.functional.pad(lengths.cumsum(0), (0, 0, 1, 0)).to(torch.int32)
        self.cu_q, self.cu_k = (c.contiguous().to(device) for c in cu.unbind(1))
        self.rows = _rows(segments[:, :2], device)
        self.keys = _rows(segments[:, 2:], device)


class Native(Protocol):
    """A library's variable-length call. Every row of every segment sees at least one of its keys."""

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Segments, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        """``out [t, h, dv]`` and ``lse [h, t]`` (natural log, float32) of ``q [t, h, d], k, v [tk, kv_heads, d]``."""

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
        """``dq, dk, dv`` from an ``out`` and ``lse`` [h, t] of a softmax over these keys and perhaps others."""


def explain(mask: AttentionMask, blocks: tuple[int, int]) -> list[NativeCall]:
    """The native calls of a forward under ``mask``, for a library that works in ``blocks`` of (rows, keys)."""
    raise NotImplementedError


def forward(
    native: Native, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
) -> tuple[Tensor, Tensor]:
    """``out, lse`` of the contract, one native call per layer of segments."""
    batch = q.shape[0]
    q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))  # segments of every row of the batch
    total = Softmax(q, v)
    for call in varlen_calls(mask):
        plan = _segments(call, mask, batch, q.device)
        taken = (_take(x, rows) for x, rows in ((q, plan.rows), (k, plan.keys), (v, plan.keys)))
        out, lse = native.varlen_forward(*taken, plan, options)
        total.add(plan.rows, out.unsqueeze(0), lse.unsqueeze(0))
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
            *(_take(x, rows) for x, rows in zip((q, k, v), ranges, strict=True)),
            _take(out, plan.rows),
            _take(lse, plan.rows).t().contiguous(),
            plan,
            options,
        )
        for total, rows, grad in zip(sums, ranges, grads, strict=True):
            total.add(rows, grad.unsqueeze(0))
    dq, dk, dv = (total.result()[0].unflatten(0, (batch, -1)) for total in sums)
    return dq, dk, dv


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
    """Rows of ``x [1, t, ...]`` as ``[rows, ...]``."""
    return x[0, rows.start : rows.stop] if isinstance(rows, range) else x[0].index_select(0, rows)
