"""The visible keys of every row as a few intervals: what a kernel compares with inside a block."""

from __future__ import annotations

import numpy as np

from lcab_plugin.masks.geometry import Ints, expand


def row_intervals(slices: Ints, q_len: int) -> tuple[Ints, Ints]:
    """``start, stop`` int64 [n, q_len]: row i sees exactly the keys of [start[m, i], stop[m, i]) for all m.

    Intervals of a row ascend and never touch; n is the most that a row has (at least 1) and the unused ones
    are [0, 0). Slices must be tight and disjoint.
    """
    owner, row = expand(slices[:, 0], slices[:, 1] - slices[:, 0])
    _, _, k0, k1, lo, hi = slices[owner].T
    start, stop = np.maximum(k0, row + lo), np.minimum(k1, row + hi + 1)
    order = np.lexsort((start, row))
    row, start, stop = row[order], start[order], stop[order]
    joins = (row[1:] == row[:-1]) & (start[1:] == stop[:-1])
    first, last = np.flatnonzero(np.append(True, ~joins)), np.flatnonzero(np.append(~joins, True))
    if not len(row):
        first = last = np.empty(0, dtype=np.int64)
    row, start, stop = row[first], start[first], stop[last]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    n = int(rank.max(initial=0)) + 1
    starts, stops = np.zeros((n, q_len), dtype=np.int64), np.zeros((n, q_len), dtype=np.int64)
    starts[rank, row], stops[rank, row] = start, stop
    return starts, stops
