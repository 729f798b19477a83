"""PyTorch's own flash attention operators, by lowering under every mask.

CPU: ``aten::_scaled_dot_product_flash_attention_for_cpu``: full and top-left causal rectangles, GQA, any
float dtype; it divides by zero on an empty tensor, so no empty tile is ever passed.
CUDA: ``aten::_flash_attention_forward/backward`` (FlashAttention 2 in torch's build) over variable-length
segments with windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from lcab_plugin.kernels.contract import KernelOptions
from lcab_plugin.kernels.lowering import Tiles, VarlenCall, tiles, varlen_calls
from lcab_plugin.kernels.merge import RowSum, Softmax
from lcab_plugin.masks import AttentionMask

Grads = tuple[Tensor, Tensor, Tensor]


class SdpaFlash:
    """aten's flash attention, one native call per batch of tiles (CPU) or layer of segments (CUDA)."""

    name = "sdpa_flash"
    verified = "CPU (torch 2.13), H100 (torch 2.11: bf16, fp16; head_dim 64, 128)"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self) -> str | None:
        if hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return None
        return f"torch {torch.__version__} has no flash attention operator that returns lse; use torch >= 2.5"

    def unsupported(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        options: KernelOptions,
        needs_backward: bool,
    ) -> str | None:
        if options.softcap is not None:
            return "PyTorch's scaled_dot_product_attention has no logit soft cap"
        if v.shape[-1] != q.shape[-1]:
            return f"value head_dim {v.shape[-1]} differs from the query's {q.shape[-1]}"
        if q.device.type not in ("cpu", "cuda"):
            return f"device {q.device.type!r} has no flash attention operator in torch"
        if q.is_cuda and q.dtype not in (torch.float16, torch.bfloat16):
            return f"on CUDA it takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
        if q.is_cuda and (q.shape[-1] > 256 or q.shape[-1] % 8):
            return f"on CUDA head_dim must be a multiple of 8 up to 256, not {q.shape[-1]}"
        if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
            return f"needs compute capability 8.0, {torch.cuda.get_device_name(q.device)} has less"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        if q.is_cuda:
            return _cuda_forward(q, k, v, mask, options)
        total = Softmax(q, v)
        for tile in tiles(mask):
            native = [_tile(x, tile, rows) for x, rows in ((q, tile.rows), (k, tile.keys), (v, tile.keys))]
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *native, 0.0, tile.kind != "full", scale=options.scale
            )
            lse = lse.flip(2) if tile.kind == "anti_causal" else lse
            lse = lse.unflatten(0, (q.shape[0], tile.count)).transpose(1, 2).flatten(2, 3)
            total.add(tile.rows, _untile(out, tile, q.shape[0]), lse, fresh=tile.fresh)
        return total.result()

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
    ) -> Grads:
        if q.is_cuda:
            return _cuda_backward(dout, q, k, v, out, lse, mask, options)
        sums = RowSum(q), RowSum(k), RowSum(v)
        for tile in tiles(mask):
            ranges = tile.rows, tile.keys, tile.keys
            native_lse = _tile(lse.transpose(1, 2).unsqueeze(-1), tile, tile.rows).squeeze(-1)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _tile(dout, tile, tile.rows),
                *(_tile(x, tile, rows) for x, rows in zip((q, k, v), ranges, strict=True)),
                _tile(out, tile, tile.rows),
                native_lse.transpose(1, 2).contiguous().transpose(1, 2),
                0.0,
                tile.kind != "full",
                scale=options.scale,
            )
            for total, rows, grad in zip(sums, ranges, grads, strict=True):
                total.add(rows, _untile(grad, tile, q.shape[0]))
        dq, dk, dv = (total.result() for total in sums)
        return dq, dk, dv


def _tile(x: Tensor, tile: Tiles, rows: range) -> Tensor:
    """The operand of a batch of tiles, ``[b * count, heads, tile rows, d]``; a view wherever one exists."""
    x = x[:, rows.start : rows.stop].unflatten(1, (tile.count, -1))
    if tile.kind == "anti_causal":  # aten knows only the other triangle
        x = x.flip(2)
    return x.flatten(0, 1).transpose(1, 2)


