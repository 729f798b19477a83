"""Does a training run stay the same when its attention is swapped?

Every cell (framework x mask x kernel x strategy x layout) trains the same model on the same data, in a
framework always through the same script. The baseline of a mask is kernel ``naive`` without context
parallelism: data parallel over the same ranks, with the same global batch. In fp32 it is in the first
framework. In a low precision every framework has its own, for each rounds in its own places: its runs share
their baseline's rounding, and the others' lie up to as far on the other side of float32, at the very edge of
the budget. There the frameworks are compared by the float32 twins of their baselines.

Compared are the digest of every step's global tokens, every step's loss and gradient norm, and every
parameter's gradient at step 0: Adam and clipping hide a gradient of the wrong scale from the losses.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lcab_plugin import kernels, masks
from lcab_plugin.bench.compare import (
    FP32,
    Budget,
    Deviations,
    Trace,
    deviations,
    different_runs,
    over_budget,
    twice,
)
from lcab_plugin.bench.launch import SCRIPTS, Outcome, launch
from lcab_plugin.context_parallel import strategy_name
from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.layout import LAYOUTS
from lcab_plugin.training import records

_WARM_UP = 2  # steps left out of the step time
_DTYPES = ("fp32", "bf16")
FRAMEWORKS = tuple(SCRIPTS)
_Of = tuple[str, str | None]  # a mask and a framework, or None: what holds in float32, for all of them


@dataclass(frozen=True)
class Cell:
    """One training run. ``layout`` is None where nothing is sharded (strategy ``none``); ``role``:
    ``baseline``, ``fp32 baseline`` (its twin, which measures a low precision's budget) or None."""

    mask: str
    kernel: str
    strategy: str
    layout: str | None = None
    role: str | None = None
    framework: str = FRAMEWORKS[0]

    @property
    def name(self) -> str:
        """Of the run and of its folder."""
        parts = (
            self.mask,
            self.kernel,
            self.strategy,
            self.layout,
            "fp32" if self.role == "fp32 baseline" else None,
            self.framework if self.framework != FRAMEWORKS[0] else None,
        )
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Settings:
    """What all cells have in common."""

    scripts: Mapping[str, Path]  # of each framework
    config: Path | None  # the DeepSpeed config of its cells; its "lcab" section is overridden by the cell
    out: Path
    world: int = 2
    steps: int = 20
    dtype: str = "fp32"
    preset: str = "tiny"
    seqlen: int = 512
    global_batch: int | None = None  # one a rank if left out
    micro_batch: int = 1
    loss_mask: str = "uneven"
    doc_lengths: str = "pile"
    zero_stage: int | None = None  # the config's if left out
    seed: int = 0
    device: str = "cpu"
    timeout: float = 600.0  # seconds of one cell
    extra: tuple[str, ...] = ()  # further flags of the script

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise unknown("dtype", self.dtype, _DTYPES)
        if self.world < 1 or self.steps < 1:
            raise LcabError(f"world = {self.world} and steps = {self.steps} must be at least 1.")
        for script in self.scripts.values():
            if not script.is_file():
                raise LcabError(f"{script} does not exist; give the training script with --script.")
        if self.zero_stage is not None and self.config is None:
            raise LcabError(f"zero_stage = {self.zero_stage} is DeepSpeed's; leave it out for Megatron.")


@dataclass
class Result:
    """One cell: how its launch ended and how it compares.

    ``status``: ``pass``, ``fail`` (``problems`` says where it differs), ``cannot run`` (the script refused;
    ``reason``), ``crashed`` or ``timeout`` (``reason``).
    """

    cell: Cell
    status: str
    reason: str | None = None
    problems: list[str] = field(default_factory=list)
    deviations: Deviations | None = None
    budget: Budget | None = None
    step_ms: dict[str, float] | None = None  # median, min, max without the first steps
    peak_memory_gib: float | None = None  # of the fullest rank
    seconds: float = 0.0  # the whole launch
    run: dict[str, Any] | None = None  # the first record: what resolved

    def to_dict(self) -> dict[str, Any]:
        """For parity.json."""
        return {"name": self.cell.name, **asdict(self)}


def plan(
    kernel_names: Sequence[str],
    strategies: Sequence[str],
    mask_names: Sequence[str],
    layouts: Sequence[str],
    dtype: str,
    frameworks: Sequence[str] = FRAMEWORKS[:1],
) -> list[Cell]:
    """The cells in the order in which they run: the baselines of a mask before what is compared with them.

    Raises:
        LcabError: an unknown name; the nearest is named.
    """
    tables = (
        ("kernel", kernel_names, kernels.names()),
        ("mask", mask_names, masks.names()),
        ("layout", layouts, LAYOUTS),
        ("framework", frameworks, FRAMEWORKS),
    )
    for kind, given, known in tables:
        for name in given:
            if name not in known:
                raise unknown(kind, name, known)
    strategies = [strategy_name(name) for name in strategies]
    cells: list[Cell] = []
    low = dtype != "fp32"
    with_baseline = frameworks if low else frameworks[:1]
    roles = ["baseline", "fp32 baseline"] if low else ["baseline"]
    for mask in mask_names:
        for framework, role in product(with_baseline, roles):
            cells.append(Cell(mask, "naive", "none", role=role, framework=framework))
        for framework, kernel, strategy in product(frameworks, kernel_names, strategies):
            if framework not in with_baseline or (kernel, strategy) != ("naive", "none"):
                for layout in [None] if strategy == "none" else layouts:
                    cells.append(Cell(mask, kernel, strategy, layout, framework=framework))
    return list(dict.fromkeys(cells))


def run(
    cells: Sequence[Cell],
    settings: Settings,
    watch: Callable[[Cell, int], None] = lambda cell, steps: None,
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Train every cell, one after the other, and compare it with the baseline of its mask.

    ``watch(cell, steps done)`` is called all along, ``done`` after every cell. ``parity.json`` and
    ``parity.md`` in ``settings.out`` are written anew then, so a comparison that is killed loses one cell; it
    has not passed before the last.

    Raises:
        LcabError: ``settings.out`` holds a comparison already, or the config cannot be read.
    """
    if (settings.out / "parity.json").exists():
        raise LcabError(f"{settings.out} holds a comparison already; give another --out.")
    config = _write_config(settings)
    results: list[Result] = []
    baselines: dict[_Of, Trace] = {}
    budgets: dict[_Of, Budget] = {}
    for cell in cells:
        outcome = _train(cell, settings, config, watch)
        result, trace = _read(cell, settings, outcome)
        if trace is not None:
            _judge(result, trace, settings, baselines, budgets)
        results.append(result)
        save(results, settings, len(cells))
        done(result)
    return results


def _write_config(settings: Settings) -> Path | None:
    """The DeepSpeed config of its cells, next to their records; None without DeepSpeed."""
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.config is None:
        return None
    try:
        config = json.loads(settings.config.read_text())
    except (OSError, ValueError) as error:
        raise LcabError(f"cannot read the DeepSpeed config {settings.config}: {error}") from None
    if settings.zero_stage is not None:
        config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": settings.zero_stage}
    path = settings.out / "ds_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n")
    return path


def _train(
    cell: Cell, settings: Settings, config: Path | None, watch: Callable[[Cell, int], None]
) -> Outcome:
    flags: dict[str, Any] = {
        "preset": settings.preset,
        "steps": settings.steps,
        "seqlen": settings.seqlen,
        "global-batch": settings.global_batch or settings.world,
        "micro-batch": settings.micro_batch,
        "dtype": "fp32" if cell.role == "fp32 baseline" else settings.dtype,
        "loss-mask": settings.loss_mask,
        "doc-lengths": settings.doc_lengths,
        "seed": settings.seed,
        "kernel": cell.kernel,
        "strategy": cell.strategy,
        "mask": cell.mask,
        "eval-batches": 0,
        "name": cell.name,
        "out": settings.out,
        "save-gradients": _gradients(cell, settings),
    }
    if cell.layout is not None:
        flags["layout"] = cell.layout
    if cell.framework == "deepspeed":
        flags["deepspeed_config"] = config
    metrics = settings.out / cell.name / "metrics.jsonl"

    def count_steps() -> None:
        lines = metrics.read_bytes().count(b'{"type": "step"') if metrics.exists() else 0
        watch(cell, lines)

    return launch(
        settings.scripts[cell.framework],
        [*(str(part) for name, value in flags.items() for part in (f"--{name}", value)), *settings.extra],
        world=settings.world,
        device=settings.device,
        logs=settings.out / cell.name,
        timeout=settings.timeout,
        watch=count_steps,
    )


def _gradients(cell: Cell, settings: Settings) -> Path:
    return settings.out / cell.name / "gradients.pt"


def _read(cell: Cell, settings: Settings, outcome: Outcome) -> tuple[Result, Trace | None]:
    """The result as far as the run alone tells, and what to compare (None if it did not run to its end)."""
    result = Result(cell, outcome.status, outcome.reason, seconds=round(outcome.seconds, 2))
    metrics, gradients = settings.out / cell.name / "metrics.jsonl", _gradients(cell, settings)
    try:
        lines = records.read(metrics) if metrics.exists() else []
    except LcabError as error:  # of a script that keeps to other fields; the other cells go on
        result.status, result.problems = "fail", [str(error).rstrip(".")]
        return result, None
    result.run = next((line for line in lines if line["type"] == "run"), None)
    steps = records.steps(lines)
    if times := [step["step_ms"] for step in steps[min(_WARM_UP, len(steps) - 1) :]]:
        result.step_ms = {"median": statistics.median(times), "min": min(times), "max": max(times)}
        result.peak_memory_gib = max(step["peak_memory_gib"] for step in steps)
    if outcome.status != "done":
        return result, None
    saved = torch.load(gradients, map_location="cpu", weights_only=True) if gradients.exists() else {}
    return result, Trace(steps, saved)


def _judge(
    result: Result,
    trace: Trace,
    settings: Settings,
    baselines: dict[_Of, Trace],
    budgets: dict[_Of, Budget],
) -> None:
    """Fill in how the run compares, and keep what the later cells of its mask are compared with."""
    cell = result.cell
    own = cell.mask, None if settings.dtype == "fp32" else cell.framework
    if cell.role == "baseline":
        baselines[own] = trace  # compared with itself: it must at least be whole and finite
        if settings.dtype == "fp32":
            budgets[own] = FP32
    baseline = baselines.get(own)
    if baseline is None:
        result.problems = ["there is nothing to compare with: the baseline of its mask did not run"]
    else:
        result.problems = different_runs(baseline, trace, settings.steps)
    if baseline is not None and not result.problems:
        result.deviations = deviations(baseline, trace, settings.dtype)
        if cell.role == "fp32 baseline":
            budgets[own] = twice(result.deviations)
            first = baselines.setdefault((cell.mask, None), trace)
            if first is not trace:
                _compare_in_fp32(result, first, trace, settings.steps)
        elif cell.role is None:
            result.budget = budgets.get(own)
            if result.budget is None:
                result.problems = ["there is no budget: the fp32 baseline of its mask did not run"]
            else:
                result.problems = over_budget(result.deviations, result.budget)
    result.status = "fail" if result.problems else "pass"
    if result.status == "pass" and cell.role is None:
        _gradients(cell, settings).unlink()  # kept where someone will look at them


def _compare_in_fp32(result: Result, first: Trace, trace: Trace, steps: int) -> None:
    """Show and judge a framework's float32 baseline beside the first framework's."""
    problems, result.budget = different_runs(first, trace, steps), FP32
    if not problems:
        result.deviations = deviations(first, trace, "fp32")
        problems = over_budget(result.deviations, FP32)
    result.problems = [f"beside the first framework in fp32: {problem}" for problem in problems]


def passed(results: Sequence[Result], strict: bool = False) -> bool:
    """Whether all baselines ran and no cell failed, crashed or hung. A cell that cannot run and says why is
    no failure unless ``strict``; but then another one must have been compared."""
    bad = {"fail", "crashed", "timeout"} | ({"cannot run"} if strict else set())
    compared = [r for r in results if r.cell.role is None]
    return (
        all(r.status not in bad for r in results)
        and all(r.status == "pass" for r in results if r.cell.role)
        and (not compared or any(r.status == "pass" for r in compared))
    )


COLUMNS = (
    "framework",
    "mask",
    "kernel",
    "strategy",
    "layout",
    "step ms",
    "min to max",
    "peak GiB",
    "loss dev",
    "grad norm dev",
    "step-0 gradient dev",
    "verdict",
)


def row(result: Result) -> tuple[str, ...]:
    """The cells of the table, one for each of COLUMNS."""
    cell, found, times = result.cell, result.deviations, result.step_ms
    return (
        cell.framework,
        cell.mask,
        cell.kernel,
        cell.strategy,
        cell.layout or "-",
        f"{times['median']:.0f}" if times else "-",
        f"{times['min']:.0f} to {times['max']:.0f}" if times else "-",
        f"{result.peak_memory_gib:.2f}" if result.peak_memory_gib is not None else "-",
        *(
            (
                f"{max(found.loss, found.loss_later):.1e}",
                f"{max(found.grad_norm, found.grad_norm_later):.1e}",
                f"{found.gradient:.1e} {found.parameter}",
            )
            if found and cell.role != "baseline"
            else ("-", "-", "-")
        ),
        cell.role if cell.role and result.status == "pass" else result.status,
    )


def notes(results: Sequence[Result]) -> list[str]:
    """What stands below the table: the budgets, and what went wrong in a cell."""
    budgets: dict[str, list[str]] = {}
    several = len({result.cell.framework for result in results}) > 1
    for result in results:
        cell = result.cell
        name = f"{cell.mask} in {cell.framework}" if several else cell.mask
        if result.budget and name not in budgets.setdefault(str(result.budget), []):
            budgets[str(result.budget)].append(name)
    lines = [f"Budget, {', '.join(names)}: {text}." for text, names in budgets.items()]
    for result in results:
        if result.status != "pass":
            what = "; ".join(result.problems) or result.reason
            lines.append(f"{result.cell.name}: {result.status}: {what}")
    return lines


def save(results: Sequence[Result], settings: Settings, asked: int) -> None:
    """Write ``parity.json`` and ``parity.md`` into ``settings.out``. ``asked``: cells in all."""
    record = {
        "settings": asdict(settings),
        "asked": asked,
        "passed": len(results) == asked and passed(results),
        "environment": records.environment(),
        "cells": [result.to_dict() for result in results],
    }
    (settings.out / "parity.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    table = [COLUMNS, ("---",) * len(COLUMNS), *map(row, results)]
    lines = ["| " + " | ".join(line) + " |" for line in table]
    text = ["# Parity", "", *lines, "", *(f"- {note}" for note in notes(results)), ""]
    (settings.out / "parity.md").write_text("\n".join(text))
