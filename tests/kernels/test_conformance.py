"""Every kernel x mask x dtype x GQA against the fp64 specification, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import N, eager, errors, inputs, reference, twelve

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.kernels import KernelOptions, get

KERNELS = lcab.kernels.names()
MASKS = twelve()


def run(kernel, q, k, v, dout, mask, scale=None):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = lcab.attention(q, k, v, mask, kernel=kernel, scale=scale, return_lse=True)
    out.backward(dout)
    return {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}


def test_the_specification_is_attention():
    """naive itself, against autograd through torch's softmax."""
    q, k, v, dout = inputs(N, N, 4, 2, 16, torch.float64)
    mask = MASKS["share_question"]
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 0.25
    p = scores.masked_fill(~mask.to_dense(), float("-inf")).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", p, v.repeat_interleave(2, 2))
    grads = torch.autograd.grad(out, (q, k, v), dout)
    got = run("naive", q, k, v, dout, mask)
    for name, want in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        torch.testing.assert_close(got[name], want)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=lambda h: f"heads{h[0]}:{h[1]}")
@pytest.mark.parametrize("kernel", KERNELS)
def test_float64_is_exact(kernel, heads, name):
    x = inputs(N, N, *heads, 16, torch.float64)
    worst = errors(run(kernel, *x, MASKS[name]), reference(*x, MASKS[name]))
    assert max(worst.values()) < 1e-12, worst


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_within_the_error_budget(kernel, dtype, name):
    """At most twice what eager attention loses in the same precision, plus a few ulp."""
    x = inputs(N, N, 4, 2, 32, dtype)
    want = reference(*x, MASKS[name])
    budget = errors(eager(*x, MASKS[name]), want)
    worst = errors(run(kernel, *x, MASKS[name]), want)
    ulp = torch.finfo(dtype).eps
    for tensor, error in worst.items():
        precision = torch.finfo(torch.float32).eps if tensor == "lse" and dtype == torch.float32 else ulp
        assert error <= 2 * budget[tensor] + 4 * precision, (tensor, error, budget[tensor])


@pytest.mark.parametrize("kernel", KERNELS)
def test_merged_out_and_lse(kernel):
    """Backward from an out and lse over twice the keys gives this half's share of the gradients."""
    q, k, v, dout = inputs(40, 80, 4, 2, 16, torch.float64)
    whole, half = masks.full_document([80]), 40
    mask = whole.local([range(40)], [range(80)])
    want = reference(q, k, v, dout, mask)
    left = mask.local([range(40)], [range(half)])
    options = KernelOptions(0.25)
    parts = [
        get(kernel).backward(dout, q, k[:, part], v[:, part], want["out"], want["lse"], left, options)
        for part in (slice(0, half), slice(half, None))
    ]
    got = {"dq": parts[0][0] + parts[1][0]}
    got |= {f"d{x}": torch.cat([p[i] for p in parts], 1) for i, x in ((1, "k"), (2, "v"))}
    assert max(errors(got, want).values()) < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_see_no_key(kernel):
    mask = masks.AttentionMask(24, 24, [(3, 9, 0, 5), (9, 20, 2, 20, None, 0)])
    x = inputs(24, 24, 4, 2, 16, torch.float32)
    got = run(kernel, *x, mask)
    assert max(errors(got, reference(*x, mask)).values()) < 1e-5
    empty = ~mask.to_dense().any(1)
    assert (got["lse"][:, :, empty] == float("-inf")).all()
    assert not got["out"][:, empty].any()
    assert not got["dq"][:, empty].any()
    unseen = ~mask.to_dense().any(0)
    assert not got["dk"][:, unseen].any()
    assert not got["dv"][:, unseen].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mask_that_shows_nothing(kernel):
    x = inputs(8, 8, 2, 1, 16, torch.float32)
    got = run(kernel, *x, masks.AttentionMask(8, 8, []))
    assert not any(got[name].any() for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize(("tq", "tk"), [(1, 96), (30, 96), (96, 30)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_different_lengths(kernel, tq, tk):
    x = inputs(tq, tk, 4, 2, 16, torch.float64)
    for types in (0, 1, 2, 3):
        if types == 3 and tq > tk:
            continue
        mask = masks.from_ranges([(0, tq)], [(0, tk)], [types])
        assert max(errors(run(kernel, *x, mask), reference(*x, mask)).values()) < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_inputs_and_large_logits(kernel):
    mask = MASKS["causal_document"]
    x = inputs(N, N, 4, 4, 32, torch.float32)
    fused = torch.stack(x[:3], dim=2).flatten(2, 3)  # one [b, t, 3 * h, d] projection
    q, k, v = (fused[:, :, i * 4 : (i + 1) * 4] for i in range(3))
    want = reference(q * 30, k, v, x[3], mask)
    got = {}
    leaves = [fused.detach().clone().requires_grad_()]
    q, k, v = (leaves[0][:, :, i * 4 : (i + 1) * 4] for i in range(3))
    out, got["lse"] = lcab.attention(q * 30, k, v, mask, kernel=kernel, return_lse=True)
    got["out"] = out
    out.backward(x[3].transpose(1, 2).contiguous().transpose(1, 2))
    assert max(errors(got, want).values()) < 1e-5
    dk = leaves[0].grad[:, :, 4:8]
    assert errors({"dk": dk}, want)["dk"] < 1e-4


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_of_a_sum(kernel):
    """``out.sum()`` hands back an expanded gradient with strides of zero."""
    x = inputs(N, N, 4, 2, 16, torch.float32)
    q, k, v = (t.requires_grad_() for t in x[:3])
    lcab.attention(q, k, v, MASKS["causal"], kernel=kernel).sum().backward()
    want = reference(q, k, v, torch.ones_like(q), MASKS["causal"])
    assert errors({"dk": k.grad, "dv": v.grad, "dq": q.grad}, want)["dv"] < 1e-5


def test_lse_is_not_differentiable():
    x = inputs(N, N, 4, 2, 16, torch.float32)
    q, k, v = (t.requires_grad_() for t in x[:3])
    _, lse = lcab.attention(q, k, v, MASKS["causal"], return_lse=True)
    assert not lse.requires_grad


def test_softcap():
    x = inputs(N, N, 4, 2, 16, torch.float64)
    q, k, v = (t.requires_grad_() for t in x[:3])
    out = lcab.attention(q, k, v, MASKS["causal"], kernel="naive", softcap=2.0)
    scores = 2.0 * torch.tanh(torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 0.25 / 2.0)
    p = scores.masked_fill(~MASKS["causal"].to_dense(), float("-inf")).softmax(-1)
    want = torch.einsum("bhqk,bkhd->bqhd", p, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, want)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), x[3]), torch.autograd.grad(want, (q, k, v), x[3]), strict=True
    ):
        torch.testing.assert_close(a, b)
    for kernel in ("sdpa_math", "sdpa_flash"):
        with pytest.raises(lcab.UnsupportedError, match="soft cap"):
            lcab.attention(*x[:3], MASKS["causal"], kernel=kernel, softcap=2.0)


