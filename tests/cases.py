"""What the conformance suites share: the twelve masks at one length, inputs, and the fp64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

from lcab_plugin import masks
from lcab_plugin.kernels import KernelOptions, get
from lcab_plugin.masks import AttentionMask

N = 96
LENGTHS = (17, 33, 1, 45)

PARAMETERS = {
    "full": {},
    "causal": {},
    "full_document": {"lengths": LENGTHS},
    "causal_document": {"lengths": LENGTHS},
    "sliding_window": {"left": 13, "right": 7},
    "sliding_window_causal": {"left": 13},
    "share_question": {"lengths": (20, 30, 10, 36)},
    "causal_blockwise": {"lengths": LENGTHS},
    "prefix_lm_causal": {"prefix": 29},
    "prefix_lm_document": {"lengths": LENGTHS, "prefixes": (5, 33, 0, 12)},
    "global_sliding_window": {"global_tokens": 11, "window": 9},
    "block_causal_document": {"lengths": LENGTHS, "block": 8},
}


def twelve(n: int = N) -> dict[str, AttentionMask]:
    """Every builder at length ``n`` (the tokens past ``N`` join the last document)."""
    out = {}
    for name, parameters in PARAMETERS.items():
        parameters = dict(parameters)
        if "lengths" in parameters:
            *head, last = parameters["lengths"]
            parameters["lengths"] = (*head, last + n - N)
        out[name] = masks.from_name(name, n, **parameters)
    assert set(out) == set(masks.names())
    return out


def inputs(
    tq: int, tk: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, batch: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dout."""
    g = torch.Generator().manual_seed(seed)

    def draw(t: int, h: int) -> Tensor:
        return torch.randn(batch, t, h, dim, generator=g, dtype=torch.float64).to(dtype)

    return draw(tq, heads), draw(tk, kv_heads), draw(tk, kv_heads), draw(tq, heads)


def reference(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: AttentionMask, scale: float | None = None
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv in float64."""
    naive = get("naive")
    options = KernelOptions(q.shape[-1] ** -0.5 if scale is None else scale)
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    out, lse = naive.forward(q, k, v, mask, options)
    dq, dk, dv = naive.backward(dout, q, k, v, out, lse, mask, options)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def eager(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: AttentionMask) -> dict[str, Tensor]:
    """The yardstick of an error budget: what a model without any attention library computes in the precision
    of its inputs, by autograd; none of our code but the mask."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    key, value = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, key).float() * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask.to_dense(q.device), float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(q.dtype), value)
    out.backward(dout)
    return {"out": out, "lse": scores.logsumexp(-1), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference by name, relative to the reference's largest value; inf where NaN or where
    the infinities differ."""
    out = {}
    for name, x in got.items():
        x, y = x.detach().double(), want[name].detach().double()
        finite = y.isfinite()
        if x.shape != y.shape or bool(x.isnan().any()) or not torch.equal(x.isfinite(), finite):
            out[name] = float("inf")
            continue
        if not finite.any():
            out[name] = 0.0
            continue
        out[name] = ((x - y)[finite].abs().max() / y[finite].abs().max().clamp_min(1.0)).item()
    return out
