"""Exact areas of the slowest ranks, and work that is sampled where there is much of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcab_plugin import layout as layouts
from lcab_plugin import masks
from lcab_plugin.context_parallel.topology import PLACEMENTS
from lcab_plugin.masks import AttentionMask
from lcab_plugin.planner import split
from lcab_plugin.planner.work import refusal


@st.composite
def some_masks(draw: st.DrawFn) -> AttentionMask:
    """Of 1024 tokens."""
    cuts = sorted(draw(st.sets(st.integers(1, 1023), max_size=6)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, 1024], strict=True)]
    family = draw(st.sampled_from(["causal", "full_document", "causal_document", "sliding_window_causal"]))
    given = {"left": draw(st.integers(1, 300))} if "window" in family else {}
    return masks.from_name(family, 1024, **given, **({"lengths": lengths} if "document" in family else {}))


@settings(max_examples=40, deadline=None)
@given(
    mask=some_masks(),
    layout=st.sampled_from(["contiguous", "zigzag"]),
    ranks=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_more_ranks_never_compute_more_each(mask: AttentionMask, layout: str, ranks: int) -> None:
    """In these layouts a rank of twice as many holds a part of what one held."""
    few, many = (
        split.block(layouts.make(layout, n, 1024), mask, 1, "head_first") for n in (ranks, 2 * ranks)
    )
    assert many.area <= few.area
    assert many.rows <= few.rows


@settings(max_examples=40, deadline=None)
@given(
    mask=some_masks(),
    layout=st.sampled_from(sorted(layouts.LAYOUTS)),
    ulysses=st.sampled_from([1, 2, 4, 8]),
    placement=st.sampled_from(PLACEMENTS),
)
def test_areas_are_the_layouts(mask: AttentionMask, layout: str, ulysses: int, placement: str) -> None:
    made = layouts.make(layout, 8, 1024, mask)
    block = split.block(made, mask, ulysses, placement)
    rows = made.rows(block.ranks)
    assert block.area == mask.local(rows, (range(1024),)).area
    assert block.mean == pytest.approx(mask.area * ulysses / 8)
    if ulysses == 1:
        assert block.imbalance == pytest.approx(layouts.imbalance(made, mask))
    ring = split.ring("triton", block, 64, "cuda")
    others = 8 // ulysses - 1
    assert ring.own.area + ring.busy * others * ring.other.area == pytest.approx(block.area, abs=1)


@pytest.mark.parametrize("kernel", ["triton", "sdpa_flash", "cudnn"])
@pytest.mark.parametrize("mask", [masks.causal(1 << 17), masks.causal_document([1 << 11] * 64)])
def test_sampled_work_is_near_all_of_it(kernel: str, mask: AttentionMask, monkeypatch: Any) -> None:
    block = split.block(layouts.make("striped", 4, mask.q_len), mask, 1, "head_first")
    monkeypatch.setattr(split, "EXACT_RANGES", 1000)
    split._parts.cache_clear()
    every = split.whole.__wrapped__(kernel, block, 128, "cuda")
    monkeypatch.setattr(split, "EXACT_RANGES", 1)
    split._parts.cache_clear()
    sampled = split.whole.__wrapped__(kernel, block, 128, "cuda")
    assert every.area == sampled.area == block.area
    assert sampled.computed == pytest.approx(every.computed, rel=0.06)
    assert sampled.rows == every.rows
    assert sampled.calls == pytest.approx(every.calls, rel=0.3, abs=split.WINDOWS)


def test_ranks_that_see_nothing_of_a_peer_are_counted() -> None:
    n = 1 << 16
    mask = masks.sliding_window_causal(n, 256)
    block = split.block(layouts.make("contiguous", 64, n), mask, 1, "head_first")
    assert split.ring("triton", block, 128, "cuda").busy == pytest.approx(1 / 63)


def test_refusals_say_why() -> None:
    mask = masks.causal(4096)
    assert refusal("triton", mask, 128, "bf16", "cuda") is None
    assert "on cuda" in (refusal("naive", mask, 128, "bf16", "cuda") or "on cuda")
    assert "not on cpu" in (refusal("cudnn", mask, 128, "bf16", "cpu") or "")
    assert "fp32" in (refusal("cudnn", mask, 128, "fp32", "cuda") or "")
    assert "multiple of 8" in (refusal("cudnn", mask, 100, "bf16", "cuda") or "")
    assert "no backward" in (refusal("flex", mask, 64, "fp32", "cpu") or "")
    deep = masks.from_ranges([[0, 64]] * 6, [[i * 100, i * 100 + 50] for i in range(6)], [0] * 6)
    assert "merged from 6" in (refusal("cudnn", deep, 128, "bf16", "cuda") or "")
