"""Timers add up, on a host and on a device that is told the time."""

from __future__ import annotations

import time

import pytest
import torch

from lcab_plugin.training import measure
from lcab_plugin.training.measure import StepTimer, summary


def test_parts_add_up_and_start_again() -> None:
    timer = StepTimer("cpu", ("whole", "part", "unused"))
    with timer("whole"):
        for _ in range(2):
            with timer("part"):
                time.sleep(0.01)
    spent = timer.take()
    assert 20 <= spent["part_ms"] <= spent["whole_ms"] < 1000
    assert spent["unused_ms"] == 0
    assert set(timer.take().values()) == {0.0}


def test_a_part_that_fails_passes_its_error_on() -> None:
    timer = StepTimer("cpu", ("part",))
    with pytest.raises(RuntimeError, match="inside"), timer("part"):
        raise RuntimeError("inside")


def test_who_watches_is_told_of_every_part_that_ended() -> None:
    ended: list[str] = []
    timer = StepTimer("cpu", ("whole", "part"), ended.append)
    with timer("whole"), timer("part"):
        pass
    assert ended == ["part", "whole"]


def test_on_a_gpu_nothing_waits_before_the_times_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch.cuda's interface as documented, with a stream whose work takes 5 ms a part."""
    now, waits = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    timer = StepTimer("cuda", ("part",))
    for _ in range(3):
        with timer("part"):
            now[0] += 5.0
        now[0] += 100.0
    assert not waits
    assert timer.take() == {"part_ms": 15.0}
    assert len(waits) == 1


def test_the_summary_of_times_and_how_a_record_names_it() -> None:
    found = summary([float(i) for i in range(1, 12)])
    assert (found.median, found.p10, found.p90, found.min, found.repeats) == (6, 2, 10, 1, 11)
    assert found.record() == {
        "median_ms": 6.0,
        "p10_ms": 2.0,
        "p90_ms": 10.0,
        "min_ms": 1.0,
        "repeats": 11,
        "relative_ci": measure.relative_ci(range(1, 12)),
    }
    assert summary([3.0]).relative_ci is None
