"""The intervals of every row against its cells."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcab_plugin import masks
from lcab_plugin.masks import AttentionMask

N = 14


@st.composite
def slice_lists(draw: st.DrawFn) -> AttentionMask:
    """Disjoint slices with bands: one after another, those that share a cell with an earlier one left out."""
    taken = np.zeros((N, N), dtype=bool)
    kept = []
    for _ in range(draw(st.integers(0, 9))):
        q0, k0 = draw(st.integers(0, N - 1)), draw(st.integers(0, N - 1))
        q1, k1 = draw(st.integers(q0 + 1, N)), draw(st.integers(k0 + 1, N))
        limit = st.none() | st.integers(-N, N)
        one = (q0, q1, k0, k1, draw(limit), draw(limit))
        cells = AttentionMask(N, N, [one]).to_dense().numpy()
        if not (taken & cells).any():
            taken |= cells
            kept.append(one)
    return AttentionMask(N, N, kept)


@settings(max_examples=300, deadline=None)
@given(slice_lists() | st.builds(masks.block_sparse, st.just(N), st.integers(1, 5), st.floats(0.1, 1.0)))
def test_intervals_are_the_cells_of_every_row(mask: AttentionMask) -> None:
    starts, stops = mask.row_intervals()
    seen = torch.zeros(N, N, dtype=torch.bool)
    for row in range(N):
        pairs = [(a, b) for a, b in zip(starts[:, row].tolist(), stops[:, row].tolist(), strict=True) if b]
        assert all(b < a for (_, b), (a, _) in pairwise(pairs))  # ascending and apart
        assert pairs == [(a, b) for a, b in pairs if a < b]
        assert not starts[len(pairs) :, row].any()
        for a, b in pairs:
            seen[row, a:b] = True
    assert torch.equal(seen, mask.to_dense())
    assert len(starts) == max(1, int((stops > 0).sum(axis=0).max()))


def test_a_block_sparse_mask_of_thousands_of_slices() -> None:
    mask = masks.block_sparse(6144, 64, 0.5)
    starts, stops = mask.row_intervals()
    assert (stops - starts).sum() == mask.area
    assert mask.block_map(64, 64).counts() == {0: 48 * 96, 1: 0, 2: 48 * 96}
