"""Timers add up; memory is what this process held."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lcab_plugin.training.measure import StepTimer, peak_memory_gib


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


def test_peak_memory_remembers_what_was_freed() -> None:
    before = peak_memory_gib("cpu")
    held = np.ones(2**26)  # half a GiB
    del held
    assert 0.01 < before < peak_memory_gib("cpu")
    assert peak_memory_gib("cpu") > 0.5
