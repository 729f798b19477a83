"""MagiAttention's flex-flash-attention: a mask's slices one to one, every mask in one call.

FFA takes pairs of a query range and a key range with a type each (arXiv 2505.13211; semantics and interface:
SandAI-org/MagiAttention v1.1.1, ``magi_attention/functional/flex_flash_attn.py``). The functions under its
autograd, ``_flex_flash_attn_forward`` and ``_flex_flash_attn_backward``, take and give ``lse``; they are
private, so the releases whose argument lists were read are the only ones accepted.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall, empty_result
from lcab_plugin.kernels.lowering import coalesced
from lcab_plugin.masks import NO_HI, NO_LO, AttentionMask, AttnSlice

FULL, CAUSAL, INVCAUSAL, BICAUSAL = range(4)  # magi_attention.common.enum.AttnMaskType.to_int_type
NAMES = ("full", "causal", "inverse causal", "bicausal")
RELEASE = (1, 1)  # 1.0 has other argument lists


class Ranges(NamedTuple):
    """FFA's arguments on the device: ``q, k`` int32 [n, 2] and ``types`` int32 [n].

    ``rows_once, keys_once``: no two ranges share a row (a key), so that each is written without atomics.
    """

    q: Tensor
    k: Tensor
    types: Tensor
    rows_once: bool
    keys_once: bool


class Ffa:
    """Flex-flash-attention, one native call; bands that are none of its four types are split along rows."""

    name = "ffa"
    features = Features(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims="multiples of 8 up to 128 (Hopper only)",
        native="every mask, as ranges with a type",
        lowering="a band becomes at most three ranges",
        softcap=True,
    )

    def version(self) -> str:
        return f"magi-attention {_installed()}"

    def unavailable(self) -> str | None:
        version = _installed()
        if version is None:
            return (
                "magi-attention is not installed: build it from the tag v1.1.1 of "
                "github.com/SandAI-org/MagiAttention"
            )
        if tuple(map(int, re.findall(r"\d+", version)[:2])) != RELEASE:
            return f"magi-attention {version} may have other private functions than 1.1: install 1.1.1"
        if not torch.cuda.is_available():
            return "needs a CUDA GPU, this machine has none"
        if torch.cuda.get_device_capability() != (9, 0):
            return f"needs a Hopper GPU (compute capability 9.0), not {torch.cuda.get_device_name()}"
        return None

    def unsupported(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        options: KernelOptions,
        needs_backward: bool,
    ) -> str | None:
        if q.dtype not in self.features.dtypes:
            return f"it takes bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
        if q.shape[-1] > 128 or q.shape[-1] % 8:
            return f"head_dim must be a multiple of 8 up to 128, not {q.shape[-1]}"
        if v.shape[-1] != q.shape[-1]:
            return f"value head_dim {v.shape[-1]} differs from the query's {q.shape[-1]}"
        if q.shape[0] * max(q.shape[1], k.shape[1]) >= 2**31:
            return f"{q.shape[0]} x {max(q.shape[1], k.shape[1])} tokens do not fit its 32-bit ranges"
        return None if q.is_cuda else f"it takes CUDA tensors, not {q.device.type}"

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        slices = typed_slices(mask)
        if not len(slices):
            return []
        counts = np.bincount(slices[:, 4], minlength=4)
        what = ", ".join(f"{n} {name}" for n, name in zip(counts.tolist(), NAMES, strict=True) if n)
        blocks = (192, 128) if head_dim <= 64 else (128, 128)
        computed = _computed(slices, *blocks)
        return [NativeCall(f"flex_flash_attn, ranges: {what}", len(slices), mask.area, computed)]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        if mask.empty:
            return empty_result(q, v)
        ranges = _ranges(mask, q.shape[0], q.device)
        out, meta = _library()._flex_flash_attn_forward(
            *(x.flatten(0, 1) for x in (q, k, v)),
            sink=None,
            sink_layout="sh",
            out=None,
            lse=None,
            out_type=None,
            disable_fwd_atomic_reduction=ranges.rows_once,
            sm_margin=0,
            **_common(ranges, options),
        )
        lse = meta.lse.unflatten(0, (q.shape[0], -1)).transpose(1, 2)
        return out.to(q.dtype).unflatten(0, (q.shape[0], -1)), lse

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
        if mask.empty:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        ranges = _ranges(mask, q.shape[0], q.device)
        # rows without keys: exp(s - inf) is 0, where -inf would be read as a sum of exponentials of 1
        lse = lse.masked_fill(lse == float("-inf"), float("inf")).transpose(1, 2).flatten(0, 1).contiguous()
        dq, dk, dv, _ = _library()._flex_flash_attn_backward(
            *(x.flatten(0, 1) for x in (dout, q, k, v)),
            sink=None,
            sink_layout="sh",
            out=out.flatten(0, 1),
            lse=lse,
            dq=None,
            dk=None,
            dv=None,
            dsink=None,
            dq_type=None,
            dk_type=None,
            dv_type=None,
            disable_bwd_dkv_atomic_reduction=ranges.keys_once and q.shape[2] == k.shape[2],  # MHA only
            sm_margin=0,
            **_common(ranges, options),
        )
        parts = ((dq, q), (dk, k), (dv, v))
        dq, dk, dv = (grad.to(x.dtype).unflatten(0, (x.shape[0], -1)) for grad, x in parts)
        return dq, dk, dv


def typed_slices(mask: AttentionMask) -> np.ndarray:
    """The mask in FFA's words: int64 [n, 5] of ``q_start, q_end, k_start, k_end, type``, each cell in one.

    CAUSAL: the last row sees up to the last key. INVCAUSAL: the first row sees from the first key on.
    BICAUSAL: both. A band whose limits begin or end inside the rectangle is cut along its rows where they do:
    the rows that a limit cuts have that limit in their corner.
    """
    pieces = [piece for s in coalesced(mask) for piece in _corners(s)]
    pieces.sort()
    rows = [(*p[:4], INVCAUSAL * (p.lo is not None) + CAUSAL * (p.hi is not None)) for p in pieces]
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def _corners(s: AttnSlice) -> list[AttnSlice]:
    """A tight slice cut where its limits begin or cease to cut, at most three pieces."""
    edges = {s.q_start, s.q_end}
    if s.hi is not None:
        edges.add(min(s.k_end - s.hi, s.q_end))  # from this row on every key is left of the upper limit
    if s.lo is not None:
        edges.add(max(s.k_start - s.lo, s.q_start))  # from this row on the lower limit hides keys
    cut = sorted(edges)
    pieces = [s.clip(range(a, b), range(s.k_start, s.k_end)) for a, b in pairwise(cut)]
    return [p for p in pieces if p is not None]


@lru_cache(maxsize=64)
def _ranges(mask: AttentionMask, batch: int, device: torch.device) -> Ranges:
    """The ranges of a batch laid end to end."""
    slices = typed_slices(mask)
    q, k = (_repeated(slices[:, i : i + 2], n, batch) for i, n in ((0, mask.q_len), (2, mask.k_len)))
    types = np.tile(slices[:, 4], batch)
    q_ranges, k_ranges, kinds = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (q, k, types))
    return Ranges(q_ranges, k_ranges, kinds, _ascending(q), _ascending(k))


def _repeated(ranges: np.ndarray, length: int, batch: int) -> np.ndarray:
    return (ranges + length * np.arange(batch)[:, None, None]).reshape(-1, 2)


def _ascending(ranges: np.ndarray) -> bool:
    """Ranges that ascend and do not overlap, as FFA's flags against atomics ask."""
    return bool((ranges[1:, 0] >= ranges[:-1, 1]).all())


