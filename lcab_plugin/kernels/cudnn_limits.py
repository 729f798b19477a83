"""What cuDNN's fused attention over packed segments refuses, whoever calls it (support matrix of 9.x)."""

from __future__ import annotations

import torch
from torch import Tensor

from lcab_plugin.kernels.contract import KernelOptions
from lcab_plugin.kernels.lowering import too_deep
from lcab_plugin.masks import AttentionMask

DTYPES = (torch.bfloat16, torch.float16)


def too_large(q: Tensor, v: Tensor) -> str | None:
    """Why cuDNN's backward, of the frontend or PyTorch's, is wrong for this call, or None. It gives no error:
    seen on an H200 (cuDNN 9.19), where the forward is right."""
    rows = max(x.shape[:-1].numel() for x in (q, v))
    if rows * max(q.shape[-1], v.shape[-1]) < 2**31:
        return None
    return "cuDNN's backward indexes with 32 bits, and a tensor of this call has 2^31 elements or more"


def refused(
    q: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions, needs_backward: bool
) -> str | None:
    """Why cuDNN cannot serve this call, or None."""
    if options.softcap is not None:
        return "cuDNN's fused attention has no logit soft cap for packed segments"
    if q.dtype not in DTYPES:
        return f"it takes bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    d, dv = q.shape[-1], v.shape[-1]
    if d % 8 or dv % 8 or max(d, dv) > 256:
        return f"head_dim must be a multiple of 8 up to 256, not {d}" + (f" and {dv}" if dv != d else "")
    if d != dv and min(d, dv) >= 128 and needs_backward and (d, dv) != (192, 128):
        return f"cuDNN's backward has no query head_dim {d} with value head_dim {dv}"
    hopper = not q.is_cuda or torch.cuda.get_device_capability(q.device) == (9, 0)
    if max(d, dv) > 128 and not hopper and (d, dv) != (192, 128):
        return f"head_dim {max(d, dv)} needs a Hopper GPU (compute capability 9.0)"
    if needs_backward and (reason := too_large(q, v)):
        return reason
    if reason := too_deep(mask):
        return reason
    return None if q.is_cuda else f"it takes CUDA tensors, not {q.device.type}"
