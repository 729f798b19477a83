"""FlashAttention 4 (package flash-attn-4, ``flash_attn.cute``): variable-length segments with a window.

Facts of its source, 4.0.0b36 (flash_attn/cute/interface.py): the window is two numbers or None, (None, 0) is
causal, nothing is dropped or filled in by length; ``lse [heads, tokens]`` is float32, -inf on an empty row;
the backward takes a given ``out`` and ``lse``.

Why segments, and not one call with a ``mask_mod`` over block-sparse lists, which could take any mask whole:
its block-sparse backward takes no segments and is not deterministic on Hopper, and it evaluates the function
cell by cell, from tables in memory, in every block that is not full, where segments cost window arithmetic.
A mask of many windows pays for layers and merges instead; ``lcab masks explain`` shows how much.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from lcab_plugin.kernels import segments
from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall
from lcab_plugin.kernels.lowering import too_deep, varlen_calls
from lcab_plugin.kernels.segments import Segments, SegmentsKernel
from lcab_plugin.masks import AttentionMask

# Rows and keys that are several blocks on every GPU: told that one block holds all of them, the library
# compiles kernels of their own for that (2 to 3 s, in the middle of a run whose documents vary).
SEVERAL_BLOCKS = 512


class FlashAttention4(SegmentsKernel):
    """flash_attn.cute, one native call per layer of segments."""

    name = "fa4"
    features = Features(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims="multiples of 8: up to 256 on Hopper; up to 128, and 256, on Blackwell",
        native="full, causal, windows, documents",
        lowering="varlen",
        softcap=True,
        value_dim=True,
    )

    def version(self) -> str:
        return f"flash-attn-4 {metadata.version('flash-attn-4')}"

    def unavailable(self) -> str | None:
        try:
            version = metadata.version("flash-attn-4")
        except metadata.PackageNotFoundError:
            return "flash-attn-4 is not installed: pip install --pre flash-attn-4"
        if not torch.cuda.is_available():
            return "needs a CUDA GPU, this machine has none"
        if torch.cuda.get_device_capability()[0] not in (9, 10, 11):
            return f"needs a GPU of compute capability 9, 10 or 11, not {torch.cuda.get_device_name()}"
        try:
            _library()
        except Exception as error:  # it compiles with packages of its own, which fail in their own ways
            return f"flash-attn-4 {version} does not import here: {error}"
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
        if torch.cuda.get_device_capability(q.device)[0] == 9:
            reason = _unsupported_on_hopper(q, k, v, needs_backward)
        else:
            reason = _unsupported_on_blackwell(q, v, mask, options)
        return reason or too_deep(mask)

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        # flash_attn/cute/interface.py, _tile_size_fwd_sm90, of a call with a window
        rows = 192 if head_dim <= 96 else 128
        return segments.explain(mask, (rows, 128 if head_dim <= 128 else 96 if head_dim <= 192 else 64))

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Segments, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _library()._flash_attn_fwd(q, k, v, return_lse=True, **_common(plan, options))
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
        dq, dk, dv, *_ = _library()._flash_attn_bwd(
            q, k, v, out, dout, lse, deterministic=options.deterministic, **_common(plan, options)
        )
        return dq, dk, dv


def _unsupported_on_hopper(q: Tensor, k: Tensor, v: Tensor, needs_backward: bool) -> str | None:
    dim, value_dim = q.shape[-1], v.shape[-1]
    for name, size in (("head_dim", dim), ("value head_dim", value_dim)):
        if size > 256 or size % 8:
            return f"{name} must be a multiple of 8 up to 256, not {size}"
    if needs_backward and value_dim != dim and q.shape[2] != k.shape[2]:
        return (
            f"on Hopper its backward with grouped heads needs equal head_dims, not {dim} with value head_dim "
            f"{value_dim}"
        )
    return None


def _unsupported_on_blackwell(
    q: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
) -> str | None:
    dims = q.shape[-1], v.shape[-1]
    if any(size % 8 for size in dims) or (max(dims) > 128 and dims not in ((192, 128), (256, 256))):
        return (
            "on Blackwell head_dim and value head_dim must be multiples of 8 up to 128, 192 with 128, or 256 "
            f"with 256, not {dims[0]} with {dims[1]}"
        )
    if dims == (256, 256):
        if options.softcap is not None:
            return "on Blackwell it has no logit soft cap at head_dim 256"
        if any((call.left, call.right) not in ((-1, -1), (-1, 0)) for call in varlen_calls(mask)):
            return "on Blackwell it has no window at head_dim 256, and this mask needs one"
    return None


def _library() -> Any:
    return import_module("flash_attn.cute.interface")


def _common(plan: Segments, options: KernelOptions) -> dict[str, Any]:
    """What forward and backward are both given."""
    return {
        "cu_seqlens_q": plan.cu_q,
        "cu_seqlens_k": plan.cu_k,
        "max_seqlen_q": max(plan.max_q, SEVERAL_BLOCKS),
        "max_seqlen_k": max(plan.max_k, SEVERAL_BLOCKS),
        "softmax_scale": options.scale,
        "window_size_left": None if plan.left < 0 else plan.left,
        "window_size_right": None if plan.right < 0 else plan.right,
        "softcap": options.softcap or 0.0,
    }


KERNEL = FlashAttention4()
