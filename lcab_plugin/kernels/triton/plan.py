"""What the kernels read of a mask, as device tensors: a block table and every row's visible intervals."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from lcab_plugin.errors import LcabError
from lcab_plugin.masks import FULL, PARTIAL, AttentionMask


class Plan:
    """The block table of one mask in blocks of [rows, keys], int32 in one buffer.

    ``lines`` [row blocks, 5]: block, then where its FULL runs begin, where its PARTIAL runs begin and where
    they end, and how many FULL blocks there are; the line with the most blocks comes first. ``runs`` [n, 4]:
    first key block, length, and which of its rows' intervals reach into it: from the first to before the
    last (of rows with more than two, which read no others).
    ``starts, stops`` [intervals, rows]: the keys each row sees, ascending and apart; unused ones are empty.

    The numbers of runs and of intervals are rounded up to powers of two, so that like masks launch alike;
    ``spare`` times as many runs leave room for those of other masks.
    """

    def __init__(
        self, mask: AttentionMask, rows: int, keys: int, device: torch.device, spare: int = 1
    ) -> None:
        lines, owner, runs, self.work = _table(mask, rows, keys)
        starts, stops = mask.row_intervals()
        intervals = _bucket(len(starts))
        self.kept = intervals if intervals <= 2 else 0  # intervals held in registers
        reached = np.zeros_like(runs) if self.kept else _reached(starts, stops, owner, runs, rows, keys)
        runs = np.concatenate([runs, reached], axis=1)
        padding = [(0, intervals - len(starts)), (0, 0)]
        runs = np.pad(runs, [(0, spare * _bucket(len(runs)) - len(runs)), (0, 0)])
        parts = [lines, runs, np.pad(starts, padding), np.pad(stops, padding)]
        # Each begins at a multiple of 16 bytes: a kernel is compiled once more for pointers that do not.
        flat = [np.pad(part.ravel(), (0, -part.size % 4)) for part in parts]
        self.shape = tuple(part.shape for part in parts)
        self.buffer = torch.from_numpy(np.concatenate(flat).astype(np.int32)).to(device)
        places = zip(self.buffer.split([x.size for x in flat]), self.shape, strict=True)
        self.tensors = tuple(place[: math.prod(shape)].view(shape) for place, shape in places)
        self.lines = self.tensors[0]
        self.blocks = lines[:, 0].astype(np.int64)
        self.size = rows, mask.q_len  # of a line, of all of them
        self.fixed = spare > 1  # another mask's table may take this one's place
        self._parts: dict[tuple[int, int, int], Parts] = {}

    def parts(self, group: int, units: int, programs: int) -> Parts:
        """The table's lines dealt to ``programs``, each for ``units`` and for all of ``group`` query heads or
        some."""
        key = group, units, programs
        if key not in self._parts:
            self._parts[key] = Parts(self, *key)
        return self._parts[key]

    def load(self, other: Plan) -> bool:
        """Take over the table of ``other`` in place, if it fits."""
        if self.shape[0] != other.shape[0] or self.kept != other.kept:
            return False
        if any(theirs[0] > mine[0] for theirs, mine in zip(other.shape, self.shape, strict=True)):
            return False
        self.buffer.zero_()  # intervals that the other does not have are empty
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine[: len(theirs)].copy_(theirs)
        return True


class Parts:
    """Who sums over which query heads, where a line is summed over several.

    A line that every row sees, of keys that all share, can be more than a program's share of the work; such
    lines are split over their query heads. ``table`` [parts, 4], int32, heaviest first: line, first query
    head, how many, and the slot for its sum, or -1 where a part is a whole line. The slots of line ``i`` of
    the ``split`` lines are ``i * each`` to ``(i + 1) * each``; the rows of those lines are ``rows`` [n] of
    the result, which are rows ``inside`` [n] of all rows of all split lines.
    """

    def __init__(self, plan: Plan, group: int, units: int, programs: int) -> None:
        device, work = plan.buffer.device, plan.work
        heavy, each = (0, 1) if plan.fixed else _split(work, group, units, programs)
        self.split, self.each = heavy, each
        # Lines come heaviest first, so those that are split are the first.
        line = np.concatenate([np.repeat(np.arange(heavy), each), np.arange(heavy, len(work))])
        count = np.where(line < heavy, group // each, group)
        slot = np.where(line < heavy, np.arange(len(line)), -1)
        head = np.where(line < heavy, slot % each * count, 0)
        table = np.stack([line, head, count, slot], axis=1)
        order = np.argsort(-work[line] * count, kind="stable")
        self.table = torch.from_numpy(table[order].astype(np.int32)).to(device)
        height, length = plan.size
        rows = (plan.blocks[:heavy, None] * height + np.arange(height)).ravel()
        inside = np.flatnonzero(rows < length)
        self.rows, self.inside = (torch.from_numpy(x).to(device) for x in (rows[inside], inside))

    @property
    def slots(self) -> int:
        """Sums that lines which were split leave."""
        return self.split * self.each


# In blocks that a program computes in that time, about a microsecond each:
_SLOT = 8.0  # to write a slot and read it again, by their bytes
_SUMS = 100.0  # to start the few operations that add slots up


def _split(work: np.ndarray, group: int, units: int, programs: int) -> tuple[int, int]:
    """How many of the heaviest lines to split over query heads, and into how many parts each; none unless the
    program with the most work has a twentieth less of it. ``work``: blocks of each line, descending."""
    share = work.sum() * group * units / programs
    whole = largest_load(work * group, units, programs)
    best, found = min(0.95 * whole, whole - _SUMS), (0, 1)
    for part in (1.0, 0.5, 0.25):  # at most so much of a share
        heavy = int((work * group > part * share).sum())
        if not heavy:
            continue
        most = work[0] * group / (part * share)
        each = next(n for n in range(1, group + 1) if group % n == 0 and (n >= most or n == group))
        parts = np.repeat(work[:heavy] * group / each + _SLOT, each)
        load = largest_load(np.concatenate([parts, work[heavy:] * group]), units, programs)
        if load < best:
            best, found = load, (heavy, each)
    return found


def largest_load(weights: np.ndarray, units: int, programs: int) -> float:
    """The work of the program with the most, where all go forth and back over the items by their weight, as
    ``hopper.item_of`` does."""
    items = np.repeat(np.sort(weights)[::-1], units)
    turns = np.pad(items, (0, -len(items) % (2 * programs))).reshape(-1, 2, programs)
    return float((turns[:, 0] + turns[:, 1, ::-1]).sum(axis=0).max())


class GraphPlans:
    """The plans of the launches inside ``with``, in buffers of their own and with room to spare, so that a
    captured CUDA graph can be replayed under other masks.

    Example::

        with triton.GraphPlans(mask) as plans, torch.cuda.graph(graph):
            out = lcab.attention(q, k, v, mask, kernel="triton")
        plans.load(other_mask)  # same lengths, at most about twice the runs
        graph.replay()
    """

    def __init__(self, mask: AttentionMask) -> None:
        self.mask = mask
        self._plans: dict[tuple[int, int, torch.device, bool], Plan] = {}

    def __enter__(self) -> GraphPlans:
        _OWNERS.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _OWNERS.remove(self)

    def plan(self, mask: AttentionMask, rows: int, keys: int, device: torch.device, transposed: bool) -> Plan:
        """The plan of a launch, made at its first use: warm up inside ``with`` before capturing.

        Raises:
            LcabError: a launch under another mask than this object's.
        """
        if mask != self.mask:
            raise LcabError(
                f"these are the plans of {self.mask!r}, and attention runs under {mask!r}; capture one mask, "
                "every row and key of which takes part"
            )
        key = rows, keys, device, transposed
        if key not in self._plans:
            self._plans[key] = Plan(_side(mask, transposed), rows, keys, device, spare=2)
        return self._plans[key]

    def load(self, mask: AttentionMask) -> None:
        """Let the graph's next replay run ``mask``.

        Raises:
            LcabError: other lengths than captured, or a block table of ``mask`` does not fit in the captured
                one; capture again. Part of the graph's tables may then be of ``mask``: load another before
                the next replay.
        """
        if (mask.q_len, mask.k_len) != (self.mask.q_len, self.mask.k_len):
            raise LcabError(f"the captured graph is for masks as long as {self.mask!r}, not {mask!r}")
        for (rows, keys, device, transposed), mine in self._plans.items():
            theirs = _cached(mask, rows, keys, device, transposed)
            if not mine.load(theirs):
                raise LcabError(
                    f"{mask!r} needs block tables of sizes {theirs.shape}, which do not fit in those of the "
                    f"captured graph, {mine.shape}; capture a graph under this mask"
                )


_OWNERS: list[GraphPlans] = []  # the innermost owns the plans of the launches that follow


def plan(mask: AttentionMask, rows: int, keys: int, device: torch.device, transposed: bool = False) -> Plan:
    """The plan of a launch over blocks of ``rows`` x ``keys``; building one copies to the device, using one
    does not. ``transposed``: lines of keys and runs of rows, in blocks of ``rows`` keys x ``keys`` rows."""
    make = _OWNERS[-1].plan if _OWNERS else _cached
    return make(mask, rows, keys, device, transposed)


@lru_cache(maxsize=256)
def _cached(mask: AttentionMask, rows: int, keys: int, device: torch.device, transposed: bool) -> Plan:
    return Plan(_side(mask, transposed), rows, keys, device)


def _side(mask: AttentionMask, transposed: bool) -> AttentionMask:
    return mask.transposed() if transposed else mask


def _table(
    mask: AttentionMask, rows: int, keys: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``lines``, the row block and the first block and length of each run, and the number of blocks of every
    line. A FULL block that reaches past the keys becomes PARTIAL: it needs bounds."""
    blocks = mask.block_map(rows, keys)
    line = np.repeat(np.arange(blocks.shape[0]), np.diff(blocks.offsets))
    first, length, kind = blocks.first, blocks.length, blocks.kind
    if mask.k_len % keys:
        last = blocks.shape[1] - 1
        ragged = np.flatnonzero((kind == FULL) & (first + length > last))
        line = np.append(line, line[ragged])
        first, kind = (
            np.append(first, np.full(len(ragged), last)),
            np.append(kind, np.full(len(ragged), PARTIAL)),
        )
        length = np.append(length, np.ones(len(ragged), dtype=length.dtype))
        length[ragged] -= 1
    present = length > 0
    line, first, length, kind = (x[present] for x in (line, first, length, kind))
    order = np.lexsort((first, kind != FULL, line))
    line, first, length, kind = (x[order] for x in (line, first, length, kind))
    begin = np.searchsorted(line, np.arange(blocks.shape[0]))
    end = np.searchsorted(line, np.arange(blocks.shape[0]), side="right")
    full = begin + np.bincount(line[kind == FULL], minlength=blocks.shape[0])
    work = np.bincount(line, weights=length, minlength=blocks.shape[0])
    inner = np.bincount(line, weights=length * (kind == FULL), minlength=blocks.shape[0])
    lines = np.stack([np.arange(blocks.shape[0]), begin, full, end, inner], axis=1)
    order = np.argsort(-work, kind="stable")
    return lines[order], line, np.stack([first, length], axis=1).reshape(-1, 2), work[order]


