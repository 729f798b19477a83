"""Packed batches in zigzag per document, against the chunks written out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lcab_plugin import layout as layouts
from lcab_plugin.errors import LcabError


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_document_is_cut_by_itself(ranks: int) -> None:
    edges = (0, 16, 16, 48, 64)
    layout = layouts.zigzag_documents(edges, ranks)
    for rank in range(ranks):
        chunks = [torch.arange(a, b).chunk(2 * ranks) for a, b in pairwise(edges) if b > a]
        wanted = torch.cat([c for parts in chunks for c in (parts[rank], parts[2 * ranks - 1 - rank])])
        assert torch.equal(layout.positions(rank), wanted.sort().values)
        assert torch.equal(layout.positions(rank), wanted), "rows of a rank ascend"
    assert layouts.zigzag_documents(edges, ranks) is layout
    whole = layouts.make("zigzag", ranks, 64)
    one = layouts.zigzag_documents((0, 64), ranks)
    assert one.ranges == whole.ranges


def test_lengths_that_do_not_divide() -> None:
    assert layouts.zigzag_documents((0, 3, 10), 1).length(0) == 10
    with pytest.raises(LcabError, match="document of 6 tokens does not divide into the 4 chunks of 2"):
        layouts.zigzag_documents((0, 6, 14), 2)
    for edges in ((0,), (1, 4), (0, 8, 4), (0, 0)):
        with pytest.raises(LcabError, match="must ascend from 0"):
            layouts.zigzag_documents(edges, 2)
