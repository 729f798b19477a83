"""FlashAttention 3 (the ``hopper`` folder of flash-attention): variable-length segments with a window.

Facts of its source, 3.0.0 at commit 0251105 (hopper/flash_attn_interface.py, hopper/flash_api.cpp):

- The functions under its autograd are custom operators since September 2025, with the window as two numbers
  and gradient buffers by name; before that ``window_size`` was one tuple, and those builds are refused.
- As in FlashAttention 2 ``causal`` is the window (-1, 0) and nothing else. A limit is dropped only where it
  limits no row, and ``lse [heads, tokens]`` is -inf on an empty row.
- The forward has a value head_dim of its own for head_dim 136 to 192 with 104 to 128, and for head_dim up to
  64 with up to 512; the backward works in the larger of the two, at most 256.
- ``pack_gqa=None`` leaves it to the library whether query heads of a group share a tile.
"""

from __future__ import annotations

import inspect
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lcab_plugin.kernels import segments
from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall
from lcab_plugin.kernels.lowering import too_deep
from lcab_plugin.kernels.segments import Segments, SegmentsKernel
from lcab_plugin.masks import AttentionMask

SOURCE = "build the hopper folder of github.com/Dao-AILab/flash-attention (python setup.py install)"


class FlashAttention3(SegmentsKernel):
    """flash_attn_interface, one native call per layer of segments."""

    name = "fa3"
    features = Features(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims="multiples of 8 up to 256 (Hopper only); deterministic backward up to 192",
        native="full, causal, windows, documents",
        lowering="varlen",
        softcap=True,
        value_dim=True,
    )

    def version(self) -> str:
        return f"flash_attn_3 {_version()}"

    def unavailable(self) -> str | None:
        if _module() is None:
            return f"flash_attn_interface (FlashAttention 3) is not installed: {SOURCE}"
        if not torch.cuda.is_available():
            return "needs a CUDA GPU, this machine has none"
        if torch.cuda.get_device_capability()[0] != 9:
            return f"needs a Hopper GPU (compute capability 9.0), not {torch.cuda.get_device_name()}"
        try:
            forward = _library()._flash_attn_forward
        except Exception as error:  # a build for another torch fails in its own ways
            return f"flash_attn_interface does not import here: {error}"
        # a custom operator keeps the function it was made of
        parameters = inspect.signature(getattr(forward, "_init_fn", forward)).parameters
        if "window_size" in parameters:
            return f"this flash_attn_interface is of before September 2025: {SOURCE}"
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
        if q.device.type != "cuda":
            return f"it takes CUDA tensors, not {q.device.type}"
        if q.dtype not in self.features.dtypes:
            return f"it takes bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
        dim, value_dim = q.shape[-1], v.shape[-1]
        if dim > 256 or dim % 8:
            return f"head_dim must be a multiple of 8 up to 256, not {dim}"
        if value_dim != dim and (value_dim % 8 or not _has_value_dim(dim, value_dim)):
            return (
                f"value head_dim {value_dim} does not go with head_dim {dim}: it has 104 to 128 with 136 to "
                "192, and up to 512 with up to 64"
            )
        if needs_backward and value_dim > 256:
            return f"its backward has value head_dims up to 256, not {value_dim}"
        if needs_backward and options.deterministic and max(dim, value_dim) > 192:
            return f"its deterministic backward has head_dims up to 192, not {max(dim, value_dim)}"
        return too_deep(mask)

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        # hopper/tile_size.h, of a call with a window
        rows = 192 if head_dim <= 96 else 128
        return segments.explain(mask, (rows, 128 if head_dim <= 128 else 96 if head_dim <= 192 else 64))

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Segments, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _library()._flash_attn_forward(
            q, k, v, causal=False, pack_gqa=None, **_common(plan, options)
        )
        return out, lse

    def varlen_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        plan: Segments,
        options: KernelOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        _library()._flash_attn_backward(
            dout,
            q,
            k,
            v,
            out=out,
            softmax_lse=lse,
            sequed_q=None,  # the library's spelling
            sequed_k=None,
            dq=dq,
            dk=dk,
            dv=dv,
            is_causal=False,
            deterministic=options.deterministic,
            **_common(plan, options),
        )
        return dq, dk, dv


def _has_value_dim(dim: int, value_dim: int) -> bool:
    return (128 < dim <= 192 and 96 < value_dim <= 128) or (dim <= 64 and value_dim <= 512)


def _module() -> str | None:
    """Its module's name: a build installs it beside the package, some distributions inside."""
    if find_spec("flash_attn_interface") is not None:
        return "flash_attn_interface"
    inside = "flash_attn_3.flash_attn_interface"
    return inside if find_spec("flash_attn_3") is not None and find_spec(inside) is not None else None


def _library() -> Any:
    return import_module(_module() or "flash_attn_interface")


def _version() -> str:
    """Of the distribution, which is named after the package; a module that was only copied has none."""
    try:
        return metadata.version("flash-attn-3")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _common(plan: Segments, options: KernelOptions) -> dict[str, Any]:
    """What forward and backward are both given."""
    return {
        "cu_seqlens_q": plan.cu_q,
        "cu_seqlens_k": plan.cu_k,
        "max_seqlen_q": plan.max_q,
        "max_seqlen_k": plan.max_k,
        "softmax_scale": options.scale,
        "window_size_left": plan.left,
        "window_size_right": plan.right,
        "softcap": options.softcap or 0.0,
    }


KERNEL = FlashAttention3()
