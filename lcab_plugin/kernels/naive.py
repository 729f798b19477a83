"""The specification: attention as its formula says, over a dense mask. Every other kernel is tested
against this one in float64; none of them imports it."""

from __future__ import annotations

import torch
from torch import Tensor

from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall, accumulation_dtype
from lcab_plugin.masks import AttentionMask


class Naive:
    """Scores and probabilities are materialised as [b, h, q, k] in float32 (float64 for float64 inputs)."""

    name = "naive"
    features = Features(
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        head_dims="any",
        native="every mask, as a dense [q, k]",
        lowering="none",
        softcap=True,
        value_dim=True,
    )

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, q, k, v, mask, options, needs_backward) -> str | None:  # type: ignore[no-untyped-def]
        return None

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        return [NativeCall("dense mask", 1, mask.area, mask.q_len * mask.k_len)]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        s = _scores(q, k, mask, options)[0]
        lse = s.logsumexp(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", _probabilities(s, lse), _per_query_head(v, q))
        return out.to(q.dtype), lse

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
        s, dcap = _scores(q, k, mask, options)
        p = _probabilities(s, lse)
        dout = dout.to(p.dtype)
        dv = torch.einsum("bhqk,bqhd->bkhd", p, dout)
        dp = torch.einsum("bqhd,bkhd->bhqk", dout, _per_query_head(v, q))
        delta = (dout * out).sum(-1).transpose(1, 2)  # [b, h, q]
        ds = p * (dp - delta.unsqueeze(-1)) * options.scale
        if dcap is not None:
            ds = ds * dcap
        dq = torch.einsum("bhqk,bkhd->bqhd", ds, _per_query_head(k, q))
        dk = torch.einsum("bhqk,bqhd->bkhd", ds, q.to(ds.dtype))
        groups = (k.shape[2], q.shape[2] // k.shape[2])
        return (
            dq.to(q.dtype),
            dk.unflatten(2, groups).sum(3).to(k.dtype),
            dv.unflatten(2, groups).sum(3).to(v.dtype),
        )


def _scores(
    q: Tensor, k: Tensor, mask: AttentionMask, options: KernelOptions
) -> tuple[Tensor, Tensor | None]:
    """Masked scores [b, h, q, k], and the derivative of the soft cap where there is one."""
    q_wide = q.to(accumulation_dtype(q.dtype))
    s = torch.einsum("bqhd,bkhd->bhqk", q_wide, _per_query_head(k, q)) * options.scale
    dcap = None
    if options.softcap is not None:
        t = torch.tanh(s / options.softcap)
        s, dcap = options.softcap * t, 1 - t * t
    return s.masked_fill(~mask.to_dense(q.device), float("-inf")), dcap


def _probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """``exp(s - lse)``, zero in rows that see no key (``-inf - -inf`` would be NaN)."""
    return torch.exp(s - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values repeated for every query head of their group, in the accumulation dtype."""
    return x.to(accumulation_dtype(q.dtype)).repeat_interleave(q.shape[2] // x.shape[2], dim=2)


KERNEL = Naive()
