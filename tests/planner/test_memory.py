"""Predicted memory beside what training took on two H100s."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcab_plugin import masks, planner
from lcab_plugin.planner import HARDWARE, Choice, Cluster, Model
from lcab_plugin.training import records

RUNS = sorted((Path(__file__).parents[2] / "docs/results/2026-11-24-2xh100/training").glob("speed-*.jsonl"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem.removeprefix("speed-deepspeed-"))
def test_memory_of_recorded_runs(path: Path) -> None:
    lines = records.read(path)
    run = next(line for line in lines if line["type"] == "run")
    peak = max(line["peak_memory_gib"] for line in lines if line["type"] == "step")
    shape, attention = run["model"], run["attention"]
    sizes = {name: shape[name] for name in ("layers", "hidden", "ffn", "vocab", "heads", "kv_heads")}
    model = Model(**sizes, head_dim=shape["hidden"] // shape["heads"], dtype=run["dtype"])
    cluster = Cluster(1, run["world"], zero=run["zero_stage"], checkpointing="none")
    given = planner.setting(masks.causal(run["seqlen"]), model, cluster, HARDWARE["H100"])
    choice = Choice((attention["kernel"],), (attention["strategy"],), ("zigzag",), (run["cp"],))
    (found,) = planner.rank(given, choice)
    assert found.bytes / 2**30 == pytest.approx(peak, rel=0.08)


def test_there_are_recorded_runs() -> None:
    assert len(RUNS) >= 9
