"""Settings that are left to the planner, decided for the ranks and the devices at hand."""

from __future__ import annotations

import os

import torch

from lcab_plugin import planner
from lcab_plugin.config import AttentionConfig
from lcab_plugin.context_parallel import collectives
from lcab_plugin.planner import Workload

_PER_NODE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's word, DeepSpeed's


def decide(
    config: AttentionConfig, workload: Workload, cp: int, device: str, stride: int = 1
) -> AttentionConfig:
    """``config`` with what the planner puts for ``"auto"`` over ``cp`` ranks, of which neighbours are
    ``stride`` apart in the world. Equal ranks decide alike; no collective.

    Raises:
        LcabError: nothing can run.
    """
    per_node = max(1, ranks_per_node() // stride)
    return config.decided(workload, cp, planner.of(device), per_node)


def ranks_per_node() -> int:
    """As the launcher says; from another launcher, as many as this process sees GPUs."""
    said = (os.environ[name] for name in _PER_NODE if os.environ.get(name, "").isdigit())
    return min(int(next(said, torch.cuda.device_count() or 1)), collectives.world_size())
