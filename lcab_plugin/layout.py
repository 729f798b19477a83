"""Which global token positions each context-parallel rank holds.

Positions travel with the tensors: RoPE, the loss and every local mask read them here. A rank's rows ascend
in global position; shards may differ in length, and a rank may hold no rows at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.masks import AttentionMask


@dataclass(frozen=True)
class Layout:
    """Row ranges of every rank, ``ranges[rank]``, over a sequence of ``seqlen`` tokens."""

    name: str
    seqlen: int
    ranges: tuple[tuple[range, ...], ...]

    def __hash__(self) -> int:
        return hash((self.name, self.seqlen, len(self.ranges)))

    def rows(self, ranks: Iterable[int]) -> tuple[range, ...]:
        """The rows that ``ranks`` hold together, ascending, neighbours joined."""
        return _ascending(r for rank in ranks for r in self.ranges[rank])

    def length(self, rank: int) -> int:
        """Number of tokens ``rank`` holds."""
        return sum(map(len, self.ranges[rank]))

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Global positions of the rows of ``rank``, int64 [tokens]."""
        return _concatenated(self.ranges[rank]).to(device or "cpu")

    def shard(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """The rows of ``rank`` from ``x``, whose dimension ``dim`` is the whole sequence."""
        if x.shape[dim] != self.seqlen:
            raise LcabError(
                f"dimension {dim} of the tensor has {x.shape[dim]} tokens, the layout {self.seqlen}; "
                f"make the layout for this sequence: cp.with_layout(seqlen={x.shape[dim]})"
            )
        parts = [x.narrow(dim, r.start, len(r)) for r in self.ranges[rank]]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def ascending(self, ranks: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Index that brings the rows of ``ranks``, laid end to end in that order, into ascending position;
        None where they already are."""
        return _ascending_index(self, ranks, device)


def contiguous(seqlen: int, ranks: int) -> Layout:
    """Rank r holds the r-th part of the sequence; parts differ by at most one token."""
    return Layout("contiguous", seqlen, tuple((part,) if part else () for part in _parts(seqlen, ranks)))


def zigzag(seqlen: int, ranks: int) -> Layout:
    """The sequence in ``2 * ranks`` chunks; rank r holds chunks r and ``2 * ranks - 1 - r``, so that every
    rank has about the same share of a causal mask (Megatron-core, ``get_batch_on_this_cp_rank``)."""
    chunks = _parts(seqlen, 2 * ranks)
    pairs = ((chunks[r], chunks[2 * ranks - 1 - r]) for r in range(ranks))
    return Layout("zigzag", seqlen, tuple(_ascending(pair) for pair in pairs))


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {"contiguous": contiguous, "zigzag": zigzag}


@lru_cache(maxsize=256)
def make(name: str, ranks: int, seqlen: int) -> Layout:
    """The layout of that name over ``ranks`` ranks.

    Raises:
        LcabError: no layout has that name, or the sequence is empty.
    """
    if name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    if seqlen < 1:
        raise LcabError(f"sequence length {seqlen} is not positive; give the number of tokens of the batch")
    return LAYOUTS[name](seqlen, ranks)


@dataclass(frozen=True)
class View:
    """A mask between the query rows held by ``q_ranks`` and the key rows held by ``k_ranks``.

    ``k_ranks`` changes as keys travel; the layout says which positions that means.
    """

    mask: AttentionMask
    layout: Layout
    q_ranks: tuple[int, ...]
    k_ranks: tuple[int, ...]

    def local(self) -> AttentionMask:
        """The mask in local rows and keys, both ascending in global position."""
        return _local(self)


@lru_cache(maxsize=1024)
def _local(view: View) -> AttentionMask:
    return view.mask.local(view.layout.rows(view.q_ranks), view.layout.rows(view.k_ranks))


@lru_cache(maxsize=64)  # an index of a million tokens is 8 MB on the device
def _ascending_index(layout: Layout, ranks: tuple[int, ...], device: torch.device) -> Tensor | None:
    positions = _concatenated(r for rank in ranks for r in layout.ranges[rank])
    order = positions.argsort()
    return None if bool((order[1:] > order[:-1]).all()) else order.to(device)


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
