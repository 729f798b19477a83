"""Bytes against the closed forms that the measured ones are compared with, and how long they travel."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcab_plugin import layout as layouts
from lcab_plugin import masks
from lcab_plugin.bench import cp_volume
from lcab_plugin.context_parallel.topology import AXES, PLACEMENTS, axis_sizes
from lcab_plugin.planner import HARDWARE, Model, traffic
from lcab_plugin.planner.candidates import splits
from lcab_plugin.planner.traffic import Span

RANKS = 8
TOKENS = 32 * RANKS
MASKS = {
    "causal": masks.causal(TOKENS),
    "window": masks.sliding_window_causal(TOKENS, 20),
    "documents": masks.causal_document([100, 60, 96]),
    "question": masks.share_question([16, 100, 140]),
}
DEGREES = [(s, d) for s in AXES if s != "none" for d in splits(s, RANKS)]


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.sampled_from(DEGREES),
    placement=st.sampled_from(PLACEMENTS),
    layout=st.sampled_from(["contiguous", "zigzag", "striped"]),
    mask=st.sampled_from(sorted(MASKS)),
    heads=st.sampled_from([(8, 8), (16, 4), (8, 2), (24, 12)]),
    dtype=st.sampled_from(["bf16", "fp32"]),
)
def test_bytes_are_those_of_the_closed_forms(
    chosen: tuple[str, dict[str, int]],
    placement: str,
    layout: str,
    mask: str,
    heads: tuple[int, int],
    dtype: str,
) -> None:
    strategy, degrees = chosen
    model = Model(1, 0, 0, 0, *heads, 16, dtype)
    made = layouts.make(layout, RANKS, TOKENS)
    axes = traffic.spans(degrees, placement, 4)
    cast = traffic.cast_rows(made, MASKS[mask]) if strategy == "group_cast" else (0.0, 0.0)
    call = cp_volume.Call(1, *heads, 16, 16, model.itemsize, 4)
    sizes = axis_sizes(degrees, placement)
    for backward in (False, True):
        sent = traffic.sent(strategy, axes, model, TOKENS // RANKS, cast, backward).total
        exact = [
            cp_volume.sent_bytes(strategy, sizes, made, MASKS[mask], call, rank, backward)
            for rank in range(RANKS)
        ]
        if strategy == "group_cast" and backward:  # the most sent and the most received, of any two ranks
            assert max(exact) <= sent <= 2 * max(exact)
        else:
            assert sent == max(exact)


def test_one_rank_sends_nothing() -> None:
    model = Model(1, 0, 0, 0, 8, 8, 64)
    assert traffic.sent("none", {}, model, 4096, (0.0, 0.0), True).total == 0
    assert traffic.cast_rows(layouts.make("zigzag", 1, 64), masks.causal(64)) == (0.0, 0.0)


def test_rows_of_many_ranks_are_sampled_near_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, layout = masks.causal(4096), layouts.make("zigzag", 32, 4096)
    exact = traffic.cast_rows.__wrapped__(layout, mask)
    monkeypatch.setattr(traffic, "EXACT_RANKS", 16)
    sampled = traffic.cast_rows.__wrapped__(layout, mask)
    assert sampled[1] == pytest.approx(exact[1], rel=0.1)
    assert sampled[0] == pytest.approx(exact[0], rel=0.6)  # the most sent stands in by the most received


@pytest.mark.parametrize(
    ("degrees", "placement", "near"),
    [
        ({"ulysses": 8, "ring": 2}, "head_first", {"ulysses": 8, "ring": 1}),
        ({"ulysses": 2, "ring": 8}, "context_first", {"ring": 8, "ulysses": 1}),
        ({"ulysses": 4, "ring": 4}, "head_first", {"ulysses": 4, "ring": 2}),
        ({"ulysses": 6, "ring": 4}, "head_first", {"ulysses": 2, "ring": 1}),  # the second six straddle nodes
    ],
)
def test_ranks_of_an_axis_in_one_node(degrees: dict[str, int], placement: str, near: dict[str, int]) -> None:
    assert {name: span.near for name, span in traffic.spans(degrees, placement, 8).items()} == near


def test_links_between_nodes_are_slower() -> None:
    h100 = HARDWARE["H100"]
    for time in (Span.hop, Span.all_to_all, Span.gather):
        inside, across = (time(Span(8, 1, near), 1e9, h100) for near in (8, 4))
        assert 0 < inside < across
    assert Span(8, 1, 8).hop(225e6, h100) == pytest.approx(1e-3, rel=0.01)  # 450 GB/s at 50 %
    assert Span(1, 1, 1).all_to_all(1e9, h100) == Span(1, 1, 1).gather(1e9, h100) == 0
