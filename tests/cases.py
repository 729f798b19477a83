"""What the conformance suites share: a mask of every family at one length, inputs, and the fp64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lcab_plugin import masks
from lcab_plugin.kernels import KernelOptions, get
from lcab_plugin.kernels.contract import accumulation_dtype
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
    "block_sparse": {"block": 16, "keep": 0.4, "seed": 0},
}


def families(n: int = N) -> dict[str, AttentionMask]:
    """Every builder at length ``n`` (the tokens past ``N`` join the last document; as many sparse blocks)."""
    out = {}
    for name, parameters in PARAMETERS.items():
        parameters = dict(parameters)
        if "keep" in parameters:
            parameters["block"] = -(-parameters["block"] * n // N)
        if "lengths" in parameters:
            *head, last = parameters["lengths"]
            parameters["lengths"] = (*head, last + n - N)
        out[name] = masks.from_name(name, n, **parameters)
    assert set(out) == set(masks.names())
    return out


def enlarged(factor: int) -> dict[str, AttentionMask]:
    """Every builder with all its lengths and windows ``factor`` times as long: the same picture."""
    out = {}
    for name, parameters in PARAMETERS.items():
        longer = {
            key: tuple(x * factor for x in value)
            if isinstance(value, tuple)
            else value * (1 if key in ("keep", "seed") else factor)
            for key, value in parameters.items()
        }
        out[name] = masks.from_name(name, N * factor, **longer)
    return out


def inputs(
    tq: int,
    tk: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    batch: int = 2,
    seed: int = 0,
    *,
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dout; v and dout have ``value_dim``, the others' where it is left out."""
    g = torch.Generator().manual_seed(seed)

    def draw(t: int, h: int, d: int) -> Tensor:
        return torch.randn(batch, t, h, d, generator=g, dtype=torch.float64).to(dtype)

    value = dim if value_dim is None else value_dim
    return draw(tq, heads, dim), draw(tk, kv_heads, dim), draw(tk, kv_heads, value), draw(tq, heads, value)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    mask: AttentionMask,
    scale: float | None = None,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv in float64."""
    naive = get("naive")
    options = KernelOptions(q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    out, lse = naive.forward(q, k, v, mask, options)
    dq, dk, dv = naive.backward(dout, q, k, v, out, lse, mask, options)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    mask: AttentionMask,
    scale: float | None = None,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """The yardstick of an error budget: what a model without any attention library computes in the precision
    of its inputs, by autograd; none of our code but the mask."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    key, value = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, key).to(accumulation_dtype(q.dtype))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = mask.to_dense(q.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    # the softmax of a row without keys is NaN, and so is its gradient: such rows are taken out on both sides
    p = scores.masked_fill(~visible.any(1, keepdim=True), 0.0).softmax(-1)
    p = p.masked_fill(~visible.any(1, keepdim=True), 0.0).to(q.dtype)
    out = torch.einsum("bhqk,bkhd->bqhd", p, value)
    out.backward(dout)
    return {"out": out, "lse": scores.logsumexp(-1), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference by name, relative to the reference's largest value; inf where NaN or where
    the infinities differ."""
    out = {}
    for name, (x, y) in _finite(got, want).items():
        if x is None:
            out[name] = float("inf")
        else:  # a rank without tokens has nothing to be wrong
            out[name] = ((x - y).abs().max() / y.abs().max().clamp_min(1.0)).item() if x.numel() else 0.0
    return out


def row_errors(got: dict[str, Tensor], want: dict[str, Tensor], sizes: dict[str, Tensor]) -> dict[str, float]:
    """The worst row by name: the norm of its difference relative to that of the terms it is a sum of.

    A row is the head_dim vector of one token and head (of lse: one number). One wrong row of small numbers
    drowns in a tensor's largest value, not here; rows that cancel to nothing keep the size of what cancelled.
    """
    out = {}
    for name, (x, y) in _finite(got, want).items():
        if x is None:
            out[name] = float("inf")
        elif name == "lse":
            out[name] = ((x - y).abs() / y.abs().clamp_min(1.0)).max().item()
        else:
            off, size = (x - y).norm(dim=-1), sizes[name].norm(dim=-1)
            out[name] = (off / size.clamp_min(torch.finfo(torch.float32).tiny)).max().item()
    return out


def term_sizes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    mask: AttentionMask,
    scale: float | None = None,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """Every sum behind out, dq, dk and dv with the absolute values of its terms, in float64."""
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    kv_heads, scale = k.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    key, value = (x.repeat_interleave(q.shape[2] // kv_heads, 2) for x in (k, v.abs()))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    p = scores.masked_fill(~mask.to_dense(q.device), float("-inf")).softmax(-1).nan_to_num(0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", p, value)
    delta = (dout.abs() * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (torch.einsum("bqhd,bkhd->bhqk", dout.abs(), value) + delta) * scale
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, q.abs()).unflatten(2, (kv_heads, -1)).sum(3)
    dv = torch.einsum("bhqk,bqhd->bkhd", p, dout.abs()).unflatten(2, (kv_heads, -1)).sum(3)
    return {"out": out, "dq": torch.einsum("bhqk,bkhd->bqhd", ds, key.abs()), "dk": dk, "dv": dv}


@dataclass(frozen=True, repr=False)
class Expected:
    """The specification's answer to one call, eager attention's in the same precision, and ``term_sizes``."""

    want: dict[str, Tensor]
    plain: dict[str, Tensor]
    sizes: dict[str, Tensor]

    @cached_property
    def eager(self) -> tuple[dict[str, float], dict[str, float]]:
        """Eager attention's errors, of each tensor as a whole and in one row."""
        return errors(self.plain, self.want), row_errors(self.plain, self.want, self.sizes)

    def limits(self, gradients: float = 2.0) -> dict[str, tuple[float, float]]:
        """The error each tensor may have as a whole, and in one row: twice eager attention's and a few ulp.
        ``gradients``: the times for those in float32.

        float64 has no yardstick to be measured by: there the formula must come out.
        """
        dtype = self.plain["out"].dtype
        if dtype == torch.float64:
            return dict.fromkeys(self.want, (1e-12, 1e-12))
        ulp = torch.finfo(dtype).eps
        ulps = (8 * ulp, 4 * ulp) if dtype == torch.float32 else (4 * ulp, ulp)
        whole, row = self.eager
        times = dict.fromkeys(self.want, 2.0)
        if dtype == torch.float32:
            times |= dict.fromkeys(("dq", "dk", "dv"), gradients)
        return {n: (times[n] * whole[n] + ulps[0], times[n] * row[n] + ulps[1]) for n in self.want}

    def problems(self, got: dict[str, Tensor], gradients: float = 2.0) -> list[str]:
        """What exceeds its limit, as a whole or in one row, in words."""
        limits = self.limits(gradients)
        measured = errors(got, self.want), row_errors(got, self.want, self.sizes)
        return [
            f"{name}{what}: {error[name]:.2e} over {limit:.2e}"
            for name in got
            for what, error, limit in zip(("", " by row"), measured, limits[name], strict=True)
            if not error[name] <= limit
        ]

    def problems_of_rows(self, got: dict[str, Tensor], positions: Tensor) -> list[str]:
        """``problems`` where ``got`` has only the tokens at ``positions``; the limits are the whole's."""
        whole = {}
        for name, rows in got.items():
            right = self.want[name].detach().double()
            whole[name] = right.index_copy(2 if name == "lse" else 1, positions, rows.detach().double())
        return self.problems(whole)

    def last(self, rows: int) -> Expected:
        """Of the last ``rows`` tokens only."""
        return Expected(*(last(x, rows) for x in (self.want, self.plain, self.sizes)))


def last(answer: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The last ``rows`` tokens of an answer."""
    return {t: x[:, :, -rows:] if t == "lse" else x[:, -rows:] for t, x in answer.items()}


def expected(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: AttentionMask, **options: float
) -> Expected:
    """What a kernel is judged by; ``options``: scale and softcap."""
    x = (q, k, v, dout, mask)
    return Expected(reference(*x, **options), eager(*x, **options), term_sizes(*x, **options))


def _finite(
    got: dict[str, Tensor], want: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor] | tuple[None, None]]:
    """Both in float64 by name; without lse's infinities where they agree, None where anything is NaN or the
    infinities or the shapes differ."""
    out: dict[str, tuple[Tensor, Tensor] | tuple[None, None]] = {}
    for name, tensor in got.items():
        x, y = tensor.detach().double(), want[name].detach().double()
        finite = y.isfinite()
        if x.shape != y.shape or bool(x.isnan().any()) or not torch.equal(x.isfinite(), finite):
            out[name] = None, None
        elif name == "lse":
            out[name] = (x[finite], y[finite]) if finite.any() else (x.new_zeros(1), x.new_zeros(1))
        else:
            out[name] = x, y
    return out
