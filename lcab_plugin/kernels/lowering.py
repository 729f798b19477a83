"""Cuts any mask into calls that a dense library kernel knows.

Two vocabularies stand here. ``tiles`` speaks *full* and *top-left causal* rectangles: a band is cut along its
rows into triangles, an upper-left triangle is a causal one with rows and keys reversed. A library that adds a
small mask to every tile's scores (aten's CPU operator) takes *bands* whole, without a merge or a reversed
copy. ``varlen_calls`` speaks flash-attn's variable-length segments with one window per call. Every cell of
the mask is in exactly one call, every row of a call sees at least one of its keys, so no library is ever
asked for the softmax of an empty row (each answers it differently). Neither builds [q, k].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lcab_plugin.masks import NO_HI, NO_LO, AttentionMask, AttnSlice
from lcab_plugin.masks.geometry import Ints, areas, expand

TileKind = Literal["full", "causal", "anti_causal", "band"]

BAND_ROWS = 192  # aten's CPU operator takes shorter tiles in blocks of 32 rows, which costs more per cell
BAND_KEYS = 8192  # overlapping keys of one call: their gradients take that much memory before they are summed
MAX_BAND = 1536  # wider bands are cheaper as triangles, and their overlapping keys' gradients grow with it


@dataclass(frozen=True)
class Tiles:
    """``count`` equal tiles laid end to end along ``rows`` and ``keys``; tile ``i`` is the i-th part of each.

    ``causal``: row r of a tile sees its keys 0..r. ``anti_causal``: the same with rows and keys reversed.
    ``band``: row r sees keys r..r + width, and keys advance from tile to tile as rows do: neighbours share
    ``width`` keys. ``fresh``: no earlier tile of the plan touches these rows.
    """

    kind: TileKind
    rows: range
    keys: range
    count: int
    fresh: bool = True

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and keys of one tile."""
        rows = len(self.rows) // self.count
        if self.kind == "band":
            return rows, len(self.keys) - (self.count - 1) * rows
        return rows, len(self.keys) // self.count

    @cached_property
    def steps(self) -> tuple[int, int]:
        """Rows and keys from the start of one tile to that of the next."""
        rows, keys = self.shape
        return rows, rows if self.kind == "band" else keys


@dataclass(frozen=True, eq=False)
class VarlenCall:
    """Segments of one native variable-length call: ``q_start, q_end, k_start, k_end`` int64 [n, 4].

    Query ranges are disjoint and ascending. ``left`` and ``right`` are flash-attn's window, bottom-right
    aligned in every segment, -1 for no limit. Where ``gathered``, key ranges overlap and are copied; rows and
    keys that do not lie end to end are copied too. ``fresh``: no earlier call of the plan touches these rows.
    """

    segments: Ints
    left: int
    right: int
    gathered: bool
    fresh: bool = True

    @property
    def rows(self) -> int:
        """Query rows of all segments."""
        return int((self.segments[:, 1] - self.segments[:, 0]).sum())

    @property
    def copied(self) -> tuple[int, int]:
        """Query rows and key rows that must be laid end to end by a copy."""
        q0, q1, k0, k1 = self.segments.T
        rows, keys = ((b - a).sum() * (a[1:] != b[:-1]).any() for a, b in ((q0, q1), (k0, k1)))
        return int(rows), int(keys)


MAX_DEPTH = 4  # calls that one row may take part in: each merge rounds, reads and writes it once more
MAX_LAYERS = 256  # more calls than this are not worth looking for: gathered keys are one call

# What a plan costs beside its attention, forward and backward, in bytes of a 16-bit tensor for one head and
# one unit of head_dim. A call: 100 us of host and launches, at 2 TB/s shared by 32 heads of 128. A merged
# row: out and dq are read, their float32 sums read and written. A copied key: K and V copied twice, dK and dV
# added in float32. A copied row: q copied twice, out and dout once, the results put back in float32.
CALL_COST, MERGED_ROW_COST, COPIED_KEY_COST, COPIED_ROW_COST = 50_000, 20, 36, 36

Follows = Callable[[AttnSlice, AttnSlice], bool]


