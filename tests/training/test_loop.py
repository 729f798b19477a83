"""What the loop does around the steps of a trainer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcab_plugin.training import loop


class Trainer:
    """One that trains nothing."""

    device, parts, cp = torch.device("cpu"), ("forward",), 1

    def attentions(self) -> list[torch.nn.Module]:
        return []

    def read(self, step: int, text: Any) -> Any:
        return SimpleNamespace(digests=["0"], area=1)

    def step(self, *given: Any) -> loop.Step:
        return loop.Step(loss=1.0, loss_tokens=1, grad_norm=1.0, lr=1.0)


@pytest.mark.parametrize(("first", "steps", "untimed"), [(0, 6, 2), (3, 6, 2), (0, 2, 1), (0, 1, 0)], ids=str)
def test_memory_is_looked_at_in_the_steps_whose_time_does_not_count(
    monkeypatch: pytest.MonkeyPatch, first: int, steps: int, untimed: int
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(loop.Meter, "begin", lambda self, timed: told.append(timed))
    monkeypatch.setattr(loop, "ByPosition", lambda text: None)
    monkeypatch.setattr(loop, "batch_digest", lambda digests: "0")
    given = {"steps": steps, "seqlen": 8, "eval_every": 0, "eval_batches": 0, "save_every": 0, "save": None}
    job: Any = SimpleNamespace(
        args=argparse.Namespace(**given, save_gradients=None), texts=(None, None), first_step=first
    )
    job.model, job.dtype = SimpleNamespace(flops=lambda tokens, area: 1.0), "fp32"
    job.dp = job.global_batch = 1
    silent: Any = SimpleNamespace(write=lambda *what, **facts: None, update=lambda *what: None)
    end = loop._train(Trainer(), job, silent, silent)  # type: ignore[arg-type]
    looked_at = max(1, untimed)  # a single step is both
    assert told == [False] * looked_at + [True] * (steps - first - looked_at)
    assert end["warm_up_steps"] == untimed
    assert end["times"]["step"]["repeats"] == steps - first - untimed


@pytest.fixture
def reductions() -> Iterator[Callable[[], list[bool]]]:
    """Whether bf16 and fp16 products may be added up in their own type; PyTorch's default at first."""
    product = torch.backends.cuda.matmul
    flags = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(product, flag) for flag in flags]
    for flag in flags:
        setattr(product, flag, True)
    yield lambda: [getattr(product, flag) for flag in flags]
    for flag, value in zip(flags, before, strict=True):
        setattr(product, flag, value)


def test_matrix_products_are_added_up_in_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reductions: Callable[[], list[bool]]
) -> None:
    seen: list[bool] = []

    def train(*given: Any) -> dict[str, Any]:
        seen.extend(reductions())
        return {"loss": 1.0, "validation_loss": None}

    monkeypatch.setattr(loop, "_train", train)
    given = {"name": "one", "preset": "tiny", "out": str(tmp_path), "steps": 1, "resume": None, "recall": 0}
    model: Any = SimpleNamespace(parameters=1)
    job = loop.Job(argparse.Namespace(**given), model, 1, "bf16", 1, {}, {}, (None, None))  # type: ignore[arg-type]
    assert reductions() == [True, True]
    loop.run(Trainer(), job)  # type: ignore[arg-type]
    assert seen == [False, False]
