"""Masks from cu_seqlens, MagiAttention's ranges and dense matrices, and sampled lengths."""

from __future__ import annotations

import json
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcab_plugin import masks
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask

quick = settings(max_examples=150, deadline=None)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Bool matrices from all False to all True, of noise, and of noise in rows that repeat or move."""
    q_len, k_len = draw(st.integers(0, 14)), draw(st.integers(0, 14))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    matrix = rng.random((q_len, k_len)) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    for row in range(1, q_len):
        if draw(st.booleans()):
            matrix[row] = np.roll(matrix[row - 1], draw(st.integers(0, 1)))
    return torch.from_numpy(matrix)


@quick
@given(matrices())
def test_from_dense_round_trip(dense: torch.Tensor) -> None:
    mask = masks.from_dense(dense)
    assert torch.equal(mask.to_dense(), dense)
    assert AttentionMask(*dense.shape, mask.array) == mask


@pytest.mark.parametrize(
    "mask",
    [
        masks.full(9),
        masks.causal(9),
        masks.sliding_window(9, 2, 1),
        masks.sliding_window_causal(9, 3),
        masks.full_document([4, 0, 5]),
        masks.causal_document([4, 0, 5]),
        masks.prefix_lm_causal(9, 4),
        masks.block_causal_document([5, 4], 2),
    ],
)
def test_from_dense_finds_the_fewest_slices_of_common_masks(mask: AttentionMask) -> None:
    assert len(masks.from_dense(mask.to_dense()).array) == len(mask.array)


@st.composite
def cumulative_pairs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    pairs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5))
    return tuple([0, *np.cumsum([pair[side] for pair in pairs], dtype=int).tolist()] for side in (0, 1))


@quick
@given(cumulative_pairs(), st.booleans(), st.booleans())
def test_from_cu_seqlens(cu: tuple[list[int], list[int]], causal: bool, tensors: bool) -> None:
    q, k = cu
    expected = torch.zeros(q[-1], k[-1], dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(pairwise(q), pairwise(k), strict=True):
        for i in range(q0, q1):
            for j in range(k0, k1):
                expected[i, j] = not causal or k1 - j >= q1 - i  # counted from the last query and key
    bounds = [torch.tensor(each, dtype=torch.int32) if tensors else each for each in cu]
    assert torch.equal(masks.from_cu_seqlens(*bounds, causal=causal).to_dense(), expected)


def test_from_cu_seqlens_of_one_side() -> None:
    assert masks.from_cu_seqlens([0, 3, 3, 8]) == masks.causal_document([3, 0, 5])
    assert masks.from_cu_seqlens([0, 3, 3, 8], causal=False) == masks.full_document([3, 5])


@quick
@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_from_ranges_is_magi_attention(sq: int, sk: int, q0: int, k0: int, kind: int) -> None:
    square = torch.ones(max(sq, sk), max(sq, sk), dtype=torch.bool)
    part = torch.ones(sq, sk, dtype=torch.bool)
    if kind in (1, 3):  # a lower triangle's bottom-right corner
        part &= square.tril()[max(sq, sk) - sq :, max(sq, sk) - sk :]
    if kind in (2, 3):  # an upper triangle's top-left corner
        part &= square.triu()[:sq, :sk]
    expected = torch.zeros(q0 + sq + 1, k0 + sk + 2, dtype=torch.bool)
    expected[q0 : q0 + sq, k0 : k0 + sk] = part
    mask = masks.from_ranges(
        [[q0, q0 + sq]], torch.tensor([[k0, k0 + sk]]), [kind], q_len=q0 + sq + 1, k_len=k0 + sk + 2
    )
    assert torch.equal(mask.to_dense(), expected)


def test_from_ranges_of_several() -> None:
    mask = masks.from_ranges([[0, 4], [4, 9]], [[0, 4], [0, 9]], [0, 1])
    assert mask == masks.prefix_lm_causal(9, 4)
    assert masks.from_ranges([], [], []) == AttentionMask(0, 0, [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[0, 4]], [[0, 4]], [4]), "not [4]"),
        (([[0, 4]], [[0, 4]], [0, 1]), "1 q_ranges, 1 k_ranges and 2 types"),
        (([[0, 4, 8]], [[0, 4]], [0]), "q_ranges must be [start, end) pairs"),
        (([[0, 4]], [[0, -4]], [0]), "k_ranges must not be negative"),
        (([[0, 4], [2, 6]], [[0, 4], [0, 4]], [0, 0]), "must be disjoint"),
        (([[0, 4]], [[0, 4]], [0], 3), "does not lie in 3 queries x 4 keys"),
    ],
)
def test_bad_ranges(arguments: tuple, words: str) -> None:
    with pytest.raises(LcabError) as error:
        masks.from_ranges(*arguments)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "cu_q must start at 0"),
        (([1, 4],), "cu_q must start at 0"),
        (([0, 4, 3],), "never descend"),
        (([0, 4], [0, 2, 4]), "as many documents: 1 and 2"),
        (([0, 4.5],), "cu_q must be integers"),
    ],
)
def test_bad_cu_seqlens(arguments: tuple, words: str) -> None:
    with pytest.raises(LcabError) as error:
        masks.from_cu_seqlens(*arguments)
    assert words in str(error.value)


@pytest.mark.parametrize("dense", [torch.ones(2, 2), torch.ones(2, dtype=torch.bool)])
def test_bad_dense(dense: torch.Tensor) -> None:
    with pytest.raises(LcabError, match="from_dense wants a bool matrix"):
        masks.from_dense(dense)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200_000), st.sampled_from(masks.distributions()), st.integers(0, 1 << 40))
def test_sampled_lengths_fill_the_sequence(n: int, distribution: str, seed: int) -> None:
    lengths = masks.sample_lengths(n, distribution, seed)
    assert sum(lengths) == n
    most = n if distribution.endswith("_long") else n // 4
    assert all(type(length) is int and 1 <= length <= max(1, most) for length in lengths)
    assert lengths == masks.sample_lengths(n, distribution, seed)


@pytest.mark.parametrize("distribution", ["pile", "prolong64k", "prolong512k"])
def test_sampled_lengths_follow_the_histogram(distribution: str) -> None:
    text = resources.files("lcab_plugin.masks").joinpath(f"data/{distribution}.json").read_text()
    histogram = {tuple(map(int, key[1:-1].split(","))): weight for key, weight in json.loads(text).items()}
    lengths = np.array(masks.sample_lengths(1 << 28, distribution, 0))
    assert len(lengths) > 10_000
    total = sum(histogram.values())
    for (low, high), weight in histogram.items():
        share = ((lengths >= max(low, 1)) & (lengths < high)).mean()
        assert abs(share - weight / total) < 5 * (weight / total / len(lengths)) ** 0.5 + 1 / len(lengths)


def test_three_fifths_of_the_tokens_are_in_long_documents() -> None:
    n = 1 << 26
    lengths = np.array(masks.sample_lengths(n, "prolong512k_long", 0))
    corpus = np.array(masks.sample_lengths(n, "prolong512k", 0))
    window = (8 << 10, 30 << 10)
    own, theirs = (int(x[(x >= window[0]) & (x <= window[1])].sum()) for x in (lengths, corpus))
    assert own == pytest.approx(0.6 * n + 0.4 * theirs, rel=0.05)
    halves = np.cumsum(lengths) < n / 2  # shuffled: as many long ones in front as behind
    long = lengths >= window[0]
    assert long[halves].sum() == pytest.approx(long[~halves].sum(), rel=0.2)


def test_lengths_of_a_histogram_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"[0,10)": 3, "[1000,1001)": 1.0}')
    lengths = np.array(masks.sample_lengths(1 << 20, str(path), 0))
    assert set(lengths[:-1]) == {*range(1, 10), 1000}
    assert (lengths == 1000).mean() == pytest.approx(0.25, abs=0.05)
    assert max(masks.sample_lengths(1500, str(path), 0)) == 1000  # no cap at a quarter


@pytest.mark.parametrize(
    "text",
    ["{", "[1, 2]", "{}", '{"[0,1)": 1}', '{"[9,5)": 1}', '{"1-5": 1}', '{"[1,5)": -1}', '{"[1,5)": "a"}'],
)
def test_what_is_no_histogram_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    with pytest.raises(LcabError, match=r"cannot read the document lengths of .*mine\.json: No such file"):
        masks.sample_lengths(100, str(path), 0)
    path.write_text(text)
    with pytest.raises(LcabError, match=r"mine\.json is no histogram of document lengths such as"):
        masks.sample_lengths(100, str(path), 0)


def test_bad_samples() -> None:
    with pytest.raises(LcabError, match="distribution 'piles'; did you mean 'pile'"):
        masks.sample_lengths(100, "piles", 0)
    with pytest.raises(LcabError, match="n must be an integer"):
        masks.sample_lengths(-1, "pile", 0)
    with pytest.raises(LcabError, match="seed must be an integer"):
        masks.sample_lengths(1, "pile", -3)
