"""Every builder against its cells' own formula, and from_name."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcab_plugin import masks
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask, builders

quick = settings(max_examples=80, deadline=None)
lengths_ = st.lists(st.integers(0, 9), max_size=6)
length_ = st.integers(0, 24)
window_ = st.integers(0, 30)


def assert_cells(mask: AttentionMask, n: int, sees: Callable[[int, int], bool]) -> None:
    expected = torch.tensor([[bool(sees(i, j)) for j in range(n)] for i in range(n)], dtype=torch.bool)
    assert torch.equal(mask.to_dense(), expected.reshape(n, n))
    assert AttentionMask(n, n, mask.array) == mask  # inside the lengths and disjoint


def documents(lengths: list[int]) -> tuple[list[int], list[int]]:
    """Of each position, its document (those of length 0 do not count) and that document's first position."""
    kept = [length for length in lengths if length]
    doc = [index for index, length in enumerate(kept) for _ in range(length)]
    return doc, [sum(kept[:index]) for index in doc]


@quick
@given(length_, window_, window_)
def test_masks_of_one_sequence(n: int, a: int, b: int) -> None:
    assert_cells(masks.full(n), n, lambda i, j: True)
    assert_cells(masks.causal(n), n, lambda i, j: j <= i)
    assert_cells(masks.sliding_window(n, a, b), n, lambda i, j: -a <= j - i <= b)
    assert_cells(masks.sliding_window_causal(n, a), n, lambda i, j: j <= i and i - j <= a)
    assert_cells(masks.prefix_lm_causal(n, a), n, lambda i, j: j < a or j <= i)
    assert_cells(masks.global_sliding_window(n, a, b), n, lambda i, j: i < a or j < a or abs(i - j) <= b)


@quick
@given(lengths_, st.integers(1, 6))
def test_masks_of_documents(lengths: list[int], block: int) -> None:
    doc, start = documents(lengths)
    n, last = len(doc), max(doc, default=0)
    assert_cells(masks.full_document(lengths), n, lambda i, j: doc[i] == doc[j])
    assert_cells(masks.causal_document(lengths), n, lambda i, j: doc[i] == doc[j] and j <= i)
    assert_cells(masks.share_question(lengths), n, lambda i, j: j <= i and doc[j] in (doc[i], 0))
    assert_cells(masks.causal_blockwise(lengths), n, lambda i, j: j <= i and doc[i] in (doc[j], last))
    assert_cells(
        masks.block_causal_document(lengths, block),
        n,
        lambda i, j: doc[i] == doc[j] and (j - start[j]) // block <= (i - start[i]) // block,
    )


@quick
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=6), st.integers(0, 12))
def test_prefix_lm_document(pairs: list[tuple[int, int]], same: int) -> None:
    lengths, prefixes = [p[0] for p in pairs], [p[1] for p in pairs]
    doc, start = documents(lengths)
    kept = [prefix for length, prefix in pairs if length]
    n = len(doc)
    assert_cells(
        masks.prefix_lm_document(lengths, prefixes),
        n,
        lambda i, j: doc[i] == doc[j] and (j - start[j] < kept[doc[j]] or j <= i),
    )
    assert_cells(
        masks.prefix_lm_document(lengths, same),
        n,
        lambda i, j: doc[i] == doc[j] and (j - start[j] < same or j <= i),
    )


