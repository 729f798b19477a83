"""Accuracy by where a token stands: sums over cells of tokens, exact however the tokens lie on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lcab_plugin.context_parallel import collectives
from lcab_plugin.training.batch_mask import Window
from lcab_plugin.training.data import Batch, PackedText, Text

_PARTS = 16  # of a sequence


class Evaluation(Text, Protocol):
    """Samples whose tokens fall into cells."""

    size: int  # number of cells

    def cells(self, batch: Batch) -> Tensor:
        """The cell of every token of a batch that `batch` made, int64 in the shape of its tokens; -1 for one
        that does not count."""

    def summary(self, totals: Tensor) -> dict[str, Any]:
        """What a record says of them, from `tally`'s sums over all tokens."""


class Scorer(Protocol):
    """The model of a trainer."""

    def read(self, step: int, text: Text) -> Window:
        """The micro-batches of ``text`` that this rank's data-parallel share of a step holds."""

    def tally(self, window: Window, cells: Sequence[Tensor], size: int) -> Tensor:
        """`tally` over all tokens of the global batch, on every rank; ``cells``: of each micro-batch."""


def evaluate(scorer: Scorer, evaluation: Evaluation, batches: int) -> dict[str, Any]:
    """The summary of an evaluation's first global batches (collective)."""
    totals = torch.zeros(evaluation.size, 3, dtype=torch.float64)
    for step in range(batches):
        window = scorer.read(step, evaluation)
        cells = [evaluation.cells(batch) for batch, _ in window.batches]
        totals += scorer.tally(window, cells, evaluation.size).cpu()
    return evaluation.summary(totals)


def scores(logits: Tensor, labels: Tensor, group: collectives.Group | None = None) -> Tensor:
    """``[2, b, t]``: each token's cross entropy, and 1 where its label has the highest logit of all.

    ``logits [b, t, vocabulary]`` float32; with a ``group``, each of its ranks has an equal part of the
    vocabulary, in their order.
    """
    size = logits.shape[-1]
    first = 0 if group is None else collectives.rank(group) * size
    inside = (labels >= first) & (labels < first + size)
    own = logits.gather(-1, (labels - first).clamp(0, size - 1)[..., None])[..., 0].where(inside, 0.0)
    highest, total = logits.amax(-1), logits.logsumexp(-1)
    if group is not None:
        collectives.all_reduce_sum(own, group)
        collectives.all_reduce_max(highest, group)
        total = highest + collectives.all_reduce_sum((total - highest).exp(), group).log()
    return torch.stack((total - own, (own >= highest).float()))


def tally(scored: Tensor, cells: Tensor, size: int) -> Tensor:
    """``[size, 3]`` float64: of the tokens in each cell the sum of losses, of hits, and their number.

    ``scored``: of `scores`; ``cells [b, t]``.
    """
    counted = cells >= 0
    losses, hits = scored.double()[:, counted]
    totals = torch.zeros(size, 3, dtype=torch.float64, device=scored.device)
    return totals.index_add_(0, cells[counted], torch.stack((losses, hits, torch.ones_like(hits)), -1))


def means(totals: Tensor) -> dict[str, list[Any]]:
    """``loss`` and ``accuracy`` of every cell, None without tokens, and ``tokens``."""
    rows = totals.tolist()
    return {
        "loss": [loss / n if n else None for loss, _, n in rows],
        "accuracy": [hits / n if n else None for _, hits, n in rows],
        "tokens": [int(n) for *_, n in rows],
    }


class ByPosition:
    """Next-token loss and accuracy of a text's unmasked tokens by their positions.

    In the document, as far as the sample holds it: 0, 1, 2-3, 4-7, 8-15 ..., the tokens of context that a
    token has, itself not counted; a loss that goes on falling says that context helps. In the sequence: 16
    equal parts; under masks of documents they should not differ.
    """

    def __init__(self, text: PackedText) -> None:
        self._text = text
        self._parts = min(_PARTS, text.seqlen)
        self._octaves = (text.seqlen - 1).bit_length() + 1
        self.size = self._octaves * self._parts

    def batch(self, samples: Sequence[int]) -> Batch:
        """The text's."""
        return self._text.batch(samples)

    def cells(self, batch: Batch) -> Tensor:
        """Document position and part of the sequence together."""
        document = np.concatenate([np.arange(n) for row in batch.lengths for n in row])
        octave = np.frexp(document)[1].astype(np.int64)  # the bits of a whole number
        part = np.arange(len(document)) % self._text.seqlen * self._parts // self._text.seqlen
        cells = torch.from_numpy(octave * self._parts + part).view_as(batch.tokens)
        return cells.where(batch.loss_mask, -1)

    def summary(self, totals: Tensor) -> dict[str, Any]:
        """``from`` are the first positions of the buckets."""
        table = totals.view(self._octaves, self._parts, 3)
        whole = means(table.sum((0, 1))[None])
        starts = [0, *(2**i for i in range(self._octaves - 1))]
        parts = [-(-i * self._text.seqlen // self._parts) for i in range(self._parts)]
        return {
            **{name: values[0] for name, values in whole.items()},
            "by_document_position": {"from": starts, **means(table.sum(1))},
            "by_sequence_position": {"from": parts, **means(table.sum(0))},
        }
