"""Learnable attention sinks: one more column in the softmax, under every kernel and every strategy."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import LENGTHS, errors, families, inputs
from distributed import run
from torch import Tensor

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.masks import AttentionMask

N = 96
STRATEGIES = ("ulysses", "ring_p2p", "ring_all_gather", "usp", "group_cast")


def softmax_with_a_column(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, sink: Tensor, mask: AttentionMask
) -> dict[str, Tensor]:
    """The definition, by autograd in float64: nothing of ours but the dense mask."""
    q, k, v, sink = (x.detach().double().requires_grad_() for x in (q, k, v, sink))
    key, value = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, key) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask.to_dense(), float("-inf"))
    column = sink[None, :, None, None].expand(*scores.shape[:3], 1)
    scores = torch.cat((scores, column), -1)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1)[..., :-1], value)
    grads = torch.autograd.grad(out, (q, k, v, sink), dout.double())
    names = ("dq", "dk", "dv", "dsink")
    return {"out": out, "lse": scores.logsumexp(-1), **dict(zip(names, grads, strict=True))}


def sinks(heads: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 3, heads, dtype=dtype).requires_grad_()


def computed(x: tuple[Tensor, ...], sink: Tensor, mask: AttentionMask, kernel: str) -> dict[str, Tensor]:
    q, k, v = (t.detach().requires_grad_() for t in x[:3])
    out, lse = lcab.attention(q, k, v, mask, kernel=kernel, sink=sink, return_lse=True)
    assert not lse.requires_grad
    grads = torch.autograd.grad(out, (q, k, v, sink), x[3])
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv", "dsink"), grads, strict=True))}


@pytest.mark.parametrize("kernel", ["naive", "sdpa_math", "sdpa_flash"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_mask_and_kernel(kernel, kv_heads):
    """Also masks that a kernel serves by several merged calls."""
    x = inputs(N, N, 4, kv_heads, 16, torch.float64)
    for name, mask in families().items():
        sink = sinks(4, torch.float64)
        got = computed(x, sink, mask, kernel)
        for tensor, error in errors(got, softmax_with_a_column(*x, sink, mask)).items():
            assert error < 1e-12, (name, tensor, error)


@pytest.mark.parametrize("kernel", ["naive", "sdpa_flash"])
def test_bfloat16_is_rounded_once_more_than_without(kernel):
    x = inputs(N, N, 4, 2, 16, torch.bfloat16)
    mask = masks.causal_document(LENGTHS)
    sink = sinks(4, torch.float32)
    got, want = computed(x, sink, mask, kernel), softmax_with_a_column(*x, sink, mask)
    assert (got["out"].dtype, got["lse"].dtype, got["dsink"].dtype) == (torch.bfloat16, *[torch.float32] * 2)
    assert max(errors(got, want).values()) < 2**-6


@pytest.mark.parametrize("kernel", ["naive", "sdpa_math", "sdpa_flash"])
@pytest.mark.parametrize("slices", [[(30, N, 0, 40)], []], ids=["some rows", "no row"])
def test_rows_that_see_no_key(kernel, slices):
    """Their softmax is all sink: out 0, lse the sink, no gradient."""
    x = inputs(N, N, 4, 2, 16, torch.float64)
    mask, sink = AttentionMask(N, N, slices), sinks(4, torch.float64)
    got = computed(x, sink, mask, kernel)
    blind = slice(0, 30) if slices else slice(0, N)
    assert not got["out"][:, blind].any()
    assert not got["dq"][:, blind].any()
    assert torch.equal(got["lse"][:, :, blind], sink.detach()[:, None].expand(2, 4, N)[:, :, blind])
    assert max(errors(got, softmax_with_a_column(*x, sink, mask)).values()) < 1e-12


def test_a_head_without_a_sink():
    """-inf is no sink, also in rows without keys."""
    x = inputs(N, N, 2, 1, 16, torch.float64)
    mask, sink = AttentionMask(N, N, [(30, N, 0, 40)]), torch.full((2,), float("-inf")).requires_grad_()
    got = computed(x, sink, mask, "sdpa_flash")
    out, lse = lcab.attention(*x[:3], mask, return_lse=True)
    assert torch.equal(got["out"], out)
    assert torch.equal(got["lse"], lse)
    assert not got["dsink"].any()
    assert got["dq"].isfinite().all()


def test_only_the_sink_learns():
    """Its gradient needs no backward of the kernel."""
    q, k, v, dout = inputs(N, N, 4, 2, 16, torch.float64)
    mask, sink = masks.causal(N), sinks(4, torch.float64)
    out = lcab.attention(q, k, v, mask, sink=sink)
    (dsink,) = torch.autograd.grad(out, sink, dout)
    want = softmax_with_a_column(q, k, v, dout, sink, mask)["dsink"]
    assert errors({"dsink": dsink}, {"dsink": want})["dsink"] < 1e-12


def test_the_module_passes_it_on():
    q, k, v, _ = inputs(N, N, 4, 2, 16, torch.float64)
    mask, sink = masks.causal(N), sinks(4, torch.float64)
    assert torch.equal(lcab.Attention()(q, k, v, mask, sink=sink), lcab.attention(q, k, v, mask, sink=sink))


@pytest.mark.parametrize("sink", [torch.zeros(2), torch.zeros(1, 4), torch.zeros(4, dtype=torch.int64)])
def test_a_sink_that_does_not_fit(sink):
    q, k, v, _ = inputs(N, N, 4, 2, 16, torch.float64)
    with pytest.raises(lcab.LcabError, match=r"sink must be floating \[4\], one logit per query head"):
        lcab.attention(q, k, v, masks.causal(N), sink=sink)


def over_ranks(rank: int, world: int, kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    """Each rank's gradient of the sinks is its share: the sum over the ranks is the whole."""
    groups = {s: lcab.context_parallel(s, ulysses=2 if s == "usp" else None) for s in STRATEGIES}
    empty_rows = AttentionMask(N, N, [(40, 90, 0, 50), (90, N, 0, N, None, 0)])
    cases = {
        "empty_rows": empty_rows,
        **{n: m for n, m in families().items() if n in ("causal", "share_question")},
    }
    for heads, kv_heads in ((4, 4), (8, 2), (4, 1)):
        x, sink = inputs(N, N, heads, kv_heads, 16, dtype), sinks(heads, dtype)
        for (name, mask), (strategy, cp) in itertools.product(cases.items(), groups.items()):
            want = softmax_with_a_column(*x, sink, mask)
            cp = cp.with_layout(mask=mask)
            q, k, v = (cp.shard(t, 1).detach().requires_grad_() for t in x[:3])
            out, lse = lcab.attention(q, k, v, mask, kernel=kernel, cp=cp, sink=sink, return_lse=True)
            dq, dk, dv, dsink = torch.autograd.grad(out, (q, k, v, sink), cp.shard(x[3], 1))
            torch.distributed.all_reduce(dsink)
            got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
            local = {t: cp.shard(want[t], 2 if t == "lse" else 1) for t in got}
            measured = {**errors(got, local), **errors({"dsink": dsink}, {"dsink": want["dsink"]})}
            for tensor, error in measured.items():
                assert error < tolerance, (strategy, name, (heads, kv_heads), tensor, error)


@pytest.mark.parametrize(
    ("world", "kernel", "dtype", "tolerance"),
    [(4, "naive", torch.float64, 1e-11), (2, "sdpa_flash", torch.float32, 2e-5)],
)
def test_every_strategy(world, kernel, dtype, tolerance):
    run(over_ranks, world, kernel, dtype, tolerance)
