"""Launches the kernels: plans, strides, descriptors. Imported only when Triton is."""

from __future__ import annotations

import math
from functools import cache
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
_SUM_ROWS = 64


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions, config: Config
) -> tuple[Tensor, Tensor]:
    """``out, lse`` of the contract, one launch."""
    (b, tq, h, d), dv = q.shape, v.shape[-1]
    out = torch.empty(b, tq, h, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, tq, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    if config.specialised:
        _forward_on_hopper(q, k, v, out, lse, mask, options, config)
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
        *_sizes(q, k, b * h),
        *_scales(options),
        **_constants(config, plan, d, dv, options),
        TMA=config.tma,
    )
    return out, lse


def _forward_on_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: AttentionMask,
    options: KernelOptions,
    config: Config,
) -> None:
    from lcab_plugin.kernels.triton import hopper, hopper_forward

    plan, counts, meta = _setting(q, k, v, mask, options, config)
    items = len(plan.lines) * counts[0]
    hopper_forward.forward_kernel[_programs(items, q)](
        hopper.source(q, meta.own, meta.dim),
        hopper.source(k, meta.block, meta.dim),
        hopper.source(v, meta.block, meta.value_dim),
        hopper.source(out, meta.own, meta.value_dim),
        lse,
        *plan.tensors,
        *counts,
        _together(k, v, counts[0]),
        items,
        q.shape[1],
        *_scales(options),
        meta,
        **hopper.LAUNCH,
    )


def _setting(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    options: KernelOptions,
    config: Config,
    by_keys: bool = False,
) -> tuple[planning.Plan, tuple[int, int, int], Any]:
    """Of a launch on Hopper: the plan, ``units, heads, group`` (of the kernels in ``hopper_forward.py``) and
    the meta. ``by_keys``: the groups of warps own keys, not rows."""
    from lcab_plugin.kernels.triton import hopper

    b, _, heads, d = q.shape
    group = heads // k.shape[2]
    paired = group % 2 == 0 and not by_keys
    units = b * k.shape[2] if by_keys else b * heads // 2 if paired else b * heads
    lines = config.keys if by_keys else config.rows
    block = config.rows if by_keys else config.keys
    plan = planning.plan(mask, lines if paired else 2 * lines, block, q.device, transposed=by_keys)
    meta = hopper.Meta(
        paired,
        block,
        config.stages,
        plan.kept,
        options.softcap is not None,
        padded(d),
        padded(v.shape[-1]),
        lines,
    )
    return plan, (units, heads, group), meta


