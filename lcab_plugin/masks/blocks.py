"""Which blocks of a mask are empty, partly visible or wholly visible, as runs of blocks per query block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcab_plugin.masks.geometry import Ints, areas, clip, expand, runs, tight

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The visible blocks of a [q_len, k_len] mask in blocks of [bq, bk]; the last of each may be ragged.

    Query block b has runs offsets[b] to offsets[b + 1]; run r is the key blocks [first[r], first[r] +
    length[r]), all of them of `kind[r]`, PARTIAL or FULL. Runs of a query block ascend, and neighbours that
    touch differ in kind. Blocks in no run are EMPTY. A block is FULL when every cell of it that exists is
    visible, through however many slices.
    """

    q_len: int
    k_len: int
    bq: int
    bk: int
    offsets: Ints  # [query blocks + 1]
    first: Ints  # [runs]
    length: Ints  # [runs]
    kind: Ints  # [runs]

    @property
    def shape(self) -> tuple[int, int]:
        """(query blocks, key blocks)."""
        return -(-self.q_len // self.bq), -(-self.k_len // self.bk)

    def counts(self) -> dict[int, int]:
        """How many blocks are EMPTY, PARTIAL and FULL."""
        partial, full = (int(self.length[self.kind == kind].sum()) for kind in (PARTIAL, FULL))
        return {EMPTY: self.shape[0] * self.shape[1] - partial - full, PARTIAL: partial, FULL: full}

    def to_dense(self) -> Ints:
        """The kind of every block, int64 [query blocks, key blocks]: for small maps."""
        dense = np.full(self.shape, EMPTY, dtype=np.int64)
        row = np.repeat(np.arange(self.shape[0]), np.diff(self.offsets))
        run, column = expand(self.first, self.length)
        dense[row[run], column] = self.kind[run]
        return dense


def block_map(slices: Ints, q_len: int, k_len: int, bq: int, bk: int) -> BlockMap:
    """The block map of canonical, disjoint slices.

    Inside one query block, a slice covers the blocks that a band limit cuts by differing amounts (at most
    about bq / bk + 2 at either side) and all blocks between by the same amount. Both become intervals of key
    blocks with a covered area a block. Summed along each query block, disjoint slices give the exact area of
    every block.
    """
    block_rows, block_columns = -(-q_len // bq), -(-k_len // bk)
    owner, row = expand(slices[:, 0] // bq, (slices[:, 1] - 1) // bq - slices[:, 0] // bq + 1)
    parts, _ = tight(clip(slices[owner], row * bq, (row + 1) * bq, axis=0))  # none empty: a row sees a key
    q0, q1, k0, k1, lo, hi = parts.T
    begin, end = k0 // bk, -(-k1 // bk)
    even_begin = -(-np.maximum(k0, q1 - 1 + lo) // bk)  # whole blocks that every one of these rows sees
    even_end = np.minimum(k1, q0 + hi + 1) // bk
    even_begin, even_end = np.where(even_begin < even_end, (even_begin, even_end), end)

    left, left_column = expand(begin, even_begin - begin)
    right, right_column = expand(even_end, end - even_end)
    single, column = np.append(left, right), np.append(left_column, right_column)
    single_area = areas(clip(parts[single], column * bk, (column + 1) * bk, axis=1))

    # Intervals of the flattened map. A spare column keeps runs from going on in the next query block, and an
    # interval of area 0 keeps the last column apart, which has a size of its own.
    width = block_columns + 1
    ragged = np.arange(block_rows) * width + block_columns - 1
    starts = np.concatenate([row * width + even_begin, row[single] * width + column, ragged])
    stops = np.concatenate([row * width + even_end, row[single] * width + column + 1, ragged])
    covered = np.concatenate([(q1 - q0) * bk, single_area, np.zeros_like(ragged)])
    start, stop, area = _summed(starts, stops, covered)

    row, column = start // width, start % width
    cells = np.minimum(bq, q_len - row * bq) * np.minimum(bk, k_len - column * bk)
    kind = np.where(area == cells, FULL, PARTIAL)
    first, last = runs((start[1:] != stop[:-1]) | (kind[1:] != kind[:-1]), len(start))
    offsets = np.searchsorted(row[first], np.arange(block_rows + 1))
    found = offsets, column[first], stop[last] - start[first], kind[first]
    for array in found:
        array.flags.writeable = False  # maps are kept and shared
    return BlockMap(q_len, k_len, bq, bk, *found)


def _summed(starts: Ints, stops: Ints, values: Ints) -> tuple[Ints, Ints, Ints]:
    """The sum of interval values as ascending pieces (start, stop, value), those of value 0 left out."""
    at = np.append(starts, stops)
    order = np.argsort(at, kind="stable")
    at, total = at[order], np.cumsum(np.append(values, -values)[order])
    _, settled = runs(at[1:] != at[:-1], len(at))
    at, total = at[settled], total[settled]
    seen = np.flatnonzero(total)
    return at[seen], at[seen + 1], total[seen]