@lru_cache(maxsize=512)
def tiles(mask: AttentionMask, bands: bool = False) -> tuple[Tiles, ...]:
    """The plan for a kernel that knows full and top-left causal rectangles, and with ``bands`` also bands."""
    cut = [t for s in coalesced(mask) for t in _cut(s, bands)]
    cut.sort(key=lambda t: (t.kind, *t.shape, t.rows.start))
    batched: list[Tiles] = []
    for tile in cut:
        if batched and (joined := _joined(batched[-1], tile)):
            batched[-1] = joined
        else:
            batched.append(tile)
    batched.sort(key=lambda t: -len(t.rows))  # the widest first: what comes later merges into it
    touched = np.zeros(mask.q_len, dtype=bool)
    plan = []
    for t in batched:
        rows = slice(t.rows.start, t.rows.stop)
        plan.append(Tiles(t.kind, t.rows, t.keys, t.count, fresh=not touched[rows].any()))
        touched[rows] = True
    return tuple(plan)


@lru_cache(maxsize=512)
def varlen_calls(mask: AttentionMask) -> tuple[VarlenCall, ...]:
    """The plan for a kernel that knows variable-length segments with a window.

    A call's key ranges must be disjoint and ascend, as its query ranges do. Where a mask's do not, segments
    go to calls of their own, or overlapping keys are copied into one: as the costs above say is cheaper.
    """
    windows: dict[tuple[int, int], list[AttnSlice]] = {}
    for s in coalesced(mask):
        windows.setdefault(_window(s), []).append(s)
    plans = (
        _plan(windows, lambda a, b: a.q_end == b.q_start and a.k_end == b.k_start, MAX_LAYERS),  # no copy
        _plan(windows, lambda a, b: a.q_end <= b.q_start and a.k_end <= b.k_start, MAX_LAYERS),  # gaps
        _plan(windows, lambda a, b: a.q_end <= b.q_start, len(mask.array)),  # gathers, always a plan
    )
    return min((plan for plan in plans if plan is not None), key=_cost, default=())


@lru_cache(maxsize=512)
def too_deep(mask: AttentionMask) -> str | None:
    """Why results under ``mask`` would be merged too often for a kernel of ``varlen_calls``, or None."""
    edges = np.zeros(mask.q_len + 1, dtype=np.int64)
    for s in coalesced(mask):
        edges[s.q_start] += 1
        edges[s.q_end] -= 1
    depth = int(edges.cumsum().max())
    if depth <= MAX_DEPTH:
        return None
    return f"rows of this mask would be merged from {depth} native calls, more than {MAX_DEPTH}"


@lru_cache(maxsize=64)
def coalesced(mask: AttentionMask) -> tuple[AttnSlice, ...]:
    """The mask's slices with neighbours joined where their union is a slice: fewer calls, fewer merges.

    A zigzag rank's own block (causal, full, causal) becomes one causal rectangle again.
    """
    slices: list[AttnSlice] = list(mask.slices)
    while True:
        # side by side first: a full block beside a causal one must be whole before the rows above can join it
        joined = _join(sorted(slices, key=lambda s: (s.q_start, s.q_end, s.k_start)), _side_by_side)
        joined = _join(sorted(joined, key=lambda s: (s.k_start, s.q_start)), _stacked)
        if len(joined) == len(slices):
            return tuple(sorted(joined))
        slices = joined


def _side_by_side(a: AttnSlice, b: AttnSlice) -> bool:
    return a.q_start == b.q_start and a.q_end == b.q_end and a.k_end == b.k_start


def _stacked(a: AttnSlice, b: AttnSlice) -> bool:
    return a.q_end == b.q_start and a.k_start < b.k_end and b.k_start < a.k_end


def _join(slices: Iterable[AttnSlice], adjacent: Callable[[AttnSlice, AttnSlice], bool]) -> list[AttnSlice]:
    out: list[AttnSlice] = []
    for s in slices:
        if out and adjacent(out[-1], s) and (joined := _union(out[-1], s)):
            out[-1] = joined
        else:
            out.append(s)
    return out


def _union(a: AttnSlice, b: AttnSlice) -> AttnSlice | None:
    """The slice that is exactly the union of two adjacent tight ones, if there is one."""
    if (a.lo != b.lo and None not in (a.lo, b.lo)) or (a.hi != b.hi and None not in (a.hi, b.hi)):
        return None
    q = min(a.q_start, b.q_start), max(a.q_end, b.q_end)
    k = min(a.k_start, b.k_start), max(a.k_end, b.k_end)
    whole = AttnSlice(*q, *k, b.lo if a.lo is None else a.lo, b.hi if a.hi is None else a.hi)
    return whole if _agree(whole, a) and _agree(whole, b) else None


