"""Slices, masks and block maps against dense booleans."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcab_plugin.errors import LcabError
from lcab_plugin.masks import (
    EMPTY,
    FULL,
    NO_HI,
    NO_LO,
    PARTIAL,
    AttentionMask,
    AttnSlice,
    causal,
    causal_document,
    geometry,
)

quick = settings(max_examples=150, deadline=None)


@st.composite
def slices(draw: st.DrawFn, length: int = 12) -> AttnSlice:
    """Any slice, tight or not, empty ones and bands that miss the rectangle included."""
    q = sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))
    k = sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))
    limit = st.none() | st.integers(-length - 1, length + 1)
    return AttnSlice(*q, *k, draw(limit), draw(limit))


@st.composite
def disjoint(draw: st.DrawFn, longest: int = 20) -> AttentionMask:
    """A grid of rectangles, each cut along diagonals into bands of which some are kept, in any order."""
    q_len, k_len = draw(st.integers(0, longest)), draw(st.integers(0, longest))
    rows, columns = (
        [0, *sorted(draw(st.lists(st.integers(0, length), max_size=3))), length] for length in (q_len, k_len)
    )
    found = []
    for q_start, q_end in pairwise(rows):
        for k_start, k_end in pairwise(columns):
            cuts = sorted(draw(st.sets(st.integers(-longest, longest), max_size=3)))
            los, his = [None, *(cut + 1 for cut in cuts)], [*cuts, None]
            bands = [
                AttnSlice(q_start, q_end, k_start, k_end, lo, hi) for lo, hi in zip(los, his, strict=True)
            ]
            found += [band for band in bands if draw(st.booleans())]
    return AttentionMask(q_len, k_len, draw(st.permutations(found)))


@st.composite
def ranges(draw: st.DrawFn, length: int) -> list[range]:
    """Disjoint ranges in any order: uneven, touching, of one token and empty ones among them."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=8)))
    pieces = [range(a, b) for a, b in pairwise(cuts) if draw(st.booleans())]
    return draw(st.permutations(pieces)) if draw(st.booleans()) else pieces


def cells(s: AttnSlice, q_len: int = 12, k_len: int = 12) -> np.ndarray:
    """The definition of a slice, cell by cell."""
    i, j = np.arange(q_len)[:, None], np.arange(k_len)[None, :]
    seen = (s.q_start <= i) & (i < s.q_end) & (s.k_start <= j) & (j < s.k_end)
    seen &= s.lo is None or j - i >= s.lo
    return seen & (s.hi is None or j - i <= s.hi)


def dense(mask: AttentionMask) -> np.ndarray:
    """The union of the mask's slices by their definition, which must not share cells."""
    total = np.zeros((mask.q_len, mask.k_len), dtype=int)
    for s in mask.slices:
        total += cells(s, mask.q_len, mask.k_len)
    assert total.max(initial=0) <= 1
    return total == 1


def rows_of(pieces: list[range]) -> list[int]:
    return [position for piece in pieces for position in piece]


