"""`lcab bench kernels` under block-sparse masks: each block size with each kept share is a cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lcab_plugin import masks
from lcab_plugin.bench import cells, kernels, timing
from lcab_plugin.bench.settings import Settings, Shape
from lcab_plugin.planner.calibrate import mask_of
from lcab_plugin.report.pictures import rebuild
from lcab_plugin.training.records import RunLog


def ask(*families: str, **changes: Any) -> Settings:
    shape = Shape(batch=1, heads=2, kv_heads=1, head_dim=16, dtype="fp32")
    return Settings(("naive",), families, (64,), ("fwd",), shape=shape, cell_seconds=1e-3, **changes)


def measure(path: Path, asked: Settings) -> list[cells.Record]:
    """What is not measured yet."""
    with RunLog(path, append=True) as log:
        return list(kernels.run(asked, log, cells.read(path)))


def test_every_block_and_share_is_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "noise_floor", lambda *_: timing.NoiseFloor(1e-6, 0.01))
    path = tmp_path / "kernels.jsonl"
    asked = ask("block_sparse", "causal", blocks=(8, 16), keeps=(0.5, 1.0))
    records = measure(path, asked)
    assert asked.total == len(records) == 5
    labels = [cells.mask_label(r["mask"], r["parameters"]) for r in records]
    assert labels == ["causal", *(f"block_sparse block {b} keep {k}" for b in (8, 16) for k in (0.5, 1))]
    for record in records[1:]:
        mask = masks.from_name("block_sparse", 64, **record["parameters"])
        assert record["digest"] == mask.digest
        assert record["fraction"] == record["parameters"]["keep"]
        assert rebuild(record) == mask_of(record) == mask
    assert all(map(asked.asks, records))
    assert not ask("block_sparse", keeps=(0.5,)).asks(records[1])  # those of 16 tokens
    assert len(cells.read(path)) == 5  # at keep 1 both blocks make the same mask
    assert measure(path, asked) == []
    (new,) = measure(path, ask("block_sparse", blocks=(16,), keeps=(0.25, 0.5)))
    assert new["parameters"] == {"block": 16, "keep": 0.25, "seed": 0}
