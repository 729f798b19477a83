"""What a rank sends in one attention call (docs/context_parallel.md's closed forms, for shards of the longest
one's length), and how long that takes on links inside and between nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lcab_plugin.context_parallel.topology import axis_sizes
from lcab_plugin.context_parallel.ulysses import deal
from lcab_plugin.layout import Layout
from lcab_plugin.masks import AttentionMask
from lcab_plugin.masks.geometry import Ints, expand
from lcab_plugin.planner.hardware import Hardware
from lcab_plugin.planner.shape import Model

SUM_ITEMSIZE = 4  # gradients of keys and values travel in float32
EXACT_RANKS, SAMPLED_RANKS = 64, 8  # group_cast's rows: of all ranks up to here, else of so many


@dataclass(frozen=True)
class Span:
    """One axis: ``size`` ranks, ``stride`` apart, of which at least ``near`` stand in one node."""

    size: int
    stride: int
    near: int

    def hop(self, payload: float, hardware: Hardware) -> float:
        """Seconds of a message to the next rank; the slowest of the ring sets its pace."""
        link = hardware.inside if self.near == self.size else hardware.between
        return link.latency + payload / link.bandwidth

    def all_to_all(self, payload: float, hardware: Hardware) -> float:
        """Seconds for a rank to send ``payload`` bytes, evenly to the others."""
        return self.seconds(self.exchanged(payload), hardware)

    def gather(self, shard: float, hardware: Hardware) -> float:
        """Seconds of an all-gather or reduce-scatter of ``shard`` bytes a rank."""
        return self.seconds(self.gathered(shard), hardware)

    def exchanged(self, payload: float) -> tuple[float, float]:
        """Bytes over a rank's link inside its node, and between nodes, of an all-to-all."""
        if self.size == 1:
            return 0.0, 0.0
        away = payload * (self.size - self.near) / (self.size - 1)
        return payload - away, away

    def gathered(self, shard: float) -> tuple[float, float]:
        """The same of an all-gather or reduce-scatter. Ranks of a node share what comes from outside: each
        takes its part over its own link and passes it on."""
        return (self.size - 1) * shard, (self.size - self.near) * shard / self.near

    @property
    def messages(self) -> int:
        """That follow one another in a collective."""
        return math.ceil(math.log2(self.size))

    def seconds(self, sent: tuple[float, float], hardware: Hardware) -> float:
        """Of a collective in which a rank sends so much inside its node, and between nodes."""
        link = hardware.inside if self.near == self.size else hardware.between
        times = sent[0] / hardware.inside.bandwidth, sent[1] / hardware.between.bandwidth
        return self.messages * link.latency + max(times)


def spans(degrees: dict[str, int], placement: str, gpus: int) -> dict[str, Span]:
    """The axes of a strategy by name, innermost first, on nodes of ``gpus`` devices."""
    made, stride = {}, 1
    for name, size in axis_sizes(degrees, placement).items():
        made[name] = Span(size, stride, _near(size, stride, gpus))
        stride *= size
    return made