@quick
@given(slices(), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_clip_is_the_intersection_and_tight(s: AttnSlice, q0: int, q1: int, k0: int, k1: int) -> None:
    expected = cells(s) & cells(AttnSlice(q0, q1, k0, k1))
    part = s.clip(range(q0, q1), range(k0, k1))
    if part is None:
        assert not expected.any()
        return
    assert (cells(part) == expected).all()
    assert part.area == expected.sum()
    rectangle = expected[part.q_start : part.q_end, part.k_start : part.k_end]
    assert rectangle.any(axis=0).all()
    assert rectangle.any(axis=1).all()
    for field in ("lo", "hi"):  # a limit that is there cuts something
        if getattr(part, field) is not None:
            assert (cells(part._replace(**{field: None})) != expected).any()


@quick
@given(slices())
def test_area_of_any_slice(s: AttnSlice) -> None:
    assert s.area == cells(s).sum()


@quick
@given(slices(length=8), st.integers(0, 4), st.integers(0, 4))
def test_shift_moves_the_cells(s: AttnSlice, dq: int, dk: int) -> None:
    assert (cells(s.shift(dq, dk))[dq:, dk:] == cells(s)[: 12 - dq, : 12 - dk]).all()


@quick
@given(disjoint())
def test_canonical_form(mask: AttentionMask) -> None:
    seen = dense(mask)
    assert torch.equal(mask.to_dense(), torch.from_numpy(seen))
    assert mask.area == seen.sum()
    assert mask.empty == (not seen.any())
    corners = [(s.q_start, s.k_start) for s in mask.slices]
    assert corners == sorted(set(corners))
    for s in mask.slices:
        assert s.clip(range(s.q_start, s.q_end), range(s.k_start, s.k_end)) == s
        sq, sk, corner = s.q_end - s.q_start, s.k_end - s.k_start, s.k_start - s.q_start
        assert s.lo is None or (sk - sq) - (s.lo - corner) >= 0  # flash-attn's left and right
        assert s.hi is None or (s.hi - corner) - (sk - sq) >= 0
        assert seen[s.q_start, s.k_start]
        assert seen[s.q_end - 1, s.k_end - 1]
    q, k = mask.bounds()
    assert seen[q.start : q.stop, k.start : k.stop].sum() == mask.area
    if not mask.empty:
        assert seen[[q.start, q.stop - 1]].any(axis=1).all()
        assert seen[:, [k.start, k.stop - 1]].any(axis=0).all()


@quick
@given(disjoint(), st.data())
def test_local_is_indexing(mask: AttentionMask, data: st.DataObject) -> None:
    q, k = data.draw(ranges(mask.q_len)), data.draw(ranges(mask.k_len))
    local = mask.local(q, k)
    assert (local.q_len, local.k_len) == (len(rows_of(q)), len(rows_of(k)))
    assert (dense(local) == dense(mask)[rows_of(q)][:, rows_of(k)]).all()
    assert AttentionMask(local.q_len, local.k_len, local.array) == local


@quick
@given(disjoint(), st.data())
def test_local_of_repeated_rows(mask: AttentionMask, data: st.DataObject) -> None:
    q = data.draw(ranges(mask.q_len)) + data.draw(ranges(mask.q_len))
    local = mask.local(q, [range(mask.k_len)])
    assert (dense(local) == dense(mask)[rows_of(q)]).all()


def test_local_does_not_fragment() -> None:
    pieces = [range(i, i + 1) for i in range(64)]
    assert causal(64).local(pieces, pieces) == causal(64)
    zigzag = causal(64).local([range(0, 16), range(48, 64)], [range(16, 32), range(32, 48)])
    assert zigzag.slices == (AttnSlice(16, 32, 0, 32),)


@quick
@given(disjoint(), st.data())
def test_needed_keys_are_exact(mask: AttentionMask, data: st.DataObject) -> None:
    q = data.draw(ranges(mask.q_len))
    needed = mask.needed_keys(q)
    assert rows_of(list(needed)) == np.flatnonzero(dense(mask)[rows_of(q)].any(axis=0)).tolist()
    assert all(a.stop < b.start for a, b in pairwise(needed))


@quick
@given(disjoint(), st.data())
def test_area_by_chunk(mask: AttentionMask, data: st.DataObject) -> None:
    edges = sorted(data.draw(st.lists(st.integers(0, mask.q_len), min_size=1, max_size=6)))
    expected = [dense(mask)[a:b].sum() for a, b in pairwise(edges)]
    assert mask.area_by_chunk(np.array(edges)).tolist() == expected


@quick
@given(disjoint(), st.integers(1, 7), st.integers(1, 7))
def test_block_map(mask: AttentionMask, bq: int, bk: int) -> None:
    seen, blocks = dense(mask), mask.block_map(bq, bk)
    kinds = np.empty(blocks.shape, dtype=int)
    for row, column in np.ndindex(blocks.shape):
        block = seen[row * bq : (row + 1) * bq, column * bk : (column + 1) * bk]
        kinds[row, column] = FULL if block.all() else PARTIAL if block.any() else EMPTY
    assert (blocks.to_dense() == kinds).all()
    assert blocks.counts() == {kind: (kinds == kind).sum() for kind in (EMPTY, PARTIAL, FULL)}
    for begin, end in zip(blocks.offsets, blocks.offsets[1:], strict=False):  # as few runs as the row allows
        for run in range(begin + 1, end):
            gap = blocks.first[run] - blocks.first[run - 1] - blocks.length[run - 1]
            assert gap > 0 or (gap == 0 and blocks.kind[run] != blocks.kind[run - 1])


def test_blocks_filled_by_several_slices_are_full() -> None:
    documents = AttentionMask(8, 8, [(0, 4, 0, 8), (4, 8, 0, 8)])
    assert documents.block_map(8, 8).counts() == {EMPTY: 0, PARTIAL: 0, FULL: 1}
    halves = AttentionMask(6, 6, [(0, 6, 0, 6, None, 0), (0, 6, 0, 6, 1, None)])
    assert halves.block_map(4, 4).counts() == {EMPTY: 0, PARTIAL: 0, FULL: 4}


def test_a_million_causal_tokens_are_few_runs() -> None:
    blocks = causal(1 << 20).block_map(128, 128)
    rows = 1 << 13
    assert blocks.counts() == {EMPTY: rows * (rows - 1) // 2, PARTIAL: rows, FULL: rows * (rows - 1) // 2}
    assert len(blocks.kind) == 2 * rows - 1


def test_areas_are_exact_at_sixteen_million_tokens() -> None:
    n = 1 << 24
    mask = causal(n)
    assert mask.area == n * (n + 1) // 2
    assert mask.area_by_chunk([0, n // 2, n]).sum() == mask.area


@quick
@given(st.lists(slices(), max_size=4))
def test_overlapping_slices_are_refused(found: list[AttnSlice]) -> None:
    covered = np.sum([cells(s) for s in found], axis=0)
    if np.max(covered) > 1:
        with pytest.raises(LcabError, match=r"disjoint, but AttnSlice.* and AttnSlice.* share a cell"):
            AttentionMask(12, 12, found)
    else:
        assert AttentionMask(12, 12, found).area == sum(s.area for s in found)


def test_the_overlap_check_names_the_two_slices_and_works_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [(q, q + 2, k, k + 2) for q in range(0, 20, 2) for k in range(0, 20, 2)]
    monkeypatch.setattr(geometry, "PAIRS_AT_ONCE", 7)
    assert AttentionMask(20, 20, grid).area == 400
    with pytest.raises(LcabError) as error:
        AttentionMask(20, 20, [*grid, (19, 20, 19, 20)])
    assert str(AttnSlice(18, 20, 18, 20)) in str(error.value)
    assert str(AttnSlice(19, 20, 19, 20)) in str(error.value)


def test_equality_goes_by_digest() -> None:
    mask = causal_document([3, 0, 5])
    same = AttentionMask(8, 8, [(3, 8, 3, 8, None, 0), (0, 3, 0, 3, None, 0), (0, 0, 0, 8)])
    assert mask == same
    assert hash(mask) == hash(same)
    assert mask.digest == same.digest
    assert mask != causal(8)
    assert AttentionMask(8, 9, same.array) != same
    assert mask != "causal_document"
    assert repr(mask) == f"AttentionMask(8 x 8, 2 slices, {mask.digest[:8]})"
    for other in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert other == mask
        assert not other.array.flags.writeable


def test_masks_are_immutable() -> None:
    source = np.array([[0, 4, 0, 4, NO_LO, 0]])
    mask = AttentionMask(4, 4, source)
    source[0, 1] = 2
    assert mask == causal(4)
    with pytest.raises(ValueError, match="read-only"):
        mask.array[0, 0] = 1
    with pytest.raises(AttributeError, match="immutable"):
        mask.q_len = 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 4, [(0, 5, 0, 4)]), "q_end=5.*does not lie in 4 queries x 4 keys"),
        ((4, 4, [(0, 4, -1, 4)]), "k_start=-1"),
        ((4, 4, [(3, 2, 0, 4)]), "does not lie"),
        ((-1, 4, []), "q_len must be an integer of at least 0, not -1"),
        ((4, 2.5, []), "k_len must be an integer of at least 0, not 2.5"),
        ((True, 4, []), "q_len must be an integer"),
        ((4, 4, np.zeros((1, 4), dtype=int)), r"slices must be integers \[n, 6\], not int64 \[1, 4\]"),
        ((4, 4, np.zeros((1, 6))), "float64"),
        ((4, 4, [(0, 2.5, 0, 4)]), "slices must be integers"),
    ],
)
def test_bad_masks(arguments: tuple, words: str) -> None:
    with pytest.raises(LcabError, match=words):
        AttentionMask(*arguments)


