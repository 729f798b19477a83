"""What may attend to what, in global token positions.

A mask is a union of disjoint slices; a slice is a rectangle of (query, key) positions cut by a diagonal band.
Causal, sliding-window, document, prefix-LM and blockwise masks are short lists of slices, and so is any part
of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lcab_plugin.errors import LcabError
from lcab_plugin.masks import geometry
from lcab_plugin.masks.blocks import BlockMap, block_map
from lcab_plugin.masks.checks import integers, size
from lcab_plugin.masks.geometry import NO_HI, NO_LO, Ints
from lcab_plugin.masks.intervals import row_intervals

_AT_ONCE = 1 << 12  # slices whose parts are made at once


class AttnSlice(NamedTuple):
    """Query i sees key j of [q_start, q_end) x [k_start, k_end) where lo <= j - i <= hi (None: no limit)."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    lo: int | None = None
    hi: int | None = None

    @property
    def area(self) -> int:
        """Number of visible (query, key) pairs."""
        return int(geometry.areas(_to_array([self]))[0])

    def clip(self, q: range, k: range) -> AttnSlice | None:
        """The tight part inside q x k; None where nothing is visible."""
        q_start, q_end = max(self.q_start, q.start), min(self.q_end, q.stop)
        k_start, k_end = max(self.k_start, k.start), min(self.k_end, k.stop)
        array, seen = geometry.tight(_to_array([(q_start, q_end, k_start, k_end, self.lo, self.hi)]))
        return _to_slice(array[0]) if seen[0] else None

    def shift(self, dq: int, dk: int) -> AttnSlice:
        """The same slice, dq queries and dk keys further on."""
        lo, hi = (None if limit is None else limit + dk - dq for limit in (self.lo, self.hi))
        return AttnSlice(self.q_start + dq, self.q_end + dq, self.k_start + dk, self.k_end + dk, lo, hi)


