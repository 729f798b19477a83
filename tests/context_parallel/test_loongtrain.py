"""LoongTrain, Ulysses around a ring of rings: exact in both placements, and overlapped as it promises."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from cases import N, errors, families, inputs, reference
from distributed import run

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.topology import PLACEMENTS, members_of
from lcab_plugin.masks import AttentionMask

SOME = ("full", "causal", "causal_document", "sliding_window_causal", "global_sliding_window")


def check(
    cp: lcab.ContextParallel,
    mask: AttentionMask,
    heads: tuple[int, int] = (4, 2),
    kernel: str = "naive",
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-12,
) -> None:
    """Forward and backward over the group equal naive attention in float64 on one process."""
    x = inputs(mask.q_len, mask.k_len, *heads, 16, dtype)
    want = reference(*x, mask)
    q, k, v = (cp.shard(t, 1).requires_grad_() for t in x[:3])
    out, lse = lcab.attention(q, k, v, mask, kernel=kernel, cp=cp, return_lse=True)
    out.backward(cp.shard(x[3], 1))
    got = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    local = {t: cp.shard(want[t], 2 if t == "lse" else 1) for t in got}
    for tensor, error in errors(got, local).items():
        assert error < tolerance, (cp.degrees, cp.layout_name, mask, tensor, error)


def exact(rank: int, world: int, degrees: list[tuple[int, int, int]]) -> None:
    """``degrees``: Ulysses, inner ring, outer ring."""
    for (ulysses, inner, outer), placement in itertools.product(degrees, PLACEMENTS):
        given = {"ulysses": ulysses, "ring": inner * outer, "inner_ring": inner}
        cp = lcab.context_parallel("loongtrain", **given, placement=placement)
        assert cp.degrees == {"ulysses": ulysses, "inner_ring": inner, "outer_ring": outer}
        assert (cp.size, cp.rank, cp.placement) == (world, rank, placement)
        assert cp.composition == f"Ulysses({ulysses}) around RingP2P({outer}) of RingP2P({inner})"
        for n, layout in ((N, "zigzag"), (N + 5, "striped")):
            cases = families(n)
            for name in SOME:
                check(cp.with_layout(layout, mask=cases[name]), cases[name])
    check(cp.with_layout("balanced", mask=cases["causal"]), masks.full(n))
    few = masks.causal(world - 1)  # a rank has no tokens
    check(cp.with_layout(mask=few), few)


def placed(rank: int, world: int) -> None:
    """Who is whose neighbour, and that a mesh of the same axes says the same."""

    def line(cp: lcab.ContextParallel, axis: str) -> list[int]:
        return members_of(cp._axes[axis].group)

    def of(strategy: str, placement: str, **given: object) -> lcab.ContextParallel:
        return lcab.context_parallel(strategy, placement=placement, mask=masks.causal(N), **given)

    near, far = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
    for strategy, ring, given in (("usp", "ring", {}), ("loongtrain", "inner_ring", {"inner_ring": 2})):
        for placement, neighbours, others in (
            ("head_first", "ulysses", ring),
            ("context_first", ring, "ulysses"),
        ):
            cp = of(strategy, placement, ulysses=2, **given)
            assert (line(cp, neighbours), line(cp, others)) == (near, far)
            check(cp, masks.causal(N))
            names = {"ulysses": "ulysses", ring: "ring"}
            mesh = dist.device_mesh.init_device_mesh(
                "cpu", (2, 2), mesh_dim_names=(names[others], names[neighbours])
            )
            same = of(strategy, placement, group=mesh, **given)
            assert (line(same, neighbours), line(same, others)) == (near, far)
            check(same, masks.causal(N))
    uneven = of("usp", "context_first", ulysses=2)
    for heads in ((6, 3), (10, 5), (4, 1)):
        check(uneven, masks.causal(N), heads)


def side_by_side(rank: int, world: int) -> None:
    """Two double rings of two beside each other at work on different masks."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = (masks.causal(N), masks.causal_document((40, N - 40)))[rank % 2]
    cp = lcab.context_parallel("loongtrain", group=pairs[rank % 2], ulysses=1, inner_ring=2, mask=mine)
    check(cp, mine)


def overlapped(rank: int, world: int, patch: pytest.MonkeyPatch) -> None:
    """The outer ring's keys leave before the inner ring turns and are waited for after it; every transfer of
    the inner ring hides behind one block."""
    cp = lcab.context_parallel("loongtrain", ulysses=1, inner_ring=2, mask=masks.full(N))
    rings = {id(axis.group): name for name, axis in cp._axes.items()}
    events: list[str] = []
    start, wait = collectives.RingExchange.start, collectives.RingExchange.wait

    def started(exchange, *args):
        events.append(f"{rings[id(exchange._group)]} starts")
        start(exchange, *args)

    def waited(exchange):
        events.append(f"{rings[id(exchange._group)]} arrives")
        return wait(exchange)

    patch.setattr(collectives.RingExchange, "start", started)
    patch.setattr(collectives.RingExchange, "wait", waited)
    q, k, v, dout = (cp.shard(t, 1) for t in inputs(N, N, 4, 2, 16, torch.float32))
    collectives.reset_bytes()
    out = lcab.attention(q, k.requires_grad_(), v, masks.full(N), cp=cp)
    turn = ["inner_ring starts", "inner_ring arrives"]
    assert events == ["outer_ring starts", *turn, "outer_ring arrives", *turn]
    keys = k.nbytes + v.nbytes
    assert collectives.bytes_sent()["ring"] == (world - 1) * keys
    events.clear()
    out.backward(dout)
    assert events[0] == "outer_ring starts"
    assert events.count("outer_ring starts") == events.count("outer_ring arrives") == 1 + 1
    # keys again, and in all as many hops of gradients: a rank's own stay, in the inner ring and the outer
    assert collectives.bytes_sent()["ring"] == 3 * (world - 1) * keys


def in_float32(rank: int, world: int) -> None:
    cp = lcab.context_parallel("loongtrain", ulysses=1, inner_ring=2, mask=masks.causal(N))
    check(cp, masks.causal(N), kernel="sdpa_flash", dtype=torch.float32, tolerance=2e-6)


def two(rank: int, world: int) -> None:
    exact(rank, world, [(1, 2, 1), (1, 1, 2), (2, 1, 1)])


def four(rank: int, world: int) -> None:
    exact(rank, world, [(1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 4, 1)])
    placed(rank, world)
    side_by_side(rank, world)
    in_float32(rank, world)
    with pytest.MonkeyPatch.context() as patch:
        overlapped(rank, world, patch)


def eight(rank: int, world: int) -> None:
    exact(rank, world, [(2, 2, 2), (1, 2, 4), (1, 4, 2), (4, 2, 1)])


@pytest.mark.parametrize(
    ("checks", "world"), [(two, 2), (four, 4), pytest.param(eight, 8, marks=pytest.mark.nightly)]
)
def test_on_processes(checks, world):
    run(checks, world)
