"""The recall task itself: what it asks, and that attention made by hand to answer it is scored right: all of
it where the mask lets it see, and nothing beyond a window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask
from lcab_plugin.training import evaluation
from lcab_plugin.training.batch_mask import Window, read_window, with_mask
from lcab_plugin.training.data import Corpus, Text, open_corpus, window_samples
from lcab_plugin.training.recall import KEY, Recall

SEQLEN, WIDTH = 512, 320  # WIDTH: above the vocabulary, for one-hot values


def corpus() -> Corpus:
    return open_corpus().split()[1]


class InductionHead:
    """A model of one attention layer, made by hand: a query is its last 4 tokens, a key the 4 tokens before
    its own, a value its own token; so attention points at what followed the same 4 tokens before."""

    def __init__(self, family: str, global_batch: int = 4) -> None:
        self.family, self.global_batch = family, global_batch

    def read(self, step: int, text: Text) -> Window:
        return read_window(text, self.family, window_samples(step, self.global_batch, 2, 0, 1))

    def tally(self, window: Window, cells: Sequence[Tensor], size: int) -> Tensor:
        totals = torch.zeros(size, 3, dtype=torch.float64)
        for (batch, mask), cell in zip(window.batches, cells, strict=True):
            logits = self.logits(batch.tokens, mask)
            totals += evaluation.tally(evaluation.scores(logits, batch.labels), cell, size)
        return totals

    def logits(self, tokens: Tensor, mask: AttentionMask) -> Tensor:
        ahead = torch.nn.functional.pad(tokens, (KEY, 0), value=-1)
        contexts = ahead.unfold(1, KEY, 1)  # [b, t + 1, 4]: the four before each place
        _, which = contexts.flatten(0, 1).unique(dim=0, return_inverse=True)
        signs = torch.randint(0, 2, (int(which.max()) + 1, WIDTH), generator=torch.Generator().manual_seed(0))
        codes = (2.0 * signs - 1)[which.view(contexts.shape[:2])][:, :, None]
        values = torch.nn.functional.one_hot(tokens, WIDTH).float()[:, :, None]
        q, k = codes[:, 1:], codes[:, :-1]
        return lcab.attention(q, k, values, mask, kernel="naive", scale=50 / WIDTH)[:, :, 0]


def accuracy(family: str, samples: int = 6) -> dict[int, float]:
    recall = Recall(corpus(), SEQLEN, samples)
    found = evaluation.evaluate(InductionHead(family), recall, -(-samples // 4))
    assert found["samples"] == samples
    assert found["tokens"] == [samples] * len(found["distance"])
    return dict(zip(found["distance"], found["accuracy"], strict=True))


@pytest.mark.parametrize("family", ["causal", "causal_document", "causal_blockwise", "prefix_lm_causal"])
def test_attention_that_sees_all_recalls_all(family: str) -> None:
    found = accuracy(family)
    assert list(found) == [8, 16, 32, 64, 128, 256, 448]
    assert set(found.values()) == {1.0}


def test_a_window_recalls_nothing_beyond_it() -> None:
    found = accuracy("sliding_window_causal")  # an eighth of the sample: 64 tokens to the left
    assert {distance: share for distance, share in found.items() if distance <= 64} == dict.fromkeys(
        (8, 16, 32, 64), 1.0
    )
    assert all(share < 0.4 for distance, share in found.items() if distance > 64)


def test_a_window_ends_where_the_distance_says() -> None:
    batch = Recall(corpus(), SEQLEN, 1).batch([0])
    head, asked = InductionHead("causal"), Recall(corpus(), SEQLEN, 1).cells(batch)
    place = asked[0].tolist().index(3)  # distance 64
    for left, right in ((64, True), (63, False)):
        logits = head.logits(batch.tokens, masks.sliding_window_causal(SEQLEN, left))
        hit = evaluation.scores(logits, batch.labels)[1, 0, place]
        assert bool(hit) is right


def test_keys_stand_where_they_should() -> None:
    recall = Recall(corpus(), SEQLEN, 8, seed=3)
    batch = recall.batch(range(8))
    cells = recall.cells(batch)
    for tokens, labels, row in zip(batch.tokens.tolist(), batch.labels.tolist(), cells.tolist(), strict=True):
        text = [*tokens, labels[-1]]
        assert labels == text[1:]
        assert sorted(cell for cell in row if cell >= 0) == list(range(recall.size))
        for place, cell in enumerate(row):
            if cell < 0:
                continue
            key, value = text[place - KEY + 1 : place + 1], text[place + 1]
            first = place - recall.distances[cell]
            assert text[first] == value
            assert text[first - KEY : first] == key
            found = [i for i in range(len(text)) if text[i : i + KEY] == key]
            assert found == [first - KEY, place - KEY + 1]
    assert torch.equal(batch.loss_mask, cells >= 0)
    assert batch.tokens.max() < 256  # what ends a document is in no sample


def test_a_sample_depends_on_its_number_and_the_seed_alone() -> None:
    some, other = Recall(corpus(), SEQLEN, 8), Recall(corpus(), SEQLEN, 8, seed=1)
    assert torch.equal(some.batch([5, 2]).tokens[1], some.batch([2]).tokens[0])
    assert some.batch([2]).digests == Recall(corpus(), SEQLEN, 3).batch([2]).digests
    assert some.batch([2]).digests != other.batch([2]).digests


def test_samples_that_fill_a_global_batch_do_not_count() -> None:
    recall = Recall(corpus(), SEQLEN, 3)
    cells = recall.cells(recall.batch([1, 2, 3]))
    assert (cells >= 0).sum(1).tolist() == [recall.size, recall.size, 0]


def test_every_family_takes_a_sample() -> None:
    recall = Recall(corpus(), 128, 2)
    for family in masks.names():
        batch, mask = with_mask(recall.batch([0, 1]), family)
        cells = recall.cells(batch)
        assert cells.shape == batch.tokens.shape
        assert mask.q_len == batch.tokens.shape[1]
        assert int((cells >= 0).sum()) == 2 * recall.size


def made(tokens: np.ndarray, vocab: int) -> Corpus:
    lengths = np.array([len(tokens)])
    return Corpus("made up", vocab, tokens, np.array([0]), lengths, "digest")


def test_any_vocabulary_will_do() -> None:
    tokens = np.random.default_rng(0).integers(0, 150_000, 1000)
    batch = Recall(made(tokens, 150_000), 256, 2).batch([0, 1])
    assert set(batch.tokens.flatten().tolist()) <= set(tokens.tolist())
    same = Recall(made(np.full(1000, 7), 50_000), 256, 2).batch([0])  # a text without choice
    assert 0 <= int(same.tokens.min()) < int(same.tokens.max()) < 50_000


def test_what_cannot_be_hidden_is_refused() -> None:
    with pytest.raises(LcabError, match="--recall hides keys in at least 128 tokens, --seqlen is 64"):
        Recall(corpus(), 64, 1)
    recall = Recall(made(np.arange(1000) % 2, 2), 512, 1)
    with pytest.raises(LcabError, match="2 different tokens"):
        recall.batch([0])
