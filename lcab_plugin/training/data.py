"""Text as documents, packed into samples of equal length.

A sample is a pure function of (text, seed, sample index): no rank, degree or strategy enters it, so every run
over the same text sees the same global batch at the same step, resumed or not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.masks import distributions, sample_lengths
from lcab_plugin.training import megatron_dataset

END_OF_DOCUMENT = 256  # follows the 256 byte values; closes every document of a text
BYTE_VOCAB = 257
LOSS_MASKS = ("none", "uneven")

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Documents laid end to end.

    ``tokens`` is one integer array ``[total]`` (a memory map for Megatron datasets), of which document i is
    ``[starts[i], starts[i] + lengths[i])``. ``digest`` identifies the text: sha256 over tokens and lengths;
    for a Megatron dataset over its boundaries and the first MiB of tokens, so that opening one stays cheap.
    """

    source: str
    vocab: int
    tokens: NDArray[np.integer]
    starts: Ints
    lengths: Ints
    digest: str

    @property
    def total(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum())

    def facts(self) -> dict[str, Any]:
        """What a record says of it."""
        return {
            "source": self.source,
            "documents": len(self.lengths),
            "tokens": self.total,
            "vocab": self.vocab,
        }

    def split(self, validation: float = 0.05) -> tuple[Corpus, Corpus]:
        """``(train, validation)``.

        Whole documents, in an order that only their number decides, are held out while they fit in the
        fraction ``validation`` of the tokens; if none fits, the shortest is. A corpus of one document is cut
        at that fraction from its end.
        """
        budget = int(self.total * validation)
        if self.total < 2:
            raise LcabError(f"{self.source} has {self.total} token; training and validation need one each.")
        if len(self.lengths) == 1:
            cut = self.total - max(1, budget)
            return self._part(self.starts, np.array([cut])), self._part(self.starts + cut, self.lengths - cut)
        order = np.random.default_rng(0).permutation(len(self.lengths))
        order = order[self.lengths[order] <= budget]
        held = order[np.cumsum(self.lengths[order]) <= budget]
        held = np.sort(held) if len(held) else np.array([self.lengths.argmin()])
        train = np.ones(len(self.lengths), dtype=bool)
        train[held] = False
        return self._part(self.starts[train], self.lengths[train]), self._part(
            self.starts[held], self.lengths[held]
        )

    def _part(self, starts: Ints, lengths: Ints) -> Corpus:
        return Corpus(self.source, self.vocab, self.tokens, starts, lengths, self.digest)


def open_corpus(source: str | None = None, vocab: int | None = None) -> Corpus:
    """Open a text.

    Args:
        source: None for the prose that Python ships (``pydoc_data.topics``, one document a topic); a text
            file (one document), a folder (one document a file, recursively, sorted by path, hidden files left
            out), or a Megatron dataset (its prefix, ``.bin`` or ``.idx``). Text is read as bytes, and token
            256 ends every document.
        vocab: vocabulary of the model. Text needs 257, its default; a Megatron dataset must be told.

    Raises:
        LcabError: the source does not exist, holds no text, or does not fit ``vocab``.
    """
    if source is None:
        from pydoc_data.topics import topics

        return _from_texts(
            "pydoc_data.topics", [topics[key].encode() for key in sorted(topics) if topics[key]], vocab
        )
    path = Path(source)
    if pair := megatron_dataset.paths(source):
        return _from_megatron(source, pair, vocab)
    if not path.exists():
        raise LcabError(
            f"--data {source!r} does not exist; give a text file, a folder of them, or the prefix of a "
            "Megatron .bin/.idx pair."
        )
    return _from_texts(source, _read_texts(path), vocab)


def _read_texts(path: Path) -> list[bytes]:
    """Contents of a file, or of every file below a folder by path; empty files are left out."""
    files = [path]
    if path.is_dir():
        below = (f.relative_to(path) for f in path.rglob("*") if f.is_file())
        files = [path / f for f in sorted(below) if not any(part.startswith(".") for part in f.parts)]
    texts = []
    for file in files:
        text = file.read_bytes()
        if b"\0" in text:
            raise LcabError(f"{file} holds NUL bytes and is not text; leave it out of --data.")
        if text:
            texts.append(text)
    return texts


