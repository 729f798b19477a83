"""Layouts: who holds which token, how even the work is, and that attention over them is exact."""

from __future__ import annotations

import itertools
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import errors, inputs, reference
from distributed import run
from hypothesis import given, settings
from hypothesis import strategies as st

import lcab_plugin as lcab
from lcab_plugin import balance, masks
from lcab_plugin import layout as layouts
from lcab_plugin.errors import LcabError
from lcab_plugin.kernels.lowering import varlen_calls
from lcab_plugin.layout import View

DOCUMENTS = st.lists(st.integers(1, 60), min_size=1, max_size=8)
NAMES = st.sampled_from(sorted(layouts.LAYOUTS))
RANKS = st.integers(1, 9)
CHUNKS = st.one_of(st.none(), st.integers(1, 40))


def rows(layout, rank):
    return layout.positions(rank).tolist()


@given(NAMES, RANKS, DOCUMENTS, CHUNKS)
def test_every_token_is_held_once(name, ranks, lengths, chunk):
    n = sum(lengths)
    layout = layouts.make(name, ranks, n, masks.causal_document(lengths), chunk)
    held = [rows(layout, r) for r in range(ranks)]
    assert sorted(itertools.chain(*held)) == list(range(n))
    assert all(own == sorted(own) for own in held)
    assert [layout.length(r) for r in range(ranks)] == [len(own) for own in held]
    apart = max(map(len, held)) - min(map(len, held))
    if name in ("striped", "balanced"):
        assert apart <= max(1, min(chunk or layouts.CHUNK, n // ranks))
        assert n < ranks or all(held), "a rank is empty though there are tokens for all"
    else:
        assert apart <= 2
    x = torch.arange(2 * n).view(2, n)
    assert all(torch.equal(layout.shard(x, r, 1), x[:, held[r]]) for r in range(ranks))


@given(RANKS, st.integers(1, 40), st.integers(1, 400))
def test_striped_deals_chunks_in_turn(ranks, chunk, n):
    layout = layouts.make("striped", ranks, n, chunk=chunk)
    if n < ranks * chunk:
        chunk = max(1, n // ranks)
    for rank in range(ranks):
        assert rows(layout, rank) == [i for i in range(n) if i // chunk % ranks == rank]


@pytest.mark.parametrize(
    ("ranks", "tokens", "chunk"),
    [(64, 1 << 20, 512), (64, 1 << 19, 256), (8, 1 << 24, 512), (4, 1024, 16), (4, 48, 12), (4, 3, 1)],
)
def test_the_length_of_chunks_by_default(ranks, tokens, chunk):
    """512 tokens, or what gives every rank 32 chunks, or 16; never more than an even share."""
    layout = layouts.make("striped", ranks, tokens)
    assert len(layout.ranges[0][0]) == chunk
    assert layout.ranges == layouts.make("striped", ranks, tokens, chunk=chunk).ranges


@given(NAMES, RANKS, DOCUMENTS, CHUNKS)
def test_imbalance_is_exact(name, ranks, lengths, chunk):
    mask = masks.full_document(lengths)
    layout = layouts.make(name, ranks, mask.q_len, mask, chunk)
    seen = masks.causal_document(lengths)
    dense = seen.to_dense()
    work = [int(dense[rows(layout, r)].sum()) for r in range(ranks)]
    assert layouts.areas(layout, seen) == work
    assert layouts.imbalance(layout, seen) == pytest.approx(max(work) / (sum(work) / ranks))


def test_imbalance_where_nothing_is_visible():
    assert layouts.imbalance(layouts.make("zigzag", 2, 8), masks.AttentionMask(8, 8, [])) == 1.0


@given(st.integers(2, 6), st.lists(st.integers(1, 200), min_size=1, max_size=8), st.booleans())
def test_balanced_is_no_worse_than_zigzag(ranks, lengths, causal):
    """With chunks no longer than zigzag's halves: some tokens of work, at most, as chunks are whole, or what
    it gives up for fewer keys."""
    mask = masks.causal_document(lengths) if causal else masks.full_document(lengths)
    n = mask.q_len
    balanced, zigzag = (
        max(layouts.areas(layouts.make(name, ranks, n, mask, chunk=2), mask))
        for name in ("balanced", "zigzag")
    )
    assert balanced <= max(zigzag, balance.NEARLY * mask.area / ranks) + 2 * max(lengths)


@pytest.mark.parametrize("tokens", [1 << 19, 1 << 20])
@pytest.mark.parametrize("corpus", masks.distributions())
@pytest.mark.parametrize("family", [masks.causal_document, masks.full_document])
def test_sampled_documents_on_64_ranks(family, corpus, tokens):
    for seed in range(4):
        mask = family(masks.sample_lengths(tokens, corpus, seed))
        work = {
            name: layouts.imbalance(layouts.make(name, 64, tokens, mask), mask) for name in layouts.LAYOUTS
        }
        assert 1 <= work["balanced"] < 1.05
        assert work["balanced"] < work["zigzag"]


def test_balanced_halves_its_chunks_where_whole_ones_do_not_divide():
    """One document of 400 chunks, all of the same work, over 64 ranks, and next to nothing beside it."""
    tokens = 1 << 20
    mask = masks.full_document([204800, *[64] * ((tokens - 204800) // 64)])
    by_chunk = [
        layouts.imbalance(layouts.make("balanced", 64, tokens, mask, chunk), mask)
        for chunk in (512, 256, 128)
    ]
    assert by_chunk[0] > 1.1
    layout = layouts.make("balanced", 64, tokens, mask)
    assert layouts.imbalance(layout, mask) == min(by_chunk) < 1.05
    assert layout != layouts.make("balanced", 64, tokens, mask, chunk=512)
    # even at once, or never: one row has all the work
    for mask in (masks.causal(tokens), masks.AttentionMask(tokens, tokens, [(5, 6, 0, tokens)])):
        assert layouts.make("balanced", 64, tokens, mask) == layouts.make("balanced", 64, tokens, mask, 512)


def others_keys(layout, mask, rank):
    """Keys that the queries of a rank see and other ranks hold."""
    seen = torch.zeros(mask.k_len, dtype=torch.bool)
    for r in mask.needed_keys(layout.ranges[rank]):
        seen[r.start : r.stop] = True
    seen[layout.positions(rank)] = False
    return int(seen.sum())


@pytest.mark.parametrize("corpus", masks.distributions())
@pytest.mark.parametrize("family", [masks.causal_document, masks.full_document])
@pytest.mark.parametrize(("ranks", "tokens"), [(2, 1 << 16), (8, 1 << 18)])
def test_documents_stay_together_where_few_chunks_move(family, corpus, ranks, tokens):
    """Never more keys from others than chunks dealt one by one need, and for short documents far fewer."""
    mask = family(masks.sample_lengths(tokens, corpus, 0))
    edges = layouts._edges(tokens, ranks, None)
    held = balance._dealt(mask.area_by_chunk(edges), ranks, False)
    near, dealt = layouts.make("balanced", ranks, tokens, mask), layouts._of_chunks("dealt", edges, held)
    needed = [max(others_keys(layout, mask, r) for r in range(ranks)) for layout in (near, dealt)]
    assert needed[0] <= needed[1] * (
        1 if corpus != "pile" else 0.6 if (ranks, family) == (2, masks.full_document) else 0.5
    )
    assert layouts.imbalance(near, mask) <= balance.NEARLY


@pytest.mark.parametrize(("ranks", "tokens", "most"), [(2, 1 << 15, 3), (2, 1 << 17, 3), (8, 1 << 17, 12)])
def test_few_pieces_and_few_calls_of_a_library(ranks, tokens, most):
    """A border inside a document is a slice more of the mask, and of a library's kernel often a call more."""
    for seed in range(8):
        mask = masks.causal_document(masks.sample_lengths(tokens, "pile", seed))
        layout = layouts.make("balanced", ranks, tokens, mask)
        assert layouts.imbalance(layout, mask) <= balance.NEARLY
        assert max(map(len, layout.ranges)) <= most
        for own in layout.ranges:
            assert len(varlen_calls(mask.local(own, mask.needed_keys(own)))) <= 6


@pytest.mark.parametrize("last", [10, 3])
def test_counts_are_even_where_work_is_not(last):
    """One chunk has more work than its rank's share: the other ranks do not take chunks off that rank."""
    mask = masks.full_document([10, *[1] * (200 + last)])
    layout = layouts.make("balanced", 4, mask.q_len, mask, 10)
    assert sorted(layout.lengths) == [50, 50, 50 + last, 60]


def test_one_long_document_is_even():
    """Work that grows along the sequence."""
    mask = masks.causal(1 << 16)
    for ranks in (3, 8, 64):
        assert layouts.imbalance(layouts.make("balanced", ranks, 1 << 16, mask), mask) < 1.002


@pytest.mark.parametrize(("family", "pieces"), [(masks.full, 1), (masks.causal, 2)])
@pytest.mark.parametrize("tokens", [1 << 16, (1 << 16) - 99])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_what_a_run_or_two_share_evenly_is_in_no_more_pieces(family, pieces, tokens, ranks):
    mask = family(tokens)
    layout = layouts.make("balanced", ranks, tokens, mask)
    assert max(map(len, layout.ranges)) <= pieces
    assert layouts.imbalance(layout, mask) < 1.005
    assert max(layout.lengths) - min(layout.lengths) <= 2


@given(RANKS, DOCUMENTS, CHUNKS)
def test_equal_masks_have_equal_layouts(ranks, lengths, chunk):
    first, second = (
        layouts.balanced(masks.causal_document(kind(lengths)), ranks, chunk) for kind in (list, np.array)
    )
    assert first == second
    assert hash(first) == hash(second)
    assert first.ranges == second.ranges
    assert pickle.loads(pickle.dumps(first)) == first


def test_what_makes_layouts_differ():
    causal, documents = masks.causal(4096), masks.causal_document([100, 3000, 996])
    first, second = (layouts.make("balanced", 4, 4096, mask) for mask in (causal, documents))
    assert first != second
    assert first.digest != second.digest
    assert layouts.make("striped", 4, 4096) != layouts.make("contiguous", 4, 4096)
    assert layouts.make("striped", 4, 4096, chunk=64) != layouts.make("striped", 4, 4096, chunk=128)
    # the same rows under another name, and in another split of the same numbers
    assert layouts.make("zigzag", 1, 8) != layouts.make("contiguous", 1, 8)
    two = [layouts.Layout("x", 2, ranges) for ranges in (((range(2),), ()), ((), (range(2),)))]
    assert two[0] != two[1]


def test_layouts_are_made_once():
    mask = masks.causal_document([300, 212])
    assert layouts.make("balanced", 4, 512, mask) is layouts.make("balanced", 4, 512, mask)
    for name in ("contiguous", "zigzag", "striped"):
        assert layouts.make(name, 4, 512, mask) is layouts.make(name, 4, 512)


@settings(max_examples=50)
@given(NAMES, st.integers(1, 5), DOCUMENTS, st.sampled_from(["causal_document", "full_document", "window"]))
def test_local_masks(name, ranks, lengths, family):
    n = sum(lengths)
    mask = masks.sliding_window(n, 9, 4) if family == "window" else getattr(masks, family)(lengths)
    layout = layouts.make(name, ranks, n, mask, chunk=5)
    dense = mask.to_dense()
    everyone = tuple(range(ranks))
    for q_ranks, k_ranks in [*(((0,), (r,)) for r in everyone), ((ranks - 1,), everyone), (everyone,) * 2]:
        i, j = (sorted(itertools.chain(*(rows(layout, r) for r in held))) for held in (q_ranks, k_ranks))
        assert torch.equal(View(mask, layout, q_ranks, k_ranks).local().to_dense(), dense[i][:, j])


@pytest.mark.parametrize("name", ["striped", "balanced"])
def test_local_masks_have_slices_in_proportion_to_chunks(name):
    """One rectangle per chunk of queries and one more for every border that cuts it, not one per pair."""
    n, ranks = 1 << 20, 64
    short = [100 + i % 10 for i in range(9999)]
    for mask in (
        masks.causal(n),
        masks.causal_document([n // 4, n // 2, n // 4]),
        masks.causal_document([*short, n - sum(short)]),
    ):
        layout = layouts.make(name, ranks, n, mask)
        chunks = n // layouts.CHUNK // ranks
        for k_ranks in ((0,), (1,), tuple(range(ranks))):
            local = View(mask, layout, (0,), k_ranks).local()
            touched = len(mask.local(layout.rows((0,)), [range(n)]).array)
            assert len(local.array) <= 2 * chunks + touched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("balanced", 4, 64), r"cp\.with_layout\(mask=mask\)"),
        (("balanced", 4, 64, masks.causal(63)), "the mask is for 63 queries, the sequence has 64 tokens"),
        (("stripped", 4, 64), "did you mean 'striped'"),
        (("striped", 4, 64, None, 0), "chunk=0 is not positive"),
        (("zigzag", 4, 0), "sequence length 0 is not positive"),
    ],
)
def test_layouts_that_cannot_be(arguments, message):
    with pytest.raises(lcab.LcabError, match=message):
        layouts.make(*arguments)


def test_imbalance_of_another_mask():
    with pytest.raises(lcab.LcabError, match="the mask is for 63 queries, the layout for 64 tokens"):
        layouts.imbalance(layouts.make("zigzag", 4, 64), masks.causal(63))


def test_a_group_takes_its_layout_from_the_mask():
    mask, other = masks.causal_document([40, 24]), masks.causal(64)
    cp = lcab.context_parallel("none", layout="balanced", mask=mask)
    assert cp.layout == layouts.make("balanced", 1, 64, mask)
    assert cp.with_layout(mask=mask) is cp
    assert cp.imbalance(other) == 1.0
    for wrong in (
        lambda: cp.with_layout(seqlen=64),
        lambda: lcab.context_parallel("none", layout="balanced", seqlen=64),
        lambda: lcab.context_parallel("none", seqlen=64).with_layout("balanced", seqlen=64),
    ):
        with pytest.raises(lcab.LcabError, match="layout 'balanced' follows the work of a mask"):
            wrong()


def attention_is_exact(rank: int, world: int) -> None:
    cases = [masks.causal_document([17, 33, 1, 46]), masks.share_question([20, 30, 10, 37])]
    for (heads, kv_heads), mask in itertools.product([(6, 6), (6, 1)], cases):
        n = mask.q_len  # 97: shards differ, and the last chunk is short
        x = inputs(n, n, heads, kv_heads, 8, torch.float64)
        want = reference(*x, mask)
        for strategy, name in itertools.product(
            ("ring_p2p", "ring_all_gather", "ulysses"), ("striped", "balanced")
        ):
            cp = group(strategy).with_layout(name, mask=mask)
            assert cp.layout == layouts.make(name, world, n, mask)
            assert cp.imbalance(mask) == layouts.imbalance(cp.layout, mask)
            assert cp.positions().tolist() == rows(cp.layout, cp.rank)
            q, k, v = (cp.shard(t, 1).requires_grad_() for t in x[:3])
            out = lcab.attention(q, k, v, mask, kernel="naive", cp=cp)
            out.backward(cp.shard(x[3], 1))
            got = {"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}
            wrong = errors(got, {t: cp.shard(want[t], 1) for t in got})
            assert max(wrong.values()) < 1e-12, (strategy, name, wrong)
            assert errors({"out": cp.unshard(out.detach(), 1)}, want)["out"] < 1e-12


_GROUPS: dict[str, lcab.ContextParallel] = {}


def group(strategy: str) -> lcab.ContextParallel:
    if strategy not in _GROUPS:
        _GROUPS[strategy] = lcab.context_parallel(strategy)
    return _GROUPS[strategy]


@pytest.mark.parametrize("world", [2, 3])
def test_attention_is_exact(world):
    run(attention_is_exact, world)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_zigzag_by_document_cuts_every_document_by_itself(ranks: int) -> None:
    edges = (0, 16, 16, 48, 64)
    layout = layouts.zigzag_documents(edges, ranks)
    for rank in range(ranks):
        chunks = [torch.arange(a, b).chunk(2 * ranks) for a, b in pairwise(edges) if b > a]
        wanted = torch.cat([c for parts in chunks for c in (parts[rank], parts[2 * ranks - 1 - rank])])
        assert torch.equal(layout.positions(rank), wanted.sort().values)
        assert torch.equal(layout.positions(rank), wanted), "rows of a rank ascend"
    assert layouts.zigzag_documents(edges, ranks) is layout
    whole = layouts.make("zigzag", ranks, 64)
    one = layouts.zigzag_documents((0, 64), ranks)
    assert one.ranges == whole.ranges


def test_zigzag_by_document_refuses_lengths_that_do_not_divide() -> None:
    assert layouts.zigzag_documents((0, 3, 10), 1).length(0) == 10
    with pytest.raises(LcabError, match="document of 6 tokens does not divide into the 4 chunks of 2"):
        layouts.zigzag_documents((0, 6, 14), 2)
    for edges in ((0,), (1, 4), (0, 8, 4), (0, 0)):
        with pytest.raises(LcabError, match="must ascend from 0"):
            layouts.zigzag_documents(edges, 2)
