"""What a kernel promises.

Tensors are ``[batch, tokens, heads, head_dim]`` (flash-attn's order); query heads are a multiple of the
key/value heads (GQA, head ``h`` reads key/value head ``h // (heads // kv_heads)``). ``lse`` is
``[batch, heads, tokens]``, natural logarithm, float32 (float64 for float64 inputs), ``-inf`` where a row
sees no key; ``out`` and every gradient of such a row are zero.

``backward`` accepts an ``out`` and ``lse`` that were merged over more keys than the ``k`` it is given:
with ``p = exp(scores - lse)`` it returns this key set's share of the gradients. That is what lets a ring,
a lowering or a double ring stand around any kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lcab_plugin.masks import AttentionMask


@dataclass(frozen=True)
class KernelOptions:
    """Options of one attention call: softmax ``scale``, logit ``softcap`` (``cap * tanh(s / cap)``), and
    whether the backward must be bitwise repeatable."""

    scale: float
    softcap: float | None = None
    deterministic: bool = False


@dataclass(frozen=True)
class Features:
    """What a kernel is made for, as `lcab kernels` shows it; ``unsupported`` decides each call.

    ``native``: the masks its library takes whole. ``lowering``: how it serves every other mask. ``head_dims``
    and ``dtypes`` on the devices named. ``value_dim``: a value head_dim other than the query's.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: str
    native: str
    lowering: str
    backward: bool = True
    deterministic: bool = True
    softcap: bool = False
    value_dim: bool = False


@dataclass(frozen=True)
class NativeCall:
    """One call of a kernel's library, as `lcab masks explain` prints it.

    ``what``: the call and its mask in the library's words. ``count``: segments or tiles in it. ``area``:
    visible cells it covers, each exactly once over all calls. ``computed``: cells the library computes for
    them, in whole blocks. ``copied``: rows of q, k or v copied beforehand (gathers, flips). ``merged``: rows
    of its result that meet an earlier call's. ``rectangle``: cells of its segments, whatever their windows,
    if the library may compute what a window hides all the same, in its backward say; 0 if it does not.
    """

    what: str
    count: int
    area: int
    computed: int
    copied: int = 0
    merged: int = 0
    rectangle: int = 0


class Kernel(Protocol):
    """One attention implementation on one device."""

    name: str
    features: Features

    def version(self) -> str:
        """The library that does the work and its version, for records."""

    def unavailable(self) -> str | None:
        """Why this kernel cannot run on this machine whatever its input, or None."""

    def unsupported(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        options: KernelOptions,
        needs_backward: bool,
    ) -> str | None:
        """Why this kernel cannot serve this call, in words that reach the report, or None."""

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        """The library calls that a forward under ``mask`` makes, for one head."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        """``out [b, tq, h, dv]`` in the dtype of ``q``, and ``lse [b, h, tq]``."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: AttentionMask,
        options: KernelOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``dq, dk, dv`` of these keys' share, shaped like ``q, k, v``."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of lse and of every merge and sum: float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_result(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of rows that see no key."""
    b, t, h, _ = q.shape
    lse = torch.full((b, h, t), float("-inf"), dtype=accumulation_dtype(q.dtype), device=q.device)
    return q.new_zeros(b, t, h, v.shape[-1]), lse


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """aten takes a deterministic backward from torch's process-wide flag: set it for this call only."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
