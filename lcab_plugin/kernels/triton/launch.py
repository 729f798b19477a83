"""Launches the kernels: plans, strides, descriptors. Imported only when Triton is."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lcab_plugin.kernels.contract import KernelOptions
from lcab_plugin.kernels.triton import plan as planning
from lcab_plugin.kernels.triton.backward import delta_kernel, dkv_kernel, dq_kernel
from lcab_plugin.kernels.triton.forward import forward_kernel
from lcab_plugin.kernels.triton.tuning import Config
from lcab_plugin.masks import AttentionMask

INTERPRETED = bool(triton.knobs.runtime.interpret)  # decided when Triton is imported
_LOG2E = math.log2(math.e)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions, config: Config
) -> tuple[Tensor, Tensor]:
    """``out, lse`` of the contract, one launch."""
    (b, tq, h, d), dv = q.shape, v.shape[-1]
    out = torch.empty(b, tq, h, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, tq, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    plan = planning.plan(mask, config.rows, config.keys, q.device)
    forward_kernel[(len(plan.lines) * b * h,)](
        q,
        _source(k, config.keys, config.tma),
        _source(v, config.keys, config.tma),
        out,
        lse,
        *plan.tensors,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *_sizes(q, k, plan, b * h),
        *_scales(options),
        **_constants(config, plan, d, dv, options),
        TMA=config.tma,
    )
    return out, lse


def row_sums(dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """``delta [b, h, tq] = rowsum(dout * out)``, and ``lse`` to base 2: what both backward passes read."""
    b, tq, h, dv = out.shape
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    if delta.numel():
        strides = *dout.stride()[:3], *out.stride()[:3]
        delta_kernel[(-(-tq // 64) * b * h,)](
            dout, out, lse, delta, lse2, *strides, h, b * h, tq, BM=64, DV=dv, DVP=_padded(dv)
        )
    return delta, lse2


def sum_dq(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse2: Tensor,
    delta: Tensor,
    mask: AttentionMask,
    options: KernelOptions,
    config: Config,
) -> Tensor:
    """``dq``, one launch over blocks of rows."""
    b, tq, h, d = q.shape
    dq = torch.empty(b, tq, h, d, dtype=q.dtype, device=q.device)
    if not dq.numel():
        return dq
    plan = planning.plan(mask, config.rows, config.keys, q.device)
    sources = dout, q, _source(k, config.keys, config.tma), _source(v, config.keys, config.tma)
    dq_kernel[(len(plan.lines) * b * h,)](
        dq,
        *sources,
        lse2,
        delta,
        *_rest(dout, q, k, v, plan, b * h, options),
        TMA=config.tma,
        **_constants(config, plan, d, v.shape[-1], options),
    )
    return dq


def sum_dkv(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse2: Tensor,
    delta: Tensor,
    mask: AttentionMask,
    options: KernelOptions,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """``dk, dv``, one launch over blocks of keys: the transposed mask's table."""
    (b, tk, hk, d), dv_dim = k.shape, v.shape[-1]
    dk = torch.empty(b, tk, hk, d, dtype=k.dtype, device=q.device)
    dv = torch.empty(b, tk, hk, dv_dim, dtype=v.dtype, device=q.device)
    if not dk.numel():
        return dk, dv
    plan = planning.plan(mask, config.keys, config.rows, q.device, transposed=True)
    sources = _source(dout, config.rows, config.tma), _source(q, config.rows, config.tma), k, v
    dkv_kernel[(len(plan.lines) * b * hk,)](
        dk,
        dv,
        *sources,
        lse2,
        delta,
        *_rest(dout, q, k, v, plan, b * hk, options),
        TMA=config.tma,
        **_constants(config, plan, d, dv_dim, options),
    )
    return dk, dv


def _rest(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: planning.Plan,
    batch_heads: int,
    options: KernelOptions,
) -> tuple[Any, ...]:
    """The arguments both backward kernels share after their tensors."""
    strides = [s for x in (dout, q, k, v) for s in x.stride()[:3]]
    return *plan.tensors, *strides, *_sizes(q, k, plan, batch_heads), *_scales(options), options.scale


def unit_stride(x: Tensor) -> Tensor:
    """The kernels read the last dimension with stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _source(x: Tensor, rows: int, tma: bool) -> Any:
    """A tensor as the kernels read its blocks of rows."""
    if not tma:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, _padded(x.shape[-1])])


def _sizes(q: Tensor, k: Tensor, plan: planning.Plan, batch_heads: int) -> tuple[int, ...]:
    heads = q.shape[2]
    return heads, heads // k.shape[2], batch_heads, q.shape[1], k.shape[1], plan.intervals


def _scales(options: KernelOptions) -> tuple[float, float]:
    """``scale_log2, cap_log2``: see ``forward.logits``."""
    if options.softcap is None:
        return options.scale * _LOG2E, 0.0
    return options.scale / options.softcap, options.softcap * _LOG2E


def _constants(
    config: Config, plan: planning.Plan, d: int, dv: int, options: KernelOptions
) -> dict[str, Any]:
    return {
        "BM": config.rows,
        "BN": config.keys,
        "D": d,
        "DP": _padded(d),
        "DV": dv,
        "DVP": _padded(dv),
        "KEPT": plan.kept,
        "SOFTCAP": options.softcap is not None,
        "UPCAST": INTERPRETED,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