@quick
@given(length_, st.integers(1, 9), st.floats(0.0, 1.0, exclude_min=True), st.integers(0, 3))
def test_block_sparse(n: int, block: int, keep: float, seed: int) -> None:
    mask, blocks = masks.block_sparse(n, block, keep, seed), -(-n // block)
    first = range(0, n, block)
    seen = mask.to_dense()[::block, ::block]  # a cell of every block
    assert_cells(mask, n, lambda i, j: bool(seen[i // block, j // block]))
    assert all(seen[i, i] for i in range(len(first)))
    if n:
        assert seen.sum(dim=1).tolist() == [max(1, int(keep * blocks + 1e-9))] * blocks
    assert mask == masks.block_sparse(n, block, keep, seed)


def test_block_sparse_draws_by_its_seed_alike_for_all_blocks() -> None:
    drawn = [masks.block_sparse(640, 10, 0.25, seed).to_dense()[::10, ::10] for seed in range(200)]
    assert len({mask.numpy().tobytes() for mask in drawn}) == 200
    seen = torch.stack(drawn).double().mean(dim=0)  # of 63 blocks beside its own, 15: a deviation of 0.03
    assert (seen.diagonal() == 1).all()
    assert (seen[~torch.eye(64, dtype=torch.bool)] - 15 / 63).abs().max() < 0.16


def test_block_sparse_of_too_many_blocks_says_which_it_can_draw() -> None:
    with pytest.raises(LcabError, match=r"131072 blocks of keys .* blocks of 1024 tokens or more, not 128"):
        masks.block_sparse(1 << 24, 128, 0.1)


def test_block_sparse_masks_of_many_blocks_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = masks.block_sparse(100, 3, 0.3, seed=1)
    monkeypatch.setattr(builders, "_DRAWN_AT_ONCE", 40)
    assert masks.block_sparse(100, 3, 0.3, seed=1) == whole


def test_all_blocks_are_the_full_mask() -> None:
    assert masks.block_sparse(1000, 64, 1.0) == masks.full(1000)
    assert masks.block_sparse(6400, 64, 0.29).area == 29 * 100 * 64**2  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize(
    ("mask", "slices"),
    [
        (masks.causal(9), 1),
        (masks.sliding_window(9, 2, 3), 1),
        (masks.causal_document([4, 0, 5]), 2),
        (masks.share_question([3, 2, 2, 2]), 4),
        (masks.share_question([3, 6]), 1),
        (masks.causal_blockwise([3, 2, 4]), 3),
        (masks.prefix_lm_causal(9, 4), 2),
        (masks.prefix_lm_causal(9, 9), 1),
        (masks.prefix_lm_document([5, 4], [2, 4]), 3),
        (masks.global_sliding_window(9, 2, 1), 3),
        (masks.global_sliding_window(9, 0, 1), 1),
        (masks.block_causal_document([5, 4], 2), 5),
    ],
)
def test_few_slices(mask: AttentionMask, slices: int) -> None:
    assert len(mask.array) == slices


@pytest.mark.parametrize("lengths", [[3, 5], (3, 5), np.array([3, 5], dtype=np.int32), torch.tensor([3, 5])])
def test_lengths_of_any_integer_kind(lengths: object) -> None:
    assert masks.causal_document(lengths) == masks.from_name("causal_document", 8, lengths=lengths)


NAMED = {
    "full": {},
    "causal": {},
    "full_document": {"lengths": [3, 5]},
    "causal_document": {"lengths": [3, 5]},
    "sliding_window": {"left": 2, "right": 1},
    "sliding_window_causal": {"left": 2},
    "share_question": {"lengths": [3, 2, 3]},
    "causal_blockwise": {"lengths": [3, 2, 3]},
    "prefix_lm_causal": {"prefix": 3},
    "prefix_lm_document": {"lengths": [3, 5], "prefixes": [1, 2]},
    "global_sliding_window": {"global_tokens": 1, "window": 2},
    "block_causal_document": {"lengths": [3, 5], "block": 2},
    "block_sparse": {"block": 2, "keep": 0.5, "seed": 3},
}


@pytest.mark.parametrize("name", masks.names())
def test_from_name(name: str) -> None:
    params = NAMED[name]
    mask = masks.from_name(name, 8, **params)
    own = params if masks.needs_lengths(name) else {"n": 8, **params}
    assert mask == getattr(masks, name)(**own)
    assert mask.q_len == mask.k_len == 8
    assert masks.needs_lengths(name) == ("lengths" in params)
    assert masks.parameters(name) == tuple(params)
    for missing in params.keys() - {"seed"}:
        with pytest.raises(LcabError, match=f"mask '{name}' takes .*{missing}"):
            masks.from_name(name, 8, **{key: value for key, value in params.items() if key != missing})
    with pytest.raises(LcabError, match=f"mask '{name}' .*was given .*windows"):
        masks.from_name(name, 8, windows=3, **params)


def test_sizes_beyond_the_sequence() -> None:
    assert masks.sliding_window(8, sys.maxsize, sys.maxsize) == masks.full(8)
    assert masks.sliding_window_causal(8, sys.maxsize) == masks.causal(8)
    assert masks.prefix_lm_causal(8, sys.maxsize) == masks.full(8)
    assert masks.prefix_lm_document([3, 5], [sys.maxsize, 5]) == masks.full_document([3, 5])
    assert masks.global_sliding_window(8, sys.maxsize, sys.maxsize) == masks.full(8)
    assert masks.block_causal_document([3, 5], sys.maxsize) == masks.full_document([3, 5])
    assert masks.block_sparse(8, sys.maxsize, 0.1) == masks.full(8)


def test_window_stands_for_both_sides() -> None:
    assert masks.from_name("sliding_window_causal", 8, window=3) == masks.sliding_window_causal(8, 3)
    assert masks.from_name("sliding_window", 8, window=3) == masks.sliding_window(8, 3, 3)
    with pytest.raises(LcabError, match="was given left, window"):
        masks.from_name("sliding_window", 8, left=1, window=3)


def test_twelve_names() -> None:
    assert len(masks.names()) == 13
    assert set(masks.names()) == set(NAMED)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: masks.from_name("casual", 8), "unknown mask 'casual'; did you mean 'causal'?"),
        (lambda: masks.needs_lengths("document"), "unknown mask 'document'"),
        (lambda: masks.from_name("causal_document", 8, lengths=[3, 4]), "sum to n = 8, but they sum to 7"),
        (
            lambda: masks.from_name("causal_document", 8),
            "takes lengths (of its documents, summing to n = 8) besides n, but was given nothing",
        ),
        (lambda: masks.from_name("causal", 8, left=1), "takes no parameters besides n, but was given left"),
        (lambda: masks.from_name("causal", -8), "n must be an integer of at least 0, not -8"),
        (lambda: masks.causal(8.0), "n must be an integer of at least 0, not 8.0"),
        (lambda: masks.causal_document([3, -1]), "lengths must not be negative, but one of them is -1"),
        (lambda: masks.causal_document([3, 1.5]), "lengths must be integers"),
        (lambda: masks.causal_document([[3], [1]]), "lengths must be integers in 1 dimension"),
        (lambda: masks.causal_document([True]), "lengths must be integers"),
        (lambda: masks.sliding_window(8, -1, 0), "left must be an integer of at least 0, not -1"),
        (lambda: masks.sliding_window(8, 1, None), "right must be an integer of at least 0, not None"),
        (lambda: masks.prefix_lm_causal(8, -1), "prefix must be an integer of at least 0, not -1"),
        (lambda: masks.prefix_lm_document([3, 5], [1]), "1 for 2 documents"),
        (lambda: masks.prefix_lm_document([3, 5], [1, -2]), "prefixes must not be negative"),
        (lambda: masks.global_sliding_window(8, -1, 2), "global_tokens"),
        (lambda: masks.global_sliding_window(8, 1, -2), "window"),
        (lambda: masks.block_causal_document([8], 0), "block must be an integer of at least 1, not 0"),
        (lambda: masks.block_sparse(8, 0, 0.5), "block must be an integer of at least 1, not 0"),
        (lambda: masks.block_sparse(8, 2.0, 0.5), "block must be an integer of at least 1, not 2.0"),
        (lambda: masks.block_sparse(8, 2, 0), "keep must be a number above 0 and at most 1, not 0"),
        (lambda: masks.block_sparse(8, 2, 1.5), "keep must be a number above 0 and at most 1, not 1.5"),
        (
            lambda: masks.block_sparse(8, 2, float("nan")),
            "keep must be a number above 0 and at most 1, not nan",
        ),
        (lambda: masks.block_sparse(8, 2, "0.5"), "keep must be a number above 0 and at most 1, not '0.5'"),
        (lambda: masks.block_sparse(8, 2, True), "keep must be a number above 0 and at most 1, not True"),
        (lambda: masks.block_sparse(8, 2, 0.5, 1.5), "seed must be an integer of at least 0, not 1.5"),
        (lambda: masks.block_sparse(8, 2, 0.5, -1), "seed must be an integer of at least 0, not -1"),
    ],
)
def test_bad_input(build: Callable[[], object], words: str) -> None:
    with pytest.raises(LcabError) as error:
        build()
    assert words in str(error.value)
