"""The attention mask of a packed batch, by the name of its family, and the batches of a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcab_plugin.masks import AttentionMask, from_name, needs_lengths
from lcab_plugin.training.data import Batch, Ints, Text


class Window(NamedTuple):
    """The micro-batches of one optimizer step that a data-parallel rank reads, whole, with their masks."""

    batches: list[tuple[Batch, AttentionMask]]
    digests: dict[int, str]
    area: int  # (query, key) pairs that attend in them


def read_window(text: Text, family: str, samples: Iterable[list[int]]) -> Window:
    """The micro-batches of these samples under masks of a family."""
    batches: list[tuple[Batch, AttentionMask]] = []
    digests: dict[int, str] = {}
    area = 0
    for numbers in samples:
        batch, mask = with_mask(text.batch(numbers), family)
        batches.append((batch, mask))
        digests |= batch.digests
        area += mask.area * len(batch.tokens)
    return Window(batches, digests, area)


def with_mask(batch: Batch, family: str) -> tuple[Batch, AttentionMask]:
    """The mask of ``batch``, and the batch in the shape and with the positions that it asks for.

    A family that knows only the number of tokens (``masks.needs_lengths`` is False) is one mask for all
    rows, and the batch stays ``[rows, seqlen]``. A family of documents differs by row: the rows are laid end
    to end into ``[1, rows * seqlen]`` under one mask that is block-diagonal over them.

    Positions restart in each document where documents cannot see one another (the families named
    ``*_document``), and count the tokens of the sample otherwise.

    Sizes that a family wants besides documents follow from the sample: a window, block or prefix is an eighth
    of it (a prefix in documents an eighth of its document), global tokens are a 64th; block_sparse has at
    most 64 blocks to a side and keeps an eighth of them, the same ones in every batch.

    Raises:
        LcabError: no family has that name.
    """
    seqlen = batch.tokens.shape[1]
    if not family.endswith("_document"):
        batch = replace(batch, positions=torch.arange(seqlen).expand_as(batch.tokens))
    if not needs_lengths(family):
        return batch, from_name(family, seqlen, **_sizes(family, seqlen, batch.lengths[0]))
    rows = [
        from_name(family, seqlen, lengths=lengths, **_sizes(family, seqlen, lengths)).array
        for lengths in batch.lengths
    ]
    shift = np.array([seqlen, seqlen, seqlen, seqlen, 0, 0])  # band limits are distances: they stay
    slices = np.concatenate([row + i * shift for i, row in enumerate(rows)])
    total = len(rows) * seqlen
    return _flattened(batch), AttentionMask.from_disjoint(total, total, slices)


def _sizes(family: str, seqlen: int, lengths: Ints) -> dict[str, Any]:
    eighth = max(1, seqlen // 8)
    sizes: dict[str, dict[str, Any]] = {
        "sliding_window": {"window": eighth},
        "sliding_window_causal": {"window": eighth},
        "prefix_lm_causal": {"prefix": eighth},
        "prefix_lm_document": {"prefixes": lengths // 8},
        "global_sliding_window": {"global_tokens": max(1, seqlen // 64), "window": eighth},
        "block_causal_document": {"block": eighth},
        "block_sparse": {"block": -(-seqlen // 64), "keep": 1 / 8},
    }
    return sizes.get(family, {})


def _flattened(batch: Batch) -> Batch:
    def flat(x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    return replace(
        batch,
        tokens=flat(batch.tokens),
        labels=flat(batch.labels),
        loss_mask=flat(batch.loss_mask),
        positions=flat(batch.positions),
        lengths=(np.concatenate(batch.lengths),),
    )
