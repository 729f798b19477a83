"""Group cast: exact for every mask and layout, and it moves the rows that are needed and no others."""

from __future__ import annotations

import itertools
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import errors, families, inputs, reference
from distributed import run
from hypothesis import given, settings
from hypothesis import strategies as st

import lcab_plugin as lcab
from lcab_plugin import kernels, masks
from lcab_plugin import layout as layouts
from lcab_plugin.context_parallel import collectives, group_cast
from lcab_plugin.context_parallel.collectives import AllToAllExchange
from lcab_plugin.context_parallel.group_cast import GroupCast, plan
from lcab_plugin.context_parallel.ring_all_gather import RingAllGather
from lcab_plugin.context_parallel.ring_p2p import RingP2P
from lcab_plugin.context_parallel.topology import Axis, build_axes
from lcab_plugin.kernels import KernelOptions
from lcab_plugin.layout import Layout, View
from lcab_plugin.operation import Local, attend

OPTIONS = KernelOptions(0.25)
ONE_BLOCK = mock.patch.object(group_cast, "FEW", 1 << 30)  # whatever arrives, where no stages are asked for


def odd(n: int, ranks: int) -> Layout:
    """Uneven shards of many short ranges; the last rank has none at all."""
    held: list[list[range]] = [[] for _ in range(ranks)]
    at = 0
    for i in itertools.count():
        if at == n:
            break
        stop = min(n, at + 1 + i % 5)
        held[i * i % max(1, ranks - 1)].append(range(at, stop))
        at = stop
    return Layout("odd", n, tuple(map(tuple, held)))


def rows_of(x: torch.Tensor, view: View, dim: int = 1) -> torch.Tensor:
    parts = [x.narrow(dim, r.start, len(r)) for r in view.layout.rows(view.q_ranks)]
    return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)


def call(x, view, kernel, axis, heads=slice(None), kv_heads=slice(None), **stages):
    """out, lse and gradients of this rank's part, through autograd."""
    q, k, v, dout = (
        rows_of(t, view)[:, :, h].clone() for t, h in zip(x, (heads, kv_heads, kv_heads, heads), strict=True)
    )
    for t in (q, k, v):
        t.requires_grad_()
    op = GroupCast(Local(kernels.get(kernel), True), axis, **stages)
    out, lse = attend(q, k, v, None, op, view, OPTIONS)
    out.backward(dout)
    return {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}


def part(want, view, heads=slice(None), kv_heads=slice(None)):
    return {
        name: rows_of(t, view, 2)[:, heads]
        if name == "lse"
        else rows_of(t, view)[:, :, kv_heads if name in ("dk", "dv") else heads]
        for name, t in want.items()
    }


@ONE_BLOCK
def conformance(rank: int, world: int, kernel: str, n: int, dtype: torch.dtype, tolerance: float) -> None:
    axis = build_axes(None, {"ring": world})[1]["ring"]
    makers = [layouts.contiguous, layouts.zigzag, odd]
    for kv_heads, (name, mask) in itertools.product((4, 1), families(n).items()):
        x = inputs(n, n, 4, kv_heads, 16, dtype)
        want = reference(*x, mask, scale=OPTIONS.scale)
        for maker, stages in itertools.product(makers, (None, 1, 2, 9)):
            view = View(mask, maker(n, world), (rank,), (rank,))
            got = call(x, view, kernel, axis, stages=stages)
            for tensor, error in errors(got, part(want, view)).items():
                assert error < tolerance, (world, name, kv_heads, maker.__name__, stages, tensor, error)


@pytest.mark.parametrize("world", [2, 4])
def test_float64_is_exact(world):
    run(conformance, world, "naive", 97, torch.float64, 1e-11)


def test_flash():
    run(conformance, 2, "sdpa_flash", 101, torch.float32, 2e-5)


def few_tokens(rank: int, world: int) -> None:
    """Fewer tokens than ranks: most have none, and all take part."""
    axis = build_axes(None, {"ring": world})[1]["ring"]
    for n, maker in itertools.product((1, 3, 5), (layouts.contiguous, layouts.zigzag)):
        mask = masks.causal(n)
        x = inputs(n, n, 2, 1, 16, torch.float64)
        want = reference(*x, mask, scale=OPTIONS.scale)
        view = View(mask, maker(n, world), (rank,), (rank,))
        got = errors(call(x, view, "naive", axis), part(want, view))
        assert max(got.values()) < 1e-11


