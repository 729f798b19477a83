"""What of our Triton kernel only a GPU can show: captured graphs, compiled models, unaligned tensors."""

from __future__ import annotations

import pytest
import torch
from cases import errors, families, inputs, reference

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.kernels import triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

N = 1000
MASKS = families(N)


def tensors(dtype=torch.bfloat16, dim=128):
    return [x.cuda() for x in inputs(N, N, 8, 2, dim, dtype, batch=1)]


def test_a_captured_graph_replays_under_another_mask():
    q, k, v, dout = tensors()
    first, other = (masks.causal_document(lengths) for lengths in ((300, 700), (450, 250, 300)))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def step():
        out = lcab.attention(*leaves, first, kernel="triton")
        return out, *torch.autograd.grad(out, leaves, dout)

    with triton.GraphPlans(first) as plans:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # compiles, and makes the plans
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    for mask in (first, other, first):
        plans.load(mask)
        graph.replay()
        want = reference(q, k, v, dout, mask)
        got = dict(zip(("out", "dq", "dk", "dv"), captured, strict=True))
        assert max(errors(got, want).values()) < 0.03, mask


def test_no_host_synchronisation_after_planning():
    q, k, v, dout = tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step():
        lcab.attention(*leaves, MASKS["share_question"], kernel="triton").backward(dout)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["causal", "global_sliding_window"])
def test_in_a_compiled_function(name):
    q, k, v, dout = tensors()

    def attend(*leaves):
        return lcab.attention(*leaves, MASKS[name], kernel="triton")

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_off_the_16_byte_grid():
    """Without tensor descriptors: the launch is one for GPUs that have none."""
    q, k, v, dout = tensors()
    moved = [
        torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x) for x in (q, k, v)
    ]
    leaves = [x.requires_grad_() for x in moved]
    out, lse = lcab.attention(*leaves, MASKS["causal"], kernel="triton", return_lse=True)
    grads = torch.autograd.grad(out, leaves, dout)
    got = {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    assert max(errors(got, reference(q, k, v, dout, MASKS["causal"])).values()) < 0.03


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_deterministic_is_bitwise_repeatable(dim):
    q, k, v, dout = tensors(dim=dim)

    def step():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = lcab.attention(*leaves, MASKS["prefix_lm_document"], kernel="triton", deterministic=True)
        return (out, *torch.autograd.grad(out, leaves, dout))

    first = step()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def agree(n, batch, heads, dims, mask, softcap=None):
    """The first configurations of both kinds that the table has: forward, dq, and dk and dv."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    from lcab_plugin.kernels.triton import launch, tuning

    q, k, _, _ = (x.cuda() for x in inputs(n, n, *heads, dims[0], torch.bfloat16, batch=batch))
    _, _, v, dout = (x.cuda() for x in inputs(n, n, *heads, dims[1], torch.bfloat16, batch=batch))
    options = lcab.kernels.KernelOptions(dims[0] ** -0.5, softcap=softcap)
    results: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for specialised, found in results.items():
        for which in tuning.PASSES:
            shape = tuning.Shape.of(which, (9, 0), dims, q.dtype, heads[0] // heads[1], mask)
            config = next(c for c in tuning.candidates(shape) if c.specialised is specialised)
            if which == "forward":
                out, lse = launch.forward(q, k, v, mask, options, config)
                found += [out, lse]
                delta, lse2 = launch.row_sums(dout, out, lse)
            elif which == "dq":
                found += [launch.sum_dq(dout, q, k, v, lse2, delta, mask, options, config)]
            else:
                found += launch.sum_dkv(dout, q, k, v, lse2, delta, mask, options, config)
    for one, other in zip(*results.values(), strict=True):
        finite = torch.isfinite(one.float())
        assert torch.equal(finite, torch.isfinite(other.float())), mask
        difference = (one.float() - other.float())[finite].norm() / one.float()[finite].norm()
        assert difference < 0.02, (mask, tuple(one.shape), float(difference))


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (8, 2)], ids=["mha", "three a group", "four a group"])
@pytest.mark.parametrize("dims", [(16, 16), (32, 64), (64, 128), (96, 96), (128, 64), (128, 128)])
def test_specialised_launches_agree_with_portable_ones(heads, dims):
    """Every mask at lengths that fill no block."""
    for i, mask in enumerate(MASKS.values()):
        agree(N, 2, heads, dims, mask, softcap=20.0 if i % 3 == 0 else None)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["causal", "causal_document", "share_question", "global_sliding_window"])
def test_programs_that_take_many_lines(name, dim):
    """Enough lines that every program takes several, some split over query heads, some whole."""
    agree(4000, 1, (64, 8), (dim, dim), families(4000)[name])


@pytest.mark.parametrize("heads", [(6, 3), (3, 3), (6, 2)], ids=["pairs", "mha", "three a group"])
def test_heads_one_after_another(heads, monkeypatch):
    """As with more keys than the L2 cache holds: those of one head first, then the next."""
    from lcab_plugin.kernels.triton import launch

    monkeypatch.setattr(launch, "_cache_size", lambda device: 1)
    for mask in families(2000).values():
        agree(2000, 2, heads, (128, 128), mask)


@pytest.mark.parametrize("block", [16, 48, 64])
@pytest.mark.parametrize("heads", [(8, 2), (3, 3)], ids=["four a group", "mha"])
def test_rows_of_many_intervals(heads, block):
    """Blocks chosen one by one, a fifth of 2000 / block a row: launches of both kinds, and those chosen."""
    mask = masks.block_sparse(2000, block=block, keep=0.2, seed=0)
    agree(2000, 1, heads, (128, 128), mask)
    q, k, v, dout = (x.cuda() for x in inputs(2000, 2000, *heads, 128, torch.bfloat16, batch=1))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = lcab.attention(*leaves, mask, kernel="triton", return_lse=True)
    grads = torch.autograd.grad(out, leaves, dout)
    got = {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    assert max(errors(got, reference(q, k, v, dout, mask)).values()) < 0.03