@lru_cache(maxsize=1024)
def _near(size: int, stride: int, gpus: int) -> int:
    """Ranks of the axis that stand in one node with the rank that has fewest: groups may straddle nodes."""
    ranks = np.arange(math.lcm(size * stride, gpus))
    group = ranks // (size * stride) * stride + ranks % stride
    _, counts = np.unique(group * len(ranks) + ranks // gpus, return_counts=True)
    return int(counts.min())


@dataclass(frozen=True)
class Sent:
    """Bytes a rank sends in a pass: by Ulysses, and of keys and of gradients, by ring and group cast."""

    heads: float
    keys: float
    gradients: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.heads + self.keys + self.gradients


def block_bytes(model: Model, tokens: int, ulysses: int) -> tuple[float, float]:
    """Bytes of the keys and values that stand at one place of a ring, as themselves and as gradients:
    ``tokens`` a rank of ``ulysses`` that share them, of the heads dealt to the one with most."""
    kv_heads = max(len(range(model.heads)[s]) for s in deal(model.heads, model.kv_heads, ulysses)[1])
    elements = tokens * ulysses * kv_heads * 2 * model.head_dim
    return float(elements * model.itemsize), float(elements * SUM_ITEMSIZE)


@lru_cache(maxsize=4096)
def head_bytes(model: Model, tokens: int, ulysses: int, backward: bool) -> float:
    """Bytes that the rank of a Ulysses axis that sends most sends in a pass: ``cp_volume._ulysses`` where
    every rank holds ``tokens``."""
    if ulysses == 1:
        return 0.0
    q_slices, kv_slices = deal(model.heads, model.kv_heads, ulysses)
    q, kv = (
        np.array([len(range(model.heads)[s]) for s in slices], dtype=np.int64)
        for slices in (q_slices, kv_slices)
    )
    inputs, results = q + 2 * kv, q  # elements of q, k and v, and of out, in units of head_dim
    out, back = (results, inputs) if backward else (inputs, results)
    sent = out.sum() - out + (ulysses - 1) * back
    return float(sent.max() * tokens * model.head_dim * model.itemsize)


def sent(
    strategy: str, axes: dict[str, Span], model: Model, tokens: int, cast: tuple[float, float], backward: bool
) -> Sent:
    """Bytes of the rank that sends most. ``tokens`` of the longest shard; ``cast``: rows that group cast
    sends and receives."""
    ulysses = axes["ulysses"].size if "ulysses" in axes else 1
    heads = head_bytes(model, tokens, ulysses, backward)
    rings = [span.size for name, span in axes.items() if name != "ulysses"]
    if not rings:
        return Sent(heads, 0.0, 0.0)
    block, sums = block_bytes(model, tokens, ulysses)
    if strategy == "group_cast":
        row, row_sum = block / (tokens * ulysses), sums / (tokens * ulysses)
        return Sent(heads, cast[0] * row, cast[1] * row_sum if backward else 0.0)
    ring = math.prod(rings)
    keys = (ring - 1) * block
    if not backward:
        return Sent(heads, keys, 0.0)
    return Sent(heads, keys, (ring - 1) * sums)  # every block's gradient but the own


@lru_cache(maxsize=256)
def cast_rows(layout: Layout, mask: AttentionMask) -> tuple[float, float]:
    """Rows of keys that the rank with most sends, and receives, under group cast.

    Beyond ``EXACT_RANKS`` ranks from ``SAMPLED_RANKS`` of them: what they receive is exact, and as all that
    is received was sent, the mean of what a rank sends is the mean of that; the most sent is taken to be the
    most received.
    """
    ranks = len(layout.ranges)
    if ranks == 1:
        return 0.0, 0.0
    every = ranks <= EXACT_RANKS
    asked = range(ranks) if every else sorted({ranks * i // SAMPLED_RANKS for i in range(SAMPLED_RANKS)})
    sends, most = np.zeros(ranks), 0
    for rank in asked:
        held = rows_held(layout, mask.needed_keys(layout.rows((rank,))))
        held[rank] = 0
        sends += held
        most = max(most, int(held.sum()))
    return (float(sends.max()) if every else float(most)), float(most)


def rows_held(layout: Layout, needed: tuple[range, ...]) -> Ints:
    """How many of the ``needed`` rows each rank holds: int64 [ranks]."""
    edges, owners = _owners(layout)
    start = np.array([r.start for r in needed], dtype=np.int64)
    stop = np.array([r.stop for r in needed], dtype=np.int64)
    first = np.searchsorted(edges, start, side="right") - 1
    last = np.searchsorted(edges, stop, side="left") - 1
    which, at = expand(first, last - first + 1)
    rows = np.minimum(stop[which], edges[at + 1]) - np.maximum(start[which], edges[at])
    total = np.zeros(len(layout.ranges), dtype=np.int64)
    np.add.at(total, owners[at], rows)
    return total


@lru_cache(maxsize=64)
def _owners(layout: Layout) -> tuple[Ints, Ints]:
    """Where every range of rows begins, and the end; and the rank of each."""
    held = sorted((r.start, rank) for rank, ranges in enumerate(layout.ranges) for r in ranges if r)
    edges = np.array([start for start, _ in held] + [layout.seqlen], dtype=np.int64)
    return edges, np.array([rank for _, rank in held], dtype=np.int64)