def inside_ulysses(rank: int, world: int) -> None:
    """Within Ulysses a rank has the rows of two and half of the heads."""
    axes = build_axes(None, {"ulysses": 2, "ring": 2})[1]
    half = axes["ulysses"].index
    for name, mask in families(97).items():
        x = inputs(97, 97, 4, 2, 16, torch.float64)
        want = reference(*x, mask, scale=OPTIONS.scale)
        for maker in (layouts.contiguous, layouts.zigzag, odd):
            view = axes["ulysses"].all_rows(View(mask, maker(97, world), (rank,), (rank,)))
            heads = slice(2 * half, 2 * half + 2), slice(half, half + 1)
            got = call(x, view, "naive", axes["ring"], *heads)
            for tensor, error in errors(got, part(want, view, *heads)).items():
                assert error < 1e-11, (name, maker.__name__, tensor, error)


def special(rank: int, world: int) -> None:
    few_tokens(rank, world)
    inside_ulysses(rank, world)
    with ONE_BLOCK:
        few_tokens(rank, world)
        inside_ulysses(rank, world)


def test_fewer_tokens_than_ranks_and_inside_ulysses():
    run(special, 4)


# The bytes


def needed(view: View, world: int) -> torch.Tensor:
    """How many rows of each rank (columns) each rank needs (rows), cell by cell; 0 on the diagonal."""
    dense = view.mask.to_dense()
    held = [view.layout.positions(r) for r in range(world)]
    counts = [[int(dense[q][:, k].any(0).sum()) for k in held] for q in held]
    return torch.tensor(counts).fill_diagonal_(0)


