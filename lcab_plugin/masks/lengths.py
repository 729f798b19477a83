"""Document lengths sampled from real training corpora."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources

import numpy as np

from lcab_plugin.errors import unknown
from lcab_plugin.masks.checks import size
from lcab_plugin.masks.geometry import Ints

_DISTRIBUTIONS = ("pile", "prolong64k", "prolong512k")


def distributions() -> tuple[str, ...]:
    """The corpora whose histograms ship with the package (data/README.md names their source)."""
    return _DISTRIBUTIONS


def sample_lengths(n: int, distribution: str, seed: int) -> list[int]:
    """Lengths of documents that fill n tokens exactly, each at least 1 and at most max(1, n // 4).

    A bucket is drawn by weight and a length uniformly inside it, then capped; the last document is cut to
    fit. Equal arguments give equal lengths. Raises LcabError for an unknown distribution and for a negative n
    or seed.
    """
    if distribution not in _DISTRIBUTIONS:
        raise unknown("document length distribution", distribution, _DISTRIBUTIONS)
    n = size("n", n)
    low, high, weight = _histogram(distribution)
    rng = np.random.default_rng(size("seed", seed))
    longest = max(1, n // 4)
    lengths: list[int] = []
    left = n
    while left:
        bucket = rng.choice(len(weight), size=1024, p=weight)
        drawn = np.minimum(rng.integers(low[bucket], high[bucket]), longest)
        end = np.cumsum(drawn)
        drawn = drawn[: np.searchsorted(end, left) + 1]
        drawn[-1] -= max(int(end[len(drawn) - 1]) - left, 0)
        lengths += drawn.tolist()
        left -= int(drawn.sum())
    return lengths


@lru_cache
def _histogram(distribution: str) -> tuple[Ints, Ints, np.ndarray]:
    """Lower bound (at least 1), upper bound (exclusive) and probability of each bucket."""
    text = (
        resources.files("lcab_plugin.masks").joinpath(f"data/{distribution}.json").read_text(encoding="utf-8")
    )
    histogram = json.loads(text)
    bounds = np.array([bucket.strip("[)").split(",") for bucket in histogram]).astype(np.int64)
    weight = np.array(list(histogram.values()))
    return np.maximum(bounds[:, 0], 1), bounds[:, 1], weight / weight.sum()
