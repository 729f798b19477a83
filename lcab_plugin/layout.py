"""Which global token positions each context-parallel rank holds.

Positions travel with the tensors: RoPE, the loss and every local mask read them here. A rank's rows ascend
in global position; shards may differ in length, and a rank may hold no rows at all.

``contiguous`` and ``zigzag`` cut the sequence by the number of ranks. ``striped`` and ``balanced`` deal
chunks of one length, ``balanced`` by the work of one mask, where the former two are not even.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lcab_plugin import balance
from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.masks import AttentionMask
from lcab_plugin.masks.geometry import NO_HI, NO_LO, runs

# The length of a chunk where none is given: CHUNK tokens, or less where a rank would not get CHUNKS_PER_RANK,
# but at least balance.LEAST.
CHUNK, CHUNKS_PER_RANK = 512, 32


@dataclass(frozen=True, eq=False)
class Layout:
    """Row ranges of every rank, ``ranges[rank]``, over a sequence of ``seqlen`` tokens.

    Equality and hash go by ``digest``, over the name, the length and the ranges: a layout is part of the key
    of every cached local mask, and comparing thousands of ranges there would cost more than the look-up.
    """

    name: str
    seqlen: int
    ranges: tuple[tuple[range, ...], ...]
    digest: str = field(init=False, repr=False)
    lengths: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        numbers = [
            x for held in self.ranges for x in (len(held), *(e for r in held for e in (r.start, r.stop)))
        ]
        content = f"{self.name} {self.seqlen} ".encode() + np.array(numbers, dtype=np.int64).tobytes()
        object.__setattr__(self, "digest", hashlib.blake2b(content, digest_size=16).hexdigest())
        object.__setattr__(self, "lengths", tuple(sum(map(len, held)) for held in self.ranges))

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Layout) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def rows(self, ranks: Iterable[int]) -> tuple[range, ...]:
        """The rows that ``ranks`` hold together, ascending, neighbours joined."""
        return _ascending(r for rank in ranks for r in self.ranges[rank])

    def length(self, rank: int) -> int:
        """Number of tokens ``rank`` holds."""
        return self.lengths[rank]

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Global positions of the rows of ``rank``, int64 [tokens]."""
        return _concatenated(self.ranges[rank]).to(device or "cpu")

    def shard(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """The rows of ``rank`` from ``x``, whose dimension ``dim`` is the whole sequence."""
        if x.shape[dim] != self.seqlen:
            raise LcabError(
                f"dimension {dim} of the tensor has {x.shape[dim]} tokens, the layout {self.seqlen}; "
                f"make the layout for this sequence: cp.with_layout(seqlen={x.shape[dim]}), or in "
                "cross-attention shard queries with cp.shard, keys and values with cp.keys.shard"
            )
        parts = [x.narrow(dim, r.start, len(r)) for r in self.ranges[rank]]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def ascending(self, ranks: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Index that brings the rows of ``ranks``, laid end to end in that order, into ascending position;
        None where they already are."""
        return _ascending_index(self, ranks, device)

    def places(self, ranks: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...] | None:
        """Where the rows of each of ``ranks`` stand once the rows of all of them ascend; None where that is
        end to end."""
        return _places(self, ranks, device)


def contiguous(seqlen: int, ranks: int) -> Layout:
    """Rank r holds the r-th part of the sequence; parts differ by at most one token."""
    return Layout("contiguous", seqlen, tuple((part,) if part else () for part in _parts(seqlen, ranks)))


def zigzag(seqlen: int, ranks: int) -> Layout:
    """The sequence in ``2 * ranks`` chunks; rank r holds chunks r and ``2 * ranks - 1 - r``, so that every
    rank has about the same share of a causal mask (Megatron-core, ``get_batch_on_this_cp_rank``)."""
    chunks = _parts(seqlen, 2 * ranks)
    pairs = ((chunks[r], chunks[2 * ranks - 1 - r]) for r in range(ranks))
    return Layout("zigzag", seqlen, tuple(_ascending(pair) for pair in pairs))


def zigzag_documents(edges: tuple[int, ...], ranks: int) -> Layout:
    """Each document ``[edges[i], edges[i + 1])`` in zigzag by itself: a rank holds its two chunks of the
    first, then of the second, and so on (Megatron-core and TransformerEngine, packed ``thd`` batches).

    Raises:
        LcabError: ``edges`` do not ascend from 0, or a document does not divide into ``2 * ranks`` chunks.
    """
    if len(edges) < 2 or edges[0] != 0 or any(b < a for a, b in pairwise(edges)) or not edges[-1]:
        raise LcabError(f"document boundaries must ascend from 0 to the number of tokens, unlike {edges}")
    uneven = [] if ranks == 1 else [b - a for a, b in pairwise(edges) if (b - a) % (2 * ranks)]
    if uneven:
        raise LcabError(
            f"a document of {uneven[0]} tokens does not divide into the {2 * ranks} chunks of {ranks} "
            f"context-parallel ranks; pad every document to a multiple of {2 * ranks} tokens"
        )
    return _zigzag_documents(edges, ranks)


@lru_cache(maxsize=64)
def _zigzag_documents(edges: tuple[int, ...], ranks: int) -> Layout:
    held: list[list[range]] = [[] for _ in range(ranks)]
    for start, end in pairwise(edges):
        chunk = (end - start) // (2 * ranks)
        for rank, own in enumerate(held) if chunk else ():
            own.append(range(start + rank * chunk, start + (rank + 1) * chunk))
            own.append(range(end - (rank + 1) * chunk, end - rank * chunk))
    if ranks == 1:
        held = [[range(edges[-1])]]
    return Layout("zigzag per document", edges[-1], tuple(_ascending(own) for own in held))


def striped(seqlen: int, ranks: int, chunk: int | None = None) -> Layout:
    """Chunk i goes to rank ``i % ranks`` (Striped Attention, arXiv 2311.09431, deals single tokens)."""
    edges = _edges(seqlen, ranks, chunk)
    return _of_chunks("striped", edges, [range(r, len(edges) - 1, ranks) for r in range(ranks)])


def balanced(mask: AttentionMask, ranks: int, chunk: int | None = None) -> Layout:
    """Chunks of queries dealt so that every rank has the same number of them and about the same visible pairs
    of ``mask``, most documents on one rank where that is possible; or the parts of ``contiguous`` or
    ``zigzag``, where those are as even (`balance.deal`).

    Counts differ by at most one chunk of tokens, or two tokens. Equal masks give equal layouts, on every
    rank.
    """
    lengths = balance.halved(_default_chunk(mask.q_len, ranks)) if chunk is None else [chunk]
    edges, held = balance.deal(mask, ranks, [_edges(mask.q_len, ranks, length) for length in lengths])
    return _of_chunks("balanced", edges, held)


LAYOUTS: dict[str, Callable[..., Layout]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
    "balanced": balanced,
}


def require_name(name: str) -> None:
    """Check that a layout is called ``name``.

    Raises:
        LcabError: none is; the message gives the nearest.
    """
    if name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)


def make(
    name: str, ranks: int, seqlen: int, mask: AttentionMask | None = None, chunk: int | None = None
) -> Layout:
    """The layout of that name over ``ranks`` ranks; equal arguments give the same object while it is cached.

    Args:
        mask: what ``balanced`` evens out; the other layouts are the same for every mask.
        chunk: tokens per chunk that ``striped`` and ``balanced`` deal (the others have none). Left out:
            512, or less where a rank would get fewer than 32 chunks, down to 16 tokens; ``balanced``
            takes half or a quarter of that where it needs to for an imbalance of at most 1.03. A sequence
            shorter than ``ranks * chunk`` has chunks of ``seqlen // ranks`` tokens, so that no rank is
            left empty needlessly. The last chunk may be short.

    Raises:
        LcabError: no layout has that name, the sequence is empty, ``chunk`` is not positive, or ``balanced``
            has no mask of this length.
    """
    require_name(name)
    if seqlen < 1:
        raise LcabError(f"sequence length {seqlen} is not positive; give the number of tokens of the batch")
    if chunk is not None and chunk < 1:
        raise LcabError(f"chunk={chunk} is not positive; give the tokens of a chunk, or leave it out")
    if name == "balanced":
        if mask is None:
            raise LcabError(
                "layout 'balanced' follows the work of a mask; give it, as in cp.with_layout(mask=mask), or "
                "choose 'zigzag' or 'striped', which need none"
            )
        if mask.q_len != seqlen:
            raise LcabError(
                f"the mask is for {mask.q_len} queries, the sequence has {seqlen} tokens; give the "
                "mask of this sequence"
            )
        return _balanced(mask, ranks, chunk)
    return _without_mask(name, ranks, seqlen, chunk if name == "striped" else None)


def make_keys(name: str, ranks: int, mask: AttentionMask) -> Layout:
    """The layout of the keys of ``mask`` beside ``make(name, ranks, mask.q_len, mask)``: that one where there
    is a key for every query, else the one of that name over ``mask.k_len`` tokens. Keys beside ``balanced``
    queries are ``striped``: who holds a key does not say who works on it, but in a ring every block of keys
    should be about as much work as the next."""
    if mask.q_len == mask.k_len:
        return make(name, ranks, mask.q_len, mask)
    return make("striped" if name == "balanced" else name, ranks, mask.k_len)


@lru_cache(maxsize=64)  # keeps masks alive, half a megabyte each for ten thousand documents
def _balanced(mask: AttentionMask, ranks: int, chunk: int | None) -> Layout:
    return balanced(mask, ranks, chunk)


@lru_cache(maxsize=256)
def _without_mask(name: str, ranks: int, seqlen: int, chunk: int | None) -> Layout:
    return LAYOUTS[name](seqlen, ranks) if chunk is None else LAYOUTS[name](seqlen, ranks, chunk)


def areas(layout: Layout, mask: AttentionMask) -> list[int]:
    """Visible pairs of the queries of every rank: each rank's share of the FLOPs.

    Raises:
        LcabError: the mask is for another length.
    """
    if mask.q_len != layout.seqlen:
        raise LcabError(
            f"the mask is for {mask.q_len} queries, the layout for {layout.seqlen} tokens; make the layout "
            f"for this mask: cp.with_layout(mask=mask)"
        )
    held = sorted((r.start, rank) for rank, ranges in enumerate(layout.ranges) for r in ranges if r)
    per_range = mask.area_by_chunk([start for start, _ in held] + [layout.seqlen])
    total = [0] * len(layout.ranges)
    for (_, rank), area in zip(held, per_range.tolist(), strict=True):
        total[rank] += area
    return total


def imbalance(layout: Layout, mask: AttentionMask) -> float:
    """The largest rank's visible pairs over the mean of all ranks, at least 1: how much longer the slowest
    rank computes than if the work were even. 1 where nothing is visible."""
    work = areas(layout, mask)
    return max(work) * len(work) / sum(work) if any(work) else 1.0


@dataclass(frozen=True)
class View:
    """A mask between the query rows held by ``q_ranks`` and the key rows held by ``k_ranks``.

    ``k_ranks`` changes as keys travel; the layouts say which positions that means: ``layout`` of the queries,
    ``keys`` of the keys, which is the same one where it is left out.
    """

    mask: AttentionMask
    layout: Layout
    q_ranks: tuple[int, ...]
    k_ranks: tuple[int, ...]
    keys: Layout = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.keys is None:
            object.__setattr__(self, "keys", self.layout)

    def local(self) -> AttentionMask:
        """The mask in local rows and keys, both ascending in global position."""
        return _local(self)


@lru_cache(maxsize=1024)
def _local(view: View) -> AttentionMask:
    return _joined(view.mask.local(view.layout.rows(view.q_ranks), view.keys.rows(view.k_ranks)))


def _joined(mask: AttentionMask) -> AttentionMask:
    """The same cells in fewer slices: full rectangles of the same queries, side by side, are one.

    A chunk of queries sees most chunks of a peer in full; joined, a local mask has as many slices as there
    are chunks of queries and borders that cut one, not as many as there are pairs of chunks.
    """
    array = mask.array  # by query and key: as slices are disjoint, none comes between two that meet
    free = (array[:, 4] == NO_LO) & (array[:, 5] == NO_HI)
    before, after = array[:-1], array[1:]
    meet = (before[:, :2] == after[:, :2]).all(axis=1) & (before[:, 3] == after[:, 2]) & free[:-1] & free[1:]
    if not meet.any():
        return mask
    first, last = runs(~meet, len(array))
    joined = array[first]
    joined[:, 3] = array[last, 3]
    return AttentionMask.from_disjoint(mask.q_len, mask.k_len, joined)


@lru_cache(maxsize=64)  # an index of a million tokens is 8 MB on the device
def _ascending_index(layout: Layout, ranks: tuple[int, ...], device: torch.device) -> Tensor | None:
    positions = _concatenated(r for rank in ranks for r in layout.ranges[rank])
    order = positions.argsort()
    return None if bool((order[1:] > order[:-1]).all()) else order.to(device)


@lru_cache(maxsize=64)
def _places(layout: Layout, ranks: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...] | None:
    order = _ascending_index(layout, ranks, device)
    return None if order is None else order.argsort().split([layout.length(r) for r in ranks])


def _concatenated(ranges: Iterable[range]) -> Tensor:
    parts = [torch.arange(r.start, r.stop) for r in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _parts(n: int, parts: int) -> list[range]:
    """[0, n) in consecutive parts whose lengths differ by at most one."""
    edges = [n * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def _ascending(ranges: Iterable[range]) -> tuple[range, ...]:
    out: list[range] = []
    for r in sorted((r for r in ranges if r), key=lambda r: r.start):
        if out and out[-1].stop == r.start:
            out[-1] = range(out[-1].start, r.stop)
        else:
            out.append(r)
    return tuple(out)


def _default_chunk(seqlen: int, ranks: int) -> int:
    return min(CHUNK, max(balance.LEAST, seqlen // (ranks * CHUNKS_PER_RANK)))


def _edges(seqlen: int, ranks: int, chunk: int | None) -> list[int]:
    """Where the chunks of a sequence begin, and its end; see ``make`` for their length."""
    chunk = _default_chunk(seqlen, ranks) if chunk is None else chunk
    return [*range(0, seqlen, max(1, min(chunk, seqlen // ranks))), seqlen]


def _of_chunks(name: str, edges: list[int], held: Iterable[Iterable[int]]) -> Layout:
    """The layout in which rank r holds the chunks ``held[r]``."""
    return Layout(
        name, edges[-1], tuple(_ascending(range(edges[c], edges[c + 1]) for c in chunks) for chunks in held)
    )
