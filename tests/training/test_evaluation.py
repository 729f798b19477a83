"""Sums over cells of tokens: exact, whoever holds the tokens and whatever shape a mask family gives them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lcab_plugin import layout
from lcab_plugin.training import evaluation
from lcab_plugin.training.batch_mask import with_mask
from lcab_plugin.training.data import Corpus, PackedText
from lcab_plugin.training.evaluation import ByPosition, scores, tally

LENGTHS = [5, 40, 1, 70, 200, 33, 300]


def text(seqlen: int = 96, **options: object) -> PackedText:
    lengths = np.array(LENGTHS)
    tokens = np.random.default_rng(0).integers(0, 50, lengths.sum())
    corpus = Corpus("made up", 50, tokens, np.cumsum(lengths) - lengths, lengths, "digest")
    return PackedText(corpus, seqlen, **options)  # type: ignore[arg-type]


def losses(shape: torch.Size) -> Tensor:
    return torch.stack(
        (
            torch.rand(shape, generator=torch.Generator().manual_seed(0)),
            torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).float(),
        )
    )


def test_scores_are_cross_entropy_and_whether_the_label_is_likeliest() -> None:
    logits = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(1))
    labels[0] = logits[0].argmax(-1)
    loss, hit = scores(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits.mT, labels, reduction="none"))
    assert torch.equal(hit, (logits.argmax(-1) == labels).float())
    assert hit[0].all()


def test_a_tally_sums_what_counts() -> None:
    scored = torch.tensor([[[1.0, 2.0, 4.0, 8.0]], [[1.0, 0.0, 1.0, 1.0]]])
    cells = torch.tensor([[2, 0, -1, 2]])
    assert tally(scored, cells, 3).tolist() == [[2, 0, 1], [0, 0, 0], [9, 2, 2]]
    assert tally(scored[:, :, :0], cells[:, :0], 3).tolist() == [[0, 0, 0]] * 3  # a rank without tokens
    assert evaluation.means(tally(scored, cells, 3)) == {
        "loss": [2, None, 4.5],
        "accuracy": [0, None, 1],
        "tokens": [1, 0, 2],
    }


@pytest.mark.parametrize("family", ["causal", "causal_document"])
@pytest.mark.parametrize("options", [{}, {"loss_mask": "uneven", "doc_lengths": "pile"}])
def test_buckets_are_those_of_a_count_by_hand(family: str, options: dict[str, str]) -> None:
    source = text(**options)
    by_position = ByPosition(source)
    plain = source.batch([3, 1])
    batch, _ = with_mask(plain, family)
    scored = losses(batch.tokens.shape)
    found = by_position.summary(tally(scored, by_position.cells(batch), by_position.size))

    rows = scored.view(2, *plain.tokens.shape)
    expected: dict[str, dict[int, list[tuple[float, float]]]] = {"document": {}, "sequence": {}}
    for row, lengths in enumerate(plain.lengths):
        places = [place for n in lengths for place in range(n)]
        for i in range(source.seqlen):
            if plain.loss_mask[row, i]:
                pair = rows[0, row, i].item(), rows[1, row, i].item()
                first = 0 if places[i] == 0 else 2 ** (places[i].bit_length() - 1)
                expected["document"].setdefault(first, []).append(pair)
                expected["sequence"].setdefault(i // 6 * 6, []).append(pair)
    for kind, by_first in expected.items():
        table = found[f"by_{kind}_position"]
        assert set(by_first) <= set(table["from"])
        for i, first in enumerate(table["from"]):
            pairs = by_first.get(first, [])
            assert table["tokens"][i] == len(pairs)
            for name, values in (("loss", [x for x, _ in pairs]), ("accuracy", [x for _, x in pairs])):
                mean = pytest.approx(float(np.mean(values)), rel=1e-6) if pairs else None
                assert table[name][i] == mean
        assert sum(table["tokens"]) == found["tokens"] == int(plain.loss_mask.sum())
    assert found["loss"] == pytest.approx(scored[0][batch.loss_mask].double().mean().item())


@pytest.mark.parametrize("seqlen", [2, 5, 16, 17, 100])
def test_buckets_cover_every_length(seqlen: int) -> None:
    by_position = ByPosition(text(seqlen))
    batch = by_position.batch([0, 1, 2])
    cells = by_position.cells(batch)
    assert torch.equal(cells >= 0, batch.loss_mask)
    assert int(cells.max()) < by_position.size
    found = by_position.summary(tally(losses(batch.tokens.shape), cells, by_position.size))
    for name in ("by_document_position", "by_sequence_position"):
        starts = found[name]["from"]
        assert starts == sorted(set(starts))
        assert starts[0] == 0
        assert starts[-1] < seqlen
        assert len(starts) == len(found[name]["loss"])


@pytest.mark.parametrize("kind", ["zigzag", "striped", "contiguous", "balanced"])
def test_ranks_that_share_a_sequence_sum_to_the_whole(kind: str) -> None:
    by_position = ByPosition(text())
    batch, mask = with_mask(by_position.batch([0, 4]), "causal_document")
    scored, cells = losses(batch.tokens.shape), by_position.cells(batch)
    whole = tally(scored, cells, by_position.size)
    cut = layout.make(kind, 4, mask.q_len, mask=mask if kind == "balanced" else None)
    parts = [
        tally(cut.shard(scored, rank, dim=2), cut.shard(cells, rank, dim=1), by_position.size)
        for rank in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=0)
