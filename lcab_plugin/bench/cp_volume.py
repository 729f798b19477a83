"""Bytes that a rank sends in one attention call, from the layout and the mask alone: the closed forms of
docs/context_parallel.md with the shards' own lengths. Nothing here runs a collective, so that counting what
was sent and computing it are two things."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lcab_plugin.layout import Layout
from lcab_plugin.masks import AttentionMask


@dataclass(frozen=True)
class Call:
    """One attention call. ``dim``, ``value_dim``: per head. ``itemsize``: bytes of an element of q, k and v;
    ``sum_itemsize``: of a gradient on its way through a ring (float32, or float64 for float64 inputs)."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    itemsize: int
    sum_itemsize: int


def sent_bytes(
    strategy: str,
    axes: dict[str, int],
    layout: Layout,
    mask: AttentionMask,
    call: Call,
    rank: int,
    backward: bool,
    keys: Layout | None = None,
) -> int:
    """Bytes that ``rank`` sends to other ranks in a forward, or in a backward.

    ``axes``: the size of each, innermost first, as ``ContextParallel.degrees`` has them. ``keys``: the layout
    of keys and values where it is not the queries'.
    """
    keys = layout if keys is None else keys
    held = [rank]
    kv_heads, total = call.kv_heads, 0
    if "ulysses" in axes:
        held = _line(axes, "ulysses", rank)
        own = held.index(rank)
        q_dealt, kv_dealt = dealt(call.heads, call.kv_heads, len(held))
        kv_heads = kv_dealt[own]
        sides = (q_dealt, list(map(layout.length, held))), (kv_dealt, list(map(keys.length, held)))
        total += _ulysses(call, *sides, own, backward)
    rings = [name for name in axes if name != "ulysses"]
    if not rings:
        return total

    def block(r: int) -> tuple[int, ...]:
        """The ranks whose rows stand at the place of ``r`` in a ring."""
        return tuple(_line(axes, "ulysses", r))

    def tokens(r: int) -> int:
        return sum(map(keys.length, block(r)))

    rows = _Rows(call.batch * kv_heads * (call.dim + call.value_dim), call.itemsize, call.sum_itemsize)
    places = _line(axes, rings[0], rank)
    if strategy == "group_cast":
        moved = _cast(layout, keys, mask, list(map(block, places)), places.index(rank))
    elif strategy == "ring_all_gather":
        padded = (len(places) - 1) * max(map(tokens, places))
        moved = padded, padded
    else:
        moved = _hops(axes, rings[::-1], rank, tokens)
    return total + rows.bytes(*moved, backward)


def _hops(
    axes: dict[str, int], rings: Sequence[str], rank: int, tokens: Callable[[int], int]
) -> tuple[int, int]:
    """Rows of keys, and of gradients, that ``rank`` passes on in rings inside rings, the outermost first: at
    every step of a ring the ring inside goes round once with the block that has arrived."""
    if not rings:
        return 0, 0
    line = _line(axes, rings[0], rank)
    inside = [_hops(axes, rings[1:], r, tokens) for r in line]
    whole = sum(map(tokens, line))
    # every block is passed on but the one that would come home, and every block's gradient but the own
    keys, gradients = whole - tokens(line[(line.index(rank) + 1) % len(line)]), whole - tokens(rank)
    return keys + sum(k for k, _ in inside), gradients + sum(g for _, g in inside)


@dataclass(frozen=True)
class _Rows:
    """What a row of keys and values weighs: elements, and bytes of each as itself and as a sum."""

    elements: int
    itemsize: int
    sum_itemsize: int

    def bytes(self, keys: int, gradients: int, backward: bool) -> int:
        """Of ``keys`` rows, and in backward of ``gradients`` rows of sums besides."""
        moved = keys * self.itemsize + (gradients * self.sum_itemsize if backward else 0)
        return self.elements * moved


def dealt(heads: int, kv_heads: int, ranks: int) -> tuple[list[int], list[int]]:
    """Query heads and key/value heads that every Ulysses rank works on: whole groups as evenly as they go,
    or, with fewer key/value heads than ranks, one on every rank whose query heads read it."""
    if kv_heads < ranks:
        return [heads // ranks] * ranks, [1] * ranks
    edges = [kv_heads * i // ranks for i in range(ranks + 1)]
    groups = [b - a for a, b in pairwise(edges)]
    return [n * (heads // kv_heads) for n in groups], groups


def _ulysses(
    call: Call,
    queries: tuple[Sequence[int], Sequence[int]],
    keys: tuple[Sequence[int], Sequence[int]],
    own: int,
    backward: bool,
) -> int:
    """Own tokens of the others' heads go out, and the others' tokens of the own heads. ``queries``, ``keys``:
    the heads that are dealt to every rank, and the tokens it holds."""

    def to_heads(side: tuple[Sequence[int], Sequence[int]]) -> int:
        heads, tokens = side
        return tokens[own] * (sum(heads) - heads[own])

    def to_tokens(side: tuple[Sequence[int], Sequence[int]]) -> int:
        heads, tokens = side
        return (sum(tokens) - tokens[own]) * heads[own]

    q, v = call.dim, call.value_dim
    if backward:  # dout to heads; dq, dk, dv to tokens
        elements = to_heads(queries) * v + to_tokens(queries) * q + to_tokens(keys) * (q + v)
    else:  # q, k, v to heads; out to tokens
        elements = to_heads(queries) * q + to_heads(keys) * (q + v) + to_tokens(queries) * v
    return call.batch * elements * call.itemsize


def _cast(
    layout: Layout, keys: Layout, mask: AttentionMask, blocks: Sequence[tuple[int, ...]], at: int
) -> tuple[int, int]:
    """Rows of keys that this rank's peers need of it, and that it needs of them."""
    rows = [keys.rows(block) for block in blocks]
    needed = [mask.needed_keys(layout.rows(block)) for block in blocks]
    away = [i for i in range(len(blocks)) if i != at]
    return (
        sum(_common(needed[i], rows[at]) for i in away),
        sum(_common(needed[at], rows[i]) for i in away),
    )


def _common(a: Sequence[range], b: Sequence[range]) -> int:
    """Numbers in both of two ascending lists of disjoint ranges."""
    count = i = j = 0
    while i < len(a) and j < len(b):
        count += max(0, min(a[i].stop, b[j].stop) - max(a[i].start, b[j].start))
        if a[i].stop < b[j].stop:
            i += 1
        else:
            j += 1
    return count


def _line(axes: dict[str, int], along: str, rank: int) -> list[int]:
    """The ranks that differ from ``rank`` on the axis ``along`` alone; itself if there is none."""
    stride = 1
    for name, size in axes.items():
        if name == along:
            return [rank + (i - rank // stride % size) * stride for i in range(size)]
        stride *= size
    return [rank]
