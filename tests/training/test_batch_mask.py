"""The mask of a batch against its rows' own masks, for every family."""

from __future__ import annotations

import pytest
import torch

from lcab_plugin import masks
from lcab_plugin.errors import LcabError
from lcab_plugin.training.batch_mask import with_mask
from lcab_plugin.training.data import Batch, PackedText, open_corpus

SEQLEN = 64


@pytest.fixture(scope="module")
def batch() -> Batch:
    return PackedText(open_corpus().split()[0], SEQLEN, doc_lengths="pile").batch([0, 1, 2])


@pytest.mark.parametrize("family", masks.names())
def test_rows_see_their_own_row_alone(batch: Batch, family: str) -> None:
    seen, mask = with_mask(batch, family)
    dense = mask.to_dense()
    if not masks.needs_lengths(family):
        assert seen.tokens.shape == (3, SEQLEN)
        assert mask.q_len == SEQLEN
        return
    assert seen.tokens.shape == seen.loss_mask.shape == (1, 3 * SEQLEN)
    assert torch.equal(seen.tokens.view(3, SEQLEN), batch.tokens)
    for row in range(3):
        one = Batch(
            *(x[row : row + 1] for x in (batch.tokens, batch.labels, batch.loss_mask, batch.positions)),
            (batch.lengths[row],),
            {},
        )
        rows = slice(row * SEQLEN, (row + 1) * SEQLEN)
        assert torch.equal(dense[rows, rows], with_mask(one, family)[1].to_dense())
        dense[rows, rows] = False
    assert not dense.any()


def test_the_documents_of_a_causal_batch(batch: Batch) -> None:
    _, mask = with_mask(batch, "causal_document")
    lengths = [n for row in batch.lengths for n in row.tolist()]
    assert mask == masks.causal_document(lengths)


@pytest.mark.parametrize("family", masks.names())
def test_positions_restart_where_documents_are_blind_to_each_other(batch: Batch, family: str) -> None:
    positions = with_mask(batch, family)[0].positions.view(3, SEQLEN)
    own = batch.positions if family.endswith("_document") else torch.arange(SEQLEN).expand(3, -1)
    assert torch.equal(positions, own)


def test_an_unknown_family_is_named(batch: Batch) -> None:
    with pytest.raises(LcabError, match="causal_document"):
        with_mask(batch, "causal_documents")
