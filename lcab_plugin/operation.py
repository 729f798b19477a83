"""What one attention call is made of.

An *operation* has ``forward`` and ``backward`` on running sums; ``Local`` is one around a kernel, and each
context-parallel strategy is one around another operation, so strategies compose without knowing kernels.
``attend`` runs an operation, with autograd where it is wanted; sinks come in there, after the last merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lcab_plugin.errors import UnsupportedError
from lcab_plugin.kernels.contract import Kernel, KernelOptions
from lcab_plugin.kernels.merge import RowSum, Softmax
from lcab_plugin.layout import View
from lcab_plugin.masks import AttentionMask
from lcab_plugin.recompute import once

Sums = tuple[RowSum, RowSum, RowSum]  # of dq, dk, dv


class Operation(Protocol):
    """Attention of these queries to these keys, added to what was there before."""

    def forward(
        self, total: Softmax, q: Tensor, k: Tensor, v: Tensor, view: View, options: KernelOptions
    ) -> None:
        """Merge the attention over the keys of ``view`` into ``total``."""

    def backward(self, sums: Sums, saved: Saved, view: View, options: KernelOptions) -> None:
        """Add the gradients of the keys of ``view`` to ``sums``."""


class Saved(NamedTuple):
    """What every backward is given, in the kernels' order."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


class MaskView(Protocol):
    """The part of a mask between the rows and the keys at hand."""

    def local(self) -> AttentionMask: ...


@dataclass(frozen=True)
class Whole:
    """The view of a single device: all rows, all keys."""

    mask: AttentionMask

    def local(self) -> AttentionMask:
        return self.mask


class Local:
    """A kernel on this rank's tensors, cropped to what the mask lets it see."""

    def __init__(self, kernel: Kernel, needs_backward: bool) -> None:
        self.kernel, self.needs_backward = kernel, needs_backward

    def forward(
        self, total: Softmax, q: Tensor, k: Tensor, v: Tensor, view: MaskView, options: KernelOptions
    ) -> None:
        mask = view.local()
        if mask.empty:
            return
        rows, keys = mask.bounds()
        mask = _cropped(mask, rows, keys)
        q, k, v = _rows(q, rows), _rows(k, keys), _rows(v, keys)
        require_supported(self.kernel, q, k, v, mask, options, self.needs_backward)
        total.add(rows, *self.kernel.forward(q, k, v, mask, options))

    def backward(self, sums: Sums, saved: Saved, view: MaskView, options: KernelOptions) -> None:
        mask = view.local()
        if mask.empty:
            return
        rows, keys = mask.bounds()
        lse = saved.lse
        if len(rows) < lse.shape[2]:
            lse = lse[:, :, rows.start : rows.stop]
        grads = self.kernel.backward(
            _rows(saved.dout, rows),
            _rows(saved.q, rows),
            _rows(saved.k, keys),
            _rows(saved.v, keys),
            _rows(saved.out, rows),
            lse,
            _cropped(mask, rows, keys),
            options,
        )
        for total, at, grad in zip(sums, (rows, keys, keys), grads, strict=True):
            total.add(at, grad)


def _rows(x: Tensor, rows: range) -> Tensor:
    return x if len(rows) == x.shape[1] else x[:, rows.start : rows.stop]


def _cropped(mask: AttentionMask, rows: range, keys: range) -> AttentionMask:
    whole = len(rows) == mask.q_len and len(keys) == mask.k_len
    return mask if whole else mask.local((rows,), (keys,))


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of one of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def require_supported(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    options: KernelOptions,
    needs_backward: bool,
) -> None:
    """Raise the kernel's reason if it cannot serve this call.

    Raises:
        UnsupportedError: the reason, and how to see what else there is.
    """
    reason = None
    if kernel.name not in _available:
        reason = kernel.unavailable()
    if reason is None:
        _available.add(kernel.name)
        reason = kernel.unsupported(q, k, v, mask, options, needs_backward)
    if reason:
        raise UnsupportedError(
            f"kernel {kernel.name!r} cannot run this attention: {reason}. `lcab kernels` lists the others."
        )


# Kernels that can run here: looking for a library and a GPU again would cost more than a small attention.
_available: set[str] = set()


def with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` after one more key per head with logit ``sink [heads]`` and value zero.

    ``lse' = logaddexp(lse, sink)`` and ``out' = out * exp(lse - lse')``; the kernels' own backward is exact
    with these two, so no kernel knows of sinks.
    """
    logit = sink.to(lse.dtype)[:, None]  # against lse [b, h, t]
    kept = torch.sigmoid(lse - logit).masked_fill_(lse == float("-inf"), 0.0)
    scaled = torch.mul(out, kept.transpose(1, 2).unsqueeze(-1), out=torch.empty_like(out))
    return scaled, torch.logaddexp(lse, logit)


def sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """The gradient of ``sink`` over these rows, from an ``out`` and ``lse`` that include it:
    ``-sum(exp(sink - lse) * rowsum(dout * out))``."""
    share = torch.exp(sink.to(lse.dtype)[:, None] - lse).masked_fill(lse == float("-inf"), 0.0)
    delta = (dout.to(lse.dtype) * out).sum(-1)  # [b, t, h]
    return -torch.einsum("bht,bth->h", share, delta).to(sink.dtype)


def compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    op: Operation,
    view: MaskView,
    options: KernelOptions,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of an operation, sink included."""

    def run() -> tuple[Tensor, Tensor]:
        total = Softmax(q, v)
        op.forward(total, q, k, v, view, options)  # type: ignore[arg-type]
        out, lse = total.result()
        return (out, lse) if sink is None else with_sink(out, lse, sink)

    out, lse = once(run)
    return out, lse


def gradients(saved: Saved, op: Operation, view: MaskView, options: KernelOptions) -> tuple[Tensor, ...]:
    """``dq, dk, dv`` of an operation."""
    sums = RowSum(saved.q), RowSum(saved.k), RowSum(saved.v)
    op.backward(sums, saved, view, options)  # type: ignore[arg-type]
    return tuple(total.result() for total in sums)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    op: Operation,
    view: MaskView,
    options: KernelOptions,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of an operation, differentiable in q, k, v and the sink; lse is not."""
    if needs_backward(q, k, v, sink):
        return AttentionFunction.apply(q, k, v, sink, op, view, options)
    return compute(q, k, v, sink, op, view, options)


class AttentionFunction(torch.autograd.Function):
    """Autograd for any operation: saves q, k, v, out and lse of this rank (and the sink), nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        op: Operation,
        view: MaskView,
        options: KernelOptions,
    ) -> tuple[Tensor, Tensor]:
        out, lse = compute(q, k, v, sink, op, view, options)
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.call = op, view, options
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # a tensor of zeros for lse
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> Any:
        q, k, v, out, lse, sink = ctx.saved_tensors
        dout = dout.contiguous()
        grads: tuple[Tensor | None, ...] = None, None, None
        if any(ctx.needs_input_grad[:3]):
            grads = gradients(Saved(dout, q, k, v, out, lse), *ctx.call)
        dsink = sink_gradient(dout, out, lse, sink) if ctx.needs_input_grad[3] else None
        return *grads, dsink, None, None, None