def _agree(whole: AttnSlice, part: AttnSlice) -> bool:
    """Whether ``whole`` sees in the rows of ``part`` what it does, the keys of one beside it aside."""
    q0, q1, k0, k1, lo, hi = part
    if lo != whole.lo and whole.lo is not None and k0 - (q1 - 1) < whole.lo:
        return False  # the limit cuts cells of this part
    if hi != whole.hi and whole.hi is not None and (k1 - 1) - q0 > whole.hi:
        return False
    if (q0, q1) == (whole.q_start, whole.q_end):
        return True
    left, right = (whole.k_start, k0), (k1, whole.k_end)  # keys of the part above or below alone
    return all(start == stop or _unseen(whole, q0, q1, start, stop) for start, stop in (left, right))


def _unseen(s: AttnSlice, q0: int, q1: int, k0: int, k1: int) -> bool:
    """Whether the limits of ``s`` hide every cell of a rectangle."""
    return (s.lo is not None and k1 - 1 - q0 < s.lo) or (s.hi is not None and k0 - (q1 - 1) > s.hi)


def _cut(s: AttnSlice, bands: bool) -> Iterator[Tiles]:
    """A tight slice as tiles: a head, the rows cut on both sides as batches with a remainder, and a tail."""
    lo, hi = s.lo, s.hi
    if lo is None or hi is None:
        yield from _one_limit(s)
        return
    first = s.k_start - lo  # from this row on the lower limit cuts
    last = s.k_end - hi  # from this row on the upper limit no longer cuts
    if first >= last:  # no row is cut on both sides
        yield from _rows(s, s.q_start, last)
        yield from _rows(s, last, first)
        yield from _rows(s, first, s.q_end)
        return
    yield from _rows(s, s.q_start, first)
    start, stop = max(first, s.q_start), min(last, s.q_end)
    if bands and hi - lo <= MAX_BAND:
        yield from _bands(start, stop, lo, hi)
    else:
        yield from _triangles(s, start, stop, lo, hi)
    yield from _rows(s, stop, s.q_end)