def _together(k: Tensor, v: Tensor, units: int) -> int:
    """How many of ``units`` go through the table side by side. Their programs drift apart, until the L2 cache
    no longer keeps for one what another has read: where the keys and values take more than twice the cache,
    as many units as half of it serves (an eighth less time of the forward at 64K tokens and 8 key/value heads
    on an H200), but those of one key/value head at least."""
    heads = k.shape[0] * k.shape[2]
    size = (k.numel() + v.numel()) * k.element_size()
    cache = _cache_size(k.device)
    if size <= 2 * cache:
        return units
    most = max(1, cache // 2 * heads // size)
    return units // heads * max(n for n in range(1, most + 1) if heads % n == 0)


def _programs(items: int, x: Tensor) -> tuple[int]:
    """The grid: one program a multiprocessor, where there are so many items."""
    return (min(items, _multiprocessors(x.device)),)


def row_sums(dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """``delta [b, h, tq] = rowsum(dout * out)``, and ``lse`` to base 2: what both backward passes read. Their
    rows are 16-byte aligned, with zeros between them."""
    b, tq, h, dv = out.shape
    sum_stride = -(-tq // _SUM_ROWS) * _SUM_ROWS
    delta, lse2 = (torch.empty(b, h, sum_stride, dtype=lse.dtype, device=lse.device) for _ in range(2))
    if delta.numel():
        strides = *dout.stride()[:3], *out.stride()[:3]
        delta_kernel[(sum_stride // _SUM_ROWS * b * h,)](
            dout,
            out,
            lse,
            delta,
            lse2,
            *strides,
            h,
            b * h,
            tq,
            sum_stride,
            BM=_SUM_ROWS,
            DV=dv,
            DVP=padded(dv),
        )
    return delta[..., :tq], lse2[..., :tq]


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
    if config.specialised:
        _dq_on_hopper(dq, dout, q, k, v, lse2, delta, mask, options, config)
        return dq
    plan = planning.plan(mask, config.rows, config.keys, q.device)
    sources = dout, q, _source(k, config.keys, config.tma), _source(v, config.keys, config.tma)
    dq_kernel[(len(plan.lines) * b * h,)](
        dq,
        *sources,
        lse2,
        delta,
        *_rest(dout, q, k, v, lse2, plan, b * h, options),
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
    if config.specialised:
        _dkv_on_hopper(dk, dv, dout, q, k, v, lse2, delta, mask, options, config)
        return dk, dv
    plan = planning.plan(mask, config.keys, config.rows, q.device, transposed=True)
    sources = _source(dout, config.rows, config.tma), _source(q, config.rows, config.tma), k, v
    dkv_kernel[(len(plan.lines) * b * hk,)](
        dk,
        dv,
        *sources,
        lse2,
        delta,
        *_rest(dout, q, k, v, lse2, plan, b * hk, options),
        TMA=config.tma,
        **_constants(config, plan, d, dv_dim, options),
    )
    return dk, dv


def _rest(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse2: Tensor,
    plan: planning.Plan,
    batch_heads: int,
    options: KernelOptions,
) -> tuple[Any, ...]:
    """The arguments both backward kernels share after their tensors."""
    strides = [s for x in (dout, q, k, v) for s in x.stride()[:3]]
    sizes = _sizes(q, k, batch_heads)
    return *plan.tensors, *strides, *sizes, lse2.stride(1), *_scales(options), options.scale


def _dq_on_hopper(
    dq: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse2: Tensor,
    delta: Tensor,
    mask: AttentionMask,
    options: KernelOptions,
    config: Config,
) -> None:
    from lcab_plugin.kernels.triton import hopper, hopper_backward

    plan, counts, meta = _setting(q, k, v, mask, options, config)
    items = len(plan.lines) * counts[0]
    hopper_backward.dq_kernel[_programs(items, q)](
        hopper.source(dq, meta.own, meta.dim),
        hopper.source(dout, meta.own, meta.value_dim),
        hopper.source(q, meta.own, meta.dim),
        hopper.source(k, meta.block, meta.dim),
        hopper.source(v, meta.block, meta.value_dim),
        lse2,
        delta,
        *plan.tensors,
        *counts,
        _together(k, v, counts[0]),
        items,
        q.shape[1],
        lse2.stride(1),
        *_scales(options),
        options.scale,
        meta,
        **hopper.LAUNCH,
    )


def _dkv_on_hopper(
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse2: Tensor,
    delta: Tensor,
    mask: AttentionMask,
    options: KernelOptions,
    config: Config,
) -> None:
    from lcab_plugin.kernels.triton import hopper, hopper_backward

    plan, counts, meta = _setting(q, k, v, mask, options, config, by_keys=True)
    units, _, group = counts
    parts = plan.parts(group, units, _multiprocessors(q.device))
    items = len(parts.table) * units
    sums = [
        torch.empty(parts.slots, units, 2 * meta.own, width, dtype=torch.float32, device=q.device)
        for width in (meta.dim, meta.value_dim)
    ]
    hopper_backward.dkv_kernel[_programs(items, q)](
        hopper.source(dk, meta.own, meta.dim),
        hopper.source(dv, meta.own, meta.value_dim),
        *sums,
        hopper.source(dout, meta.block, meta.value_dim),
        hopper.source(q, meta.block, meta.dim),
        hopper.source(k, meta.own, meta.dim),
        hopper.source(v, meta.own, meta.value_dim),
        hopper.row_source(lse2, meta.block),
        hopper.row_source(delta, meta.block),
        parts.table,
        *plan.tensors,
        *counts,
        items,
        k.shape[1],
        *_scales(options),
        options.scale,
        meta,
        **hopper.LAUNCH,
    )
    if parts.slots:
        for target, slots in zip((dk, dv), sums, strict=True):
            add_parts(target, slots, parts)


def add_parts(target: Tensor, sums: Tensor, parts: planning.Parts) -> None:
    """Write the rows of ``target [b, t, heads, d]`` whose lines are split: the sums of their parts,
    ``[slots, b * heads, rows of a line, D]``, added in the order of the query heads."""
    b, _, heads, d = target.shape
    total = sums.view(parts.split, parts.each, b, heads, *sums.shape[2:]).sum(1)
    rows = total.permute(1, 0, 3, 2, 4).flatten(1, 2)  # [b, rows of all split lines, heads, D]
    target.index_copy_(1, parts.rows, rows[:, parts.inside, :, :d].to(target.dtype))


def unit_stride(x: Tensor) -> Tensor:
    """The kernels read the last dimension with stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _cache_size(device: torch.device) -> int:
    """Bytes of its L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def padded(n: int) -> int:
    """A head_dim as wide as the kernels read it."""
    return max(16, 1 << (n - 1).bit_length())


def _source(x: Tensor, rows: int, tma: bool) -> Any:
    """A tensor as the kernels read its blocks of rows."""
    if not tma:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, padded(x.shape[-1])])


def _sizes(q: Tensor, k: Tensor, batch_heads: int) -> tuple[int, ...]:
    heads = q.shape[2]
    return heads, heads // k.shape[2], batch_heads, q.shape[1], k.shape[1]


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
        "DP": padded(d),
        "DV": dv,
        "DVP": padded(dv),
        "KEPT": plan.kept,
        "SOFTCAP": options.softcap is not None,
        "UPCAST": INTERPRETED,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,  # Triton 3.10 leaves it out unless asked
    }
