"""Groups, layouts and what goes wrong: one clear error on every rank, no hang."""

from __future__ import annotations

import atexit
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from cases import errors, inputs, reference
from distributed import run

import lcab_plugin as lcab
from lcab_plugin import layout as layouts
from lcab_plugin import masks
from lcab_plugin.context_parallel import collectives, resolve_degrees
from lcab_plugin.context_parallel.topology import AXES, axis_sizes, build_axes, with_mesh
from lcab_plugin.context_parallel.ulysses import HeadExchange, deal, fits, require_heads
from lcab_plugin.layout import View

N = 64


def test_zigzag_is_megatrons():
    """Rank r holds chunks r and 2 * cp - 1 - r."""
    layout = layouts.make("zigzag", 4, 16)
    assert [layout.positions(r).tolist() for r in range(4)] == [
        [0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "size", "given_degrees", "want"),
    [
        ("ulysses", 4, {}, {"ulysses": 4}),
        ("usp", 8, {"ulysses": 2}, {"ulysses": 2, "ring": 4}),
        ("usp", 8, {"ulysses": 2, "ring": 4}, {"ulysses": 2, "ring": 4}),
        ("ring_p2p", 4, {"ulysses": 1}, {"ring": 4}),
        ("none", 1, {}, {}),
        ("loongtrain", 8, {"ulysses": 2, "inner_ring": 2}, {"ulysses": 2, "inner_ring": 2, "ring": 4}),
        ("loongtrain", 8, {"ring": 4, "inner_ring": 4}, {"ulysses": 2, "inner_ring": 4, "ring": 4}),
        ("usp", 4, {"ulysses": 2, "inner_ring": 1}, {"ulysses": 2, "ring": 2}),
        ("group_cast", 4, {}, {"ring": 4}),
    ],
)
def test_degrees_follow_from_the_size(strategy, size, given_degrees, want):
    assert resolve_degrees(strategy, size, given_degrees) == want


@pytest.mark.parametrize(
    ("strategy", "size", "given_degrees", "message"),
    [
        ("ulysses", 4, {"ulysses": 3}, "ulysses=3 does not make 4 ranks"),
        ("usp", 8, {}, "ulysses, ring missing"),
        ("usp", 8, {"ring": 3}, "does not make 8 ranks"),
        ("ring_p2p", 4, {"ulysses": 2}, "has no ulysses axis"),
        ("ring_p2p", 4, {"ring": 0}, "ring=0 is not a positive degree"),
        ("none", 2, {}, "does not make 2 ranks"),
        (
            "loongtrain",
            8,
            {"ulysses": 2, "inner_ring": 3},
            "ring=4: inner_ring = 3 does not divide it; give one of: 1, 2, 4",
        ),
        ("loongtrain", 8, {"ulysses": 2}, "ring=4: inner_ring is missing; give one of: 1, 2, 4"),
        ("loongtrain", 8, {"inner_ring": 2}, r"ulysses=\? x ring=\? does not make 8.*ulysses, ring missing"),
        ("loongtrain", 8, {"ulysses": 2, "ring": 2, "inner_ring": 2}, "ulysses=2 x ring=2 does not make 8"),
        ("loongtrain", 8, {"ulysses": 3, "inner_ring": 2}, "ulysses=3 x ring=.* does not make 8"),
        ("usp", 8, {"ulysses": 2, "inner_ring": 2}, r"has no inner_ring axis.*used by: loongtrain"),
    ],
)
def test_degrees_that_do_not_fit(strategy, size, given_degrees, message):
    with pytest.raises(lcab.LcabError, match=message):
        resolve_degrees(strategy, size, given_degrees)


@pytest.mark.parametrize(
    ("placement", "want"),
    [
        ("head_first", [("ulysses", 2), ("inner_ring", 2), ("outer_ring", 3)]),
        ("context_first", [("inner_ring", 2), ("outer_ring", 3), ("ulysses", 2)]),
    ],
)
def test_axes_in_the_order_of_the_placement(placement, want):
    assert list(axis_sizes({"ulysses": 2, "inner_ring": 2, "ring": 6}, placement).items()) == want


def test_placements_that_cannot_be():
    with pytest.raises(lcab.LcabError, match="did you mean 'head_first'"):
        lcab.context_parallel("usp", ulysses=1, placement="heads_first")
    with pytest.raises(lcab.LcabError, match=r"no two axes to place.*used by: usp, loongtrain"):
        lcab.context_parallel("ring_p2p", placement="context_first")


