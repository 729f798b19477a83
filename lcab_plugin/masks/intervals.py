"""The visible keys of every row as a few intervals: what a kernel compares with inside a block."""

from __future__ import annotations

import numpy as np

from lcab_plugin.masks.geometry import Ints, expand, runs


def row_intervals(slices: Ints, q_len: int) -> tuple[Ints, Ints]:
    """``start, stop`` int64 [n, q_len]: row i sees exactly the keys of [start[m, i], stop[m, i]) for all m.

    Intervals of a row ascend and never touch; n is the most that a row has (at least 1) and the unused ones
    are [0, 0). Slices must be canonical and disjoint.
    """
    apart = (slices[1:, 0] >= slices[:-1, 1]).all()  # no row is in two: nothing to sort, nothing to join
    owner, row = expand(slices[:, 0], slices[:, 1] - slices[:, 0]) if apart else _in_order(slices)
    start = np.maximum(slices[owner, 2], row + slices[owner, 4])
    stop = np.minimum(slices[owner, 3], row + slices[owner, 5] + 1)
    if apart:
        starts, stops = np.zeros((2, 1, q_len), dtype=np.int64)
        starts[0, row], stops[0, row] = start, stop
        return starts, stops
    first, last = runs((row[1:] != row[:-1]) | (start[1:] != stop[:-1]), len(row))
    row, start, stop = row[first], start[first], stop[last]
    counts = np.bincount(row, minlength=q_len)
    rank = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    n = int(counts.max(initial=1))
    starts, stops = np.zeros((n, q_len), dtype=np.int64), np.zeros((n, q_len), dtype=np.int64)
    starts[rank, row], stops[rank, row] = start, stop
    return starts, stops


def _in_order(slices: Ints) -> tuple[Ints, Ints]:
    """All (slice, row) with the row in the slice, by rows and in these by keys.

    Slices are sorted where one of them begins or ends, not in every row: between, they keep their order, for
    the edges of a slice move by at most a key a row, and so none jumps over another that it never meets.
    """
    edges = np.unique(slices[:, :2])
    begin, end = np.searchsorted(edges, slices[:, 0]), np.searchsorted(edges, slices[:, 1])
    owner, band = expand(begin, end - begin)  # a band is the rows between two edges
    owner = owner[np.lexsort((np.maximum(slices[owner, 2], edges[band] + slices[owner, 4]), band))]
    inside = np.bincount(band, minlength=max(len(edges) - 1, 0))  # slices of every band
    offset = np.cumsum(inside) - inside
    band, at = expand(np.zeros_like(inside), inside * np.diff(edges))
    down, across = np.divmod(at, inside[band])
    return owner[offset[band] + across], edges[band] + down
