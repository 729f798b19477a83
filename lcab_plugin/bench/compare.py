"""How far one training run is from another, and whether that is within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

FIRST = 10  # steps held to the tight budget: every optimizer step makes rounding differences grow


@dataclass(frozen=True)
class Trace:
    """What a run left behind: its step records, and its gradients at step 0, {parameter: tensor}."""

    steps: list[dict[str, Any]]
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Deviations:
    """Relative deviations: the largest of the first ten steps, of the steps after them (0 if there are none),
    and of one parameter's gradient at step 0 (norm of the difference over norm of the baseline's).

    In a low precision, of nine in ten of the later steps: by then right runs part at single batches. Of 125M
    parameters in bf16 on an H200 the losses of three kernels and of float32 lay up to 11% apart at one batch,
    and within 1.1% at every other step.
    """

    loss: float
    loss_later: float
    grad_norm: float
    grad_norm_later: float
    gradient: float
    parameter: str  # whose gradient that is


@dataclass(frozen=True)
class Budget:
    """The largest deviations that pass."""

    loss: float
    loss_later: float
    grad_norm: float
    grad_norm_later: float
    gradient: float
    source: str

    def __str__(self) -> str:
        return (
            f"{self.source}. Relative deviations that pass: loss {self.loss:.1e} in the first {FIRST} steps, "
            f"{self.loss_later:.1e} after them; gradient norm {self.grad_norm:.1e}, then "
            f"{self.grad_norm_later:.1e}; each parameter's gradient at step 0 {self.gradient:.1e}"
        )


FP32 = Budget(
    1e-5, 1e-4, 1e-5, 1e-4, 1e-5, "fp32: fixed bounds, ten times or more what rounding alone makes here"
)


def twice(from_fp32: Deviations) -> Budget:
    """The budget of a low precision: twice what its baseline differs by from the same run in float32.

    Two baselines in bfloat16 are no measure: with the same rows in the same matrix products they share most
    of their rounding. Kernel sdpa_math, or one rank instead of two, moved step-0 gradients by 5e-3 and losses
    by 4e-5, where context parallelism, which shards the rows, moved them by 1.2e-2 and 1.3e-4; but each of
    those runs was 9e-3 to 1.0e-2 and 8e-4 to 9e-4 away from float32: none is less exact than another.
    After ten steps two right runs have drifted apart, as those two baselines have: four times as far passes.
    """
    d = from_fp32
    return Budget(
        loss=2 * d.loss,
        loss_later=max(2 * d.loss, 4 * d.loss_later),
        grad_norm=2 * d.grad_norm,
        grad_norm_later=max(2 * d.grad_norm, 4 * d.grad_norm_later),
        gradient=2 * d.gradient,
        source="bf16: 2x what the baseline differs by from the same run in fp32; after ten steps 4x, in nine "
        "of ten steps",
    )


def different_runs(baseline: Trace, run: Trace, steps: int) -> list[str]:
    """Why two runs cannot be compared number by number: something missing, other data, not a number."""
    return [*incomplete(run, steps), *_other_data(baseline, run), *_other_parameters(baseline, run)]


def incomplete(run: Trace, steps: int) -> list[str]:
    """What one run lacks of ``steps`` steps with finite numbers and step-0 gradients."""
    problems = []
    have = [record["step"] for record in run.steps]
    if have != list(range(steps)):
        problems.append(f"has records of {len(have)} steps instead of steps 0 to {steps - 1}")
    for record in run.steps:
        for key in ("loss", "grad_norm"):
            if not isinstance(record[key], (int, float)) or not math.isfinite(record[key]):
                problems.append(f"{key} is {record[key]} at step {record['step']}")
                return problems
    if not run.gradients:
        problems.append("saved no gradients of step 0")
    problems += [
        f"gradient of {n} at step 0 is not finite" for n, g in run.gradients.items() if not g.isfinite().all()
    ]
    return problems


def _other_data(baseline: Trace, run: Trace) -> Iterator[str]:
    for ours, theirs in zip(run.steps, baseline.steps, strict=False):
        if ours["batch_digest"] != theirs["batch_digest"]:
            yield f"saw other tokens than the baseline at step {ours['step']}"
            return


def _other_parameters(baseline: Trace, run: Trace) -> Iterator[str]:
    for name in sorted(baseline.gradients.keys() ^ run.gradients.keys()):
        yield f"gradient of {name} at step 0 is in one of the two runs only"
    for name in baseline.gradients.keys() & run.gradients.keys():
        shapes = tuple(baseline.gradients[name].shape), tuple(run.gradients[name].shape)
        if shapes[0] != shapes[1]:
            yield f"gradient of {name} at step 0 has shape {shapes[1]}, the baseline's {shapes[0]}"


def deviations(baseline: Trace, run: Trace, dtype: str) -> Deviations:
    """How far ``run`` is from ``baseline``, which trained in ``dtype``; the two must be comparable
    (``different_runs`` is empty)."""
    counted = 1.0 if dtype == "fp32" else 0.9  # of the later steps
    relative: dict[str, list[float]] = {
        key: [_relative(r[key], b[key]) for r, b in zip(run.steps, baseline.steps, strict=True)]
        for key in ("loss", "grad_norm")
    }
    gradients = {
        name: _gradient(run.gradients[name], baseline.gradients[name]) for name in baseline.gradients
    }
    worst = max(gradients, key=lambda name: gradients[name])
    return Deviations(
        loss=max(relative["loss"][:FIRST]),
        loss_later=_largest(relative["loss"][FIRST:], counted),
        grad_norm=max(relative["grad_norm"][:FIRST]),
        grad_norm_later=_largest(relative["grad_norm"][FIRST:], counted),
        gradient=gradients[worst],
        parameter=worst,
    )


def over_budget(found: Deviations, budget: Budget) -> list[str]:
    """The deviations that do not pass, in words."""
    after = f"after step {FIRST - 1}"
    rows = (
        (f"loss in the first {FIRST} steps", found.loss, budget.loss),
        (f"loss {after}", found.loss_later, budget.loss_later),
        (f"gradient norm in the first {FIRST} steps", found.grad_norm, budget.grad_norm),
        (f"gradient norm {after}", found.grad_norm_later, budget.grad_norm_later),
        (f"gradient of {found.parameter} at step 0", found.gradient, budget.gradient),
    )
    return [
        f"{what} deviates by {value:.1e} (budget {most:.1e})"
        for what, value, most in rows
        if not value <= most
    ]


def _relative(value: float, baseline: float) -> float:
    return 0.0 if value == baseline else abs(value - baseline) / abs(baseline) if baseline else math.inf


def _largest(values: list[float], share: float) -> float:
    """The largest of this share of the values, the smallest ones."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else 0.0


def _gradient(gradient: Tensor, baseline: Tensor) -> float:
    difference, size = (float(x.norm()) for x in (gradient.double() - baseline.double(), baseline.double()))
    return difference / size if size else (math.inf if difference else 0.0)
