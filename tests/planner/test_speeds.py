"""What is fitted, on numbers that are known and on the records of an H100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcab_plugin.planner import HARDWARE, calibrate, speeds
from lcab_plugin.planner.measured import H100
from lcab_plugin.planner.speeds import COSTS, Heads
from lcab_plugin.planner.work import Work
from lcab_plugin.training import records

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "2026-11-23-h100"


def shipped() -> list[dict[str, Any]]:
    """The records that planner/measured.py was fitted to."""
    cells, fa4 = (calibrate.measured(records.read(RESULTS / f"{n}.jsonl")) for n in ("kernels", "with_fa4"))
    return cells + [r for r in fa4 if r["kernel"] == "fa4"]


def test_costs_that_made_the_times_are_found() -> None:
    rng = np.random.default_rng(0)
    amounts = rng.uniform(1, 2, (40, 4)) * 10.0 ** rng.uniform(0, 6, (40, 1)) * [1, 1e3, 1e-3, 1]
    amounts[:, 3] = rng.uniform(1, 2, 40)
    costs = np.array([2e-6, 0.0, 4e-3, 5.0])
    assert speeds.least_squares(amounts, amounts @ costs) == pytest.approx(costs, rel=1e-6, abs=1e-9)


def test_no_cost_is_below_zero() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        costs = speeds.least_squares(rng.normal(size=(12, 5)), rng.uniform(1, 2, 12))
        assert (costs >= 0).all()
        assert np.isfinite(costs).all()


def test_an_outlier_does_not_turn_the_fit() -> None:
    amounts = np.stack([np.ones(30), np.arange(1.0, 31)], axis=1)
    seconds = amounts @ [1.0, 2.0]
    seconds[7] *= 5
    assert speeds.least_squares(amounts, seconds) == pytest.approx([1, 2], rel=0.05)


def test_nothing_visible_takes_no_time() -> None:
    heads = Heads(1, 8, 2, 64, 2)
    assert H100["triton"].seconds("fwd", Work(), heads) == 0
    more = [H100["triton"].seconds("fwd", Work(1, n, n, 0, n, n), heads) for n in (10, 100, 1000)]
    assert more == sorted(more)


def test_speeds_scale_with_the_hardware() -> None:
    h200, b200 = HARDWARE["H200"], HARDWARE["B200"]
    heads, work = Heads(1, 64, 8, 128, 2), Work(1, 1e9, 1e9, 0, 65536, 65536)
    slow, fast = (speeds.table(h, "bf16")["triton"] for h in (h200, b200))
    assert slow.seconds("fwd", work, heads) / fast.seconds("fwd", work, heads) == pytest.approx(
        b200.peak / h200.peak, rel=0.05
    )
    assert fast.origin == "H100's scaled to B200"
    assert speeds.table(HARDWARE["H100"], "bf16")["triton"].origin == "measured on H100"
    assert speeds.table(HARDWARE["H100"], "fp32") == {}


def test_what_ships_is_what_the_records_give_and_predicts_those_held_back() -> None:
    fitted = calibrate.fit(shipped(), HARDWARE["H100"], "bf16")
    assert set(fitted.speeds) == set(H100) == {"triton", "sdpa_flash", "cudnn", "fa4"}
    for name, speed in fitted.speeds.items():
        assert speed.fwd == pytest.approx(H100[name].fwd, rel=1e-2, abs=1e-18)
        assert speed.bwd == pytest.approx(H100[name].bwd, rel=1e-2, abs=1e-18)
    assert len(fitted.errors) == 8
    for error in fitted.errors:
        assert error.held >= 5
        assert error.median < 0.10, error
        assert error.p90 < 0.30, error
    assert fitted.left_out["'torch_flex' is no kernel here"] == 141


def test_records_of_other_hardware_and_numbers_are_left_aside() -> None:
    records = shipped()
    assert calibrate.fit(records, HARDWARE["A100"], "bf16").speeds == {}
    assert calibrate.fit(records, HARDWARE["H100"], "fp32").left_out["dtype bf16"] > 400
    other = [{**r, "digest": "0"} for r in records]
    assert calibrate.fit(other, HARDWARE["H100"], "bf16").left_out["a mask that cannot be made again"] > 400


def test_the_share_of_matrices_is_fitted_to_training() -> None:
    run = {
        "type": "run",
        "name": "r",
        "first_step": 0,
        "device": "NVIDIA H100 80GB HBM3",
        "dtype": "bf16",
        "model": {"vocab": 100, "hidden": 64, "layers": 12},
        "parameters": 1e9,
        "world": 8,
        "attention": {"kernel": "triton"},
    }
    tokens, area_flops = 65536, 1e15
    matrices = 6 * (1e9 - 6400) * tokens
    costs = sum(speeds.PASSES[p] * getattr(H100["triton"], p)[COSTS.index("computed")] for p in speeds.PASSES)
    seconds = area_flops / 3 / 8 * costs + matrices / 8 / (0.45 * 989e12)
    steps = [
        {
            "type": "step",
            "step": i,
            "tokens": tokens,
            "step_ms": seconds * (1e3 if i else 1e5),
            "model_tflops": (matrices + area_flops) / 1e12,
        }
        for i in range(9)
    ]
    fitted = calibrate.fit(calibrate.measured([run, *steps]), HARDWARE["H100"], "bf16")
    assert fitted.linear_share == pytest.approx(0.45, rel=1e-3)
    assert (fitted.errors[0].fitted, fitted.errors[0].held) == (6, 2)
    assert fitted.errors[0].largest < 1e-3


def test_steps_that_wait_for_the_host_say_nothing_of_matrices() -> None:
    training = RESULTS.parent / "2026-11-24-2xh100" / "training"
    steps = [r for path in sorted(training.glob("*.jsonl")) for r in calibrate.measured(records.read(path))]
    fitted = calibrate.fit(steps, HARDWARE["H100"], "bf16")
    assert fitted.linear_share == pytest.approx(0.28, abs=0.05)  # of 1b; 125m waits, and would give 0.02
    (error,) = fitted.errors
    assert error.what == "training step"
    assert error.held >= 10
    assert error.median < 0.1, error
    assert error.largest < 0.3, error
    assert fitted.left_out["training steps so short that GPUs may have waited for the host"] > 500