def sent(op, x, view) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes this rank sends in forward and in backward."""
    q, k, v, dout = (rows_of(t, view).clone() for t in x)
    for t in (q, k, v):
        t.requires_grad_()
    collectives.reset_bytes()
    out, _ = attend(q, k, v, None, op, view, OPTIONS)
    forward = collectives.bytes_sent()
    collectives.reset_bytes()
    out.backward(dout)
    return forward, collectives.bytes_sent()


@ONE_BLOCK
def exact_bytes(rank: int, world: int, n: int) -> None:
    axis = build_axes(None, {"ring": world})[1]["ring"]
    b, kv_heads, d = 2, 2, 16
    x = list(inputs(n, n, 4, kv_heads, d, torch.bfloat16, batch=b))
    row = b * kv_heads * (d + d)  # elements of a row of keys and values
    for (name, mask), maker, stages in itertools.product(
        families(n).items(), (layouts.contiguous, layouts.zigzag, odd), (None, 2)
    ):
        view = View(mask, maker(n, world), (rank,), (rank,))
        counts = needed(view, world)
        gives, takes = int(counts[:, rank].sum()), int(counts[rank].sum())
        forward, backward = sent(GroupCast(Local(kernels.get("naive"), True), axis, stages), x, view)
        assert forward.get("group_cast", 0) == gives * row * 2, (name, maker.__name__)
        assert backward.get("group_cast", 0) == gives * row * 2 + takes * row * 4, (name, maker.__name__)
        assert {*forward, *backward} <= {"group_cast"}
        total = collectives.all_reduce_sum(torch.tensor(forward.get("group_cast", 0)))
        held = [{k for keys in ranges for k in keys} for ranges in view.layout.ranges]
        keys = [{k for keys in mask.needed_keys(ranges) for k in keys} for ranges in view.layout.ranges]
        others = sum(len(need - own) for need, own in zip(keys, held, strict=True))
        assert total == others * row * 2, "needed_keys, less what a rank holds itself"
        whole = n * (world - 1)
        for ring, kind in ((RingAllGather, "all_gather"), (RingP2P, "ring")):
            collectives.reset_bytes()
            op = ring(Local(kernels.get("naive"), True), axis)
            attend(*(rows_of(t, view) for t in x[:3]), None, op, view, OPTIONS)
            theirs = collectives.all_reduce_sum(torch.tensor(collectives.bytes_sent().get(kind, 0)))
            assert theirs >= whole * row * 2 >= total
        # and less than they move, but for masks with rows or columns that see everything
        if maker is not odd and name not in ("full", "prefix_lm_causal", "global_sliding_window"):
            assert others < whole, (name, maker.__name__)


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_the_needed_rows(world):
    run(exact_bytes, world, 99)


def almost_nothing(rank: int, world: int) -> None:
    n, window, row = 512, 5, 1 * 2 * 32 * 4
    axis = build_axes(None, {"ring": world})[1]["ring"]
    x = inputs(n, n, 4, 2, 16, torch.float32, batch=1)
    op = GroupCast(Local(kernels.get("sdpa_flash"), True), axis)

    def totals(mask, layout) -> list[int]:
        both = sent(op, x, View(mask, layout, (rank,), (rank,)))
        return [int(collectives.all_reduce_sum(torch.tensor(s.get("group_cast", 0)))) for s in both]

    contiguous, zigzag = layouts.contiguous(n, world), layouts.zigzag(n, world)
    for layout, edges in ((contiguous, world - 1), (zigzag, 2 * (world - 1))):
        forward = edges * window * row
        assert totals(masks.sliding_window_causal(n, window), layout) == [forward, 2 * forward]
    starts = []
    start = AllToAllExchange.start
    AllToAllExchange.start = lambda *args: starts.append(args) or start(*args)
    assert totals(masks.causal_document([n // 8] * 8), contiguous) == [0, 0]
    assert not starts, "documents that no rank shares need no collective"
    forward = (world - 1) * (n // world) * world // 2 * row  # each rank needs all ranks before it
    assert totals(masks.causal(n), contiguous) == [forward, 2 * forward]


def test_windows_and_short_documents_send_almost_nothing():
    run(almost_nothing, 4)


# The plan


@settings(deadline=None)
@given(
    st.sampled_from(sorted(families())),
    st.integers(96, 120),
    st.integers(2, 7),
    st.integers(1, 4),
    st.integers(0, 2),
)
def test_the_ranks_plans_fit_together(name, n, world, stages, which):
    mask = families(n)[name]
    layout = (layouts.contiguous, layouts.zigzag, odd)[which](n, world)
    plans = [
        plan(Axis("ring", world, 1, r, None), View(mask, layout, (r,), (r,)), stages) for r in range(world)
    ]
    assert len({len(p) for p in plans}) == 1
    assert len(plans[0]) <= stages
    for r, own in enumerate(plans):
        for s, stage in enumerate(own):
            for peer, lengths in enumerate(stage.receives):
                assert lengths == tuple(map(len, plans[peer][s].sends[r]))
        arrives = Counter(k for stage in own for keys in stage.keys for k in keys)
        needs = {k for keys in mask.needed_keys(layout.ranges[r]) for k in keys}
        assert arrives == Counter(needs.difference(*layout.ranges[r])), "each needed row once, no other"
        assert all(list(stage.keys) == sorted(stage.keys, key=lambda k: k.start) for stage in own)


def test_rows_that_stand_together_on_both_sides_move_as_one():
    n = 4096
    mask = masks.causal(n)
    view = View(mask, layouts.make("striped", 2, n), (0,), (0,))
    assert len(view.layout.ranges[0]) > 10
    for stage in plan(Axis("ring", 2, 1, 0, None), view, 1):
        assert [len(ranges) for ranges in stage.sends] == [0, 1]
        assert [len(lengths) for lengths in stage.receives] == [0, 1]
        assert len(stage.keys) > 10


def test_a_rank_that_needs_nothing_takes_part():
    layout = layouts.contiguous(64, 4)
    stages = plan(Axis("ring", 4, 1, 0, None), View(masks.causal(64), layout, (0,), (0,)))
    assert [stage.keys for stage in stages] == [(), ()]
    assert sum(len(rows) for stage in stages for rows in stage.sends) == 3


def test_stages_are_bounded_in_rows():
    """Where almost everything is needed, more stages rather than the whole sequence at once."""
    n, world = 64 * 256, 64
    view = View(masks.causal(n), layouts.zigzag(n, world), (9,), (9,))
    stages = plan(Axis("ring", world, 1, 9, None), view)
    rows = [sum(map(len, stage.keys)) for stage in stages]
    assert sum(rows) > n // 2
    assert max(rows) <= 5 * 256
    window = View(masks.sliding_window_causal(n, 9), view.layout, (9,), (9,))
    assert len(plan(Axis("ring", world, 1, 9, None), window)) <= 2


def test_a_plan_is_made_once():
    view = View(masks.causal(64), layouts.make("zigzag", 4, 64), (1,), (1,))
    again = View(masks.causal(64), layouts.make("zigzag", 4, 64), (1,), (1,))
    axis = Axis("ring", 4, 1, 1, None)
    assert plan(axis, view) is plan(axis, again)
    assert plan(axis, view, 1) is not plan(axis, view)


# Overlap, repetition, precision


def clocked(rank: int, world: int) -> None:
    """A clock that only blocks and waits advance: each block takes 1, and so does each transfer on a link
    that carries one at a time. What is hidden costs nothing."""
    clock = {"now": 0.0, "link": 0.0, "transfers": 0, "blocks": 0}
    arrivals = {}
    start, wait = AllToAllExchange.start, AllToAllExchange.wait

    def slow_start(self, *args):
        clock["link"] = arrivals[self] = max(clock["now"], clock["link"]) + 1.0
        clock["transfers"] += 1
        start(self, *args)

    def slow_wait(self):
        clock["now"] = max(clock["now"], arrivals[self])
        return wait(self)

    def slow_block(run_block):
        def timed(*args):
            clock["now"] += 1.0
            clock["blocks"] += 1
            run_block(*args)

        return timed

    AllToAllExchange.start, AllToAllExchange.wait = slow_start, slow_wait
    Local.forward, Local.backward = slow_block(Local.forward), slow_block(Local.backward)
    axis = build_axes(None, {"ring": world})[1]["ring"]
    x = inputs(256, 256, 4, 2, 16, torch.float32)
    view = View(masks.causal(256), layouts.zigzag(256, world), (rank,), (rank,))
    q, k, v, dout = (rows_of(t, view).requires_grad_() for t in x)
    op = GroupCast(Local(kernels.get("sdpa_flash"), True), axis, stages=world - 1)
    out, _ = attend(q, k, v, None, op, view, OPTIONS)
    assert clock == {"now": world, "link": world - 1, "transfers": world - 1, "blocks": world}
    clock.update(now=0.0, link=0.0, transfers=0, blocks=0)
    out.backward(dout)
    # the own keys are two blocks; every transfer, the last gradients' too, is hidden unless the link itself
    # is the bottleneck
    assert (clock["blocks"], clock["transfers"]) == (world + 1, 2 * (world - 1))
    assert clock["now"] == max(clock["blocks"], clock["transfers"])


@pytest.mark.parametrize("world", [2, 4])
def test_transfers_hide_behind_the_blocks(world):
    run(clocked, world)


def repeated(rank: int, world: int) -> None:
    axis = build_axes(None, {"ring": world})[1]["ring"]
    x = inputs(256, 256, 4, 2, 32, torch.bfloat16)
    for mask in (masks.causal(256), masks.global_sliding_window(256, 20, 9)):
        view = View(mask, layouts.zigzag(256, world), (rank,), (rank,))
        first, *others = (call(x, view, "sdpa_flash", axis) for _ in range(3))
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)
        # merged and summed in float32, cast once: no worse than on one device
        whole = View(mask, Layout("whole", 256, ((range(256),),)), (0,), (0,))
        want = reference(*x, mask, scale=OPTIONS.scale)
        alone = errors(call(x, whole, "sdpa_flash", Axis("ring", 1, 1, 0, None)), want)
        for name, error in errors(first, part(want, view)).items():
            assert error <= 1.5 * alone[name] + 2**-9, (name, error, alone[name])
    dist.barrier()


def test_runs_repeat_bitwise_with_float32_sums():
    run(repeated, 4)


def counted(kernel, step, calls):
    """The kernel's method, which counts how often it is called."""
    method = getattr(kernel, step)

    def counting(*arguments):
        calls[step] += 1
        return method(*arguments)

    return counting


