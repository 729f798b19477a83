"""The Triton kernels under Triton's interpreter, on CPU tensors. Run by ``test_triton.py`` in a process of
its own, since Triton decides at import whether it interprets."""

from __future__ import annotations

import pytest
import torch
from cases import N, eager, errors, families, inputs, reference

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.kernels import KernelOptions, get, triton
from lcab_plugin.kernels.triton import tuning
from lcab_plugin.kernels.triton.tuning import Config

MASKS = families()
CONFIGS = {"forward": Config(32, 16, 4, 1), "dq": Config(16, 32, 4, 1), "dkv": Config(32, 16, 4, 1)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks small enough that the masks have empty, partial, full and ragged ones."""
    monkeypatch.setattr(tuning, "choose", lambda which, *_: CONFIGS[which])


def run(q, k, v, dout, mask, **options):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = lcab.attention(q, k, v, mask, kernel="triton", return_lse=True, **options)
    out.backward(dout)
    return {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}


def assert_exact(got, want):
    worst = errors(got, want)
    assert max(worst.values()) < 2e-6, worst


def test_it_is_the_interpreter():
    assert lcab.kernels.availability()["triton"] is None
    assert get("triton").version().startswith("triton ")


@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name):
    x = inputs(N, N, 4, 2, 16, torch.float32)
    assert_exact(run(*x, MASKS[name]), reference(*x, MASKS[name]))


@pytest.mark.parametrize("name", ["causal_document", "global_sliding_window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_the_budget(dtype, name):
    x = inputs(N, N, 2, 1, 32, dtype, batch=1)
    want = reference(*x, MASKS[name])
    budget, got = errors(eager(*x, MASKS[name]), want), errors(run(*x, MASKS[name]), want)
    for tensor, error in got.items():
        assert error <= 2 * budget[tensor] + 4 * torch.finfo(dtype).eps, (tensor, error, budget[tensor])


@pytest.mark.parametrize("name", MASKS)
def test_painting(name):
    """Values that are one-hot in the key show which keys each row saw."""
    n = 48
    mask = MASKS[name].local([range(0, N, 1)], [range(n)]).local([range(n)], [range(n)])
    q = torch.zeros(1, n, 1, 16)
    out, lse = get("triton").forward(q, q, torch.eye(n)[None, :, None], mask, KernelOptions(1.0))
    seen = mask.to_dense()
    torch.testing.assert_close(out[0, :, 0] > 0, seen)
    torch.testing.assert_close(lse[0, 0], seen.sum(1).float().log())


@pytest.mark.parametrize(("tq", "tk"), [(1, 96), (30, 96), (96, 30), (17, 33)])
def test_different_lengths(tq, tk):
    x = inputs(tq, tk, 2, 1, 16, torch.float32)
    for types in (0, 1):
        mask = masks.from_ranges([(0, tq)], [(0, tk)], [types])
        assert_exact(run(*x, mask), reference(*x, mask))


def test_rows_of_many_intervals():
    """More than two a row are read from memory, not from registers."""
    dense = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = masks.from_dense(dense)
    assert len(mask.row_intervals()[0]) > 4
    x = inputs(40, 50, 2, 1, 16, torch.float32, batch=1)
    assert_exact(run(*x, mask), reference(*x, mask))


def test_rows_that_see_no_key():
    mask = masks.AttentionMask(40, 40, [(3, 9, 0, 5), (9, 20, 2, 20, None, 0), (21, 30, 30, 33)])
    x = inputs(40, 40, 2, 1, 16, torch.float32)
    got = run(*x, mask)
    assert_exact(got, reference(*x, mask))
    empty = ~mask.to_dense().any(1)
    assert (got["lse"][:, :, empty] == float("-inf")).all()
    assert not got["out"][:, empty].any()
    assert not got["dq"][:, empty].any()


def test_merged_out_and_lse():
    """Backward from an out and lse over twice the keys gives this half's share of the gradients."""
    q, k, v, dout = inputs(40, 80, 4, 2, 16, torch.float32)
    whole = masks.full(80).local([range(40)], [range(80)])
    want = reference(q, k, v, dout, whole)
    out, lse = want["out"].float(), want["lse"].float()
    left = whole.local([range(40)], [range(40)])
    parts = [
        get("triton").backward(dout, q, k[:, part], v[:, part], out, lse, left, KernelOptions(0.25))
        for part in (slice(0, 40), slice(40, None))
    ]
    got = {"dq": parts[0][0] + parts[1][0]}
    got |= {f"d{x}": torch.cat([p[i] for p in parts], 1) for i, x in ((1, "k"), (2, "v"))}
    assert_exact(got, want)


@pytest.mark.parametrize(("dim", "value_dim"), [(24, 24), (16, 32), (40, 16)])
def test_head_dims_that_are_padded_or_differ(dim, value_dim):
    q, k, _, _ = inputs(33, 33, 2, 1, dim, torch.float32)
    _, _, v, dout = inputs(33, 33, 2, 1, value_dim, torch.float32)
    mask = masks.causal(33)
    assert_exact(run(q, k, v, dout, mask), reference(q, k, v, dout, mask))


def test_softcap():
    x = inputs(33, 33, 2, 1, 16, torch.float32)
    mask = masks.sliding_window_causal(33, 10)
    options = KernelOptions(0.25, softcap=2.0)
    naive = get("naive")
    wide = [t.double() for t in x]
    out, lse = naive.forward(*wide[:3], mask, options)
    dq, dk, dv = naive.backward(wide[3], *wide[:3], out, lse, mask, options)
    want = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert_exact(run(*x, mask, softcap=2.0), want)


def test_strided_inputs():
    x = inputs(N, N, 2, 2, 16, torch.float32)
    fused = torch.stack(x[:3], dim=2).flatten(2, 3)  # one [b, t, 3 * h, d] projection
    q, k, v = (fused[:, :, i * 2 : (i + 1) * 2] for i in range(3))
    got = {}
    out, got["lse"] = get("triton").forward(q, k, v, MASKS["causal"], KernelOptions(0.25))
    dout = x[3].transpose(1, 2).contiguous().transpose(1, 2)
    grads = get("triton").backward(dout, q, k, v, out, got["lse"], MASKS["causal"], KernelOptions(0.25))
    got |= {"out": out, "dq": grads[0], "dk": grads[1], "dv": grads[2]}
    assert_exact(got, reference(q, k, v, x[3], MASKS["causal"]))


def test_a_graphs_plans_take_another_mask():
    """What a captured graph would replay: the same launch reads another mask's table."""
    x = inputs(N, N, 2, 1, 16, torch.float32, batch=1)
    first, other = (masks.causal_document(lengths) for lengths in ((40, 56), (50, 46)))
    with triton.GraphPlans(first) as plans:
        before = run(*x, first)
        plans.load(other)
        after = run(*x, first)
    assert_exact(before, reference(*x, first))
    assert_exact(after, reference(*x, other))
    assert_exact(run(*x, first), before)
    with pytest.raises(lcab.LcabError, match="capture a graph under this mask"):
        plans.load(MASKS["global_sliding_window"])


def test_a_graphs_plans_take_another_mask_of_many_intervals():
    """With the intervals that each of its runs reaches."""
    x = inputs(N, N, 2, 1, 16, torch.float32, batch=1)
    first, other = (masks.block_sparse(N, block=4, keep=0.3, seed=seed) for seed in (0, 1))
    assert all(len(mask.row_intervals()[0]) > 4 for mask in (first, other))
    with triton.GraphPlans(first) as plans:
        run(*x, first)
        plans.load(other)
        assert_exact(run(*x, first), reference(*x, other))


def test_a_graph_of_a_symmetric_mask_takes_one_that_is_not(monkeypatch):
    """Forward and backward then read tables of one size, but not the same one."""
    square = Config(32, 32, 4, 1)
    monkeypatch.setattr(tuning, "choose", lambda *_: square)
    x = inputs(N, N, 2, 1, 16, torch.float32, batch=1)
    window, causal = masks.sliding_window(N, 40, 40), masks.sliding_window_causal(N, 50)
    with triton.GraphPlans(window) as plans:
        run(*x, window)
        plans.load(causal)
        assert_exact(run(*x, window), reference(*x, causal))
        with pytest.raises(lcab.LcabError, match="are the plans of"):
            run(*x, causal)
        with pytest.raises(lcab.LcabError, match="masks as long as"):
            plans.load(masks.causal(N - 1))


def test_repeatable():
    x = inputs(N, N, 4, 2, 16, torch.float32)
    a, b = (run(*x, MASKS["share_question"], deterministic=True) for _ in range(2))
    assert all(torch.equal(a[t], b[t]) for t in a)
