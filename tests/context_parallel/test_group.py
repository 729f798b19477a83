"""Groups, layouts and what goes wrong: one clear error on every rank, no hang."""

from __future__ import annotations

import atexit
import itertools

import pytest
import torch
import torch.distributed as dist
from cases import errors, inputs, reference
from distributed import run
from hypothesis import given
from hypothesis import strategies as st

import lcab_plugin as lcab
from lcab_plugin import layout as layouts
from lcab_plugin import masks
from lcab_plugin.context_parallel import collectives, resolve_degrees

N = 64


@given(st.sampled_from(sorted(layouts.LAYOUTS)), st.integers(1, 9), st.integers(1, 200))
def test_a_layout_deals_every_token_once(name, ranks, tokens):
    layout = layouts.make(name, ranks, tokens)
    held = [layout.positions(r).tolist() for r in range(ranks)]
    assert sorted(itertools.chain(*held)) == list(range(tokens))
    assert all(rows == sorted(rows) for rows in held)
    assert [layout.length(r) for r in range(ranks)] == [len(rows) for rows in held]
    assert max(map(len, held)) - min(map(len, held)) <= 2
    x = torch.arange(2 * tokens).view(2, tokens)
    assert all(torch.equal(layout.shard(x, r, 1), x[:, held[r]]) for r in range(ranks))


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
    ],
)
def test_degrees_that_do_not_fit(strategy, size, given_degrees, message):
    with pytest.raises(lcab.LcabError, match=message):
        resolve_degrees(strategy, size, given_degrees)


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
    expect("the mask is for 63 queries", call, mask=masks.causal(63))
    expect("disagree on the attention call", call, mask=mask if rank else masks.full(N))
    expect("disagree on the attention call", call, kernel="naive" if rank else "sdpa_math")
    expect("disagree on the attention call", call, dtype=torch.float32 if rank else torch.float64)
    expect("disagree on the attention call", call, layout="zigzag" if rank else "contiguous")
    expect("rank 2: this rank holds 16 of 64 tokens", call, rows=3 if rank == 2 else None)
    expect("does not make 4 ranks", lcab.context_parallel, "ring_p2p", ring=3)
    expect("disagree", collectives.require_agreement, "a setting", rank > 2)


def test_bad_calls_raise_the_same_on_every_rank():
    run(bad_calls, 4)
