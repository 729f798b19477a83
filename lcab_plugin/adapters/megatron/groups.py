"""The plug-in's context parallelism over Megatron's context-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron.core import parallel_state

from lcab_plugin import kernels
from lcab_plugin.config import AttentionConfig
from lcab_plugin.context_parallel import ContextParallel, collectives, context_parallel
from lcab_plugin.errors import LcabError


@dataclass(frozen=True)
class Plug:
    """What every slot of a model shares: the settings, and their groups, made before the model is built."""

    config: AttentionConfig
    cp: ContextParallel

    def __deepcopy__(self, memo: Any) -> Plug:  # Megatron copies specs; process groups cannot be
        return self


def cp_group(pg_collection: Any = None) -> Any:
    """Megatron's context-parallel group, from its collection of groups (``model_comm_pgs`` before 0.15) where
    there is one."""
    group = getattr(pg_collection, "cp", None)
    return group if group is not None else parallel_state.get_context_parallel_group()


def plug(config: AttentionConfig, pg_collection: Any = None) -> Plug:
    """Make the groups that ``config`` needs inside Megatron's context-parallel group.

    Collective over the world, whatever pipeline, tensor and data parallelism there is: call it on every rank,
    after ``initialize_model_parallel`` and before the model is built. Groups made in a first forward pass
    would have pipeline stages wait for each other.

    Raises:
        LcabError: on every rank alike, where the settings differ or do not fit.
    """
    if not parallel_state.model_parallel_is_initialized() and pg_collection is None:
        raise LcabError("Megatron has no process groups yet; call initialize_model_parallel first")
    group = cp_group(pg_collection)
    collectives.raise_together(_problem(config, collectives.world_size(group)))
    collectives.require_agreement("the settings of lcab", config.to_dict())
    degrees = (config.ulysses, config.ring, config.inner_ring)
    return Plug(config, _context_parallel(group, config.strategy, degrees, config.placement))


@lru_cache(maxsize=8)  # a model of several chunks is built chunk by chunk: the same groups for all
def _context_parallel(
    group: Any, strategy: str, degrees: tuple[int | None, ...], placement: str
) -> ContextParallel:
    ulysses, ring, inner_ring = degrees
    return context_parallel(
        strategy, group, ulysses=ulysses, ring=ring, inner_ring=inner_ring, placement=placement
    )


def _problem(config: AttentionConfig, cp_size: int) -> str | None:
    """What is wrong with the settings for this many context-parallel ranks."""
    try:
        config.degrees(cp_size)
    except LcabError as error:
        return f"--context-parallel-size {cp_size}: {error}"
    if config.layout != "zigzag":
        return (
            f"layout {config.layout!r} cannot be had under Megatron, whose rotary embedding and batches are "
            "sliced in 'zigzag'; leave the layout out"
        )
    reason = kernels.get(config.kernel).unavailable()
    return None if reason is None else f"kernel {config.kernel!r} cannot run here: {reason}"