def _from_texts(source: str, texts: list[bytes], vocab: int | None) -> Corpus:
    if not texts:
        raise LcabError(f"{source} holds no text; give files that are not empty.")
    if vocab is not None and vocab < BYTE_VOCAB:
        raise LcabError(
            f"--vocab {vocab} is too small for {source}: text is read as 256 byte values and an end of "
            f"document; give at least {BYTE_VOCAB} or leave --vocab out."
        )
    lengths = np.array([len(text) + 1 for text in texts], dtype=np.int64)
    ends = np.cumsum(lengths)
    tokens = np.empty(ends[-1], dtype=np.uint16)
    inside = np.ones(len(tokens), dtype=bool)
    inside[ends - 1] = False
    tokens[inside] = np.frombuffer(b"".join(texts), dtype=np.uint8)
    tokens[~inside] = END_OF_DOCUMENT
    return Corpus(source, vocab or BYTE_VOCAB, tokens, ends - lengths, lengths, _sha256(tokens, lengths))


def _from_megatron(source: str, pair: tuple[Path, Path], vocab: int | None) -> Corpus:
    if vocab is None:
        raise LcabError(f"{source} does not say its vocabulary; give --vocab, the size of its tokenizer.")
    tokens, boundaries = megatron_dataset.read(*pair)
    starts, lengths = boundaries[:-1], np.diff(boundaries)
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    if not len(lengths):
        raise LcabError(f"{source} holds no tokens; preprocess a text that is not empty.")
    digest = _sha256(boundaries, tokens[: 2**20 // tokens.itemsize])
    return Corpus(source, vocab, tokens, starts, lengths, digest)


@dataclass(frozen=True)
class Batch:
    """Samples stacked row by row; every tensor is ``[rows, seqlen]``.

    Attributes:
        tokens, labels: int64; the label is the token that follows.
        loss_mask: bool, False where the label belongs to another document.
        positions: int64, counted from the start of each document (its part in this sample).
        lengths: for each row its document lengths, summing to ``seqlen``.
        digests: sha256 of each sample by its number in the run.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    lengths: tuple[Ints, ...]
    digests: dict[int, str]


class Text(Protocol):
    """What samples are read from."""

    def batch(self, samples: Sequence[int]) -> Batch:
        """The samples of these numbers."""


class PackedText:
    """The documents of a corpus laid end to end and cut every ``seqlen`` tokens.

    Sample i of an epoch reads tokens ``[i * seqlen, (i + 1) * seqlen)`` of that stream and one more for the
    last label; a stream shorter than that repeats. The rest of a stream that fills no sample is left out.

    Args:
        corpus: what to read.
        seqlen: tokens of a sample.
        seed: decides the order of samples, sampled document lengths and the uneven loss mask.
        shuffle: visit samples in another order each epoch; otherwise in the order of the text.
        doc_lengths: cut each sample into documents of lengths drawn from this distribution
            (``masks.distributions()``) instead of at the text's own boundaries.
        loss_mask: ``"uneven"`` counts only the last part, of very uneven size, of each document, as answers
            after prompts; ``"none"`` masks nothing more than labels of another document.

    Raises:
        LcabError: an argument is out of range or names nothing.
    """

    def __init__(
        self,
        corpus: Corpus,
        seqlen: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        doc_lengths: str | None = None,
        loss_mask: str = "none",
    ) -> None:
        if seqlen < 2:
            raise LcabError(f"--seqlen {seqlen} is too short; a sample needs at least 2 tokens.")
        if seed < 0:
            raise LcabError(f"--seed {seed} is negative; give 0 or more.")
        if doc_lengths is not None and doc_lengths not in distributions():
            raise unknown("document length distribution", doc_lengths, distributions())
        if loss_mask not in LOSS_MASKS:
            raise unknown("loss mask", loss_mask, LOSS_MASKS)
        self.corpus, self.seqlen, self.seed = corpus, seqlen, seed
        self.shuffle, self.doc_lengths, self.loss_mask = shuffle, doc_lengths, loss_mask
        self._ends = np.cumsum(corpus.lengths)  # of each document in the stream
        self._shifts = corpus.starts - (self._ends - corpus.lengths)  # from the stream to corpus.tokens
        self.samples_per_epoch = max(1, corpus.total // seqlen)

    def batch(self, samples: Sequence[int]) -> Batch:
        """The samples of these numbers. Numbers count on over epochs."""
        rows = [self._sample(number) for number in samples]
        tokens, labels, loss_mask, positions = (
            torch.from_numpy(np.stack([row[column] for row in rows])) for column in range(4)
        )
        lengths = tuple(row[4] for row in rows)
        digests = {number: _sha256(*row) for number, row in zip(samples, rows, strict=True)}
        return Batch(tokens, labels, loss_mask, positions, lengths, digests)

    def _sample(self, number: int) -> tuple[Ints, Ints, NDArray[np.bool_], Ints, Ints]:
        """Tokens, labels, loss mask, positions ``[seqlen]`` and document lengths of one sample."""
        text, document = self._read(self._start(number), self.seqlen + 1)
        inside = document[1:] == document[:-1]  # whether the label is of its token's document
        if self.doc_lengths is None:
            ends = np.append(np.flatnonzero(~inside[:-1]) + 1, self.seqlen)
        else:
            seed = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0]
            ends = np.cumsum(sample_lengths(self.seqlen, self.doc_lengths, int(seed)), dtype=np.int64)
            inside = np.ones(self.seqlen, dtype=bool)
            inside[ends - 1] = False
        lengths = np.diff(ends, prepend=0)
        positions = np.arange(self.seqlen) - np.repeat(ends - lengths, lengths)
        if self.loss_mask == "uneven":
            inside &= positions >= np.repeat(self._prompts(number, lengths), lengths)
        return text[:-1], text[1:], inside, positions, lengths

    def _start(self, number: int) -> int:
        """First token of the sample in the stream."""
        epoch, at = divmod(number, self.samples_per_epoch)
        if self.shuffle:
            at = int(_order(self.seed, epoch, self.samples_per_epoch)[at])
        return at * self.seqlen

    def _read(self, start: int, count: int) -> tuple[Ints, Ints]:
        """``count`` tokens of the repeating stream from ``start`` on, and each one's document by number."""
        lap, at = np.divmod(np.arange(start, start + count), self._ends[-1])
        document = np.searchsorted(self._ends, at, side="right")
        text = self.corpus.tokens[at + self._shifts[document]].astype(np.int64)
        if text.max() >= self.corpus.vocab or text.min() < 0:
            raise LcabError(
                f"{self.corpus.source} holds token {max(text.max(), text.min(), key=abs)}, outside --vocab "
                f"{self.corpus.vocab}; give the size of the tokenizer that wrote it."
            )
        return text, document + lap * len(self._ends)

    def _prompts(self, number: int, lengths: Ints) -> Ints:
        """Tokens at the head of each document that do not count: from nearly none to all but one label.

        The skew is drawn for each sample, so that samples differ as much as documents do.
        """
        rng = np.random.default_rng([self.seed, number, 1])
        skew = 2.0 ** rng.integers(-2, 5)
        answer = rng.random(len(lengths)) ** skew * (lengths - 1)
        return lengths - 1 - np.maximum(answer.astype(np.int64), 1)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, samples: int) -> Ints:
    return np.random.default_rng([seed, epoch]).permutation(samples)


def window_samples(
    step: int, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """Sample numbers of each micro-batch that a data-parallel rank reads in a step.

    Step i reads samples ``[i * global_batch, (i + 1) * global_batch)``, whatever the degrees; micro-batches
    are dealt to the ranks in turn.

    Raises:
        LcabError: the global batch does not divide into micro-batches over these ranks.
    """
    per_round = micro_batch * dp_size
    if global_batch < 1 or micro_batch < 1 or global_batch % per_round:
        raise LcabError(
            f"global batch {global_batch} does not divide into micro-batches of {micro_batch} on {dp_size} "
            f"data-parallel rank(s); give a multiple of {max(per_round, 1)}."
        )
    starts = range(step * global_batch + dp_rank * micro_batch, (step + 1) * global_batch, per_round)
    return [list(range(start, start + micro_batch)) for start in starts]


def batch_digest(shares: Iterable[Mapping[int, str]]) -> str:
    """One sha256 for the global batch from each rank's ``Batch.digests``.

    Raises:
        LcabError: two ranks read different text for one sample.
    """
    samples: dict[int, str] = {}
    for share in shares:
        for number, digest in share.items():
            if samples.setdefault(number, digest) != digest:
                raise LcabError(
                    f"ranks read different text for sample {number}; give every rank the same --data."
                )
    return hashlib.sha256("".join(samples[number] for number in sorted(samples)).encode()).hexdigest()


def _sha256(*arrays: NDArray[np.generic]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
