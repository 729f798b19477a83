"""The calls a mask becomes are that mask, every cell exactly once."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from cases import errors, families, inputs, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from lcab_plugin import masks
from lcab_plugin.kernels import KernelOptions, get, segments, tiled
from lcab_plugin.kernels.lowering import (
    BAND_KEYS,
    MAX_DEPTH,
    Tiles,
    VarlenCall,
    coalesced,
    tiles,
    too_deep,
    varlen_calls,
)
from lcab_plugin.kernels.merge import Softmax, merge_
from lcab_plugin.masks import AttentionMask


@st.composite
def any_mask(draw) -> AttentionMask:
    """A part of one of the families, as a rank of some layout would see it."""
    n = draw(st.integers(96, 140))
    mask = families(n)[draw(st.sampled_from(masks.names()))]
    if draw(st.booleans()):
        width = draw(st.integers(0, 40))
        mask = masks.sliding_window(n, width, draw(st.integers(0, 40)))

    def part() -> list[range]:
        edges = sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=6)))
        return [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)] or [range(n)]

    return mask.local(part(), part())


def tile_cells(tile: Tiles) -> np.ndarray:
    """Which keys each row of one tile sees."""
    rows, keys = tile.shape
    if tile.kind == "full":
        return np.ones((rows, keys), dtype=int)
    if tile.kind == "band":
        return np.tril(np.triu(np.ones((rows, keys), dtype=int)), keys - rows)
    cells = np.tri(rows, keys, dtype=int)
    return cells[::-1, ::-1] if tile.kind == "anti_causal" else cells


def segment_cells(call: VarlenCall, rows: int, keys: int) -> np.ndarray:
    """flash-attn's rule: left and right are bottom-right aligned in each segment, -1 for no limit."""
    diagonal = np.arange(keys)[None] - np.arange(rows)[:, None] - (keys - rows)
    cells = np.ones((rows, keys), dtype=int)
    cells[(diagonal > call.right) & (call.right >= 0)] = 0
    cells[(-diagonal > call.left) & (call.left >= 0)] = 0
    return cells


def visited(cells: np.ndarray, blocks: tuple[int, int]) -> int:
    """Cells of the blocks from the first to the last that a row of each row block sees."""
    rows, keys = blocks
    total = 0
    for start in range(0, len(cells), rows):
        seen = np.flatnonzero(cells[start : start + rows].any(0)) // keys
        total += (seen[-1] - seen[0] + 1) * rows * keys if len(seen) else 0
    return total


