"""Does a model find again what it read long ago? Keys and values hidden in text, asked for at set distances.

A sample is one document of filler text in which, for every distance, a key of 4 tokens followed by a value
of one was written at a random place, and both once more, so far behind that the key's last token, where the
value is asked for, stands at that distance from the first value. What is asked is what an induction head
does, so that a model that only ever saw text can answer, in any vocabulary: keys and values are drawn from
the tokens of the filler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcab_plugin.errors import LcabError
from lcab_plugin.training.data import Batch, Corpus, Ints, PackedText
from lcab_plugin.training.evaluation import means

KEY = 4  # tokens
SHORTEST = 8  # distance
_LEAST = 128  # tokens of a sample, for its pairs to find room
_TRIES = 100


class Recall:
    """Samples of the recall task, an `Evaluation` whose cells are the distances.

    ``distances``: 8, 16, 32 ... up to half of ``seqlen``, and seven eighths of it. Query i attends to key j
    at distance i - j, so that a window of that many keys to the left just sees the value.

    Args:
        corpus: text for the filler, its documents laid end to end, what ends them replaced.
        seqlen: tokens of a sample.
        samples: how many; each asks once at every distance.
        seed: decides keys, values and places; sample i depends on nothing else but i and the text.

    Raises:
        LcabError: ``seqlen`` leaves no room.
    """

    def __init__(self, corpus: Corpus, seqlen: int, samples: int, seed: int = 0) -> None:
        if seqlen < _LEAST:
            raise LcabError(
                f"--recall hides keys in at least {_LEAST} tokens, --seqlen is {seqlen}; give more."
            )
        self._filler, self._seqlen, self._seed = PackedText(corpus, seqlen, seed=seed), seqlen, seed
        self._samples = samples
        self.distances = [2**i for i in range(SHORTEST.bit_length() - 1, (seqlen // 2).bit_length())]
        self.distances.append(seqlen * 7 // 8)
        self.size = len(self.distances)

    def batch(self, samples: Sequence[int]) -> Batch:
        """The samples of these numbers; only what is asked for counts."""
        made = [self._sample(number) for number in samples]
        text = torch.from_numpy(np.stack([tokens for tokens, _ in made]))
        asked = torch.from_numpy(np.stack([cells for _, cells in made])) >= 0
        digests = [hashlib.sha256(np.concatenate(pair).tobytes()).hexdigest() for pair in made]
        return Batch(
            tokens=text[:, :-1].contiguous(),
            labels=text[:, 1:].contiguous(),
            loss_mask=asked,
            positions=torch.arange(self._seqlen).expand(asked.shape),
            lengths=(np.array([self._seqlen]),) * len(made),
            digests=dict(zip(samples, digests, strict=True)),
        )

    def cells(self, batch: Batch) -> Tensor:
        """Which distance a token is asked at; -1 also in samples past the last, which fill a global batch."""
        none = np.full(self._seqlen, -1)
        rows = [self._sample(i)[1] if i < self._samples else none for i in batch.digests]
        return torch.from_numpy(np.stack(rows)).view_as(batch.tokens)

    def summary(self, totals: Tensor) -> dict[str, Any]:
        """``accuracy``: how often the value was the likeliest of all tokens; ``tokens``: how often asked."""
        return {"samples": self._samples, "distance": self.distances, **means(totals)}

    def _sample(self, number: int) -> tuple[Ints, Ints]:
        """Tokens ``[seqlen + 1]``, and for each but the last the distance it is asked at, by its index."""
        source = self._filler.batch([number])
        filler = torch.cat((source.tokens[0], source.labels[0, -1:])).numpy()
        ends = np.append(~source.loss_mask[0].numpy(), True)
        rng = np.random.default_rng([self._seed, number, 2])
        symbols = np.unique(filler[~ends])
        if len(symbols) < 2:
            symbols = np.arange(self._filler.corpus.vocab)
        filler[ends] = rng.choice(symbols, ends.sum())
        for _ in range(_TRIES):
            made = self._hide(filler.copy(), symbols, rng)
            if made is not None:
                return made
        raise LcabError(
            f"keys of {KEY} tokens could not be hidden in {self._filler.corpus.source}: they occur in it by "
            f"chance ({len(symbols)} different tokens); give a text with more, or leave --recall out."
        )

    def _hide(self, text: Ints, symbols: Ints, rng: np.random.Generator) -> tuple[Ints, Ints] | None:
        """Write the pairs into ``text``; None where one finds no room, or a key stands elsewhere too."""
        cells = np.full(self._seqlen, -1)
        busy = np.zeros(len(text), dtype=bool)
        keys = []
        for index in reversed(range(self.size)):  # far ones have the fewest places
            apart = self.distances[index] + 1
            places = np.flatnonzero(_both_free(busy, apart))
            if not len(places):
                return None
            pair = rng.choice(symbols, KEY + 1)
            start = int(rng.choice(places))
            for at in (start, start + apart):
                text[at : at + KEY + 1], busy[at : at + KEY + 1] = pair, True
            cells[start + apart + KEY - 1] = index
            keys.append(pair[:KEY])
        windows = np.lib.stride_tricks.sliding_window_view(text, KEY)
        unique = all((windows == key).all(1).sum() == 2 for key in keys)
        return (text, cells) if unique else None


def _both_free(busy: NDArray[np.bool_], apart: int) -> NDArray[np.bool_]:
    """For every place whether a key and its value can stand there and so far behind."""
    before = np.append(0, np.cumsum(busy))
    free = before[KEY + 1 :] == before[: -KEY - 1]
    return free[: len(free) - apart] & free[apart:]
