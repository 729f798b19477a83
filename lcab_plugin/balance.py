"""Which chunks of queries go to which rank, by the area of one mask: what layout ``balanced`` is made of."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from lcab_plugin.masks import AttentionMask
from lcab_plugin.masks.geometry import Ints

# Chunks are halved up to HALVINGS times, to no less than LEAST tokens, to bring the imbalance down to EVEN:
# whole chunks of a few long documents, all of the same work, do not always divide by the ranks.
LEAST, HALVINGS, EVEN = 16, 2, 1.03
# Neighbouring chunks stay together where few exchanges between ranks bring the imbalance down to NEARLY: at
# most one for SWAPPED chunks, and so many per rank and besides.
NEARLY, SWAPPED, SWAPS_PER_RANK, SWAPS = 1.04, 4, 4, 32
FEWER = 0.9  # of the keys that the parts of another layout need, what is worth more pieces than it has
LITTLE = 0.005  # imbalance that a run or two on every rank may have more than chunks dealt one by one
ASKED = 64  # ranks at most whose needed keys are looked at

Held = list[list[int]]  # of every rank, the numbers of its chunks


def halved(longest: int) -> list[int]:
    """The lengths of chunks to try, in this order."""
    return [max(LEAST, longest >> halvings) for halvings in range(HALVINGS + 1)]


def deal(mask: AttentionMask, ranks: int, cuts: Sequence[list[int]]) -> tuple[list[int], Held]:
    """One of ``cuts`` (where the chunks of a sequence begin, and its end), and the chunks of every rank.

    Where exchanging a few runs of chunks between ranks that hold consecutive ones brings the imbalance down
    to NEARLY, documents stay together, and ``group_cast`` sends little. Where it does not, chunks are dealt
    one by one, largest first, to the least loaded rank that still takes one. But where that is no more even
    than the parts of ``contiguous`` or ``zigzag``, and exchanges do not save keys, it is those: a kernel's
    mask and what is sent have fewer pieces then.
    """
    work = [mask.area_by_chunk(edges) for edges in cuts]
    tried = []
    for i, edges in enumerate(cuts):
        held = _dealt(work[i], ranks, _is_short(edges))
        tried.append((_imbalance(work[i], held), i, held))
        if tried[-1][0] <= EVEN:
            break
    imbalance, best, dealt = min(tried)
    even, worth = (cuts[best], dealt), 1.0
    if mask.q_len >= 2 * ranks:
        halves, runs = _in_runs(mask.q_len, ranks)
        area = mask.area_by_chunk(halves)
        if whole := next((r for r in runs if _imbalance(area, r) <= imbalance + LITTLE), None):
            even, worth = (halves, whole), FEWER
    for edges, area in zip(cuts, work, strict=True):
        exchanged = _exchanged(area, ranks, _is_short(edges))
        if exchanged is not None:
            fewer = _most_needed(mask, edges, exchanged) <= worth * _most_needed(mask, *even)
            return (edges, exchanged) if fewer else even
    return even


def _is_short(edges: list[int]) -> bool:
    """Whether the last chunk is shorter than the others."""
    return len(edges) > 2 and edges[-1] - edges[-2] < edges[1]


def _imbalance(area: Ints, held: Held) -> float:
    """Largest over mean area of a rank, 1 where nothing is visible."""
    work = [int(area[chunks].sum()) for chunks in held]
    return max(work) * len(work) / sum(work) if any(work) else 1.0


def _most_needed(mask: AttentionMask, edges: list[int], held: Held) -> int:
    """Keys that the rank needs which needs most."""
    asked = held[:: -(-len(held) // ASKED)]
    rows = ([range(edges[c], edges[c + 1]) for c in sorted(chunks)] for chunks in asked)
    return max(sum(map(len, mask.needed_keys(ranges))) for ranges in rows)


def _in_runs(tokens: int, ranks: int) -> tuple[list[int], list[Held]]:
    """Where ``zigzag`` cuts, and which parts each rank has in ``contiguous`` (one run), and in it (two)."""
    parts = range(2 * ranks)
    edges = [tokens * i // len(parts) for i in range(len(parts) + 1)]
    return edges, [[[2 * r, 2 * r + 1] for r in range(ranks)], [[r, parts[-1 - r]] for r in range(ranks)]]


def _exchanged(area: Ints, ranks: int, short: bool) -> Held | None:
    """Consecutive chunks on every rank, but for the runs that the heaviest and the lightest rank exchanged,
    again and again; None where that does not bring the imbalance down to NEARLY in few exchanges."""
    n = len(area)
    held = [np.arange(n * r // ranks, n * (r + 1) // ranks) for r in range(ranks)]
    load = np.array([int(area[chunks].sum()) for chunks in held])
    mean = int(load.sum()) / ranks
    for _ in range(min(n // SWAPPED, SWAPS_PER_RANK * ranks + SWAPS) + 1):
        heavy, light = int(load.argmax()), int(load.argmin())
        if load[heavy] <= NEARLY * mean:
            return [chunks.tolist() for chunks in held]
        # a short last chunk stays where it is: the last rank has as many chunks as any
        mine, theirs = (held[r][: -1 if short and r == ranks - 1 else None] for r in (heavy, light))
        if not len(mine) or not len(theirs):
            return None
        wanted = min(load[heavy] - mean, mean - load[light])  # settles one of the two
        gain, give, take = _run_to_exchange(area[mine], area[theirs], wanted, (NEARLY - 1) * mean)
        if not 0 < gain < load[heavy] - load[light]:
            return None
        load[heavy], load[light] = load[heavy] - gain, load[light] + gain
        held[heavy][give], held[light][take] = theirs[take].copy(), mine[give].copy()
    return None


def _run_to_exchange(mine: Ints, theirs: Ints, wanted: float, slack: float) -> tuple[int, slice, slice]:
    """By how much exchanging a run of chunks of these areas for as long a run of the other rank's relieves
    the first, and the two runs: the shortest, of 1, 2, 4 ... chunks, that is within ``slack`` of ``wanted``,
    else the nearest. One run leaves a rank in fewer pieces than single chunks, each of which is a border
    inside a document: a mask with more slices, and for a library's kernel more calls.
    """
    up_to = [np.concatenate(([0], area.cumsum())) for area in (mine, theirs)]
    best: tuple[float, int, slice, slice] | None = None
    for length in (2**i for i in range(min(len(mine), len(theirs)).bit_length())):
        here, there = (ends[length:] - ends[:-length] for ends in up_to)
        order = np.argsort(there, kind="stable")
        near = np.searchsorted(there[order], here - wanted).clip(0, len(there) - 1)
        gains = here - there[order[near]]
        give = int(np.abs(gains - wanted).argmin())
        take, missed = int(order[near[give]]), float(abs(gains[give] - wanted))
        if best is None or missed < best[0]:
            best = missed, int(gains[give]), slice(give, give + length), slice(take, take + length)
        if missed <= slack:
            break
    assert best is not None
    return best[1:]


def _dealt(area: Ints, ranks: int, short: bool) -> Held:
    """Chunks one by one, largest first, to the least loaded rank that still takes one.

    ``short``: the last chunk is shorter than the others, so its rank must not have fewer chunks than another.
    It is dealt first, to rank 0, which gets one more where any rank does.
    """
    each, spare = divmod(len(area), ranks)
    order = np.argsort(-area, kind="stable").tolist()
    limit = [each] * ranks
    if short:
        last = len(area) - 1
        order.remove(last)
        order.insert(0, last)
        limit[0] += spare > 0
        spare -= spare > 0
    work, held = area.tolist(), [list[int]() for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for chunk in order:
        load, rank = heapq.heappop(heap)
        while not spare and len(held[rank]) == limit[rank]:
            load, rank = heapq.heappop(heap)
        spare -= len(held[rank]) == limit[rank]
        held[rank].append(chunk)
        if len(held[rank]) <= each:
            heapq.heappush(heap, (load + work[chunk], rank))
    return held
