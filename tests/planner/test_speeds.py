"""What is fitted, on numbers that are known and on the records of an H200 and an H100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcab_plugin import masks
from lcab_plugin.planner import HARDWARE, calibrate, speeds
from lcab_plugin.planner.measured import MEASURED
from lcab_plugin.planner.speeds import COSTS, Heads
from lcab_plugin.planner.work import Work, work
from lcab_plugin.training import records

RESULTS = Path(__file__).parents[2] / "docs" / "results"
TRITON = MEASURED["H200"]["triton"]


def recorded(name: str) -> list[dict[str, Any]]:
    """The measured cells of a file of results."""
    return calibrate.measured(records.read(RESULTS / f"{name}.jsonl"))


def shipped(gpu: str) -> list[dict[str, Any]]:
    """The records that planner/measured.py was fitted to."""
    if gpu == "H200":
        cells = [r for r in recorded("2026-11-29-h200/kernels") if r["seqlen"] >= 2048]
        cells += recorded("2026-11-29-h200/head_dim_64")
    else:
        fa4 = [r for r in recorded("2026-11-23-h100/with_fa4") if r["kernel"] == "fa4"]
        cells = recorded("2026-11-23-h100/kernels") + fa4
    return [r for r in cells if r["kernel"] in MEASURED[gpu]]


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
    assert TRITON.seconds("fwd", Work(), heads) == 0
    more = [TRITON.seconds("fwd", Work(1, n, n, 0, n, n), heads) for n in (10, 100, 1000)]
    assert more == sorted(more)


def test_speeds_scale_with_the_hardware() -> None:
    h200, b200 = HARDWARE["H200"], HARDWARE["B200"]
    heads, done = Heads(1, 64, 8, 128, 2), Work(1, 1e9, 1e9, 0, 65536, 65536)
    slow, fast = (speeds.table(h, "bf16")["triton"] for h in (h200, b200))
    assert slow.seconds("fwd", done, heads) / fast.seconds("fwd", done, heads) == pytest.approx(
        b200.peak / h200.peak, rel=0.05
    )
    assert speeds.table(h200, "fp32") == {}


def test_a_kernel_is_scaled_to_where_it_was_not_measured() -> None:
    origins = {
        gpu: {name: speed.origin for name, speed in speeds.table(HARDWARE[gpu], "bf16").items()}
        for gpu in ("H100", "H200", "B200")
    }
    assert origins["H100"] == {
        "cudnn": "H200's scaled to H100",
        "fa4": "measured on H100",
        "sdpa_flash": "measured on H100",
        "triton": "H200's scaled to H100",
    }
    assert origins["H200"] == {
        "cudnn": "measured on H200",
        "fa4": "measured on H200",
        "sdpa_flash": "measured on H200",
        "triton": "measured on H200",
    }
    assert origins["B200"]["fa4"] == "H200's scaled to B200"
    assert origins["B200"]["sdpa_flash"] == "H200's scaled to B200"  # the latest of two
    for gpu, kernels in MEASURED.items():
        here = speeds.table(HARDWARE[gpu], "bf16")
        assert {name: here[name] for name in kernels} == kernels


@pytest.mark.parametrize("gpu", MEASURED)
def test_what_ships_is_what_the_records_give_and_predicts_those_held_back(gpu: str) -> None:
    fitted, costs = calibrate.fit(shipped(gpu), HARDWARE[gpu], "bf16"), MEASURED[gpu]
    assert set(fitted.speeds) == set(costs)
    for name, speed in fitted.speeds.items():
        assert speed.fwd == pytest.approx(costs[name].fwd, rel=1e-2, abs=1e-18)
        assert speed.bwd == pytest.approx(costs[name].bwd, rel=1e-2, abs=1e-18)
    assert len(fitted.errors) == 2 * len(costs)
    for error in fitted.errors:
        assert error.held >= 5
        assert error.median < 0.12, error
        assert error.p90 < 0.35, error
        assert error.largest < 0.50, error
    assert not fitted.left_out


def test_cudnn_computes_the_whole_rectangle_backward_but_for_causal_bands_in_squares() -> None:
    n, speed = 16384, MEASURED["H200"]["cudnn"]
    fwd, bwd = (dict(zip(COSTS, costs, strict=True)) for costs in (speed.fwd, speed.bwd))
    computed = bwd["computed"] + bwd["cells"] / (4 * 128 * speeds.PASSES["bwd"])
    assert bwd["outside"] == pytest.approx(computed, rel=0.1, abs=0)
    assert fwd["outside"] < 0.01 * fwd["computed"]
    for mask in (masks.causal(n), masks.sliding_window_causal(n, 1024), masks.full(n)):
        assert work("cudnn", mask, 128, "cuda").outside == 0
    window = work("cudnn", masks.sliding_window(n, 1024, 1024), 128, "cuda")
    assert window.outside == n * n - window.computed
    prefix = work("cudnn", masks.prefix_lm_causal(n, 4096), 128, "cuda")  # its causal part is no square
    assert prefix.outside > 0.2 * n * n


def test_what_a_cell_costs_whatever_the_head_dim_shows_between_two(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [r for r in shipped("H200") if r["kernel"] == "triton"]
    wide = [r for r in found if r["head_dim"] == 128]
    narrow = [r for r in found if r["head_dim"] == 64]
    assert len(narrow) == 4
    cell = COSTS.index("cells")
    one, both = (calibrate.fit(cells, HARDWARE["H200"], "bf16").speeds["triton"] for cells in (wide, found))
    assert (one.fwd[cell], one.bwd[cell]) == (0, 0)
    with monkeypatch.context() as patch:  # the other head_dim is none of those that are fitted
        patch.setattr(calibrate, "held_out", lambda record: record["head_dim"] == 64)
        held = calibrate.fit(found, HARDWARE["H200"], "bf16").speeds["triton"]
    assert (held.fwd[cell], held.bwd[cell]) == (0, 0)
    for record in narrow:  # an exponential a cell is half of this forward
        mask = calibrate.mask_of(record)
        assert mask is not None
        done = record["pass"], work("triton", mask, 64, "cuda"), calibrate._heads(record)
        seconds = record["median_ms"] / 1e3
        assert abs(both.seconds(*done) / seconds - 1) < 0.05 < abs(one.seconds(*done) / seconds - 1)


def test_records_of_other_hardware_and_numbers_are_left_aside() -> None:
    found = recorded("2026-11-29-h200/kernels")
    for name in ("A100", "H100"):
        assert calibrate.fit(found, HARDWARE[name], "bf16").speeds == {}
    assert calibrate.fit(found, HARDWARE["H200"], "fp32").left_out["dtype bf16"] > 250
    other = [{**r, "digest": "0"} for r in found]
    assert calibrate.fit(other, HARDWARE["H200"], "bf16").left_out["a mask that cannot be made again"] > 250
    assert calibrate.fit(found, HARDWARE["H200"], "bf16").left_out == {"'torch_flex' is no kernel here": 167}


def test_the_share_of_matrices_is_fitted_to_training() -> None:
    run = {
        "type": "run",
        "name": "r",
        "first_step": 0,
        "device": "NVIDIA H200",
        "dtype": "bf16",
        "model": {"vocab": 100, "hidden": 64, "layers": 12, "heads": 1},
        "parameters": 1e9,
        "world": 8,
        "attention": {"kernel": "triton"},
    }
    tokens, area_flops = 65536, 1e15
    matrices = 6 * (1e9 - 6400) * tokens
    fwd, bwd = (dict(zip(COSTS, costs, strict=True)) for costs in (TRITON.fwd, TRITON.bwd))
    costs = fwd["computed"] + 2.5 * bwd["computed"] + (fwd["cells"] + bwd["cells"]) / (4 * 64)
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
    fitted = calibrate.fit(calibrate.measured([run, *steps]), HARDWARE["H200"], "bf16")
    assert fitted.linear_share == pytest.approx(0.45, rel=1e-3)
    assert (fitted.errors[0].fitted, fitted.errors[0].held) == (6, 2)
    assert fitted.errors[0].largest < 1e-3


def test_steps_that_wait_for_the_host_say_nothing_of_matrices() -> None:
    """The kernels of these runs are those of the H100's records, and their costs are fitted to these."""
    training = RESULTS / "2026-11-24-2xh100" / "training"
    steps = [r for path in sorted(training.glob("*.jsonl")) for r in calibrate.measured(records.read(path))]
    fitted = calibrate.fit(recorded("2026-11-23-h100/kernels") + steps, HARDWARE["H100"], "bf16")
    assert fitted.linear_share == pytest.approx(0.28, abs=0.05)  # of 1b; 125m waits, and would give 0.02
    (error,) = (e for e in fitted.errors if e.what == "training step")
    assert error.held >= 10
    assert error.median < 0.1, error
    assert error.largest < 0.3, error
    assert fitted.left_out["training steps so short that GPUs may have waited for the host"] > 500
