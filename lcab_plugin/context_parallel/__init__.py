"""Context parallelism: one sequence over several ranks. A strategy is a composition of operations."""

from __future__ import annotations

from lcab_plugin.context_parallel.group import ContextParallel, context_parallel
from lcab_plugin.context_parallel.topology import ALIASES, AXES, resolve_degrees, strategy_name

STRATEGIES = tuple(AXES)

__all__ = [
    "ALIASES",
    "AXES",
    "STRATEGIES",
    "ContextParallel",
    "context_parallel",
    "resolve_degrees",
    "strategy_name",
]
