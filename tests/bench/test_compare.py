"""Every way in which two runs differ is found, and a rounding difference is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcab_plugin.bench.compare import FP32, Deviations, Trace, deviations, different_runs, over_budget, twice

STEPS = 12


def trace() -> Trace:
    steps: list[dict[str, Any]] = [
        {"step": i, "loss": 5.0 - 0.1 * i, "grad_norm": 2.0 + i, "batch_digest": f"digest {i}"}
        for i in range(STEPS)
    ]
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(4, 3, generator=generator) for name in ("query.weight", "key.weight")}
    return Trace(steps, gradients)


def problems(run: Trace) -> list[str]:
    baseline = trace()
    return different_runs(baseline, run, STEPS) or over_budget(deviations(baseline, run, "fp32"), FP32)


def test_rounding_passes() -> None:
    run = trace()
    for record in run.steps:
        record["loss"] *= 1 + 5e-6
        record["grad_norm"] *= 1 - 5e-6
    run.steps[10]["loss"] *= 1 + 5e-5
    for gradient in run.gradients.values():
        gradient *= 1 + 5e-6
    assert problems(run) == []
    found = deviations(trace(), run, "fp32")
    assert found.loss == pytest.approx(5e-6, rel=1e-3)
    assert found.loss_later == pytest.approx(5.5e-5, rel=1e-3)
    assert found.gradient == pytest.approx(5e-6, rel=0.05)


def test_runs_that_part_at_a_few_late_batches_pass_in_a_low_precision() -> None:
    """Nine in ten late steps count, and one more is a difference; in fp32 all count."""
    budget = twice(Deviations(1e-4, 1e-4, 1e-4, 1e-4, 1e-4, "key.weight"))
    baseline, run = (
        Trace([{**trace().steps[0], "step": i, "batch_digest": str(i)} for i in range(30)], trace().gradients)
        for _ in range(2)
    )
    for step in (12, 29):
        run.steps[step]["loss"] *= 1.1
    assert over_budget(deviations(baseline, run, "bf16"), budget) == []
    (found,) = over_budget(deviations(baseline, run, "fp32"), FP32)
    assert "loss after step 9 deviates by 1.0e-01" in found
    run.steps[20]["loss"] *= 1.1
    (found,) = over_budget(deviations(baseline, run, "bf16"), budget)
    assert "loss after step 9 deviates by 1.0e-01" in found


@pytest.mark.parametrize(
    ("step", "key", "factor", "words"),
    [
        (0, "loss", 1 + 2e-5, "loss in the first 10 steps deviates"),
        (9, "loss", 1 - 2e-5, "loss in the first 10 steps deviates"),
        (10, "loss", 1 + 2e-4, "loss after step 9 deviates"),
        (0, "grad_norm", 2.0, "gradient norm in the first 10 steps deviates"),
        (11, "grad_norm", 1 + 2e-4, "gradient norm after step 9 deviates"),
        (4, "loss", float("nan"), "loss is nan at step 4"),
        (4, "grad_norm", float("inf"), "grad_norm is inf at step 4"),
    ],
)
def test_a_step_that_differs_is_found(step: int, key: str, factor: float, words: str) -> None:
    run = trace()
    run.steps[step][key] *= factor
    found = problems(run)
    assert len(found) == 1
    assert words in found[0]


def test_other_tokens_are_found() -> None:
    run = trace()
    run.steps[7]["batch_digest"] = "digest of another batch"
    assert problems(run) == ["saw other tokens than the baseline at step 7"]


def test_missing_steps_are_found() -> None:
    run = trace()
    del run.steps[5]
    assert "instead of steps 0 to 11" in problems(run)[0]
    assert "instead of steps 0 to 11" in problems(Trace([], trace().gradients))[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g["key.weight"].mul_(1 + 2e-5), "gradient of key.weight at step 0 deviates by 2.0e-05"),
        (lambda g: g["key.weight"][0].zero_(), "gradient of key.weight at step 0 deviates"),
        (lambda g: g["key.weight"].fill_(float("nan")), "gradient of key.weight at step 0 is not finite"),
        (lambda g: g.pop("key.weight"), "gradient of key.weight at step 0 is in one of the two runs only"),
        (
            lambda g: g.update({"bias": torch.ones(3)}),
            "gradient of bias at step 0 is in one of the two runs only",
        ),
        (lambda g: g.update({"key.weight": torch.ones(3, 4)}), "has shape (3, 4), the baseline's (4, 3)"),
        (lambda g: g.clear(), "saved no gradients of step 0"),
    ],
)
def test_a_gradient_that_differs_is_found(change: Any, words: str) -> None:
    run = trace()
    change(run.gradients)
    assert words in problems(run)[0]


def test_a_gradient_that_should_be_zero() -> None:
    baseline, run = trace(), trace()
    baseline.gradients["key.weight"].zero_()
    run.gradients["key.weight"].zero_()
    assert deviations(baseline, run, "fp32").gradient == 0
    run.gradients["key.weight"][0, 0] = 1e-20
    assert over_budget(deviations(baseline, run, "fp32"), FP32)


def test_the_budget_of_a_low_precision_is_twice_the_baselines_own_error() -> None:
    budget = twice(Deviations(1e-3, 4e-3, 1e-2, 4e-3, 3e-3, "key.weight"))
    at_the_edge = Deviations(2e-3, 1.6e-2, 2e-2, 2e-2, 6e-3, "key.weight")
    assert over_budget(at_the_edge, budget) == []
    for name in ("loss", "loss_later", "grad_norm", "grad_norm_later", "gradient"):
        found = over_budget(
            Deviations(**{**vars(at_the_edge), name: getattr(at_the_edge, name) * 1.01}), budget
        )
        assert len(found) == 1
