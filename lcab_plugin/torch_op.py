"""Attention as one operator of torch's own, for graphs: ``torch.compile``, export and what reads them.

``lcab::attention`` is a pure function of its tensors. The mask travels as its slices, int64 [n, 6] on the
CPU, so that another mask is another input and not another graph. Eager calls do not come through here: the
dispatcher would cost them several microseconds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lcab_plugin import kernels
from lcab_plugin.kernels.contract import KernelOptions, accumulation_dtype
from lcab_plugin.masks import AttentionMask
from lcab_plugin.operation import Local, Saved, Whole, compute, gradients, sink_gradient

_CALL = "Tensor slices, str kernel, float scale, float? softcap, bool deterministic"
# The mask is read on the host, so a CUDA graph would replay the captured mask for every later one.
_TAGS = tuple(
    getattr(torch.Tag, name)
    for name in ("pt2_compliant_tag", "cudagraph_unsafe")
    if hasattr(torch.Tag, name)  # the second one is of torch 2.8
)

torch.library.define(
    "lcab::attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? sink, {_CALL}, bool needs_backward) -> (Tensor out, Tensor lse)",
    tags=_TAGS,
)
torch.library.define(
    "lcab::attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_CALL})"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_TAGS,
)


def _mask(q: Tensor, k: Tensor, slices: Tensor) -> AttentionMask:
    return _mask_of(q.shape[1], k.shape[1], slices.numpy().tobytes())


@lru_cache(maxsize=64)  # a model's layers and the backward ask for the same few masks
def _mask_of(q_len: int, k_len: int, slices: bytes) -> AttentionMask:
    array = torch.frombuffer(bytearray(slices), dtype=torch.int64).view(-1, 6).numpy()
    return AttentionMask.from_disjoint(q_len, k_len, array)


@torch.library.impl("lcab::attention", "default")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    slices: Tensor,
    kernel: str,
    scale: float,
    softcap: float | None,
    deterministic: bool,
    needs_backward: bool,
) -> tuple[Tensor, Tensor]:
    local, whole = Local(kernels.get(kernel), needs_backward), Whole(_mask(q, k, slices))
    out, lse = compute(q, k, v, sink, local, whole, KernelOptions(scale, softcap, deterministic))
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("lcab::attention")
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, slices: Tensor, kernel: str, *_: Any
) -> tuple[Tensor, Tensor]:
    kernels.get(kernel)  # a wrong name is an error of the compilation
    b, t, h, _d = q.shape
    return q.new_empty(b, t, h, v.shape[-1]), q.new_empty(b, h, t, dtype=accumulation_dtype(q.dtype))


@torch.library.impl("lcab::attention_backward", "default")
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slices: Tensor,
    kernel: str,
    scale: float,
    softcap: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    local, whole = Local(kernels.get(kernel), True), Whole(_mask(q, k, slices))
    saved = Saved(dout.contiguous(), q, k, v, out, lse)
    dq, dk, dv = gradients(saved, local, whole, KernelOptions(scale, softcap, deterministic))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@torch.library.register_fake("lcab::attention_backward")
def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sink, slices, *ctx.call, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, sink, slices)


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, sink, slices = ctx.saved_tensors
    grads: tuple[Tensor | None, ...] = None, None, None
    if any(ctx.needs_input_grad[:3]):
        grads = torch.ops.lcab.attention_backward(dout, q, k, v, out, lse, slices, *ctx.call)
    dsink = sink_gradient(dout, out, lse, sink) if ctx.needs_input_grad[3] else None
    return *grads, dsink, *[None] * 6


torch.library.register_autograd("lcab::attention", _differentiate, setup_context=_save)
