"""Integer geometry of slice arrays.

A slice array is int64 [n, 6] with columns q_start, q_end, k_start, k_end, lo, hi: query i sees key j of the
rectangle [q_start, q_end) x [k_start, k_end) where lo <= j - i <= hi. NO_LO and NO_HI mean "no limit".
Everything here is vectorised over slices and never looks at a single cell.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

NO_LO = -(1 << 60)  # far beyond any length, and sums of two of them still fit int64
NO_HI = 1 << 60
PAIRS_AT_ONCE = 1 << 20  # bounds the memory of the overlap check, 48 MB a slice array


def tight(slices: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """The slices without empty rows, empty columns and limits that cut nothing, and which are not empty.

    One pass is exact. A row i has a key iff k_start - hi <= i < k_end - lo; a column j of the remaining rows
    has a query iff q_start + lo <= j < q_end + hi; and as lo <= hi, cutting columns empties no row again.
    """
    q0, q1, k0, k1, lo, hi = slices.T
    q0, q1 = np.maximum(q0, k0 - hi), np.minimum(q1, k1 - lo)
    k0, k1 = np.maximum(k0, q0 + lo), np.minimum(k1, q1 + hi)
    seen = (q0 < q1) & (k0 < k1) & (lo <= hi)
    lo = np.where(k0 - (q1 - 1) < lo, lo, NO_LO)
    hi = np.where((k1 - 1) - q0 > hi, hi, NO_HI)
    return np.stack([q0, q1, k0, k1, lo, hi], axis=1), seen


def canonical(slices: Ints) -> Ints:
    """Tight, not empty, sorted by (q_start, k_start).

    A tight slice's first cell, (q_start, k_start), is visible, so disjoint slices never tie in this order.
    """
    cut, seen = tight(slices)
    cut = cut[seen]
    return np.ascontiguousarray(cut[np.lexsort((cut[:, 2], cut[:, 0]))])


def areas(slices: Ints) -> Ints:
    """Visible cells of each slice, exact: int64 [n]. The slices need not be tight."""
    q0, q1, k0, k1, lo, hi = slices.T
    rows, columns, corner = np.maximum(q1 - q0, 0), np.maximum(k1 - k0, 0), k0 - q0

    def sum_of_clipped(x: Ints) -> Ints:  # sum over t <= x of min(max(t, 0), columns)
        inside = np.clip(x, 0, columns)
        return inside * (inside + 1) // 2 + np.maximum(x - columns, 0) * columns

    def at_most(diagonal: Ints) -> Ints:  # cells with j - i <= diagonal
        diagonal = np.clip(diagonal - corner, -rows, columns)
        return sum_of_clipped(diagonal + rows) - sum_of_clipped(diagonal)

    return np.maximum(at_most(hi) - at_most(lo - 1), 0)


def expand(first: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """All (owner, value) with value in [first[owner], first[owner] + counts[owner]), owners ascending."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) + (first - (np.cumsum(counts) - counts))[owner]


def runs(breaks: NDArray[np.bool_], n: int) -> tuple[Ints, Ints]:
    """First and last index of each run of n items; breaks[i] says that item i + 1 begins another."""
    cut = np.flatnonzero(breaks)
    return np.append(0, cut + 1)[:n], np.append(cut, n - 1)[:n]


def touching(slices: Ints, start: Ints, stop: Ints, axis: int) -> tuple[Ints, Ints]:
    """Pairs (slice, range) of slices whose queries (axis 0) or keys (axis 1) meet the range [start, stop).

    Linear in the output when the ranges are disjoint, in any order. Ranges that overlap may add pairs that
    only nearly meet.
    """
    order = np.argsort(start, kind="stable")
    reach = np.maximum.accumulate(stop[order])
    first = np.searchsorted(reach, slices[:, 2 * axis], side="right")
    last = np.searchsorted(start[order], slices[:, 2 * axis + 1], side="left")
    owner, at = expand(first, np.maximum(last - first, 0))
    return owner, order[at]


def clip(slices: Ints, start: Ints, stop: Ints, axis: int) -> Ints:
    """A copy of each slice with its queries (axis 0) or keys (axis 1) cut to its own [start, stop)."""
    cut = slices.copy()
    np.maximum(cut[:, 2 * axis], start, out=cut[:, 2 * axis])
    np.minimum(cut[:, 2 * axis + 1], stop, out=cut[:, 2 * axis + 1])
    return cut


def crop(slices: Ints, ranges: Ints, axis: int) -> Ints:
    """The tight parts inside `ranges` (int64 [n, 2]: start, stop), moved as these are laid end to end."""
    start, stop = ranges.T
    offset = np.cumsum(stop - start) - stop  # from a position to its place in the result
    owner, which = touching(slices, start, stop, axis)
    cut = clip(slices[owner], start[which], stop[which], axis)
    cut[:, 2 * axis : 2 * axis + 2] += offset[which, None]
    cut[:, 4:] += offset[which, None] * (1 if axis else -1)  # tight() turns a moved "no limit" back into one
    cut, seen = tight(cut)
    return cut[seen]


def overlap(slices: Ints) -> tuple[int, int] | None:
    """Two slices that share a cell, or None.

    Tests every pair whose queries meet, or every pair whose keys meet, whichever are fewer: near linear for
    the masks of the field, quadratic only for dense grids of many rectangles.
    """
    orders, counts = [], []
    for axis in (0, 1):
        order = np.argsort(slices[:, 2 * axis], kind="stable")
        meet = np.searchsorted(slices[order, 2 * axis], slices[order, 2 * axis + 1], side="left")
        orders.append(order)
        counts.append(meet - np.arange(len(slices)) - 1)
    axis = int(counts[1].sum() < counts[0].sum())
    order, count = orders[axis], counts[axis]
    total = np.concatenate([[0], np.cumsum(count)])
    begin = 0
    while begin < len(slices):
        end = max(begin + 1, int(np.searchsorted(total, total[begin] + PAIRS_AT_ONCE, side="right")) - 1)
        owner, other = expand(np.arange(begin, end) + 1, count[begin:end])
        a, b = slices[order[owner + begin]], slices[order[other]]
        both = np.where([True, False, True, False, True, False], np.maximum(a, b), np.minimum(a, b))
        hits = np.flatnonzero(tight(both)[1])
        if len(hits):
            return int(order[owner[hits[0]] + begin]), int(order[other[hits[0]]])
        begin = end
    return None


def merged(starts: Ints, stops: Ints) -> Ints:
    """The union of non-empty intervals as the fewest ascending intervals: int64 [m, 2]."""
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(stops[order])
    first, last = runs(starts[1:] > reach[:-1], len(starts))
    return np.stack([starts[first], reach[last]], axis=1)