def test_flash_never_builds_the_dense_mask(monkeypatch):
    """Neither a dense mask nor any tensor with q x k elements."""
    monkeypatch.setattr(masks.AttentionMask, "to_dense", None)
    n, heads = 2048, 1
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(
                t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)
            )
            return out

    for mask in twelve(n).values():
        x = inputs(n, n, heads, heads, 16, torch.float32, batch=1)
        with Watch():
            run("sdpa_flash", *x, mask)
    assert max(largest) < n * n / 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "sdpa_flush"}, "did you mean 'sdpa_flash'"),
        ({"mask": masks.causal(95)}, "the mask is for 95 queries"),
        ({"k": torch.zeros(2, N, 3, 16)}, "4 query heads are not a multiple of 3|share batch"),
        ({"v": torch.zeros(2, N, 2, 16, dtype=torch.float64)}, "one floating dtype"),
        ({"softcap": -1.0}, "softcap -1.0"),
        ({"q": torch.zeros(2, N, 16)}, r"must be \[batch"),
    ],
)
def test_bad_input(change, message):
    q, k, v, _ = inputs(N, N, 4, 2, 16, torch.float32)
    call = {"q": q, "k": k, "v": v, "mask": masks.causal(N), "kernel": "sdpa_flash"} | change
    with pytest.raises(lcab.LcabError, match=message):
        lcab.attention(**call)


def test_uneven_value_heads_dim():
    q, k, v, dout = inputs(N, N, 4, 2, 16, torch.float64)
    v, dout = v[..., :8], dout[..., :8]
    for kernel in ("naive", "sdpa_math"):
        worst = errors(run(kernel, q, k, v, dout, MASKS["causal"]), reference(q, k, v, dout, MASKS["causal"]))
        assert max(worst.values()) < 1e-12
    with pytest.raises(lcab.UnsupportedError, match="value head_dim 8"):
        lcab.attention(q, k, v, MASKS["causal"], kernel="sdpa_flash")


def test_repeatable():
    x = inputs(N, N, 4, 2, 32, torch.float32)
    for name, kernel in itertools.product(MASKS, KERNELS):
        a, b = run(kernel, *x, MASKS[name]), run(kernel, *x, MASKS[name])
        assert all(torch.equal(a[t], b[t]) for t in a)
