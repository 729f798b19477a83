"""PyTorch's unfused attention (``aten::_scaled_dot_product_attention_math``) over a dense boolean mask.

It computes in the precision of its inputs. Memory grows with [q, k] by its nature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall, accumulation_dtype
from lcab_plugin.masks import AttentionMask


class SdpaMath:
    """Eager attention: two matrix products around a softmax, in the precision of the inputs."""

    name = "sdpa_math"
    features = Features(
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        head_dims="any",
        native="every mask, as a dense [q, k]",
        lowering="none",
        value_dim=True,
    )

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self) -> str | None:
        return None

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
        return None

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        return [NativeCall("dense mask", 1, mask.area, mask.q_len * mask.k_len)]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        visible = mask.to_dense(q.device)
        key, value = _expand(q, k), _expand(q, v)
        # this operator adds its mask: a boolean one would shift the scores by one instead of hiding keys
        added = q.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            q.transpose(1, 2), key, value, added, 0.0, False, scale=options.scale
        )
        # rows without a key are NaN in older versions of the operator
        out = out.masked_fill(~visible.any(-1, keepdim=True), 0.0).transpose(1, 2).contiguous()
        return out, _scores(q, key, visible, options.scale).logsumexp(-1)

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
        """The math path's own derivative written out, since autograd's cannot take a merged softmax."""
        wide = accumulation_dtype(q.dtype)
        visible = mask.to_dense(q.device)
        key, value, query, grad = _expand(q, k), _expand(q, v), q.transpose(1, 2), dout.transpose(1, 2)
        scores = _scores(q, key, visible, options.scale)
        p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        delta = (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2).unsqueeze(-1)
        ds = (p * ((grad @ value.transpose(-1, -2)).to(wide) - delta) * options.scale).to(q.dtype)
        dq = ds @ key
        dk = ds.transpose(-1, -2) @ query
        dv = p.to(q.dtype).transpose(-1, -2) @ grad
        groups = (k.shape[2], q.shape[2] // k.shape[2])
        return (
            dq.transpose(1, 2),
            dk.unflatten(1, groups).sum(2).transpose(1, 2),
            dv.unflatten(1, groups).sum(2).transpose(1, 2),
        )


def _expand(q: Tensor, x: Tensor) -> Tensor:
    """[b, t, kv_heads, d] as [b, heads, t, d], repeated within each group."""
    return x.transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], dim=1)


def _scores(q: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Masked scores [b, h, q, k]: multiplied in the inputs' precision, kept in the accumulation dtype."""
    s = (q.transpose(1, 2) @ key.transpose(-1, -2)).to(accumulation_dtype(q.dtype)) * scale
    return s.masked_fill_(~visible, float("-inf"))


KERNEL = SdpaMath()
