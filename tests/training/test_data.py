"""Packing, held against a loop over tokens; corpora of every kind; the same global batch for every split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcab_plugin.errors import LcabError
from lcab_plugin.training.data import (
    BYTE_VOCAB,
    END_OF_DOCUMENT,
    Corpus,
    PackedText,
    batch_digest,
    open_corpus,
    window_samples,
)


def corpus_of(documents: list[list[int]], vocab: int = 1000) -> Corpus:
    """Documents with a gap before each, so that where they start matters."""
    tokens = np.concatenate([[999, *document] for document in documents])
    lengths = np.array([len(document) for document in documents])
    return Corpus("a test", vocab, tokens, np.cumsum(lengths + 1) - lengths, lengths, "")


def random_corpus(seed: int) -> Corpus:
    rng = np.random.default_rng(seed)
    return corpus_of(
        [rng.integers(0, 900, size).tolist() for size in rng.integers(1, 30, rng.integers(1, 12))]
    )


def stream(corpus: Corpus, count: int) -> list[tuple[int, int]]:
    """(token, document number) of the first tokens, laps counted on: the loop that packing must equal."""
    out: list[tuple[int, int]] = []
    document = 0
    while len(out) < count:
        i = document % len(corpus.lengths)
        out += [(int(corpus.tokens[corpus.starts[i] + j]), document) for j in range(corpus.lengths[i])]
        document += 1
    return out[:count]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("seqlen", [2, 7, 64, 500])
def test_samples_are_the_documents_in_order(seed: int, seqlen: int) -> None:
    corpus = random_corpus(seed)
    text = PackedText(corpus, seqlen, shuffle=False)
    assert text.samples_per_epoch == max(1, corpus.total // seqlen)
    batch = text.batch(range(text.samples_per_epoch))
    expected = stream(corpus, text.samples_per_epoch * seqlen + 1)
    tokens, documents = (torch.tensor(column) for column in zip(*expected, strict=True))

    assert torch.equal(batch.tokens.flatten(), tokens[:-1])
    assert torch.equal(batch.labels.flatten(), tokens[1:])
    assert torch.equal(batch.loss_mask.flatten(), documents[1:] == documents[:-1])
    for row in range(text.samples_per_epoch):
        inside = documents[row * seqlen : (row + 1) * seqlen]
        _, lengths = inside.unique_consecutive(return_counts=True)
        assert batch.lengths[row].tolist() == lengths.tolist()
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
        assert torch.equal(batch.positions[row], positions)


def test_an_epoch_visits_every_sample_once_and_the_next_in_another_order() -> None:
    corpus = corpus_of([list(range(400))])
    text = PackedText(corpus, 10, seed=3)
    epochs = [text.batch(range(40 * e, 40 * e + 40)).tokens[:, 0].tolist() for e in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 400, 10))
    other = PackedText(corpus, 10, seed=4).batch(range(40)).tokens[:, 0].tolist()
    assert other != epochs[0]


@pytest.mark.parametrize("options", [{}, {"doc_lengths": "pile"}, {"loss_mask": "uneven"}])
def test_a_sample_depends_on_its_number_alone(options: dict[str, Any]) -> None:
    corpus, _ = open_corpus().split()
    one, other = (PackedText(corpus, 256, seed=1, **options) for _ in range(2))
    other.batch([3, 5])
    a, b = one.batch([7, 8, 900]), other.batch([900, 7])
    for name in ("tokens", "labels", "loss_mask", "positions"):
        assert torch.equal(getattr(a, name)[[2, 0]], getattr(b, name))
    assert {n: a.digests[n] for n in (7, 900)} == b.digests
    assert PackedText(corpus, 256, seed=2, **options).batch([7]).digests != {7: a.digests[7]}


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_every_split_reads_the_same_global_batch(dp_size: int, micro_batch: int) -> None:
    text = PackedText(open_corpus().split()[0], 128, loss_mask="uneven", doc_lengths="prolong64k")
    whole = [text.batch(window_samples(step, 8, 8, 0, 1)[0]) for step in range(2)]
    for step, batch in enumerate(whole):
        windows = [window_samples(step, 8, micro_batch, rank, dp_size) for rank in range(dp_size)]
        assert sorted(n for window in windows for samples in window for n in samples) == [*batch.digests]
        assert all(len(window) == 8 // micro_batch // dp_size for window in windows)
        shares = [text.batch(samples).digests for window in windows for samples in window]
        assert batch_digest(reversed(shares)) == batch_digest([batch.digests])
    assert batch_digest([whole[0].digests]) != batch_digest([whole[1].digests])


def test_a_digest_tells_ranks_that_read_different_text() -> None:
    with pytest.raises(LcabError, match="sample 5"):
        batch_digest([{5: "a"}, {6: "b"}, {5: "c"}])


@pytest.mark.parametrize(("batch", "micro", "dp"), [(6, 2, 2), (1, 2, 1), (0, 1, 1)])
def test_a_batch_that_does_not_divide_is_refused(batch: int, micro: int, dp: int) -> None:
    with pytest.raises(LcabError, match=f"multiple of {micro * dp}"):
        window_samples(0, batch, micro, 0, dp)


def test_sampled_lengths_cut_the_text_instead_of_its_documents() -> None:
    text = PackedText(corpus_of([list(range(900))]), 200, doc_lengths="pile", shuffle=False)
    batch = text.batch([0, 1])
    for row, lengths in enumerate(batch.lengths):
        assert lengths.sum() == 200
        assert lengths.max() <= 50
        assert np.array_equal(np.flatnonzero(~batch.loss_mask[row].numpy()), np.cumsum(lengths) - 1)
    assert batch.lengths[0].tolist() != batch.lengths[1].tolist()
    assert torch.equal(batch.tokens.flatten(), torch.arange(400))


def test_the_uneven_loss_mask_is_very_uneven_and_never_empty() -> None:
    corpus, _ = open_corpus().split()
    plain, uneven = (PackedText(corpus, 512, loss_mask=mask).batch(range(64)) for mask in ("none", "uneven"))
    assert torch.equal(plain.tokens, uneven.tokens)
    assert not (uneven.loss_mask & ~plain.loss_mask).any()
    counts = uneven.loss_mask.sum(1)
    assert counts.min() >= 1
    assert counts.max() > 20 * counts.min()
    for row, lengths in enumerate(uneven.lengths):
        for part in uneven.loss_mask[row].split(lengths.tolist()):
            assert part.any() or len(part) == 1
            assert (part[:-1].diff() if len(part) > 2 else part[:0]).sum() <= 1  # one answer, at the end


def test_the_default_corpus_is_python_s_own_documentation() -> None:
    corpus = open_corpus()
    assert corpus.vocab == BYTE_VOCAB
    assert corpus.facts()["documents"] > 50
    ends = corpus.starts + corpus.lengths
    assert (corpus.tokens[ends - 1] == END_OF_DOCUMENT).all()
    assert (corpus.tokens == END_OF_DOCUMENT).sum() == len(corpus.lengths)
    assert b"statement" in corpus.tokens[corpus.tokens < 256].astype(np.uint8).tobytes()
    assert open_corpus().digest == corpus.digest


def test_train_and_validation_share_no_document() -> None:
    corpus = open_corpus()
    train, validation = corpus.split()
    assert sorted([*train.starts, *validation.starts]) == corpus.starts.tolist()
    assert 0.02 < validation.total / corpus.total <= 0.05


@pytest.mark.parametrize(
    ("documents", "expected"), [([[0] * 100], 5), ([[0] * 9, [0] * 3], 3), ([[1, 2]], 1)]
)
def test_few_documents_are_split_too(documents: list[list[int]], expected: int) -> None:
    corpus = corpus_of(documents)
    train, validation = corpus.split()
    assert validation.total == expected
    assert train.total + validation.total == corpus.total
    with pytest.raises(LcabError, match="1 token"):
        corpus_of([[1]]).split()


def test_a_file_and_a_folder_of_text(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"xyz")
    (tmp_path / "sub" / "a.md").write_bytes("é".encode())
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"no")
    folder = open_corpus(str(tmp_path))
    assert folder.tokens.tolist() == [*b"xyz", END_OF_DOCUMENT, *"é".encode(), END_OF_DOCUMENT]
    assert folder.lengths.tolist() == [4, 3]
    one = open_corpus(str(tmp_path / "b.txt"), vocab=300)
    assert (one.tokens.tolist(), one.vocab) == ([*b"xyz", END_OF_DOCUMENT], 300)


def test_sources_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LcabError, match="does not exist"):
        open_corpus(str(tmp_path / "missing"))
    with pytest.raises(LcabError, match="no text"):
        open_corpus(str(tmp_path))
    (tmp_path / "picture.png").write_bytes(b"\x89\0\0")
    with pytest.raises(LcabError, match=r"picture\.png"):
        open_corpus(str(tmp_path))
    with pytest.raises(LcabError, match="at least 257"):
        open_corpus(None, vocab=256)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seqlen": 1}, "--seqlen 1"),
        ({"seed": -1}, "--seed -1"),
        ({"doc_lengths": "piles"}, "pile"),
        ({"loss_mask": "unevn"}, "uneven"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(LcabError, match=words):
        PackedText(random_corpus(0), **{"seqlen": 8, **arguments})


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    text = PackedText(corpus_of([[1, 2, 3, 40]], vocab=40), 3)
    with pytest.raises(LcabError, match="token 40, outside --vocab 40"):
        text.batch([0])
