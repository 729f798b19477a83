"""When the timing core stops, in what order it calls, and what its numbers mean: by clocks that are told the
time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from lcab_plugin.bench import timing
from lcab_plugin.bench.timing import Limits, Timing


class Clock:
    """Tells the time that calls pass on it; logs what is asked of it."""

    def __init__(self) -> None:
        self.now = 0.0  # ms
        self.log: list[str] = []

    def prepare(self, host_seconds: float) -> None:
        self.log.append("prepare")

    def mark(self) -> float:
        return self.now

    def wait(self) -> None:
        self.log.append("wait")

    def elapsed_ms(self, begin: float, end: float) -> float:
        return end - begin

    def call(self, name: str, *ms: float) -> Any:
        """A callable that takes these times in turn."""
        count = 0

        def run() -> None:
            nonlocal count
            self.log.append(name)
            self.now += ms[count % len(ms)]
            count += 1

        return run


def measured(clock: Clock, limits: Limits, **calls: Any) -> dict[str, Timing]:
    found = timing.measure(calls, clock, limits)
    assert all(isinstance(result, Timing) for result in found.values())
    return found  # type: ignore[return-value]


def test_callables_take_turns_after_the_warm_up() -> None:
    clock = Clock()
    limits = Limits(min_repeats=3, warm_up=2)
    measured(clock, limits, a=clock.call("a", 1), b=clock.call("b", 2), c=clock.call("c", 3))
    names = [entry for entry in clock.log if entry in "abc"]
    assert names[:6] == list("aabbcc")
    assert [sorted(names[i : i + 3]) for i in range(6, len(names), 3)] == [list("abc")] * 3


def test_the_order_of_turns_is_shuffled_by_a_seed() -> None:
    def rounds(seed: int) -> list[str]:
        clock = Clock()
        limits = Limits(min_repeats=20, warm_up=1, seed=seed)
        measured(clock, limits, **{name: clock.call(name, 1) for name in "abcd"})
        names = "".join(entry for entry in clock.log if entry in "abcd")[4:]
        return [names[i : i + 4] for i in range(0, len(names), 4)]

    assert len(set(rounds(0))) > 10
    assert rounds(0) == rounds(0) != rounds(1)
    firsts = [order[0] for order in rounds(0)]
    assert all(firsts.count(name) >= 2 for name in "abcd")


def test_every_repeat_is_prepared_and_a_batch_waits_once() -> None:
    clock = Clock()
    measured(clock, Limits(min_repeats=2, warm_up=1), a=clock.call("a", 1), b=clock.call("b", 1))
    timed = clock.log[-9:]
    assert timed[:8:2] == ["prepare"] * 4
    assert sorted(timed[1:8:2]) == ["a", "a", "b", "b"]
    assert timed[8] == "wait"


def test_the_numbers_are_milliseconds_of_the_timed_repeats() -> None:
    clock = Clock()
    limits = Limits(relative_ci=0.0, max_repeats=11, min_repeats=11, warm_up=1)
    result = measured(clock, limits, a=clock.call("a", 500, *range(1, 12)))["a"]
    assert (result.median, result.p10, result.p90, result.min, result.repeats) == (6, 2, 10, 1, 11)


def test_a_steady_callable_stops_at_the_least_repeats_and_a_noisy_one_goes_on() -> None:
    clock = Clock()
    assert measured(clock, Limits(), a=clock.call("a", 4))["a"].repeats == Limits().min_repeats
    noisy = measured(clock, Limits(max_repeats=40), a=clock.call("a", 4, 9, 14))["a"]
    assert noisy.repeats == 40
    assert noisy.relative_ci > 0.02
    settling = measured(clock, Limits(), a=clock.call("a", 10, 10, 10, 20))["a"]
    assert 6 < settling.repeats < 100
    assert (settling.median, settling.relative_ci) == (10, 0.0)


def test_a_callable_may_not_exceed_its_seconds() -> None:
    clock = Clock()
    limits = Limits(relative_ci=0.0, seconds=1.0, max_repeats=1000)
    measured(clock, limits, a=clock.call("a", 90, 110))
    assert 900 <= clock.now <= 1000


def test_a_call_longer_than_its_seconds_is_warmed_up_and_timed_once() -> None:
    clock = Clock()
    result = measured(clock, Limits(seconds=1.0), a=clock.call("a", 7000))["a"]
    assert (result.median, result.repeats, result.relative_ci) == (7000, 1, None)
    assert clock.log.count("a") == 2


def test_a_slow_callable_does_not_take_the_fast_ones_repeats() -> None:
    clock = Clock()
    limits = Limits(seconds=1.0)
    found = measured(clock, limits, slow=clock.call("slow", 5000), fast=clock.call("fast", 1))
    assert found["slow"].repeats == 1
    assert found["fast"].repeats >= limits.min_repeats


def test_a_steady_callable_stays_until_the_noisy_one_has_settled() -> None:
    clock = Clock()
    found = measured(clock, Limits(max_repeats=30), a=clock.call("a", 5), b=clock.call("b", 5, 10, 20))
    assert found["a"].repeats == found["b"].repeats == 30


def test_a_callable_that_raises_leaves_the_others_alone() -> None:
    clock = Clock()
    seen = []

    def fails() -> None:
        seen.append(torch.zeros(1))
        if len(seen) == 4:
            raise RuntimeError("the fourth")

    found = timing.measure({"a": clock.call("a", 1), "b": fails}, clock, Limits(min_repeats=5))
    assert isinstance(found["a"], Timing)
    assert found["a"].repeats >= 5
    assert str(found["b"]) == "the fourth"
    assert found["b"].__traceback__ is None  # or it would hold the tensors of the call
    at_once = timing.measure({"b": fails}, clock, Limits(warm_up=1, min_repeats=1))
    assert isinstance(at_once["b"], Timing)


def test_an_interrupt_is_not_swallowed() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.measure({"a": interrupted}, Clock())


def test_the_interval_of_the_median_covers_it_whatever_the_distribution() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        times = rng.lognormal(sigma=1.0, size=21)
        ordered = np.sort(times)
        width = timing.relative_ci(times.tolist()) * 2 * np.median(times)
        ends = [
            (ordered[i], ordered[20 - i])
            for i in range(10)
            if np.isclose(ordered[20 - i] - ordered[i], width)
        ]
        inside += ends[0][0] <= 1.0 <= ends[0][1]
    assert inside / 2000 > 0.94
    assert timing.relative_ci([3.0]) is None
    assert timing.relative_ci([3.0, 3.0]) == 0.0
    assert timing.relative_ci([0.0, 0.0, 1.0]) == float("inf")


def test_the_noise_floor_is_an_empty_call_and_one_call_measured_several_times() -> None:
    clock = Clock()
    floor = timing.noise_floor(clock.call("a", 4), clock)
    assert (floor.empty_ms, floor.same_relative) == (0.0, 0.0)
    ms = np.random.default_rng(0).normal(10, 1, 1000).tolist()
    floor = timing.noise_floor(clock.call("a", *ms), clock, Limits(relative_ci=0.0, max_repeats=10))
    assert 0.03 < floor.same_relative < 0.3  # medians of ten: 0.4 ms of deviation, the farthest of five
    assert str(timing.NoiseFloor(0.0012, 0.013)) == "noise floor: 0.0012 ms, and 1.3% between equal calls"
    assert floor.record() == {"noise_empty_ms": 0.0, "noise_same_relative": floor.same_relative}


def test_the_host_clock_measures_the_call() -> None:
    found = timing.measure({"sleep": lambda: time.sleep(2e-3)}, timing.clock("cpu"), Limits(seconds=0.05))
    assert found["sleep"].min >= 2.0
    assert timing.host_us(lambda: time.sleep(1e-3), timing.clock("cpu")) >= 1000.0


def test_the_cuda_clock_empties_l2_until_the_host_has_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch.cuda's interface as documented, with a stream that writes 4 MiB in 50 us."""
    l2 = 2 << 20
    writes = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            self.at = 0.05 * len(writes)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    properties = type("Properties", (), {"L2_cache_size": l2})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda x: writes.append(x.nbytes))
    clock = timing.CudaClock("cpu")
    assert set(writes) == {2 * l2}
    for host_seconds, expected in ((0.0, 1), (100e-6, 3), (1.0, 40)):
        writes.clear()
        clock.prepare(host_seconds)
        assert len(writes) == expected
    begin = clock.mark()
    clock.prepare(0.0)
    assert clock.elapsed_ms(begin, clock.mark()) == pytest.approx(0.05)
