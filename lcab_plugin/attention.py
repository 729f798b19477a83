"""One attention call, and the drop-in module.

Under ``torch.compile`` the call is one operator of the graph (``torch_op``), else an autograd function around
a kernel. Over a context-parallel group it runs outside of graphs, behind a graph break; ``fullgraph=True``
therefore stops there with an error that quotes the line.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lcab_plugin import kernels, torch_op  # noqa: F401  (torch_op registers torch.ops.lcab)
from lcab_plugin.errors import LcabError, UnsupportedError
from lcab_plugin.kernels.contract import Kernel, KernelOptions
from lcab_plugin.masks import AttentionMask
from lcab_plugin.operation import Local, Whole, attend, needs_backward


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
        sink: Tensor | None,
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
    sink: Tensor | None = None,
    dropout: float = 0.0,
    cp: Parallel | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention under ``mask``, differentiable in q, k, v and the sink.

    Args:
        q: ``[batch, tokens, heads, head_dim]``; with ``cp``, this rank's rows.
        k, v: ``[batch, keys, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``. With ``cp``,
            this rank's rows, as ``cp.keys.shard`` gives them.
        mask: the whole (global) mask, shared by the batch.
        kernel: a name of ``lcab_plugin.kernels.names()``; that kernel runs or the call raises.
        scale: softmax scale, ``head_dim ** -0.5`` if None.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        deterministic: the backward must be bitwise repeatable.
        sink: ``[heads]``, one more logit in the softmax of every row of a head, with value zero (learnable
            attention sinks; neither scaled nor soft-capped). With ``cp`` every rank gives all heads' sinks,
            and its gradient is this rank's share: the sum over the group is the whole, as for any parameter
            that the ranks of the group hold copies of.
        dropout: a framework's attention dropout probability, refused above 0 where gradients are wanted.
        cp: the group the sequence is split over (``lcab_plugin.context_parallel``).
        return_lse: also return ``lse [batch, heads, tokens]`` (float32, natural log, the sink included,
            ``-inf`` where a row sees neither key nor sink). lse is not differentiable.

    Returns:
        ``out [batch, tokens, heads, value head_dim]``, or ``(out, lse)``.

    Raises:
        LcabError: a shape, a name or the mask does not fit; the message says which.
        UnsupportedError: the kernel cannot serve this call; the message says why.
    """
    if dropout:
        refuse_dropout(dropout, torch.is_grad_enabled())
    problem = _problem(q, k, v, softcap, sink)
    if problem is None and cp is None and (q.shape[1] != mask.q_len or k.shape[1] != mask.k_len):
        problem = (
            f"the mask is for {mask.q_len} queries and {mask.k_len} keys, the tensors have {q.shape[1]} "
            f"and {k.shape[1]}; build the mask for this length, or pass cp= if these are shards"
        )
    if problem is not None:
        raise LcabError(problem)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if cp is not None:
        run = _over_group
        if torch.compiler.is_compiling():  # ranks compare, plan and exchange in there: not of one graph
            run = torch.compiler.disable(run, reason="context parallelism needs fullgraph=False")
        out, lse = run(cp, q, k, v, mask, kernel, (scale, softcap, deterministic), return_lse, sink)
    elif torch.compiler.is_compiling():
        call = scale, softcap, deterministic, needs_backward(q, k, v)
        out, lse = torch.ops.lcab.attention(q, k, v, sink, mask.tensor, kernel, *call)
    else:
        local = Local(kernels.get(kernel), needs_backward(q, k, v))
        out, lse = attend(q, k, v, sink, local, Whole(mask), _options(scale, softcap, deterministic))
    return (out, lse) if return_lse else out


_options = lru_cache(KernelOptions)


def _over_group(
    cp: Parallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    kernel: str,
    options: tuple[float, float | None, bool],
    return_lse: bool,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    return cp.attend(q, k, v, mask, kernels.get(kernel), _options(*options), return_lse, sink)


def refuse_dropout(dropout: float, training: bool) -> None:
    """Refuse attention dropout while training: no kernel here drops probabilities.

    Raises:
        UnsupportedError: names the flag that turns it off.
    """
    if dropout and training:
        raise UnsupportedError(
            f"attention dropout {dropout} is not applied by any kernel here; train with dropout=0.0 (the "
            "model's attention_dropout, in Megatron --attention-dropout 0)"
        )


def _problem(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, sink: Tensor | None) -> str | None:
    """What is wrong with the arguments, in words that name the values."""
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"q, k and v must be [batch, tokens, heads, head_dim], not {_shapes(q, k, v)}"
    (b, _, heads, dim), (kv_b, _, kv_heads, k_dim) = q.shape, k.shape
    if k.shape[:3] != v.shape[:3] or b != kv_b:
        return f"k and v must share batch, tokens and heads, and q their batch: {_shapes(q, k, v)}"
    if dim != k_dim:
        return f"q and k must have the same head_dim: {_shapes(q, k, v)}"
    if kv_heads == 0 or heads % kv_heads:
        return f"{heads} query heads are not a multiple of {kv_heads} key/value heads"
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        return f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
    if softcap is not None and softcap <= 0:
        return f"softcap {softcap} is not positive; leave it out for none"
    if sink is not None and (sink.shape != (heads,) or not sink.is_floating_point()):
        return f"sink must be floating [{heads}], one logit per query head, not {sink.dtype} {[*sink.shape]}"
    return None


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


class _ForEveryMask:
    """A group whose layout is made for the mask of each call."""

    def __init__(self, cp: Any) -> None:
        self.cp = cp

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *rest: Any) -> Any:
        if self.cp.layout_name == "balanced":  # layers of other masks would read the same rows as others
            raise LcabError(
                "layout 'balanced' is made for one mask, which need not be every layer's; pass the batch's "
                "group: cp=cp.with_layout(mask=mask)"
            )
        return self.cp.with_layout(mask=mask).attend(q, k, v, mask, *rest)


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

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        cp: Any = None,
        *,
        sink: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Attention of this rank's rows, ``[b, tokens, heads, d]``, under the batch's global ``mask``.

        ``cp``: the bound group with this batch's layout (``cp.with_layout(...)``); without it the bound
        group's own layout is used, made for the mask's length. ``sink``: as in :func:`attention`, a parameter
        of the module around this one. ``dropout``: refused above 0 in training mode, without effect in eval.
        """
        refuse_dropout(dropout, self.training)
        group = cp if cp is not None or self.cp is None else _ForEveryMask(self.cp)
        return attention(
            q,
            k,
            v,
            mask,
            kernel=self.kernel,
            scale=self.scale,
            softcap=self.softcap,
            deterministic=self.deterministic,
            sink=sink,
            cp=group,
        )

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, cp={self.cp.describe() if self.cp is not None else None}"
