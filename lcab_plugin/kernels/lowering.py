"""Cuts any mask into calls that a dense library kernel knows.

Two vocabularies stand here. ``tiles`` speaks *full* and *top-left causal* rectangles (what aten's CPU flash
operator knows): a band is cut along its rows into triangles, an upper-left triangle is a causal one with
rows and keys reversed. ``varlen_calls`` speaks flash-attn's variable-length segments with one window per
call. Every cell of the mask is in exactly one call, every row of a call sees at least one of its keys, so
no library is ever asked for the softmax of an empty row (each answers it differently). Neither builds [q, k].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from lcab_plugin.masks import AttentionMask, AttnSlice

TileKind = Literal["full", "causal", "anti_causal"]


@dataclass(frozen=True)
class Tiles:
    """``count`` equal tiles laid end to end along ``rows`` and ``keys``; tile ``i`` is the i-th part of each.

    ``causal``: row r of a tile sees its keys 0..r. ``anti_causal``: the same with rows and keys reversed.
    ``fresh``: no earlier tile of the plan touches these rows.
    """

    kind: TileKind
    rows: range
    keys: range
    count: int
    fresh: bool = True


@dataclass(frozen=True, eq=False)
class VarlenCall:
    """Segments of one native variable-length call: ``q_start, q_end, k_start, k_end`` int64 [n, 4].

    Query ranges are disjoint and ascending. ``left`` and ``right`` are flash-attn's window, bottom-right
    aligned in every segment, -1 for no limit. Where ``gathered``, key ranges overlap and are copied.
    """

    segments: np.ndarray
    left: int
    right: int
    gathered: bool


MAX_VARLEN_LAYERS = 4  # beyond this, merging rounds and costs more than copying the overlapping keys


@lru_cache(maxsize=512)
def tiles(mask: AttentionMask) -> tuple[Tiles, ...]:
    """The plan for a kernel that knows full and top-left causal rectangles."""
    cut = [t for s in coalesced(mask) for t in _cut(s)]
    cut.sort(key=lambda t: (t.kind, len(t.rows) // t.count, len(t.keys) // t.count, t.rows.start))
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
    """The plan for a kernel that knows variable-length segments with a window."""
    layers: dict[tuple[int, int], list[list[AttnSlice]]] = {}
    for s in coalesced(mask):
        same_window = layers.setdefault(_window(s), [])
        for layer in same_window:
            if layer[-1].q_end <= s.q_start and layer[-1].k_end <= s.k_start:
                layer.append(s)
                break
        else:
            same_window.append([s])
    if sum(map(len, layers.values())) > MAX_VARLEN_LAYERS:
        layers = {window: list(_by_rows(parts)) for window, parts in layers.items()}
    return tuple(_varlen_call(part, *window) for window, parts in layers.items() for part in parts)


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
    """The slice that is exactly the union of two disjoint ones, if there is one."""
    los, his = ([limit for limit in pair if limit is not None] for pair in ((a.lo, b.lo), (a.hi, b.hi)))
    if len(set(los)) > 1 or len(set(his)) > 1:
        return None
    lo, hi = los[0] if los else None, his[0] if his else None
    q = range(min(a.q_start, b.q_start), max(a.q_end, b.q_end))
    k = range(min(a.k_start, b.k_start), max(a.k_end, b.k_end))
    whole = AttnSlice(q.start, q.stop, k.start, k.stop, lo, hi).clip(q, k)
    if whole is None or whole.area != a.area + b.area:
        return None
    parts = [whole.clip(range(s.q_start, s.q_end), range(s.k_start, s.k_end)) for s in (a, b)]
    inside = all(p is not None and p.area == s.area for p, s in zip(parts, (a, b), strict=True))
    return whole if inside else None


def _cut(s: AttnSlice) -> Iterator[Tiles]:
    """A tight slice as tiles: at most a head, two batches of triangles with their remainder, and a tail."""
    if s.lo is None or s.hi is None:
        yield from _one_limit(s)
        return
    first = s.k_start - s.lo  # from this row on the lower limit cuts
    last = s.k_end - s.hi  # from this row on the upper limit no longer cuts
    if first >= last:  # no row is cut on both sides
        yield from _rows(s, s.q_start, last)
        yield from _rows(s, last, first)
        yield from _rows(s, first, s.q_end)
        return
    yield from _rows(s, s.q_start, first)
    width = s.hi - s.lo + 1
    chunk = max(width - 1, 1)  # a band of this height is exactly two triangles
    count = (min(last, s.q_end) - max(first, s.q_start)) // chunk
    start = max(first, s.q_start)
    end = start + count * chunk
    if count:
        rows = range(start, end)
        yield Tiles("causal", rows, range(start + s.hi, end + s.hi), count)
        if width > 1:
            yield Tiles("anti_causal", rows, range(start + s.lo, end + s.lo), count)
    rest = min(last, s.q_end)
    if end < rest:
        split = end + s.hi
        for keys in (range(s.k_start, split), range(split, s.k_end)):
            part = s.clip(range(end, rest), keys)
            if part is not None:
                yield from _one_limit(part)
    yield from _rows(s, rest, s.q_end)


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
    same = a.kind == b.kind and len(a.rows) * b.count == len(b.rows) * a.count
    same = same and len(a.keys) * b.count == len(b.keys) * a.count
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


def _by_rows(layers: list[list[AttnSlice]]) -> Iterator[list[AttnSlice]]:
    """The same slices in as few layers as their rows allow; their keys may overlap."""
    out: list[list[AttnSlice]] = []
    for s in sorted(s for layer in layers for s in layer):
        for layer in out:
            if layer[-1].q_end <= s.q_start:
                layer.append(s)
                break
        else:
            out.append([s])
    yield from out


def _varlen_call(slices: list[AttnSlice], left: int, right: int) -> VarlenCall:
    segments = np.array([s[:4] for s in slices], dtype=np.int64)
    gathered = bool((segments[1:, 2] < segments[:-1, 3]).any())
    return VarlenCall(segments, left, right, gathered)
