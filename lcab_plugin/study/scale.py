"""`--scale tiny`: the same study with sizes for a CPU."""

from __future__ import annotations

from typing import Any

from lcab_plugin.study.settings import CpSweep, Degrees, KernelsSweep, Study, Sweep, TrainingSweep

_HEADS, _HEAD_DIM = 8, 32
_TOKENS = 512  # of a sequence
_WORLD = 2


def tiny(study: Study) -> Study:
    """All its kernels, strategies, masks, layouts and frameworks, once: one length of 512 tokens, at most 2
    ranks on this machine's CPU, 8 query heads in the study's grouping with a head_dim of 32, float32,
    training runs of at most 2 steps of the smallest preset."""
    launcher = study.launcher.model_copy(update={"kind": "local"})
    sweeps = [_tiny(sweep) for sweep in study.sweeps]
    return study.model_copy(update={"sweeps": sweeps, "device": "cpu", "launcher": launcher})


def _tiny(sweep: Sweep) -> Sweep:
    changes: dict[str, Any] = {"seqlens": [_TOKENS]}
    if isinstance(sweep, (KernelsSweep, CpSweep)):
        changes |= {
            "heads": _HEADS,
            "kv_heads": max(1, sweep.kv_heads * _HEADS // sweep.heads),
            "head_dim": min(sweep.head_dim, _HEAD_DIM),
            "dtype": "fp32",
            "batch": 1,
            "cell_seconds": 0.02,
        }
    if isinstance(sweep, (CpSweep, TrainingSweep)):
        changes |= {
            "seqlens_per_rank": None,
            "worlds": sorted({min(world, _WORLD) for world in sweep.worlds}),
            "degrees": [_tiny_degrees(degrees) for degrees in sweep.degrees],
        }
    if isinstance(sweep, TrainingSweep):
        changes |= {"preset": "tiny", "dtype": "fp32", "steps": min(sweep.steps, 2)}
        changes |= {"micro_batch": 1, "global_batch": None}
    return sweep.model_copy(update=changes)


def _tiny_degrees(degrees: Degrees) -> Degrees:
    """A Ulysses degree at most as large as the world; the ring takes what is left, of inner rings of 1."""
    ulysses = min(degrees.ulysses, _WORLD) if degrees.ulysses else None
    inner = 1 if degrees.inner_ring else None
    return degrees.model_copy(update={"ulysses": ulysses, "ring": None, "inner_ring": inner})