def _untile(x: Tensor, tile: Tiles, batch: int) -> Tensor:
    """``[b * count, heads, tile rows, d]`` back to ``[b, rows, heads, d]``."""
    x = x.flip(2) if tile.kind == "anti_causal" else x
    return x.transpose(1, 2).unflatten(0, (batch, tile.count)).flatten(1, 2)


# CUDA


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
) -> tuple[Tensor, Tensor]:
    batch = q.shape[0]
    q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))  # segments of every row of the batch
    total = Softmax(q, v)
    for call in varlen_calls(mask):
        plan = _segments(call, mask, batch, q.device)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(_take(x, rows) for x, rows in ((q, plan.rows), (k, plan.keys), (v, plan.keys))),
            plan.cu_q,
            plan.cu_k,
            plan.max_q,
            plan.max_k,
            0.0,
            False,
            False,
            scale=options.scale,
            window_size_left=call.left,
            window_size_right=call.right,
        )
        total.add(plan.rows, out.unsqueeze(0), lse.unsqueeze(0), fresh=False)
    out, lse = total.result()
    return out[0].unflatten(0, (batch, -1)), lse[0].unflatten(1, (batch, -1)).transpose(0, 1)


def _cuda_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: AttentionMask,
    options: KernelOptions,
) -> Grads:
    batch = q.shape[0]
    q, k, v, out, dout = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, out, dout))
    lse = lse.transpose(1, 2).flatten(0, 1).unsqueeze(0)  # [1, b * t, h]
    sums = RowSum(q), RowSum(k), RowSum(v)
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # dropout's random state; there is none
    for call in varlen_calls(mask):
        plan = _segments(call, mask, batch, q.device)
        ranges = plan.rows, plan.keys, plan.keys
        with _determinism(options.deterministic):
            grads = torch.ops.aten._flash_attention_backward(
                _take(dout, plan.rows),
                *(_take(x, rows) for x, rows in zip((q, k, v), ranges, strict=True)),
                _take(out, plan.rows),
                _take(lse, plan.rows).t().contiguous(),
                plan.cu_q,
                plan.cu_k,
                plan.max_q,
                plan.max_k,
                0.0,
                False,
                unused,
                unused,
                scale=options.scale,
                window_size_left=call.left,
                window_size_right=call.right,
            )
            for total, rows, grad in zip(sums, ranges, grads, strict=True):
                total.add(rows, grad.unsqueeze(0))
    dq, dk, dv = (total.result()[0].unflatten(0, (batch, -1)) for total in sums)
    return dq, dk, dv


class _Segments:
    """A call's segments on the device, repeated for every row of the batch."""

    def __init__(self, call: VarlenCall, mask: AttentionMask, batch: int, device: torch.device) -> None:
        segments = torch.from_numpy(call.segments.copy())
        shift = torch.tensor([mask.q_len, mask.q_len, mask.k_len, mask.k_len])
        segments = (segments + shift * torch.arange(batch)[:, None, None]).flatten(0, 1)
        lengths = segments[:, 1::2] - segments[:, 0::2]
        self.max_q, self.max_k = (int(x) for x in lengths.max(0).values)
        cu = torch.nn.functional.pad(lengths.cumsum(0), (0, 0, 1, 0)).to(torch.int32)
        self.cu_q, self.cu_k = (c.contiguous().to(device) for c in cu.unbind(1))
        self.rows = _rows(segments[:, :2], device)
        self.keys = _rows(segments[:, 2:], device)


@lru_cache(maxsize=64)  # may hold an index of all tokens on the device
def _segments(call: VarlenCall, mask: AttentionMask, batch: int, device: torch.device) -> _Segments:
    return _Segments(call, mask, batch, device)


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


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """aten takes a deterministic flash backward from torch's process-wide flag: set it for this call only."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


KERNEL = SdpaFlash()