def mesh(**dimensions: int) -> SimpleNamespace:
    """What is read of a DeviceMesh, outermost dimension first."""
    shape = tuple(dimensions.values())
    return SimpleNamespace(mesh_dim_names=tuple(dimensions), mesh=torch.zeros(shape))


@pytest.mark.parametrize(
    ("strategy", "dimensions", "placement", "want"),
    [
        ("usp", {"ring": 4, "ulysses": 2}, "head_first", {"ring": 4, "ulysses": 2}),
        ("usp", {"ulysses": 2, "ring": 4}, "context_first", {"ring": 4, "ulysses": 2}),
        ("usp", {"dp": 2, "cp": 4}, "head_first", {}),
        ("ring_p2p", {"ring": 4}, "head_first", {}),
        (
            "loongtrain",
            {"ring": 3, "inner_ring": 2, "ulysses": 4},
            "head_first",
            {"ring": 6, "inner_ring": 2, "ulysses": 4},
        ),
        (
            "loongtrain",
            {"ulysses": 4, "outer_ring": 3, "inner_ring": 2},
            "context_first",
            {"ring": 6, "inner_ring": 2, "ulysses": 4},
        ),
        ("loongtrain", {"ring": 6, "ulysses": 4}, "head_first", {"ring": 6, "ulysses": 4}),
    ],
)
def test_degrees_of_a_mesh(strategy, dimensions, placement, want):
    given = dict.fromkeys(AXES[strategy])
    assert with_mesh(strategy, mesh(**dimensions), given, placement) == {**given, **want}


def test_meshes_that_do_not_fit():
    with pytest.raises(
        lcab.LcabError, match=r"innermost first, are ring, ulysses, but 'usp'.*ulysses, ring;"
    ):
        with_mesh("usp", mesh(ulysses=2, ring=4), {}, "head_first")
    with pytest.raises(lcab.LcabError, match="the mesh has ring=4, but ring=2 was given"):
        with_mesh("usp", mesh(ring=4, ulysses=2), {"ring": 2}, "head_first")


def test_names_that_do_not_exist():
    with pytest.raises(lcab.LcabError, match="did you mean 'ring_p2p'"):
        lcab.context_parallel("ring_p2")
    with pytest.raises(lcab.LcabError, match="did you mean 'zigzag'"):
        lcab.context_parallel("none", layout="zigzak")


def test_a_group_without_a_sequence():
    cp = lcab.context_parallel("none")
    with pytest.raises(lcab.LcabError, match="with_layout"):
        cp.positions()
    assert cp.with_layout(seqlen=8).positions().tolist() == list(range(8))


def test_layouts_are_made_once():
    cp = lcab.context_parallel("none", seqlen=8)
    assert cp.with_layout(seqlen=8) is cp
    assert cp.with_layout(seqlen=9).layout is lcab.context_parallel("none", seqlen=9).layout


