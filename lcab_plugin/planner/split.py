"""How a layout splits the work of a mask: the slowest ranks' exact area, and what their kernels do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lcab_plugin import layout as layouts
from lcab_plugin.layout import CHUNK, Layout, View
from lcab_plugin.masks import AttentionMask
from lcab_plugin.masks.geometry import Ints
from lcab_plugin.planner.speeds import Floats
from lcab_plugin.planner.traffic import rows_held
from lcab_plugin.planner.work import Work, refusal, work

# A kernel's plan is made for all rows of a block that lie in up to EXACT_RANGES ranges and see up to
# EXACT_SLICES slices; else for WINDOWS runs of them, SAMPLED_ROWS in all. Areas are exact all the same.
EXACT_RANGES, EXACT_SLICES, SAMPLED_ROWS, WINDOWS = 128, 4096, 1 << 14, 8


@dataclass(frozen=True)
class Block:
    """The ``ulysses`` ranks that share their rows and have the largest ``area`` of them (in one head), on
    ``mean`` over all such blocks; ``ranks`` of the block, ``rows`` of the longest shard of a rank."""

    layout: Layout
    mask: AttentionMask
    ranks: tuple[int, ...]
    area: int
    mean: float
    rows: int

    @property
    def imbalance(self) -> float:
        """Largest over mean area."""
        return self.area / self.mean if self.mean else 1.0


@dataclass(frozen=True)
class Ring:
    """A block's work around a ring: with its ``own`` keys, with a peer's on average (``other``), of which the
    share ``busy`` sees any."""

    own: Work
    other: Work
    busy: float


@lru_cache(maxsize=256)
def _areas(layout: Layout, mask: AttentionMask) -> Floats:
    return np.array(layouts.areas(layout, mask), dtype=np.float64)


@lru_cache(maxsize=4096)
def block(layout: Layout, mask: AttentionMask, ulysses: int, placement: str) -> Block:
    """The slowest block of ``ulysses`` ranks, neighbours under ``head_first``, else far apart."""
    areas = _areas(layout, mask)
    ranks = len(areas)
    others = ranks // ulysses
    neighbours = placement == "head_first"
    shape = (others, ulysses) if neighbours else (ulysses, others)
    grid = np.arange(ranks).reshape(shape)
    grid = grid if neighbours else grid.T
    sums = areas[grid].sum(axis=1)
    at = int(sums.argmax())
    held = tuple(grid[at].tolist())
    return Block(layout, mask, held, int(sums[at]), float(sums.mean()), max(layout.lengths))


@lru_cache(maxsize=8192)
def whole(kernel: str, block: Block, head_dim: int, device: str) -> Work:
    """One call: the block's rows against all keys."""
    parts = _parts(block)
    return _stretched(work(kernel, parts.whole, head_dim, device), block.area, parts.share)


@lru_cache(maxsize=8192)
def ring(kernel: str, block: Block, head_dim: int, device: str) -> Ring:
    """A call for the keys of every block: the own ones, and some peers' that stand for all, so that the areas
    of all calls add up to the block's."""
    parts = _parts(block)
    others = len(block.layout.ranges) // len(block.ranks) - 1
    by = block.area / parts.whole.area if parts.whole.area else 0.0
    own_area = round(parts.own.area * by)
    own = _stretched(work(kernel, parts.own, head_dim, device), own_area, parts.share)
    left = block.area - own_area
    met = [work(kernel, mask, head_dim, device) for mask in parts.peers if not mask.empty]
    if parts.met == 0 or left <= 0:
        return Ring(own, Work(), 0.0)
    busy = parts.met / others
    total = sum(met, Work())
    mean = _stretched(total.scaled(1 / max(len(met), 1)), left / (others * busy), parts.share)
    return Ring(own, mean, busy)