def _bands(start: int, stop: int, lo: int, hi: int) -> Iterator[Tiles]:
    """Rows that both limits cut, as runs of tiles of equal height and one of the rest."""
    height = min(BAND_ROWS, max(hi - lo, 32))
    most = height * max(BAND_KEYS // (height + hi - lo), 1)
    whole = stop - (stop - start) % height
    for at in range(start, whole, most):
        end = min(at + most, whole)
        yield Tiles("band", range(at, end), range(at + lo, end + hi), (end - at) // height)
    if whole < stop:
        yield Tiles("band", range(whole, stop), range(whole + lo, stop + hi), 1)


def _triangles(s: AttnSlice, start: int, stop: int, lo: int, hi: int) -> Iterator[Tiles]:
    """Rows that both limits cut: a band as high as it is wide is a causal triangle and an anti-causal one."""
    chunk = max(hi - lo, 1)
    count = (stop - start) // chunk
    end = start + count * chunk
    if count:
        rows = range(start, end)
        yield Tiles("causal", rows, range(start + hi, end + hi), count)
        if hi > lo:
            yield Tiles("anti_causal", rows, range(start + lo, end + lo), count)
    if end < stop:
        split = end + hi
        for keys in (range(s.k_start, split), range(split, s.k_end)):
            part = s.clip(range(end, stop), keys)
            if part is not None:
                yield from _one_limit(part)


def _rows(s: AttnSlice, start: int, stop: int) -> Iterator[Tiles]:
    part = s.clip(range(start, stop), range(s.k_start, s.k_end))
    if part is not None:
        yield from _one_limit(part)


def _one_limit(s: AttnSlice) -> Iterator[Tiles]:
    """A tight slice with at most one band limit: a full rectangle beside a triangle."""
    rows = range(s.q_start, s.q_end)
    if s.hi is not None:
        seen = s.q_start + s.hi  # keys before this one are seen by every row
        if seen > s.k_start:
            yield Tiles("full", rows, range(s.k_start, seen), 1)
        yield Tiles("causal", rows, range(seen, s.k_end), 1)
    elif s.lo is not None:
        seen = s.q_end - 1 + s.lo + 1  # keys from this one on are seen by every row
        if seen < s.k_end:
            yield Tiles("full", rows, range(seen, s.k_end), 1)
        yield Tiles("anti_causal", rows, range(s.k_start, seen), 1)
    else:
        yield Tiles("full", rows, range(s.k_start, s.k_end), 1)


def _joined(a: Tiles, b: Tiles) -> Tiles | None:
    """Two runs of equal tiles as one, where the second continues the first."""
    same = a.kind == b.kind != "band" and a.shape == b.shape
    if not same or a.rows.stop != b.rows.start or a.keys.stop != b.keys.start:
        return None
    rows, keys = range(a.rows.start, b.rows.stop), range(a.keys.start, b.keys.stop)
    return Tiles(a.kind, rows, keys, a.count + b.count)


def _window(s: AttnSlice) -> tuple[int, int]:
    """flash-attn's (left, right) of a tight slice, bottom-right aligned; both are >= 0 where they limit."""
    shift = (s.k_end - s.k_start) - (s.q_end - s.q_start) + s.k_start - s.q_start
    left = -1 if s.lo is None else shift - s.lo
    right = -1 if s.hi is None else s.hi - shift
    return left, right


def _plan(
    windows: dict[tuple[int, int], list[AttnSlice]], follows: Follows, most: int
) -> tuple[VarlenCall, ...] | None:
    """Slices of equal window, each in the first call whose last it ``follows``; None for over ``most``."""
    calls: list[tuple[tuple[int, int], list[AttnSlice]]] = []
    for window, slices in windows.items():
        layers: list[list[AttnSlice]] = []
        for s in slices:
            for layer in layers:
                if follows(layer[-1], s):
                    layer.append(s)
                    break
            else:
                layers.append([s])
                if len(calls) + len(layers) > most:
                    return None
        calls += [(window, layer) for layer in layers]
    touched = np.zeros(max((s.q_end for _, layer in calls for s in layer), default=0), dtype=bool)
    return tuple(_varlen_call(layer, *window, touched) for window, layer in calls)


def _varlen_call(slices: list[AttnSlice], left: int, right: int, touched: NDArray[np.bool_]) -> VarlenCall:
    segments = np.array([s[:4] for s in slices], dtype=np.int64)
    gathered = bool((segments[1:, 2] < segments[:-1, 3]).any())
    fresh = not any(touched[s.q_start : s.q_end].any() for s in slices)
    for s in slices:
        touched[s.q_start : s.q_end] = True
    return VarlenCall(segments, left, right, gathered, fresh)


def _cost(plan: tuple[VarlenCall, ...]) -> int:
    total = CALL_COST * len(plan)
    for call in plan:
        rows, keys = call.copied
        total += COPIED_ROW_COST * rows + COPIED_KEY_COST * keys
        total += 0 if call.fresh else MERGED_ROW_COST * call.rows
    return total


def cells_in_blocks(
    shapes: Ints, left: Ints | int, right: Ints | int, blocks: tuple[int, int], ragged: bool = False
) -> tuple[Ints, Ints]:
    """Visible cells and cells in visited blocks of rectangles ``shapes`` [n, 2] under one window each.

    The window is flash-attn's, bottom-right aligned. A library visits, for every block of rows, the blocks of
    keys from the first to the last that a row of it sees; blocks are counted whole, or with ``ragged`` up to
    the rectangle's end.
    """
    nq, nk = shapes.T
    lo = np.where(left < 0, NO_LO, nk - nq - left)
    hi = np.where(right < 0, NO_HI, nk - nq + right)
    zero = np.zeros_like(nq)
    slices = np.stack([zero, nq, zero, nk, lo, hi], axis=1)
    owner, block = expand(zero, -(-nq // blocks[0]))
    rows = np.minimum(blocks[0], nq[owner] - block * blocks[0])
    first = np.maximum(0, block * blocks[0] + lo[owner]) // blocks[1] * blocks[1]
    last = np.minimum(nk[owner], block * blocks[0] + rows + hi[owner])
    last = -(-last // blocks[1]) * blocks[1]
    last, rows = (np.minimum(last, nk[owner]), rows) if ragged else (last, np.full_like(rows, blocks[0]))
    computed = np.zeros_like(nq)
    np.add.at(computed, owner, rows * np.maximum(last - first, 0))
    return areas(slices), computed
