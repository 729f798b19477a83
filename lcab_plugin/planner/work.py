"""What a kernel has to do: the native calls of a mask, counted by the kernel's own plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from lcab_plugin import kernels
from lcab_plugin.kernels import segments
from lcab_plugin.kernels.contract import Kernel, KernelOptions, NativeCall
from lcab_plugin.kernels.lowering import too_deep
from lcab_plugin.masks import AttentionMask, full

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Work:
    """Of one head: native ``calls``; cells visible (``area``), ``computed`` in whole blocks, and ``outside``,
    cells of the segments' rectangles that a plan leaves out but a library may compute all the same; ``rows``
    of queries and of ``keys``; ``moved``: rows copied before a call, and 5 a row merged after it (its float32
    sum read and written, in units of a 16-bit row)."""

    calls: float = 0
    area: float = 0
    computed: float = 0
    outside: float = 0
    rows: float = 0
    keys: float = 0
    moved: float = 0

    def scaled(self, by: float) -> Work:
        """Everything, the calls too, times ``by``."""
        return Work(*(value * by for value in vars(self).values()))

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@lru_cache(maxsize=4096)
def work(kernel: str, mask: AttentionMask, head_dim: int, device: str) -> Work:
    """What ``kernel`` does under ``mask`` in one head."""
    if mask.empty:
        return Work()
    calls = _explained(kernel, mask, head_dim, device)
    return Work(
        calls=len(calls),
        area=mask.area,
        computed=sum(call.computed for call in calls),
        outside=max(0, sum(call.rectangle - call.computed for call in calls if call.rectangle)),
        rows=mask.q_len,
        keys=mask.k_len,
        moved=sum(call.copied + 5 * call.merged for call in calls),
    )


def _explained(kernel: str, mask: AttentionMask, head_dim: int, device: str) -> list[NativeCall]:
    """The kernel's own plan. ``sdpa_flash`` has one for each kind of device and reads which from the machine
    at hand; its plan for a GPU is that of every segment kernel in blocks of 128 x 64."""
    if kernel == "sdpa_flash" and device == "cuda":
        return segments.explain(mask, (128, 64))
    return kernels.get(kernel).explain(mask, head_dim)


@lru_cache(maxsize=1024)
def refusal(kernel: str, mask: AttentionMask, head_dim: int, dtype: str, device: str) -> str | None:
    """Why a kernel does not serve such a call on such a device, or None.

    A kernel that looks at the GPU itself (its compute capability, its library's version) is not asked for
    that: the GPU planned for need not be here.
    """
    chosen = kernels.get(kernel)
    if reason := _beside_the_mask(chosen, dtype, device):
        return reason
    reason = _unsupported(chosen, mask, head_dim, dtype)
    if reason and (device == "cpu" or reason != _unsupported(chosen, full(1), 64, "bf16")):
        return reason
    by_segments = chosen.features.lowering.startswith("varlen") or kernel == "sdpa_flash"
    return too_deep(mask) if device == "cuda" and by_segments else None


def _beside_the_mask(kernel: Kernel, dtype: str, device: str) -> str | None:
    features = kernel.features
    if device not in features.devices:
        return f"it runs on {', '.join(features.devices)}, not on {device}"
    if not features.backward:
        return "it has no backward"
    half_on_cuda = kernel.name == "sdpa_flash" and device == "cuda"
    if _DTYPES[dtype] not in features.dtypes or (half_on_cuda and dtype == "fp32"):
        return f"it does not take {dtype} on {device}"
    return None


def _unsupported(kernel: Kernel, mask: AttentionMask, head_dim: int, dtype: str) -> str | None:
    """The kernel's reason, judged by tensors that take no memory."""
    one = torch.empty(1, 1, 1, head_dim, dtype=_DTYPES[dtype])
    q, k = one.expand(1, mask.q_len, 1, head_dim), one.expand(1, mask.k_len, 1, head_dim)
    return kernel.unsupported(q, k, k, mask, KernelOptions(head_dim**-0.5), needs_backward=True)
