"""What mask work costs on the host: building, localising and block-mapping a packed batch."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask, causal, causal_document

Row = dict[str, str | float]


def run(
    tokens: int = 1 << 20, documents: int = 10_000, ranks: int = 64, block: int = 128, repeats: int = 5
) -> list[Row]:
    """Times mask operations: a row of name, median_ms, min_ms, max_ms and detail for each.

    The mask is causal_document over `documents` of random lengths that fill `tokens`, a new one for every
    timing, so that no cache serves it. Ranks hold zigzag rows (chunks r and 2 * ranks - 1 - r). Raises
    LcabError where there are too few tokens for the documents or the chunks.
    """
    if not 1 <= documents <= tokens or not 2 <= 2 * ranks <= tokens or block < 1 or repeats < 1:
        raise LcabError(
            f"need at least a token for each of {documents} documents and for both chunks of {ranks} ranks "
            f"(tokens={tokens}), and block={block} and repeats={repeats} of at least 1."
        )
    seeds = itertools.count()
    held = [_zigzag(tokens, ranks, rank) for rank in range(ranks)]
    whole = [range(tokens)]

    def lengths() -> np.ndarray:
        return _lengths(tokens, documents, next(seeds))

    def packed() -> AttentionMask:
        return causal_document(lengths())

    def local_all_ranks(mask: AttentionMask) -> str:
        return f"{sum(len(mask.local(rows, whole).array) for rows in held)} slices"

    def local_ring(mask: AttentionMask) -> str:
        return f"{sum(len(mask.local(held[0], keys).array) for keys in held)} slices"

    def needed_keys(mask: AttentionMask) -> str:
        return f"{sum(len(mask.needed_keys(rows)) for rows in held)} ranges"

    def block_map(mask: AttentionMask) -> str:
        return f"{len(mask.block_map(block, block).kind)} runs"

    name = f"causal_document, {documents} documents, {tokens} tokens"
    return [
        _row(
            "build", name, repeats, lengths, lambda lengths: f"{len(causal_document(lengths).array)} slices"
        ),
        _row("local_all_ranks", f"{name}, rows of {ranks} ranks, all keys", repeats, packed, local_all_ranks),
        _row("local_ring", f"{name}, rows of rank 0, keys of {ranks} peers", repeats, packed, local_ring),
        _row("needed_keys", f"{name}, rows of {ranks} ranks", repeats, packed, needed_keys),
        _row("block_map", f"{name}, blocks of {block}", repeats, packed, block_map),
        _row(
            "block_map_causal",
            f"causal, {tokens} tokens, blocks of {block}",
            repeats,
            lambda: causal(tokens),
            block_map,
        ),
    ]


def _row(name: str, detail: str, repeats: int, prepare: Callable[[], Any], work: Callable[[Any], str]) -> Row:
    """Times `work` on what `prepare` makes, which is not timed; what `work` counts ends the detail."""
    times, count = [], ""
    for _ in range(repeats):
        value = prepare()
        begin = time.perf_counter()
        count = work(value)
        times.append((time.perf_counter() - begin) * 1e3)
    return {
        "name": name,
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "detail": f"{detail}: {count}",
    }


def _lengths(tokens: int, documents: int, seed: int) -> np.ndarray:
    """`documents` lengths of at least 1 that sum to `tokens`, every split equally likely."""
    cuts = np.random.default_rng(seed).choice(tokens - 1, size=documents - 1, replace=False) + 1
    return np.diff(np.sort(np.concatenate([[0], cuts, [tokens]])))


def _zigzag(tokens: int, ranks: int, rank: int) -> list[range]:
    edges = np.linspace(0, tokens, 2 * ranks + 1).astype(int).tolist()
    return [range(edges[chunk], edges[chunk + 1]) for chunk in (rank, 2 * ranks - 1 - rank)]
