"""The masks of the field, each as few slices as its cells allow.

Names and cells follow FlashMask (arXiv 2410.01359) and the Long-Context Attention Benchmark (arXiv
2510.17896, NJUDeepEngine/LongCA-bench, longca_bench/dist_attn/benchmark/mask.py). Each docstring states when
query i sees key j, with doc(i) the document of position i and start(i) that document's first position.
Windows are inclusive: `left` earlier keys and the diagonal. Windows, prefixes and blocks may be longer than
the sequence. Documents of length 0 vanish, as if they were not listed.

Every builder raises LcabError for sizes and seeds that are not integers of at least 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.masks.checks import integers, share, size
from lcab_plugin.masks.geometry import NO_HI, NO_LO, Ints, expand, runs
from lcab_plugin.masks.slices import AttentionMask

Lengths = Sequence[int] | Ints | torch.Tensor

_DRAWN_AT_ONCE = 1 << 24  # random numbers of block_sparse, 64 MB
_MOST_BLOCKS = 1 << 14  # of block_sparse each way: a table of 256 MB, and seconds to draw it


def full(n: int) -> AttentionMask:
    """Every query sees every key."""
    return _mask(n, [(0, n, 0, n, NO_LO, NO_HI)])


def causal(n: int) -> AttentionMask:
    """j <= i."""
    return _mask(n, [(0, n, 0, n, NO_LO, 0)])


def full_document(lengths: Lengths) -> AttentionMask:
    """doc(i) == doc(j). FlashMask's document mask."""
    start, end = _documents(lengths)
    return _mask(_total(end), _columns(start, end, start, end, NO_LO, NO_HI))


def causal_document(lengths: Lengths) -> AttentionMask:
    """doc(i) == doc(j) and j <= i."""
    start, end = _documents(lengths)
    return _mask(_total(end), _columns(start, end, start, end, NO_LO, 0))


def sliding_window(n: int, left: int, right: int) -> AttentionMask:
    """-left <= j - i <= right. LongCA-bench draws it with left == right."""
    n = size("n", n)
    left, right = min(size("left", left), n), min(size("right", right), n)
    return _mask(n, [(0, n, 0, n, -left, right)])


def sliding_window_causal(n: int, left: int) -> AttentionMask:
    """-left <= j - i <= 0."""
    return sliding_window(n, left, 0)


def share_question(lengths: Lengths) -> AttentionMask:
    """j <= i and (doc(i) == doc(j) or doc(j) == 0). The first length is the question, the others its answers.

    The question and its first answer are one causal document, and the other answers one each; a full
    rectangle lets those see the question.
    """
    start, end = _documents(lengths)
    n = _total(end)
    if len(end) < 3:
        return causal(n)
    question, second = end[0], start[2]
    start, end = np.append(0, start[2:]), end[1:]
    own = _columns(start, end, start, end, NO_LO, 0)
    return _mask(n, np.append(own, [(second, n, 0, question, NO_LO, NO_HI)], axis=0))


def causal_blockwise(lengths: Lengths) -> AttentionMask:
    """j <= i and (doc(i) == doc(j) or doc(i) == last): the last block sees all demonstrations before it."""
    start, end = _documents(lengths)
    k_start = start.copy()
    k_start[-1:] = 0
    return _mask(_total(end), _columns(start, end, k_start, end, NO_LO, 0))


def prefix_lm_causal(n: int, prefix: int) -> AttentionMask:
    """j < prefix or j <= i. LongCA-bench's ranges say so too; its FlexAttention variant has j <= prefix."""
    return prefix_lm_document([size("n", n)], prefix)


def prefix_lm_document(lengths: Lengths, prefixes: int | Lengths) -> AttentionMask:
    """doc(i) == doc(j) and (j - start(j) < prefixes[doc(j)] or j <= i).

    `prefixes` is one length for all documents or one for each; a prefix as long as its document or longer
    makes it fully visible.
    """
    start, end, prefix = _documents_with(lengths, prefixes)
    split = start + np.minimum(prefix, end - start)
    head = _columns(start, split, start, split, NO_LO, NO_HI)
    return _mask(_total(end), np.append(head, _columns(split, end, start, end, NO_LO, 0), axis=0))