@given(any_mask(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_tiles_are_the_mask(mask, bands):
    seen = np.zeros((mask.q_len, mask.k_len), dtype=int)
    touched = np.zeros(mask.q_len, dtype=bool)
    plan = tiles(mask, bands)
    explained = tiled.explain(mask, (16, 8), bands=bands)
    for t, call in zip(plan, explained, strict=True):
        nq, nk = t.shape
        step = t.steps[1]
        assert bands or t.kind != "band"
        assert nq * t.count == len(t.rows)
        assert nk + (t.count - 1) * step == len(t.keys)
        assert nq
        assert nk
        cell = tile_cells(t)
        assert cell.any(1).all(), "a row of a tile that sees nothing"
        for i in range(t.count):
            rows = slice(t.rows.start + i * nq, t.rows.start + (i + 1) * nq)
            seen[rows, t.keys.start + i * step : t.keys.start + i * step + nk] += cell
        rows = slice(t.rows.start, t.rows.stop)
        assert t.fresh == (not touched[rows].any())
        touched[rows] = True
        assert (call.count, call.area) == (t.count, cell.sum() * t.count)
        walked = {"full": cell, "band": np.ones_like(cell)}.get(t.kind, np.tri(nq, nk))
        assert call.computed == visited(walked, (16, 8)) * t.count
        assert call.copied == (len(t.rows) + 2 * len(t.keys)) * (t.kind == "anti_causal")
    np.testing.assert_array_equal(seen, mask.to_dense().int().numpy())
    assert sum(call.area for call in explained) == mask.area


@given(any_mask())
@settings(max_examples=400, deadline=None)
def test_varlen_calls_are_the_mask(mask):
    seen = np.zeros((mask.q_len, mask.k_len), dtype=int)
    touched = np.zeros(mask.q_len, dtype=bool)
    explained = segments.explain(mask, (16, 8))
    for call, told in zip(varlen_calls(mask), explained, strict=True):
        q_end = last_key = area = computed = 0
        rows = np.zeros(mask.q_len, dtype=bool)
        for q0, q1, k0, k1 in call.segments.tolist():
            assert q0 >= q_end, "query ranges must be disjoint and ascend"
            assert call.gathered or k0 >= last_key, "key ranges must be disjoint and ascend, or be gathered"
            q_end, last_key = q1, k1
            assert call.left >= -1
            assert call.right >= -1
            cell = segment_cells(call, q1 - q0, k1 - k0)
            assert cell.any(1).all(), "a row of a segment that sees nothing"
            seen[q0:q1, k0:k1] += cell
            rows[q0:q1] = True
            area += cell.sum()
            computed += visited(cell, (16, 8))
        assert call.fresh == (not (touched & rows).any())
        touched |= rows
        assert (told.count, told.area, told.computed) == (len(call.segments), area, computed)
        assert told.merged == (0 if call.fresh else rows.sum())
    np.testing.assert_array_equal(seen, mask.to_dense().int().numpy())
    assert sum(call.area for call in explained) == mask.area


def test_common_masks_are_one_call():
    n = 512
    assert len(tiles(masks.causal(n))) == 1
    assert len(varlen_calls(masks.causal(n))) == 1
    assert len(varlen_calls(masks.causal_document([100, 12, 400]))) == 1
    assert len(varlen_calls(masks.sliding_window_causal(n, 64))) == 1
    assert len(tiles(masks.causal_document([64] * 8))) == 1, "equal documents are one batch"


def test_a_zigzag_ranks_own_block_is_causal_again():
    """Ranks hold chunks r and 2 * cp - 1 - r: causal, full and causal blocks join into one causal call."""
    mask = masks.causal(800)
    rows = [range(100, 200), range(600, 700)]
    assert [t.kind for t in tiles(mask.local(rows, rows))] == ["causal"]
    assert len(coalesced(mask.local(rows, rows))) == 1


def test_nested_keys_are_layers_or_gathers_whichever_is_cheaper():
    """A call for each block copies nothing; of many short documents such calls would copy as much anyway."""
    long = varlen_calls(masks.block_causal_document([8192], 512))
    assert len(long) == 16
    assert not any(call.gathered for call in long)
    assert all(call.fresh for call in long), "every row is in one call: nothing to merge"
    (short,) = varlen_calls(masks.block_causal_document([512] * 16, 8))
    assert short.gathered
    uneven = varlen_calls(masks.block_causal_document([3072, 5120], 512))
    assert [call.copied for call in uneven] == [(0, 0)] * 15, (
        "gaps between the blocks of two documents cost more"
    )
    rows, keys = short.copied
    assert (rows, keys) == (0, 16 * 8 * sum(range(1, 65)))
    (told,) = segments.explain(masks.block_causal_document([512] * 16, 8), (128, 128))
    assert told.what == "varlen full, keys gathered"
    assert told.copied == 2 * keys


def test_rows_in_too_many_calls_are_refused():
    def runs(n: int) -> AttentionMask:
        return AttentionMask(8, 16 * n, [(0, 8, 16 * i, 16 * i + 8) for i in range(n)])

    assert too_deep(runs(MAX_DEPTH)) is None
    assert (
        too_deep(runs(MAX_DEPTH + 1)) == "rows of this mask would be merged from 5 native calls, more than 4"
    )
    assert all(too_deep(mask) is None for mask in families().values())
    assert sum(len(call.segments) for call in varlen_calls(runs(400))) == 400, "more calls than rows"


@pytest.mark.parametrize("name", ["full_document", "prefix_lm_document", "block_causal_document"])
def test_ten_thousand_documents_are_explained_at_once(name):
    lengths = np.random.default_rng(0).integers(20, 100, 10_000)
    more = {"prefix_lm_document": {"prefixes": 30}, "block_causal_document": {"block": 64}}.get(name, {})
    mask = masks.from_name(name, int(lengths.sum()), lengths=lengths, **more)
    start = time.process_time()
    assert sum(call.area for call in segments.explain(mask, (128, 128))) == mask.area
    assert sum(call.area for call in tiled.explain(mask, (64, 512), bands=True)) == mask.area
    assert time.process_time() - start < 1.5


def test_a_long_band_is_several_calls_of_bounded_memory():
    mask = masks.sliding_window_causal(16384, 1024)
    plan = [t for t in tiles(mask, bands=True) if t.kind == "band"]
    assert all(t.count * t.shape[1] <= BAND_KEYS for t in plan)
    assert [t.rows.start for t in plan[1:]] == [t.rows.stop for t in plan[:-1]]
    assert (plan[0].rows.start, plan[-1].rows.stop) == (1024, 16384)
    assert all(t.keys == range(t.rows.start - 1024, t.rows.stop) for t in plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_bands_are_exact_over_several_tiles(batch, dtype):
    """Overlapping views of k and v and the sums of their gradients, at lengths of more than one tile."""
    kernel, options = get("sdpa_flash"), KernelOptions(0.25)
    budget = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for mask in (
        masks.sliding_window_causal(700, 250),
        masks.sliding_window(450, 0, 0),
        masks.global_sliding_window(700, 50, 70),
        masks.sliding_window(1400, 100, 130).local([range(200, 700), range(900, 1000)], [range(50, 900)]),
    ):
        assert any(t.kind == "band" and t.count > 1 for t in tiles(mask, bands=True))
        q, k, v, dout = inputs(mask.q_len, mask.k_len, 4, 2, 16, dtype, batch)
        out, lse = kernel.forward(q, k, v, mask, options)
        dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, mask, options)
        got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        worst = errors(got, reference(q, k, v, dout, mask))
        assert max(worst.values()) < budget, worst


def test_merge_is_the_softmax_over_both():
    q, k, v, dout = inputs(20, 40, 2, 2, 8, torch.float64)
    want = reference(q, k, v, dout, masks.full_document([40]).local([range(20)], [range(40)]))
    total = Softmax(q, v)
    for keys in (slice(0, 11), slice(11, 12), slice(12, 40)):
        part = masks.AttentionMask(20, keys.stop - keys.start, [(0, 20, 0, keys.stop - keys.start)])
        got = reference(q, k[:, keys], v[:, keys], dout, part)
        total.add(range(20), got["out"], got["lse"])
    out, lse = total.result()
    torch.testing.assert_close(out, want["out"])
    torch.testing.assert_close(lse, want["lse"])


def test_merge_of_nothing_with_nothing():
    out, lse = torch.zeros(1, 3, 1, 2), torch.full((1, 1, 3), float("-inf"))
    merge_(out, lse, torch.zeros(1, 3, 1, 2), torch.full((1, 1, 3), float("-inf")))
    assert not out.any()
    assert (lse == float("-inf")).all()