def test_bad_arguments() -> None:
    mask = causal(8)
    with pytest.raises(LcabError, match=r"q_ranges must have step 1 and lie in \[0, 8\), not range\(4, 9\)"):
        mask.local([range(4, 9)], [range(8)])
    with pytest.raises(LcabError, match="k_ranges"):
        mask.local([range(8)], [range(0, 8, 2)])
    with pytest.raises(LcabError, match="q_ranges"):
        mask.needed_keys([range(-1, 2)])
    with pytest.raises(LcabError, match="q_len = 8"):
        mask.area_by_chunk([0, 9])
    with pytest.raises(LcabError, match="boundaries must ascend"):
        mask.area_by_chunk([4, 2])
    with pytest.raises(LcabError, match="boundaries must be integers"):
        mask.area_by_chunk([0, 2.5])
    with pytest.raises(LcabError, match="bk must be an integer of at least 1, not 0"):
        mask.block_map(4, 0)


def test_limits_beyond_the_sentinels_are_no_limits() -> None:
    assert AttentionMask(4, 4, [(0, 4, 0, 4, 2 * NO_LO, 2 * NO_HI)]) == AttentionMask(4, 4, [(0, 4, 0, 4)])
    assert AttentionMask(4, 4, [(0, 4, 0, 4, NO_HI, None)]).empty


def test_local_is_kept() -> None:
    mask = causal_document([5] * 2000)
    q, k = [range(100, 5000)], [range(10000)]
    assert mask.local(q, k) is mask.local(tuple(q), tuple(k))