def global_sliding_window(n: int, global_tokens: int, window: int) -> AttentionMask:
    """i < global_tokens or j < global_tokens or |j - i| <= window.

    FlashMask's generators state it so; LongCA-bench ties global_tokens to the window.
    """
    n = size("n", n)
    g, w = min(size("global_tokens", global_tokens), n), min(size("window", window), n)
    return _mask(n, [(0, g, 0, n, NO_LO, NO_HI), (g, n, 0, g, NO_LO, NO_HI), (g, n, g, n, -w, w)])


def block_causal_document(lengths: Lengths, block: int) -> AttentionMask:
    """doc(i) == doc(j) and j < start(i) + ((i - start(i)) // block + 1) * block.

    Blocks are counted from each document's start, as in LongCA-bench's ranges; the last may be short.
    """
    start, end = _documents(lengths)
    block = min(size("block", block, least=1), max(_total(end), 1))
    document, at = expand(np.zeros_like(start), -(-(end - start) // block))
    first, last = start[document], end[document]
    q_start, q_end = first + at * block, np.minimum(first + (at + 1) * block, last)
    return _mask(_total(end), _columns(q_start, q_end, first, q_end, NO_LO, NO_HI))


def block_sparse(n: int, block: int, keep: float, seed: int = 0) -> AttentionMask:
    """j // block is one of the blocks drawn for i // block: its own, and others at random.

    Each block of queries sees max(1, floor(keep * blocks)) blocks of keys of as many positions (the last may
    be short), 0 < keep <= 1, drawn without replacement by numpy's Generator of `seed`. One pattern serves all
    heads.

    LongCA-bench's uniform block-sparse masks (longca_bench/attn/run_block_sparse_benchmark.py) keep as many
    blocks of a row, drawn uniformly as well; but there each key/value head has a pattern of its own, and a
    query's own block is drawn like any other. It runs keep = 0.1, 0.2, 0.5, 0.8 and 1 with blocks of 64 and
    128 at 16K and 48K tokens.
    """
    n, seed = size("n", n), size("seed", seed)
    block, keep = min(size("block", block, least=1), max(n, 1)), share("keep", keep)
    if (blocks := -(-n // block)) > _MOST_BLOCKS:
        raise LcabError(
            f"block_sparse draws each of {blocks} blocks of keys for each of queries, {_MOST_BLOCKS} at "
            f"most; give blocks of {-(-n // _MOST_BLOCKS)} tokens or more, not {block}."
        )
    row, first, last = _adjacent(_drawn(blocks, keep, np.random.default_rng(seed)))
    order = np.lexsort((row, last, first))  # the same run in rows that follow one another is one slice
    row, first, last = row[order], first[order], last[order]
    breaks = (np.diff(row) != 1) | (np.diff(first) != 0) | (np.diff(last) != 0)
    top, bottom = runs(breaks, len(row))
    edges = np.stack([row[top], row[bottom] + 1, first[top], last[top]], axis=1) * block
    return _mask(n, _columns(*np.minimum(edges, n).T, NO_LO, NO_HI))


_FAMILIES: dict[str, Callable[..., AttentionMask]] = {
    builder.__name__: builder
    for builder in (
        full,
        causal,
        full_document,
        causal_document,
        sliding_window,
        sliding_window_causal,
        share_question,
        causal_blockwise,
        prefix_lm_causal,
        prefix_lm_document,
        global_sliding_window,
        block_causal_document,
        block_sparse,
    )
}


def names() -> tuple[str, ...]:
    """The mask families."""
    return tuple(_FAMILIES)


def parameters(name: str) -> tuple[str, ...]:
    """What from_name takes for this family besides n. LcabError for an unknown name."""
    return tuple(p for p in _signature(name) if p != "n")


def needs_lengths(name: str) -> bool:
    """Whether from_name wants `lengths` for this family of documents. LcabError for an unknown name."""
    return "lengths" in parameters(name)


def from_name(name: str, n: int, **params: Any) -> AttentionMask:
    """The mask family `name` over n tokens.

    `params` are the builder's own: `lengths` (summing to n) for the document families, `left`, `right`,
    `prefix`, `prefixes`, `global_tokens`, `window`, `block`, `keep`, `seed` (0 if left out). For the two
    sliding windows `window=w` stands for left=w, and right=w where there is one. Raises LcabError for an
    unknown name and for parameters unknown, missing or that do not fit n.
    """
    wanted = parameters(name)
    n = size("n", n)
    if name.startswith("sliding_window") and "window" in params and not {"left", "right"} & params.keys():
        window = params.pop("window")
        params.update(dict.fromkeys(wanted, window))
    required = {p for p in wanted if _signature(name)[p].default is inspect.Parameter.empty}
    if not required <= set(params) <= set(wanted):
        takes = ", ".join(wanted).replace("lengths", f"lengths (of its documents, summing to n = {n})")
        given, missing = ", ".join(params) or "nothing", [p for p in wanted if p in required - params.keys()]
        given += f" and not {', '.join(missing)}" if params and missing else ""
        raise LcabError(f"mask {name!r} takes {takes or 'no parameters'} besides n, but was given {given}.")
    if "lengths" in params:
        total = int(integers("lengths", params["lengths"]).sum())
        if total != n:
            raise LcabError(f"lengths of mask {name!r} must sum to n = {n}, but they sum to {total}.")
        return _FAMILIES[name](**params)
    return _FAMILIES[name](n, **params)


def _signature(name: str) -> Mapping[str, inspect.Parameter]:
    if name not in _FAMILIES:
        raise unknown("mask", name, _FAMILIES)
    return inspect.signature(_FAMILIES[name]).parameters


def _mask(n: int, slices: Ints | list[tuple[int, ...]]) -> AttentionMask:
    n = size("n", n)
    return AttentionMask.from_disjoint(n, n, np.array(slices, dtype=np.int64).reshape(-1, 6))


def _columns(*columns: Ints | int) -> Ints:
    """Slice rows from columns, scalars broadcast."""
    return np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.int64)


def _documents(lengths: Lengths) -> tuple[Ints, Ints]:
    """First position and one past the last of each document that has tokens."""
    array = integers("lengths", lengths)
    end = np.cumsum(array[array > 0])
    return end - array[array > 0], end


def _documents_with(lengths: Lengths, prefixes: int | Lengths) -> tuple[Ints, Ints, Ints]:
    array = integers("lengths", lengths)
    if np.ndim(prefixes) == 0:
        prefix = np.full(len(array), size("prefix", prefixes))
    else:
        prefix = integers("prefixes", prefixes)
    if len(prefix) != len(array):
        raise LcabError(f"prefixes must have one entry a document: {len(prefix)} for {len(array)} documents.")
    return *_documents(array), prefix[array > 0]


def _drawn(blocks: int, keep: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """[blocks, blocks]: as many True in every row, one of them on the diagonal."""
    kept = max(1, int(keep * blocks + 1e-9))  # 0.29 * 100 is 28.999999999999996
    chosen = np.zeros((blocks, blocks), dtype=bool)
    step = max(1, _DRAWN_AT_ONCE // max(blocks, 1))
    for begin in range(0, blocks, step):
        part = chosen[begin : begin + step]
        lots = rng.random(part.shape, dtype=np.float32)
        np.fill_diagonal(lots[:, begin:], -1.0)
        np.put_along_axis(part, np.argpartition(lots, kept - 1, axis=1)[:, :kept], True, axis=1)
    return chosen


def _adjacent(chosen: NDArray[np.bool_]) -> tuple[Ints, Ints, Ints]:
    """Row, first column and one past the last of each run of True in a row."""
    padded = np.pad(chosen, ((0, 0), (1, 1)))
    row, column = np.nonzero(padded[:, 1:] != padded[:, :-1])  # where runs begin and end, in turn
    return row[::2], column[::2], column[1::2]


def _total(end: Ints) -> int:
    return int(end[-1]) if len(end) else 0