def _common(ranges: Ranges, options: KernelOptions) -> dict[str, Any]:
    return {
        "q_ranges": ranges.q,
        "k_ranges": ranges.k,
        "attn_type_map": ranges.types,
        "softmax_scale": options.scale,
        "softcap": options.softcap or 0.0,
        "deterministic": options.deterministic,
    }


def _computed(slices: np.ndarray, block_rows: int, block_keys: int) -> int:
    """Cells of the blocks that are not empty; blocks begin at the corner of their range."""
    shapes, counts = np.unique(
        np.column_stack([slices[:, 1] - slices[:, 0], slices[:, 3] - slices[:, 2], slices[:, 4]]),
        axis=0,
        return_counts=True,
    )
    total = 0
    for (rows, keys, kind), count in zip(shapes.tolist(), counts.tolist(), strict=True):
        lo = 0 if kind & INVCAUSAL else NO_LO
        hi = keys - rows if kind & CAUSAL else NO_HI
        one = AttentionMask.from_disjoint(rows, keys, np.array([[0, rows, 0, keys, lo, hi]]))
        blocks = one.block_map(block_rows, block_keys)
        total += count * int(blocks.length.sum()) * block_rows * block_keys
    return total


def _installed() -> str | None:
    try:
        return metadata.version("magi-attention") if find_spec("magi_attention") else None
    except metadata.PackageNotFoundError:
        return None


def _library() -> Any:
    from magi_attention.functional import flex_flash_attn  # type: ignore[import-not-found]

    return flex_flash_attn


KERNEL = Ffa()
