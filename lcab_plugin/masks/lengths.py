"""Document lengths sampled from real training corpora, or from a histogram of one's own."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np

from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.masks.checks import size
from lcab_plugin.masks.geometry import Ints

_CORPORA = ("pile", "prolong64k", "prolong512k")
# As the Long-Context Attention Benchmark draws them for context parallelism: two fifths of the tokens like
# prolong512k, which has few documents of a rank's length, and the rest in documents of 8K to 30K tokens.
_LONG = "prolong512k_long"
_SHORT_SHARE = (2, 5)
_BUCKET = re.compile(r"\[(\d+), ?(\d+)\)")

Histogram = tuple[Ints, Ints, np.ndarray]  # lower bounds (at least 1), upper (exclusive), probabilities

_LONG_DOCUMENTS: Histogram = (np.array([8 * 1024]), np.array([30 * 1024 + 1]), np.ones(1))


def distributions() -> tuple[str, ...]:
    """What ships with the package: the corpora whose histograms data/README.md names the source of, and
    prolong512k with long documents among its own."""
    return (*_CORPORA, _LONG)


def sample_lengths(n: int, distribution: str, seed: int) -> list[int]:
    """Lengths of documents that fill n tokens exactly, each at least 1.

    ``distribution``: one of ``distributions()``, or the path of a JSON file of the form of data/pile.json,
    ``{"[1,512)": 0.7, "[512,8192)": 0.3}``: buckets of tokens and their weights. A bucket is drawn by weight
    and a length uniformly inside it; a corpus's are capped at max(1, n // 4). The last document is cut to
    fit. Equal arguments give equal lengths. Raises LcabError for an unknown distribution, a file that is no
    histogram, and for a negative n or seed.
    """
    n, rng = size("n", n), np.random.default_rng(size("seed", seed))
    if distribution.endswith(".json"):
        return _drawn(n, _read(Path(distribution)), n, rng)
    if distribution in _CORPORA:
        return _drawn(n, _histogram(distribution), n // 4, rng)
    if distribution != _LONG:
        raise unknown("document length distribution", distribution, distributions())
    short = n * _SHORT_SHARE[0] // _SHORT_SHARE[1]
    found = _drawn(short, _histogram("prolong512k"), n // 4, rng)
    found += _drawn(n - short, _LONG_DOCUMENTS, n, rng)
    return [found[i] for i in rng.permutation(len(found))]


def _drawn(n: int, histogram: Histogram, longest: int, rng: np.random.Generator) -> list[int]:
    """Lengths that fill n tokens."""
    low, high, weight = histogram
    lengths: list[int] = []
    left = n
    while left:
        bucket = rng.choice(len(weight), size=1024, p=weight)
        drawn = np.minimum(rng.integers(low[bucket], high[bucket]), max(1, longest))
        end = np.cumsum(drawn)
        drawn = drawn[: np.searchsorted(end, left) + 1]
        drawn[-1] -= max(int(end[len(drawn) - 1]) - left, 0)
        lengths += drawn.tolist()
        left -= int(drawn.sum())
    return lengths


@lru_cache
def _histogram(corpus: str) -> Histogram:
    data = resources.files("lcab_plugin.masks").joinpath(f"data/{corpus}.json")
    return _parsed(json.loads(data.read_text(encoding="utf-8")))


def _read(path: Path) -> Histogram:
    """A file's.

    Raises:
        LcabError: it cannot be read, or is no histogram.
    """
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise LcabError(f"cannot read the document lengths of {path}: {error.strerror}.") from None
    except (ValueError, TypeError, AttributeError) as error:
        such = '{"[1,512)": 0.7, "[512,8192)": 0.3}'
        raise LcabError(f"{path} is no histogram of document lengths such as {such}: {error}.") from None


def _parsed(buckets: dict[str, float]) -> Histogram:
    """Raises ValueError where a bucket is none, or the weights are no weights."""
    bounds = []
    for bucket in buckets:
        found = _BUCKET.fullmatch(bucket)
        if found is None or max(1, int(found[1])) >= int(found[2]):
            raise ValueError(f"{bucket!r} is no bucket of tokens")
        bounds.append((max(1, int(found[1])), int(found[2])))
    weight = np.array(list(buckets.values()), dtype=np.float64)
    if not len(weight) or not np.isfinite(weight).all() or (weight < 0).any() or not weight.sum():
        raise ValueError("its weights must be numbers of at least 0, and not all 0")
    low, high = np.array(bounds, dtype=np.int64).T
    return low, high, weight / weight.sum()
