"""The ranking and its terms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcab_plugin import masks, planner
from lcab_plugin.context_parallel.topology import AXES, resolve_degrees
from lcab_plugin.errors import LcabError
from lcab_plugin.planner import (
    HARDWARE,
    MODELS,
    Choice,
    Cluster,
    Model,
    Prediction,
    candidates,
    memory,
    predict,
)
from lcab_plugin.planner.plan import ALIKE
from lcab_plugin.planner.predict import _Parts, _rings
from lcab_plugin.planner.traffic import Span

ATTENTION, SMALL = MODELS["attention"], Model(2, 512, 1024, 1000, 8, 2, 64)
TINY = Model(12, 768, 3072, 257, 12, 4, 64)  # docs/results/2026-11-24-2xh100: 60 to 145 ms a step
H100, NODE, ALL = HARDWARE["H100"], Cluster(), Choice()


def ranked(
    tokens: int = 8192,
    model: Model = SMALL,
    cluster: Cluster = NODE,
    choice: Choice = ALL,
    mask: masks.AttentionMask | None = None,
) -> list[Prediction]:
    given = planner.setting(mask or masks.causal(tokens), model, cluster, H100)
    return planner.rank(given, choice)


def test_every_degree_is_one_that_context_parallel_takes() -> None:
    for cp in (1, 2, 6, 12, 96):
        for strategy in AXES:
            found = list(candidates.splits(strategy, cp)) if strategy != "none" else []
            for degrees in found:
                assert resolve_degrees(strategy, cp, dict(degrees)) == degrees
            assert len({tuple(d.items()) for d in found}) == len(found)
    assert list(candidates.splits("usp", 8)) == [{"ulysses": 2, "ring": 4}, {"ulysses": 4, "ring": 2}]


@settings(max_examples=20, deadline=None)
@given(
    family=st.sampled_from(["causal", "full", "sliding_window_causal"]),
    gpus=st.sampled_from([1, 2, 4, 8]),
    nodes=st.sampled_from([1, 2]),
    zero=st.sampled_from([0, 3]),
)
def test_the_ranking_is_whole_ordered_and_deterministic(
    family: str, gpus: int, nodes: int, zero: int
) -> None:
    mask = masks.from_name(family, 4096, **({"left": 512} if "window" in family else {}))
    cluster = Cluster(nodes, gpus, zero=zero)
    once, again = ranked(cluster=cluster, mask=mask), ranked(cluster=cluster, mask=mask)
    assert [p.to_dict() for p in once] == [p.to_dict() for p in again]
    runs = [p.seconds for p in once if p.reason is None]
    alike = sum(seconds <= ALIKE * min(runs) for seconds in runs)
    assert max(runs[:alike], default=0) <= ALIKE * min(runs, default=0)
    assert runs[alike:] == sorted(runs[alike:])
    assert [p.reason is None for p in once] == sorted((p.reason is None for p in once), reverse=True)
    for p in once:
        assert all(math.isfinite(x) and x >= 0 for x in (*p.terms.values(), *p.memory.values()))
        assert p.imbalance >= 1 - 1e-12
        assert math.prod((p.candidate.cp, p.candidate.dp)) == cluster.world


def test_one_rank_sends_nothing_and_hides_nothing() -> None:
    for p in ranked(cluster=Cluster(1, 1)):
        assert p.candidate.strategy == "none"
        assert p.terms["exposed"] == p.terms["imbalance"] == p.terms["parameters"] == 0
        assert p.sent == {"fwd": 0, "bwd": 0}
        assert p.memory["communication"] == 0


@pytest.mark.parametrize("strategy", ["ulysses", "ring_all_gather", "ring_p2p"])
def test_more_ranks_do_not_compute_more_each(strategy: str) -> None:
    kept = Choice(kernels=("triton",), strategies=(strategy,), layouts=("zigzag",))
    each = []
    for gpus in (2, 4, 8):
        best = ranked(1 << 17, ATTENTION, Cluster(1, gpus), kept)[0]
        each.append((best.terms["attention"] + best.terms["imbalance"], best.memory["activations"]))
    assert each == sorted(each, reverse=True)


def test_slower_links_expose_more_and_change_nothing_else() -> None:
    mask = masks.causal(16384)
    fast = planner.setting(mask, ATTENTION, Cluster(2, 8), H100)
    slow = planner.setting(mask, ATTENTION, Cluster(2, 8), H100.with_links(45, 5))
    kept = Choice(kernels=("triton",), layouts=("zigzag",))
    before, after = ({p.candidate: p for p in planner.rank(s, kept)} for s in (fast, slow))
    for candidate, p in before.items():
        other = after[candidate]
        assert other.terms["exposed"] >= p.terms["exposed"]
        assert {**other.terms, "exposed": 0} == {**p.terms, "exposed": 0}
        assert other.sent == p.sent


def test_what_cannot_run_says_why() -> None:
    reasons = {
        (p.candidate.strategy, p.candidate.kernel): p.reason or ""
        for p in ranked(model=Model(2, 512, 1024, 1000, 6, 6, 64), choice=Choice(kernels=("triton", "flex")))
    }
    assert "cannot be dealt to 8 Ulysses ranks" in reasons["ulysses", "triton"]
    assert not reasons["ring_p2p", "triton"]
    large = ranked(1 << 20, MODELS["llama3-405b"], Cluster(1, 8), Choice(layouts=("zigzag",)))
    assert all("GiB of" in (p.reason or "") or "dealt" in (p.reason or "") for p in large)
    with pytest.raises(LcabError, match=r"nothing fits: .* GiB"):
        planner.best(planner.setting(masks.causal(1 << 20), MODELS["llama3-405b"], Cluster(), H100), Choice())


def test_batches_are_shared_by_groups() -> None:
    found = {(p.candidate.cp, p.candidate.dp) for p in ranked(cluster=Cluster(1, 8, batch=4))}
    assert found == {(2, 4), (4, 2), (8, 1)}
    with pytest.raises(LcabError, match=r"3 context-parallel ranks .* give one of: 2, 4, 8"):
        ranked(cluster=Cluster(1, 8, batch=4), choice=Choice(cp=(3,)))


def test_names_and_numbers_are_checked() -> None:
    for make in (
        lambda: Choice(kernels=("tritn",)),
        lambda: Choice(layouts=("zigzg",)),
        lambda: Choice(strategies=("uspp",)),
        lambda: Cluster(checkpointing="blok"),
        lambda: planner.find("H10O"),
        lambda: planner.model("llama"),
        lambda: Model(1, 0, 0, 0, 8, 8, 64, "int8"),
    ):
        with pytest.raises(LcabError, match="Choose one of"):
            make()
    for make in (
        lambda: Cluster(0),
        lambda: Cluster(zero=4),
        lambda: Model(1, 0, 0, 0, 8, 3, 64),
        lambda: Model(1, -1, 0, 0, 8, 2, 64),
        lambda: H100.with_links(0, None),
    ):
        with pytest.raises(LcabError):
            make()


def test_model_states_follow_zero() -> None:
    model = MODELS["llama3-8b"]
    assert model.parameters == pytest.approx(8.03e9, rel=0.01)
    assert MODELS["llama3-70b"].parameters == pytest.approx(70.6e9, rel=0.01)
    assert MODELS["llama3-405b"].parameters == pytest.approx(405.9e9, rel=0.01)
    held = [memory.model_states(model, Cluster(1, 8, zero=stage)) for stage in range(4)]
    assert held == sorted(held, reverse=True)
    assert held[0] == 16 * model.parameters
    assert held[1] == (4 + 12 / 8) * model.parameters
    assert held[2] == (2 + 14 / 8) * model.parameters
    kept = [memory.activations(model, Cluster(checkpointing=c), 8192) for c in planner.CHECKPOINTING]
    assert kept[1] < kept[2] < kept[0]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_ring_hides_what_its_blocks_take(size: int) -> None:
    """Step by step: a transfer that is longer than the block it travels behind is waited for."""
    span = Span(size, 1, size)
    for factor in (0.5, 1.0, 3.0):
        hop = span.hop(1e8, H100)
        parts = _Parts(own=hop * factor, other=hop * factor, busy=1.0)
        exposed, whole = _rings([span], 1e8, 0.0, parts, H100)
        assert exposed == pytest.approx((size - 1) * max(0.0, hop * (1 - factor)))
        assert whole == pytest.approx((size - 1) * hop)
    exposed, whole = _rings([span], 1e8, 2e8, _Parts(1.0, 1.0, 1.0), H100)
    assert exposed == pytest.approx(span.hop(2e8, H100))  # the last gradients' way home
    assert whole == pytest.approx((size - 1) * (span.hop(1e8, H100) + span.hop(2e8, H100)))


def test_a_double_ring_sends_less_between_nodes() -> None:
    parts = _Parts(0.0, 0.0, 1.0)
    single, _ = _rings([Span(16, 1, 8)], 1e8, 0.0, parts, H100)
    double, _ = _rings([Span(8, 1, 8), Span(2, 8, 1)], 1e8, 0.0, parts, H100)
    assert double < single


def test_checkpointing_repeats_what_is_not_kept() -> None:
    kept = Choice(kernels=("triton",), strategies=("ring_all_gather",), layouts=("zigzag",))
    none, block, attention = (
        ranked(cluster=Cluster(checkpointing=c), choice=kept)[0].terms for c in planner.CHECKPOINTING
    )
    assert block["exposed"] > none["exposed"] == attention["exposed"]
    assert block["attention"] > none["attention"] == attention["attention"]
    assert block["linear"] == attention["linear"] > none["linear"]


@pytest.mark.parametrize(
    ("tokens", "model", "cluster", "words"),
    [
        (8192, TINY, Cluster(1, 1, zero=1), ("takes 2 ms a layer and sequence", "took 5 to 12 ms a layer")),
        (8192, TINY, Cluster(1, 1, zero=3), ("took 5 to 24 ms a layer",)),
        (8192, TINY, Cluster(1, 2, batch=4, zero=1), ("takes 1.9 ms a layer and sequence",)),
        (1 << 17, MODELS["llama3-8b"], Cluster(4, 8), ()),
        (8192, ATTENTION, Cluster(1, 1), ()),
    ],
)
def test_steps_that_wait_for_the_host_are_told(
    tokens: int, model: Model, cluster: Cluster, words: tuple[str, ...]
) -> None:
    given = planner.setting(masks.causal(tokens), model, cluster, H100)
    said = planner.host_bound(planner.rank(given, Choice(kernels=("triton",)))[0], given)
    assert bool(said) == bool(words)
    assert all(word in (said or "") for word in words)


def test_a_mask_that_would_take_minutes_is_refused() -> None:
    mask = masks.block_sparse(1 << 19, 128, 0.1)
    with pytest.raises(LcabError, match="slices, and planning takes seconds up to 524288"):
        ranked(mask=mask)


def test_a_kernel_is_not_chosen_for_hiding_the_parameters_by_being_slow() -> None:
    found = ranked(model=MODELS["llama3-8b"], mask=masks.prefix_lm_causal(4096, 3072))
    fastest = min(found, key=lambda p: p.seconds)
    assert fastest.terms["attention"] > 0.1  # and ZeRO 3's gathers hidden behind it
    assert found[0].attention < 0.25 * fastest.attention
    assert found[0].seconds < ALIKE * fastest.seconds


def test_unmeasured_kernels_are_marked() -> None:
    found = {p.candidate.kernel: p.speed for p in ranked(choice=Choice(kernels=("fa3", "triton")))}
    assert found == {"fa3": "assumed", "triton": "H200's scaled to H100"}
    assert {p.candidate.kernel for p in ranked()} == {"triton", "sdpa_flash", "cudnn", "fa4"}


def test_terms_add_up_to_the_step() -> None:
    p = ranked()[0]
    assert set(p.terms) == {"attention", "imbalance", "exposed", "linear", "parameters", "optimizer"}
    assert set(p.memory) == {"states", "activations", "attention", "communication", "logits"}
    assert p.seconds == sum(p.terms.values())
    assert p.to_dict()["step_ms"] == pytest.approx(p.seconds * 1e3)
    assert predict.training(planner.setting(masks.causal(64), ATTENTION, Cluster(), H100), 8, 1) == {
        "linear": 0,
        "parameters": 0,
        "optimizer": 0,
    }


def exposed(strategy: str, mask: masks.AttentionMask) -> float:
    """Seconds of a forward and a backward over two GPUs that kernels do not take."""
    choice = Choice(("triton",), (strategy,), ("contiguous",), (2,))
    (found,) = ranked(model=ATTENTION, cluster=Cluster(1, 2, zero=0), choice=choice, mask=mask)
    return found.terms["exposed"]


def test_packing_and_merging_are_exposed() -> None:
    n, (h, hk, d, e) = 16384, (ATTENTION.heads, ATTENTION.kv_heads, ATTENTION.head_dim, ATTENTION.itemsize)
    rows, two = n // 2, Span(2, 1, 2)
    packed = 4 * e * d * rows * (h + hk) / H100.stream
    sent = two.all_to_all(e * rows * (h + hk) * d, H100)  # half of q, k, v and out
    assert exposed("ulysses", masks.full(n)) == pytest.approx(2 * (sent + packed))
    merged = d * rows * h * (2 * (e + 4) + (e + 16) + 2 * (e + 4) + (e + 8)) / H100.stream
    last = two.hop(2 * rows * hk * d * 4, H100)  # gradients of the keys, which nothing hides
    assert exposed("ring_p2p", masks.full(n)) == pytest.approx(merged + last)


def test_little_is_awaited_and_nothing_merged() -> None:
    mask, two = masks.sliding_window_causal(16384, 512), Span(2, 1, 2)
    keys = 512 * 2 * ATTENTION.kv_heads * ATTENTION.head_dim * ATTENTION.itemsize
    times = [two.all_to_all(x, H100) for x in (keys, keys, keys * 4 // ATTENTION.itemsize)]
    assert exposed("group_cast", mask) == pytest.approx(sum(times), rel=0.01)
