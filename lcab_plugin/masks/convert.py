"""Masks from other libraries' descriptions: cu_seqlens, MagiAttention's ranges, dense booleans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lcab_plugin.errors import LcabError
from lcab_plugin.masks.checks import integers
from lcab_plugin.masks.geometry import NO_HI, NO_LO, Ints
from lcab_plugin.masks.slices import AttentionMask

FULL, CAUSAL, INVCAUSAL, BICAUSAL = range(4)  # MagiAttention's AttnMaskType as integers


def from_cu_seqlens(
    cu_q: Sequence[int] | torch.Tensor, cu_k: Sequence[int] | torch.Tensor | None = None, causal: bool = True
) -> AttentionMask:
    """The documents of flash-attn's varlen functions: [0, end of the first, end of the second, ...].

    `cu_k` is `cu_q` unless given. Where a document's queries and keys differ in number, causal is
    bottom-right aligned as in flash-attn: its last query sees its last key. Documents without queries or keys
    vanish.

    Raises LcabError for bounds that do not start at 0 and ascend, or that differ in number of documents.
    """
    q = _cumulative("cu_q", cu_q)
    k = q if cu_k is None else _cumulative("cu_k", cu_k)
    if len(q) != len(k):
        raise LcabError(f"cu_q and cu_k must have as many documents: {len(q) - 1} and {len(k) - 1}.")
    hi = k[1:] - q[1:] if causal else np.full(len(q) - 1, NO_HI)
    slices = np.stack([q[:-1], q[1:], k[:-1], k[1:], np.full_like(hi, NO_LO), hi], axis=1)
    return AttentionMask.from_disjoint(int(q[-1]), int(k[-1]), slices)


def from_ranges(
    q_ranges: Sequence[Sequence[int]] | torch.Tensor,
    k_ranges: Sequence[Sequence[int]] | torch.Tensor,
    types: Sequence[int] | torch.Tensor,
    q_len: int | None = None,
    k_len: int | None = None,
) -> AttentionMask:
    """MagiAttention's slices: query ranges and key ranges, [start, end) each, and a type for each pair.

    0 FULL; 1 CAUSAL, the last query sees up to the last key (bottom-right aligned); 2 INVCAUSAL, the first
    query sees from the first key on (top-left aligned); 3 BICAUSAL, both. The lengths are the largest ends
    unless given.

    Raises LcabError for ranges, types or lengths that do not fit together, and for slices that share a cell.
    """
    q, k = _pairs("q_ranges", q_ranges), _pairs("k_ranges", k_ranges)
    kind = integers("types", types)
    if not len(q) == len(k) == len(kind):
        raise LcabError(
            f"one type a pair of ranges: {len(q)} q_ranges, {len(k)} k_ranges and {len(kind)} types."
        )
    if (kind > BICAUSAL).any():
        raise LcabError(f"types are 0 FULL, 1 CAUSAL, 2 INVCAUSAL and 3 BICAUSAL, not {kind.tolist()}.")
    lo = np.where((kind == INVCAUSAL) | (kind == BICAUSAL), k[:, 0] - q[:, 0], NO_LO)
    hi = np.where((kind == CAUSAL) | (kind == BICAUSAL), k[:, 1] - q[:, 1], NO_HI)
    q_len = int(q.max(initial=0)) if q_len is None else q_len
    k_len = int(k.max(initial=0)) if k_len is None else k_len
    return AttentionMask(q_len, k_len, np.column_stack([q, k, lo, hi]))


def from_dense(dense: torch.Tensor) -> AttentionMask:
    """The exact mask of a bool matrix [q_len, k_len], True = may attend. Meant for small ones.

    Greedy: each run of visible keys in a row is continued in the next row for as long as its two edges move
    as a slice's do (the left one stays, then steps; the right one steps, then stays). Few slices for the
    masks of the field, though not always the fewest. O(q_len * k_len).
    """
    if dense.dtype != torch.bool or dense.ndim != 2:
        raise LcabError(f"from_dense wants a bool matrix, not {dense.dtype} {list(dense.shape)}.")
    edges = np.diff(np.pad(dense.detach().cpu().numpy().astype(np.int8), ((0, 0), (1, 1))), axis=1)
    done = [np.empty((0, 6), dtype=np.int64)]
    # Of each growing slice: q_start; start and end of its first run; start and end of its latest run; whether
    # the start has stepped; whether the end has stayed.
    live = np.empty((0, 7), dtype=np.int64)
    for row in range(len(edges)):
        start, end = np.flatnonzero(edges[row] == 1), np.flatnonzero(edges[row] == -1)
        new = np.full_like(start, row), start, end, start, end, np.zeros_like(start), np.zeros_like(start)
        grown = np.stack(new, axis=1)
        before = np.searchsorted(live[:, 3], start, side="right") - 1  # the one slice that could go on here
        candidate = live[before] if len(live) else np.zeros_like(grown)
        step, grow = start - candidate[:, 3], end - candidate[:, 4]
        stepped, stayed = candidate[:, 5] | (step == 1), candidate[:, 6] | (grow == 0)
        goes_on = (before >= 0) & (step == stepped) & (grow == 1 - stayed)
        grown[goes_on, :3] = candidate[goes_on, :3]
        grown[goes_on, 5:] = np.column_stack([stepped, stayed])[goes_on]
        done.append(_finished(np.delete(live, before[goes_on], axis=0), row))
        live = grown
    done.append(_finished(live, len(edges)))
    q_len, k_len = dense.shape
    return AttentionMask.from_disjoint(q_len, k_len, np.concatenate(done))


def _finished(live: Ints, q_end: int) -> Ints:
    """The slices of from_dense's growing slices whose last row is q_end - 1."""
    q_start, first_start, first_end, start, end, stepped, _ = live.T
    lo = np.where(stepped == 1, start - (q_end - 1), NO_LO)
    hi = np.where(end > first_end, first_end - 1 - q_start, NO_HI)
    return np.stack([q_start, np.full_like(q_start, q_end), first_start, end, lo, hi], axis=1)


def _cumulative(name: str, values: Sequence[int] | torch.Tensor) -> Ints:
    array = integers(name, values)
    if not len(array) or array[0] != 0 or (np.diff(array) < 0).any():
        raise LcabError(f"{name} must start at 0 and never descend, unlike {array.tolist()[:8]}.")
    return array


def _pairs(name: str, ranges: Sequence[Sequence[int]] | torch.Tensor) -> Ints:
    array = integers(name, ranges, ndim=2)
    if not array.size:
        return array.reshape(0, 2)
    if array.shape[1] != 2:
        raise LcabError(f"{name} must be [start, end) pairs, not {list(array.shape)}.")
    return array
