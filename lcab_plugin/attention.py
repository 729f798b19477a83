"""One attention call, and the drop-in module.

An *operation* has ``forward`` and ``backward`` on running sums; ``Local`` is one around a kernel, and each
context-parallel strategy is one around another operation, so strategies compose without knowing kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lcab_plugin import kernels
from lcab_plugin.errors import LcabError, UnsupportedError
from lcab_plugin.kernels.contract import Kernel, KernelOptions
from lcab_plugin.kernels.merge import RowSum, Softmax
from lcab_plugin.layout import View
from lcab_plugin.masks import AttentionMask

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
        q, k, v, mask = _rows(q, rows), _rows(k, keys), _rows(v, keys), mask.local((rows,), (keys,))
        require_supported(self.kernel, q, k, v, mask, options, self.needs_backward)
        total.add(rows, *self.kernel.forward(q, k, v, mask, options))

    def backward(self, sums: Sums, saved: Saved, view: MaskView, options: KernelOptions) -> None:
        mask = view.local()
        if mask.empty:
            return
        rows, keys = mask.bounds()
        grads = self.kernel.backward(
            _rows(saved.dout, rows),
            _rows(saved.q, rows),
            _rows(saved.k, keys),
            _rows(saved.v, keys),
            _rows(saved.out, rows),
            saved.lse[:, :, rows.start : rows.stop],
            mask.local((rows,), (keys,)),
            options,
        )
        for total, at, grad in zip(sums, (rows, keys, keys), grads, strict=True):
            total.add(at, grad)


def needs_backward(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the gradient of one of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _rows(x: Tensor, rows: range) -> Tensor:
    return x[:, rows.start : rows.stop]


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
    reason = kernel.unavailable() or kernel.unsupported(q, k, v, mask, options, needs_backward)
    if reason:
        raise UnsupportedError(
            f"kernel {kernel.name!r} cannot run this attention: {reason}. `lcab kernels` lists the others."
        )


class AttentionFunction(torch.autograd.Function):
    """Autograd for any operation: saves q, k, v, out and lse of this rank and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, op: Operation, view: View, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        total = Softmax(q, v)
        op.forward(total, q, k, v, view, options)
        out, lse = total.result()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = op, view, options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        op, view, options = ctx.call
        sums = RowSum(q), RowSum(k), RowSum(v)
        op.backward(sums, Saved(dout.contiguous(), q, k, v, out, lse), view, options)
        return *(total.result() for total in sums), None, None, None


class Parallel(Protocol):
    """What ``attention`` needs of a context-parallel group."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        kernel: Kernel,
        options: KernelOptions,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    kernel: str = "sdpa_flash",
    scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
    cp: Parallel | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention under ``mask``, differentiable in q, k and v.

    Args:
        q: ``[batch, tokens, heads, head_dim]``; with ``cp``, this rank's rows.
        k, v: ``[batch, keys, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        mask: the whole (global) mask, shared by the batch.
        kernel: a name of ``lcab_plugin.kernels.names()``; that kernel runs or the call raises.
        scale: softmax scale, ``head_dim ** -0.5`` if None.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        deterministic: the backward must be bitwise repeatable.
        cp: the group the sequence is split over (``lcab_plugin.context_parallel``).
        return_lse: also return ``lse [batch, heads, tokens]`` (float32, natural log, ``-inf`` where a row
            sees no key). lse is not differentiable.

    Returns:
        ``out [batch, tokens, heads, value head_dim]``, or ``(out, lse)``.

    Raises:
        LcabError: a shape, a name or the mask does not fit; the message says which.
        UnsupportedError: the kernel cannot serve this call; the message says why.
    """
    chosen = kernels.get(kernel)
    problem = _shape_problem(q, k, v)
    if problem is None and softcap is not None and softcap <= 0:
        problem = f"softcap {softcap} is not positive; leave it out for none"
    if problem:
        raise LcabError(problem)
    options = KernelOptions(q.shape[-1] ** -0.5 if scale is None else scale, softcap, deterministic)
    if cp is not None:
        out, lse = cp.attend(q, k, v, mask, chosen, options, return_lse)
    else:
        if (q.shape[1], k.shape[1]) != (mask.q_len, mask.k_len):
            raise LcabError(
                f"the mask is for {mask.q_len} queries and {mask.k_len} keys, the tensors have {q.shape[1]} "
                f"and {k.shape[1]}; build the mask for this length, or pass cp= if these are shards"
            )
        local = Local(chosen, needs_backward(q, k, v))
        out, lse = AttentionFunction.apply(q, k, v, local, Whole(mask), options)
    return (out, lse) if return_lse else out


def _shape_problem(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"q, k and v must be [batch, tokens, heads, head_dim], not {shapes}"
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        return f"k and v must share batch, tokens and heads, and q their batch: {shapes}"
    if q.shape[-1] != k.shape[-1]:
        return f"q and k must have the same head_dim: {shapes}"
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        return f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads"
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        return f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
    return None


class Settings(Protocol):
    """The part of ``AttentionConfig`` that an attention module reads."""

    @property
    def kernel(self) -> str: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def deterministic(self) -> bool: ...


class Attention(nn.Module):
    """Drop-in attention: takes q, k, v after RoPE, returns the heads' outputs; has no parameters.

    Put it where a model calls its attention. Unbound it runs ``sdpa_flash`` on one device; an adapter (or
    you) binds it to a configuration and a context-parallel group with :meth:`bind`.
    """

    def __init__(self, config: Settings | None = None, cp: Any = None) -> None:
        super().__init__()
        self.kernel = "sdpa_flash"
        self.scale: float | None = None
        self.softcap: float | None = None
        self.deterministic = False
        self.bind(config, cp)

    def bind(self, config: Settings | None, cp: Any = None) -> None:
        """Take kernel and options from ``config`` and run over the group of ``cp`` (None: one device)."""
        if config is not None:
            self.kernel, self.scale = config.kernel, config.scale
            self.softcap, self.deterministic = config.softcap, config.deterministic
            kernels.get(self.kernel)
        self.cp = cp

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, cp: Any = None) -> Tensor:
        """Attention of this rank's rows, ``[b, tokens, heads, d]``, under the batch's global ``mask``.

        ``cp``: the bound group with this batch's layout (``cp.with_layout(...)``); without it the bound
        group's own layout is used, made for the mask's length.
        """
        group = cp if cp is not None else self.cp
        if group is not None and cp is None:
            group = group.with_layout(mask=mask)
        return attention(
            q,
            k,
            v,
            mask,
            kernel=self.kernel,
            scale=self.scale,
            softcap=self.softcap,
            deterministic=self.deterministic,
            cp=group,
        )

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, cp={self.cp.describe() if self.cp is not None else None}"