def groups_side_by_side(rank: int, world: int) -> None:
    """Two context-parallel groups of two beside each other (data parallel 2), by group and by mesh."""
    mask, other = masks.causal(N), masks.full(N)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    x = [inputs(N, N, 4, 2, 8, torch.float64, seed=seed) for seed in (0, 1)][rank // 2]
    mine = (mask, other)[rank // 2]  # the groups do different things at the same time
    want = reference(*x, mine)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ring"))
    for strategy, group in itertools.product(("ulysses", "ring_p2p"), (pairs[rank // 2], mesh["ring"])):
        cp = lcab.context_parallel(strategy, group=group, mask=mine)
        assert cp.size == 2
        assert cp.rank == rank % 2
        q, k, v = (cp.shard(t, 1).requires_grad_() for t in x[:3])
        out = lcab.attention(q, k, v, mine, kernel="naive", cp=cp)
        out.backward(cp.shard(x[3], 1))
        got = {"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}
        assert max(errors(got, {t: cp.shard(want[t], 1) for t in got}).values()) < 1e-12


def test_groups_side_by_side():
    run(groups_side_by_side, 4)


def fewer_tokens_than_ranks(rank: int, world: int) -> None:
    for n in (1, 3, 5):
        x = inputs(n, n, 4, 2, 8, torch.float64)
        mask = masks.causal(n)
        want = reference(*x, mask)
        for strategy, layout in itertools.product(
            ("ulysses", "ring_p2p", "ring_all_gather"), layouts.LAYOUTS
        ):
            cp = lcab.context_parallel(strategy, layout=layout, mask=mask)
            q, k, v = (cp.shard(t, 1).requires_grad_() for t in x[:3])
            out = lcab.attention(q, k, v, mask, kernel="sdpa_flash", cp=cp)
            out.backward(cp.shard(x[3], 1))
            got = {"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}
            assert max(errors(got, {t: cp.shard(want[t], 1) for t in got}).values()) < 1e-12
            torch.testing.assert_close(cp.unshard(out.detach(), 1), want["out"])


def test_ranks_without_tokens():
    run(fewer_tokens_than_ranks, 4)


STRATEGIES = {
    "ulysses": {},
    "ring_p2p": {},
    "ring_all_gather": {},
    "usp": {"ulysses": 2},
    "loongtrain": {"ulysses": 1, "inner_ring": 2},
    "group_cast": {},
}


def repeats_bitwise(rank: int, world: int) -> None:
    """Two calls by themselves, again, and then both alive at once: no bit differs, whatever was reused."""
    cases = [
        (masks.causal(N + 3), inputs(N + 3, N + 3, 4, 2, 32, torch.bfloat16, seed=1), "zigzag"),
        (masks.sliding_window_causal(N, 30), inputs(N, N, 8, 4, 16, torch.float32, seed=2), "striped"),
    ]
    for strategy, given in STRATEGIES.items():
        group = lcab.context_parallel(strategy, **given)

        def forward(case):
            mask, x, layout = case
            cp = group.with_layout(layout, mask=mask)  # noqa: B023
            leaves = [cp.shard(t, 1).detach().requires_grad_() for t in x[:3]]
            return lcab.attention(*leaves, mask, cp=cp), leaves, cp.shard(x[3], 1)

        def finished(out, leaves, dout):
            out.backward(dout)
            return [out.detach(), *(t.grad for t in leaves)]

        alone = [finished(*forward(case)) for case in cases]
        again = [finished(*forward(case)) for case in cases]
        both = [forward(case) for case in cases]
        alive = [finished(*call) for call in both]
        for name, found in (("again", again), ("alive", alive)):
            for one, other in zip(alone, found, strict=True):
                assert all(map(torch.equal, one, other)), (strategy, name)


def inherits_the_timeout(rank: int, world: int) -> None:
    """Groups made later than the world's have its timeout, not torch's half an hour."""
    half = collectives.new_groups([[0, 1], [2, 3]])
    for group in (dist.group.WORLD, half, collectives.beside(half, "test")):
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 120
    assert collectives.global_ranks(collectives.beside(half, "test")) == collectives.global_ranks(half)


def test_runs_repeat_bitwise_and_do_not_share_memory():
    run(each, 4, (repeats_bitwise, inherits_the_timeout))


def unshard_backward(rank: int, world: int) -> None:
    cp = lcab.context_parallel("ring_p2p", seqlen=N)
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    own = cp.shard(x, 0).requires_grad_()
    whole = cp.unshard(own, 0)
    assert torch.equal(whole, x)
    (whole**2).sum().backward()
    torch.testing.assert_close(own.grad, 2 * own.detach())


def test_unshard():
    run(unshard_backward, 2)


def settles_once(rank: int, world: int) -> None:
    """gloo's workers get the GIL before the interpreter goes; without that some runs abort at their exit."""
    before = atexit._ncallbacks()
    for strategy in ("ulysses", "ring_p2p"):
        lcab.context_parallel(strategy)
    assert atexit._ncallbacks() == before + 1


def test_gloo_settles_at_exit():
    run(settles_once, 2)


@pytest.mark.parametrize("degree", range(1, 9))
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 5, 8])
def test_heads_are_dealt_in_groups(kv_heads, degree):
    """Every query head is worked on once, beside its key/value head, which no rank is sent twice."""
    for group in (1, 2, 3, 4):
        heads = kv_heads * group
        if not fits(heads, kv_heads, degree):
            continue
        q_slices, kv_slices = deal(heads, kv_heads, degree)
        q_dealt = [list(range(heads))[s] for s in q_slices]
        kv_dealt = [list(range(kv_heads))[s] for s in kv_slices]
        assert list(itertools.chain(*q_dealt)) == list(range(heads))
        assert set(itertools.chain(*kv_dealt)) == set(range(kv_heads))
        for own, keys in zip(q_dealt, kv_dealt, strict=True):
            local = len(own) // len(keys)  # query heads per key/value head, as a kernel reads the shapes
            assert [h // group for h in own] == [keys[i // local] for i in range(len(own))]
        if kv_heads >= degree:
            assert {len(keys) for keys in kv_dealt} <= {kv_heads // degree, -(-kv_heads // degree)}


@pytest.mark.parametrize(
    ("heads", "degree", "ranks", "message"),
    [
        ((6, 2), 4, 4, "degrees that fit: 1, 2, 6; on 4 ranks: strategy 'usp' with ulysses=2, ring=2"),
        ((12, 3), 4, 8, "fit: 1, 2, 3, 6, 12; on 8 ranks: strategy 'usp' with ulysses=2, ring=4"),
        ((3, 1), 2, 2, "degrees that fit: 1, 3; on 2 ranks: strategy 'usp' with ulysses=1, ring=2"),
        ((4, 4), 8, 8, "4 key/value heads cannot be dealt to 8 Ulysses ranks.*ulysses=4, ring=2"),
        ((8, 1), 6, 12, "a group of 8 query heads unevenly.*on 12 ranks.*ulysses=4, ring=3"),
    ],
)
def test_heads_that_cannot_be_dealt(heads, degree, ranks, message):
    with pytest.raises(lcab.LcabError, match=message):
        require_heads(*heads, degree, ranks)


def dealt_heads(rank: int, world: int) -> None:
    """Uneven groups, groups in parts, MQA; values of another head_dim; with sinks and lse."""
    mask = masks.sliding_window_causal(N, 20)
    axes = {"ulysses": {}, "usp": {"ulysses": world // 2}, "loongtrain": {"ulysses": 2, "inner_ring": 1}}
    groups = {name: lcab.context_parallel(name, **given, seqlen=N) for name, given in axes.items()}
    for (heads, kv_heads), (name, cp) in itertools.product(
        [(6, 3), (10, 5), (5, 5), (4, 1), (12, 3), (8, 2), (12, 6)], groups.items()
    ):
        if not fits(heads, kv_heads, cp.degrees["ulysses"]):
            continue
        q, k, v, dout = inputs(N, N, heads, kv_heads, 16, torch.float64)
        v, dout = v[..., :10], dout[..., :10]
        want = reference(q, k, v, dout, mask)
        q, k, v = (cp.shard(t, 1).requires_grad_() for t in (q, k, v))
        out, lse = lcab.attention(q, k, v, mask, kernel="naive", cp=cp, return_lse=True)
        out.backward(cp.shard(dout, 1))
        got = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
        local = {t: cp.shard(want[t], 2 if t == "lse" else 1) for t in got}
        for tensor, error in errors(got, local).items():
            assert error < 1e-12, (name, (heads, kv_heads), tensor, error)
        sink = torch.arange(heads, dtype=torch.float64, requires_grad=True)
        lcab.attention(q, k, v, mask, kernel="naive", cp=cp, sink=sink).backward(cp.shard(dout, 1))
        alone = sink.detach().clone().requires_grad_()
        x = inputs(N, N, heads, kv_heads, 16, torch.float64)[:3]
        lcab.attention(*x[:2], x[2][..., :10], mask, kernel="naive", sink=alone).backward(dout)
        torch.testing.assert_close(collectives.all_reduce_sum(sink.grad), alone.grad, rtol=0, atol=1e-12)


def other_value_dim(rank: int, world: int) -> None:
    mask = masks.causal_document((30, 1, 33))
    q, k, v, dout = inputs(N, N, 4, 2, 8, torch.float64)
    v, dout = torch.cat((v, v.sin()), -1), torch.cat((dout, dout.cos()), -1)
    want = reference(q, k, v, dout, mask)
    for strategy in ("ulysses", "ring_p2p", "ring_all_gather", "group_cast"):
        cp = lcab.context_parallel(strategy, seqlen=N)
        own = [cp.shard(t, 1).requires_grad_() for t in (q, k, v)]
        out = lcab.attention(*own, mask, kernel="naive", cp=cp)
        out.backward(cp.shard(dout, 1))
        got = {"out": out, **{f"d{n}": t.grad for n, t in zip("qkv", own, strict=True)}}
        assert max(errors(got, {t: cp.shard(want[t], 1) for t in got}).values()) < 1e-12, strategy


def shared_key_sent(rank: int, world: int) -> None:
    """One key/value head for four ranks: each is sent it once, and its gradients are summed in float32."""
    mask, cp = masks.causal(N), lcab.context_parallel("ulysses", seqlen=N)
    x = inputs(N, N, 4, 1, 32, torch.bfloat16, batch=1)
    q, k, v = (cp.shard(t, 1).requires_grad_() for t in x[:3])
    collectives.reset_bytes()
    out = lcab.attention(q, k, v, mask, kernel="naive", cp=cp)
    own = N // world
    rows = own * 3 * (1 + 2) + own * 3  # q, k and v of a head to each of three ranks; out of their tokens
    sent = {key: n for key, n in collectives.bytes_sent().items() if key == "all_to_all"}
    assert sent == {"all_to_all": rows * 32 * 2}
    out.backward(cp.shard(x[3], 1))
    assert errors({"dk": k.grad}, {"dk": cp.shard(reference(*x, mask)["dk"], 1)})["dk"] < 2**-8
    axis = cp._axes["ulysses"]
    exchange = HeadExchange(axis, View(mask, cp.layout, (rank,), (rank,)), q, k)
    part = torch.full((1, N, 1, 1), (256, 1, 1, 0)[rank], dtype=torch.bfloat16)
    (total,) = exchange.to_tokens((part,), (exchange.keys,))
    assert total.dtype == torch.bfloat16
    assert (total == 258).all(), "in bfloat16 the sum would stay 256"


def each(rank: int, world: int, checks: tuple[Callable[[int, int], None], ...]) -> None:
    for check in checks:
        check(rank, world)


@pytest.mark.parametrize(
    ("world", "checks"), [(2, (dealt_heads, other_value_dim)), (4, (dealt_heads, shared_key_sent))]
)
def test_heads_on_ranks(world, checks):
    run(each, world, checks)


def bad_calls(rank: int, world: int) -> None:
    def expect(message: str, call, *args, **kwargs) -> None:
        try:
            call(*args, **kwargs)
        except lcab.LcabError as error:
            texts = collectives.all_gather_object(str(error))
            assert all(message in text for text in texts), texts
        else:
            raise AssertionError(f"no error with {message!r} on rank {rank}")

    x = inputs(N, N, 6, 2, 8, torch.float32)
    mask = masks.causal(N)

    def call(
        strategy="ring_p2p",
        mask=mask,
        rows=None,
        kernel="naive",
        dtype=torch.float32,
        heads=6,
        layout="zigzag",
    ):
        cp = lcab.context_parallel(strategy, seqlen=N, layout=layout)
        q, k, v = (cp.shard(t.to(dtype), 1)[:, :rows] for t in x[:3])
        return lcab.attention(q[:, :, :heads], k, v, mask, kernel=kernel, cp=cp)

    expect("degrees that fit: 1, 2, 6", call, "ulysses")  # six heads over four ranks
    expect("on 4 ranks: strategy 'usp' with ulysses=2, ring=2", call, "ulysses")
    expect("the mask is for 63 queries", call, mask=masks.causal(63))
    longer = masks.AttentionMask(N, 80, [(0, N, 0, 80)])
    expect("the mask is for 64 queries and 80 keys, the layout for 64 and 64", call, mask=longer)
    expect("disagree on the attention call", call, mask=mask if rank else masks.full(N))
    expect("disagree on the attention call", call, kernel="naive" if rank else "sdpa_math")
    expect("disagree on the attention call", call, dtype=torch.float32 if rank else torch.float64)
    expect("disagree on the attention call", call, layout="zigzag" if rank else "contiguous")
    expect("rank 2: this rank holds 16 of 64 queries and 16 of 64 keys", call, rows=3 if rank == 2 else None)
    expect("does not make 4 ranks", lcab.context_parallel, "ring_p2p", ring=3)
    expect("ring=2: inner_ring = 3", lcab.context_parallel, "loongtrain", ulysses=2, inner_ring=3)
    expect("disagree on the context-parallel strategy", call, "ring_all_gather" if rank else "ring_p2p")
    order = ("ulysses", "ring") if rank else ("ring", "ulysses")
    expect("disagree on the context-parallel axes", build_axes, None, dict.fromkeys(order, 2))
    expect("disagree", collectives.require_agreement, "a setting", rank > 2)


def test_bad_calls_raise_the_same_on_every_rank():
    run(bad_calls, 4)
