"""What the planner is told of the machine when an adapter leaves a choice to it."""

from __future__ import annotations

import pytest

from lcab_plugin import masks, planner
from lcab_plugin.adapters import decide
from lcab_plugin.config import AttentionConfig
from lcab_plugin.context_parallel import collectives

WORKLOAD = planner.Workload(masks.causal(4096), 8, 8, 64, "fp32")


def test_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(collectives, "world_size", lambda: 16)
    monkeypatch.setattr(decide.torch.cuda, "device_count", lambda: 4)
    assert decide.ranks_per_node() == 4
    monkeypatch.setattr(decide.torch.cuda, "device_count", lambda: 0)
    assert decide.ranks_per_node() == 1
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert decide.ranks_per_node() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert decide.ranks_per_node() == 8
    monkeypatch.setattr(collectives, "world_size", lambda: 4)
    assert decide.ranks_per_node() == 4


def test_ranks_between_neighbours_take_their_place_in_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "ranks_per_node", lambda: 8)
    given: list[int] = []
    monkeypatch.setattr(
        AttentionConfig, "decided", lambda self, workload, cp, hardware, per_node: given.append(per_node)
    )
    auto = AttentionConfig(kernel="auto")
    for stride in (1, 2, 16):
        decide.decide(auto, WORKLOAD, 8, "cpu", stride)
    assert given == [8, 4, 1]