def blocks(rank: int, world: int) -> None:
    """Kernel calls by mask: one where little arrives, more where it pays to hide transfers."""
    n, found, once = 256, {}, {"forward": 1, "backward": 1}
    for name, mask, kv_heads, few in (
        ("a window", masks.sliding_window_causal(n, 16), 2, 0),
        ("shared heads", masks.causal(n), 1, 0),
        ("all keys", masks.causal(n), 8, 0),
        ("all keys, 256 KiB", masks.causal(n), 8, 256 * 1024),
        ("all keys, 1 too many", masks.causal(n), 8, 256 * 1024 - 1),
    ):
        cp = lcab.context_parallel("group_cast").with_layout("zigzag", mask=mask)
        q, k, v, dout = (cp.shard(x) for x in inputs(n, n, 8, kv_heads, 16, torch.float32))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        kernel, calls = type(kernels.get("sdpa_math")), Counter()
        counting = mock.patch.multiple(kernel, **{step: counted(kernel, step, calls) for step in once})
        with counting, mock.patch.object(group_cast, "FEW", few):
            lcab.attention(q, k, v, mask, kernel="sdpa_math", cp=cp).backward(dout)
        found[name] = dict(calls)
    assert found["a window"] == found["shared heads"] == found["all keys, 256 KiB"] == once
    assert min(found["all keys"].values()) > 1
    assert found["all keys, 1 too many"] == found["all keys"]


def test_one_block_where_little_arrives():
    run(blocks, 2)
