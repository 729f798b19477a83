"""The calls a mask becomes are that mask, every cell exactly once."""

from __future__ import annotations

import numpy as np
import torch
from cases import inputs, reference, twelve
from hypothesis import given, settings
from hypothesis import strategies as st

from lcab_plugin import masks
from lcab_plugin.kernels.lowering import MAX_VARLEN_LAYERS, coalesced, tiles, varlen_calls
from lcab_plugin.kernels.merge import Softmax, merge_
from lcab_plugin.masks import AttentionMask


@st.composite
def any_mask(draw) -> AttentionMask:
    """A part of one of the twelve, as a rank of some layout would see it."""
    n = draw(st.integers(96, 140))
    mask = twelve(n)[draw(st.sampled_from(masks.names()))]
    if draw(st.booleans()):
        width = draw(st.integers(0, 40))
        mask = masks.sliding_window(n, width, draw(st.integers(0, 40)))

    def part() -> list[range]:
        edges = sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=6)))
        return [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)] or [range(n)]

    return mask.local(part(), part())


@given(any_mask())
@settings(max_examples=300, deadline=None)
def test_tiles_are_the_mask(mask):
    seen = np.zeros((mask.q_len, mask.k_len), dtype=int)
    touched = np.zeros(mask.q_len, dtype=bool)
    for t in tiles(mask):
        nq, nk = len(t.rows) // t.count, len(t.keys) // t.count
        assert nq * t.count == len(t.rows)
        assert nk * t.count == len(t.keys)
        assert nq
        assert nk
        cell = np.tri(nq, nk, dtype=int) if t.kind != "full" else np.ones((nq, nk), dtype=int)
        cell = cell[::-1, ::-1] if t.kind == "anti_causal" else cell
        assert cell.any(1).all(), "a row of a tile that sees nothing"
        for i in range(t.count):
            rows = slice(t.rows.start + i * nq, t.rows.start + (i + 1) * nq)
            seen[rows, t.keys.start + i * nk : t.keys.start + (i + 1) * nk] += cell
        rows = slice(t.rows.start, t.rows.stop)
        assert t.fresh == (not touched[rows].any())
        touched[rows] = True
    np.testing.assert_array_equal(seen, mask.to_dense().int().numpy())


@given(any_mask())
@settings(max_examples=300, deadline=None)
def test_varlen_calls_are_the_mask(mask):
    """flash-attn's rule: with left and right bottom-right aligned in each segment, -1 for no limit."""
    seen = np.zeros((mask.q_len, mask.k_len), dtype=int)
    for call in varlen_calls(mask):
        q_end = 0
        last_key = 0
        for q0, q1, k0, k1 in call.segments.tolist():
            assert q0 >= q_end, "query ranges must be disjoint and ascend"
            assert call.gathered or k0 >= last_key, "key ranges must be disjoint and ascend, or be gathered"
            q_end, last_key = q1, k1
            diagonal = np.arange(k1 - k0)[None] - np.arange(q1 - q0)[:, None] - ((k1 - k0) - (q1 - q0))
            cell = np.ones((q1 - q0, k1 - k0), dtype=int)
            assert call.left >= -1
            assert call.right >= -1
            cell[(diagonal > call.right) & (call.right >= 0)] = 0
            cell[(-diagonal > call.left) & (call.left >= 0)] = 0
            assert cell.any(1).all(), "a row of a segment that sees nothing"
            seen[q0:q1, k0:k1] += cell
    np.testing.assert_array_equal(seen, mask.to_dense().int().numpy())


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


def test_many_layers_gather_keys_instead():
    mask = masks.block_causal_document([512], 8)
    calls = varlen_calls(mask)
    assert len(calls) <= MAX_VARLEN_LAYERS
    assert any(call.gathered for call in calls)


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
