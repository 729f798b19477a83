"""Swap the attention of a long-context training run: kernel, context-parallel strategy and mask.

Importing this package loads torch and nothing else of weight; what needs more is imported when used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lcab_plugin import kernels, masks
from lcab_plugin.attention import Attention, attention
from lcab_plugin.context_parallel import ContextParallel, context_parallel
from lcab_plugin.errors import LcabError, UnsupportedError
from lcab_plugin.layout import Layout
from lcab_plugin.recompute import KeepAttention, keep_attention

if TYPE_CHECKING:
    from lcab_plugin.config import AttentionConfig

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "AttentionConfig",
    "ContextParallel",
    "KeepAttention",
    "Layout",
    "LcabError",
    "UnsupportedError",
    "attention",
    "context_parallel",
    "keep_attention",
    "kernels",
    "masks",
]

_LAZY = {"AttentionConfig": "lcab_plugin.config"}  # pydantic is only needed to read a configuration


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
