"""Megatron's activation recomputation without a second pass of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core import tensor_parallel

from lcab_plugin.recompute import KeepAttention


@contextmanager
def keep_attention() -> Iterator[None]:
    """Around forward passes (the whole schedule, say): layers under ``--recompute-granularity full`` keep
    what attention computed and received, and their recomputation is handed it back.

    Not for ``selective`` recomputation of ``core_attn``, which is there to drop just that.
    """
    checkpoint = tensor_parallel.checkpoint

    def keeping(function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(KeepAttention(function), *args)

    tensor_parallel.checkpoint = keeping
    try:
        yield
    finally:
        tensor_parallel.checkpoint = checkpoint