class AttentionMask:
    """Which of k_len keys each of q_len queries may attend to: a union of disjoint slices. Immutable.

    `slices` are AttnSlices or tuples like them, or an integer array [n, 6] with NO_LO and NO_HI for absent
    limits. They are stored in canonical form as `array`, read-only int64 [n, 6]: empty slices dropped, sorted
    by (q_start, k_start), and tight. Tight means that every row and column of the rectangle has a visible
    cell and that a limit which cuts nothing is absent. flash-attn's bottom-right aligned window of a tight
    slice, left = (sk - sq) - lo and right = hi - (sk - sq) with lo and hi counted from the rectangle's
    corner, is then never negative.

    `tensor` is `array` as an int64 tensor on the CPU, which a torch.compile graph takes as its input. Empty
    slices fill it up to two rows, as torch.compile makes graphs of their own for sizes 0 and 1. Do not write
    to it.

    Equality and hash go by `digest`, over the lengths and the array: two ways to slice the same cells differ.

    Raises LcabError for slices outside the lengths and for two slices that share a cell.
    """

    q_len: int
    k_len: int
    array: Ints
    tensor: torch.Tensor
    digest: str

    def __init__(self, q_len: int, k_len: int, slices: Iterable[Sequence[int | None]] | NDArray[Any]) -> None:
        q_len, k_len = size("q_len", q_len), size("k_len", k_len)
        array = _to_array(slices)
        _require_inside(array, q_len, k_len)
        self._set(q_len, k_len, array)
        if pair := geometry.overlap(self.array):
            first, second = (_to_slice(self.array[i]) for i in pair)
            raise LcabError(f"slices of a mask must be disjoint, but {first} and {second} share a cell.")

    @classmethod
    def from_disjoint(cls, q_len: int, k_len: int, array: Ints) -> AttentionMask:
        """The mask of an int64 array [n, 6] known to be disjoint and inside the lengths: not checked."""
        mask = cls.__new__(cls)
        mask._set(q_len, k_len, array)
        return mask

    def _set(self, q_len: int, k_len: int, array: Ints) -> None:
        array = geometry.canonical(array)
        fill = np.zeros((2 - len(array), 6), dtype=np.int64) if len(array) < 2 else None
        tensor = torch.from_numpy(array if fill is None else np.concatenate((array, fill)))
        array.flags.writeable = False
        content = np.array([q_len, k_len], dtype=np.int64).tobytes() + array.tobytes()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.__dict__.update(q_len=q_len, k_len=k_len, array=array, tensor=tensor, digest=digest)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an AttentionMask is immutable; {name!r} cannot be set.")

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, AttentionMask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return AttentionMask.from_disjoint, (self.q_len, self.k_len, self.array)

    def __repr__(self) -> str:
        return f"AttentionMask({self.q_len} x {self.k_len}, {len(self.array)} slices, {self.digest[:8]})"

    @cached_property
    def slices(self) -> tuple[AttnSlice, ...]:
        """The rows of `array`."""
        return tuple(map(_to_slice, self.array))

    @cached_property
    def area(self) -> int:
        """Number of visible (query, key) pairs; attention FLOPs are proportional to it."""
        return int(geometry.areas(self.array).sum())

    @property
    def empty(self) -> bool:
        """True where no query sees any key."""
        return not len(self.array)

    def bounds(self) -> tuple[range, range]:
        """The smallest ranges of queries and of keys outside which nothing is visible."""
        return self._bounds

    @cached_property
    def _bounds(self) -> tuple[range, range]:
        if self.empty:
            return range(0), range(0)
        (q0, k0), (q1, k1) = self.array[:, [0, 2]].min(axis=0), self.array[:, [1, 3]].max(axis=0)
        return range(int(q0), int(q1)), range(int(k0), int(k1))

    def area_by_chunk(self, boundaries: ArrayLike) -> Ints:
        """Visible pairs of each query chunk [boundaries[i], boundaries[i + 1]): int64 [chunks]."""
        edges = integers("boundaries", boundaries)
        if not len(edges) or edges[-1] > self.q_len or (np.diff(edges) < 0).any():
            raise LcabError(f"boundaries must ascend and end by q_len = {self.q_len}, unlike {boundaries!r}.")
        start, stop = edges[:-1], edges[1:]
        total = np.zeros(len(start), dtype=np.int64)
        for begin in range(0, len(self.array), _AT_ONCE):  # a slice of many chunks is as many parts
            slices = self.array[begin : begin + _AT_ONCE]
            owner, chunk = geometry.touching(slices, start, stop, axis=0)
            parts = geometry.clip(slices[owner], start[chunk], stop[chunk], axis=0)
            np.add.at(total, chunk, geometry.areas(parts))
        return total

    def local(self, q_ranges: Sequence[range], k_ranges: Sequence[range]) -> AttentionMask:
        """The mask of the rows `q_ranges` against the columns `k_ranges`, each laid end to end as given.

        Ranges have step 1 and may be uneven, empty, adjacent (then they count as one) and in any order. The
        work is linear in the slices and those of the result, and the latest 1024 results are kept.
        """
        return _local(self, tuple(q_ranges), tuple(k_ranges))

    def needed_keys(self, q_ranges: Sequence[range]) -> tuple[range, ...]:
        """Exactly the keys that at least one of these queries sees, as the fewest ascending ranges."""
        rows = _rows(self, tuple(q_ranges)).array
        return tuple(range(start, stop) for start, stop in geometry.merged(rows[:, 2], rows[:, 3]).tolist())

    def block_map(self, bq: int, bk: int) -> BlockMap:
        """EMPTY, PARTIAL and FULL blocks of [bq, bk] cells as runs: see BlockMap. Never O(q_len * k_len). The
        latest few results are kept."""
        return _block_map(self, size("bq", bq, least=1), size("bk", bk, least=1))

    def row_intervals(self) -> tuple[Ints, Ints]:
        """The keys each query sees as intervals, int64 [n, q_len] starts and stops: see ``intervals``."""
        return row_intervals(self.array, self.q_len)

    def transposed(self) -> AttentionMask:
        """The mask with queries and keys exchanged."""
        q0, q1, k0, k1, lo, hi = self.array.T
        array = np.stack([k0, k1, q0, q1, -hi, -lo], axis=1)  # NO_LO is -NO_HI
        return AttentionMask.from_disjoint(self.k_len, self.q_len, array)

    def to_dense(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Bool [q_len, k_len], True = may attend."""
        dense = torch.zeros(self.q_len, self.k_len, dtype=torch.bool, device=device)
        for q0, q1, k0, k1, lo, hi in self.array.tolist():
            rectangle = dense[q0:q1, k0:k1]
            cells = torch.ones_like(rectangle)
            if hi != NO_HI:
                cells = cells.tril(hi - (k0 - q0))
            if lo != NO_LO:
                cells = cells.triu(lo - (k0 - q0))
            rectangle |= cells
        return dense


@lru_cache(maxsize=8)  # a kernel asks for some of them twice: which launch, then its table
def _block_map(mask: AttentionMask, bq: int, bk: int) -> BlockMap:
    return block_map(mask.array, mask.q_len, mask.k_len, bq, bk)


@lru_cache(maxsize=1024)
def _local(mask: AttentionMask, q_ranges: tuple[range, ...], k_ranges: tuple[range, ...]) -> AttentionMask:
    rows = _rows(mask, q_ranges)
    columns = _to_ranges("k_ranges", k_ranges, mask.k_len)
    k_len = sum(map(len, k_ranges))
    return AttentionMask.from_disjoint(rows.q_len, k_len, geometry.crop(rows.array, columns, axis=1))


@lru_cache(maxsize=64)
def _rows(mask: AttentionMask, q_ranges: tuple[range, ...]) -> AttentionMask:
    """The mask of these rows: the step that a rank's calls with each peer's keys share."""
    rows = geometry.crop(mask.array, _to_ranges("q_ranges", q_ranges, mask.q_len), axis=0)
    return AttentionMask.from_disjoint(sum(map(len, q_ranges)), mask.k_len, rows)


def _to_ranges(name: str, ranges: tuple[range, ...], length: int) -> Ints:
    """Start and stop of each range, int64 [n, 2]; empty ranges dropped, adjacent consecutive ones joined."""
    array = np.array([(r.start, r.stop, r.step) for r in ranges if len(r)], dtype=np.int64).reshape(-1, 3)
    bad = np.flatnonzero((array[:, 2] != 1) | (array[:, 0] < 0) | (array[:, 1] > length))
    if len(bad):
        start, stop, step = array[bad[0]].tolist()
        raise LcabError(f"{name} must have step 1 and lie in [0, {length}), not {range(start, stop, step)}.")
    start, stop = array[:, 0], array[:, 1]
    first, last = geometry.runs(start[1:] != stop[:-1], len(start))
    return np.stack([start[first], stop[last]], axis=1)


def _to_array(slices: Iterable[Sequence[int | None]] | NDArray[Any]) -> Ints:
    """int64 [n, 6] of slices, tuples like them, or an integer array."""
    if not isinstance(slices, np.ndarray):
        rows = [AttnSlice(*s) for s in slices]
        filled = [(*s[:4], NO_LO if s.lo is None else s.lo, NO_HI if s.hi is None else s.hi) for s in rows]
        slices = np.array(filled) if filled else np.empty((0, 6), dtype=np.int64)
    if slices.ndim != 2 or slices.shape[1] != 6 or not np.issubdtype(slices.dtype, np.integer):
        raise LcabError(f"slices must be integers [n, 6], not {slices.dtype} {list(slices.shape)}.")
    array = slices.astype(np.int64)
    array[:, 4:] = array[:, 4:].clip(NO_LO, NO_HI)
    return array


def _to_slice(row: Ints) -> AttnSlice:
    q_start, q_end, k_start, k_end, lo, hi = row.tolist()
    return AttnSlice(q_start, q_end, k_start, k_end, None if lo == NO_LO else lo, None if hi == NO_HI else hi)


def _require_inside(array: Ints, q_len: int, k_len: int) -> None:
    q0, q1, k0, k1 = array[:, :4].T
    outside = (q0 < 0) | (q0 > q1) | (q1 > q_len) | (k0 < 0) | (k0 > k1) | (k1 > k_len)
    if outside.any():
        bad = _to_slice(array[np.flatnonzero(outside)[0]])
        raise LcabError(f"{bad} does not lie in {q_len} queries x {k_len} keys.")