@lru_cache(maxsize=8192)
def refused(kernel: str, block: Block, at_once: bool, head_dim: int, dtype: str, device: str) -> str | None:
    """Why ``kernel`` does not serve the block: its rows against all keys (``at_once``), or around a ring."""
    parts = _parts(block)
    masks = [parts.whole] if at_once else [parts.own, *parts.peers]
    reasons = (refusal(kernel, mask, head_dim, dtype, device) for mask in masks if not mask.empty)
    return next(filter(None, reasons), None)


@dataclass(frozen=True)
class _Parts:
    """Masks of the block's rows with all keys, with its own and with some peers'; of how many blocks it sees
    keys (``met``). Of many rows a ``share`` stands for all."""

    whole: AttentionMask
    own: AttentionMask
    peers: tuple[AttentionMask, ...]
    met: int
    share: float


@lru_cache(maxsize=64)
def _parts(block: Block) -> _Parts:
    layout, mask = block.layout, block.mask
    rows = layout.rows(block.ranks)
    everything = mask.local(rows, (range(mask.k_len),))
    few = len(rows) <= EXACT_RANGES and len(everything.array) <= EXACT_SLICES
    taken = rows if few else _sample(rows)
    everything = _cropped(everything if few else mask.local(taken, (range(mask.k_len),)))
    needed = rows_held(layout, mask.needed_keys(rows))
    blocks = _blocks(block)
    seen = [i for i in range(1, len(blocks)) if needed[blocks[i]].any()]
    some = [seen[i] for i in dict.fromkeys((0, len(seen) // 2, len(seen) - 1))] if seen else []
    held = [layout.rows(blocks[i].tolist()) for i in (0, *some)]
    view = Layout("sample", layout.seqlen, (taken, *held))
    own, *peers = (_cropped(View(mask, view, (0,), (i,)).local()) for i in range(1, len(held) + 1))
    share = sum(map(len, taken)) / max(1, sum(map(len, rows)))
    return _Parts(everything, own, tuple(peers), len(seen), share)


def _blocks(block: Block) -> Ints:
    """The ranks of every block, int64 [blocks, ulysses], in the order of the ring from this one on."""
    ulysses = len(block.ranks)
    blocks = len(block.layout.ranges) // ulysses
    neighbours = ulysses == 1 or block.ranks[1] - block.ranks[0] == 1
    stride = ulysses if neighbours else 1
    place = block.ranks[0] // stride
    places = (place + np.arange(blocks)) % blocks
    return np.array(block.ranks) + (places[:, None] - place) * stride


def _sample(rows: tuple[range, ...]) -> tuple[range, ...]:
    """``WINDOWS`` runs of the rows, evenly spread, from a chunk's first row on."""
    ends = np.cumsum([len(r) for r in rows])
    total = int(ends[-1])
    each = min(SAMPLED_ROWS, total) // WINDOWS
    found = []
    for i in range(WINDOWS):
        start = (total - each) * i // (WINDOWS - 1) // CHUNK * CHUNK
        stop, at = start + each, int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            first = rows[at].start + start - (int(ends[at]) - len(rows[at]))
            length = min(stop, int(ends[at])) - start
            found.append(range(first, first + length))
            start, at = start + length, at + 1
    return tuple(found)


def _stretched(sampled: Work, area: float, share: float) -> Work:
    """The work of all rows, of this ``area``, by that of a ``share`` of them. A few calls stay as many, since
    one takes segments of the whole length; more are one for every few segments."""
    if not sampled.area or not area:
        return Work(calls=1, area=area, computed=area) if area else Work()
    by = area / sampled.area
    return Work(
        calls=sampled.calls if sampled.calls <= WINDOWS else sampled.calls / share,
        area=area,
        computed=sampled.computed * by,
        outside=sampled.outside * by,
        rows=sampled.rows / share,
        keys=sampled.keys,
        moved=sampled.moved / share,
    )


def _cropped(mask: AttentionMask) -> AttentionMask:
    """As a kernel is handed it: only the rows and keys that take part."""
    if mask.empty:
        return mask
    rows, keys = mask.bounds()
    return mask.local((rows,), (keys,))