def _reached(
    starts: np.ndarray, stops: np.ndarray, owner: np.ndarray, runs: np.ndarray, rows: int, keys: int
) -> np.ndarray:
    """Of each run, which belongs to a block ``owner`` of ``rows`` rows, [n, 2]: the first interval of any of
    those rows that ends behind the run's first key, and the one after the last that begins before its end."""
    count, length = starts.shape
    end = int(stops.max(initial=0)) + 1
    seen, blocks = starts < stops, np.arange(0, length, rows)
    begin = np.minimum.reduceat(np.where(seen, starts, end), blocks, axis=1)
    stop = np.maximum.reduceat(np.where(seen, stops, 0), blocks, axis=1)
    stop = np.maximum.accumulate(stop, axis=0)  # rows with fewer intervals are missing in the later ones
    # One ascending list for each of the two: of every block of rows in a range of numbers of its own.
    own = np.arange(len(blocks))[:, None] * (end + 1)
    first, last = (np.minimum(x * keys, end) for x in (runs[:, 0], runs.sum(axis=1)))
    low = np.searchsorted((stop.T + own).ravel(), first + owner * (end + 1), side="right")
    high = np.searchsorted((begin.T + own).ravel(), last + owner * (end + 1), side="left")
    return np.stack([low, high], axis=1) - (owner * count)[:, None]


def _bucket(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
