"""FlashAttention 2 (package flash-attn): every mask as variable-length segments with a window.

The functions under its autograd give and take ``lse [heads, tokens]``. Facts of its sources, 2.7.4 to 2.8.3
(flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp; the argument lists are the same in both):

- ``causal`` only sets the right limit to 0, and a call with no left limit and a right limit of 0 runs the
  causal kernel whatever ``causal`` says. So windows alone are passed.
- ``max_seqlen_k`` is also how it judges a window: a right limit of at least that is dropped, and a right
  limit that is missing beside a left one becomes that. Both cut wrongly where a segment has more rows than
  keys, so with a window the larger of the two lengths is passed (a few blocks more that return at once).
- The softmax of an empty row has lse ``+inf``; no segment here has one.
- ``dq, dk, dv`` are written into buffers; ``rng_state`` is dropout's, there is none.
"""

from __future__ import annotations

import re
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from lcab_plugin.kernels import segments
from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall
from lcab_plugin.kernels.lowering import too_deep
from lcab_plugin.kernels.segments import Segments, SegmentsKernel
from lcab_plugin.masks import AttentionMask

OLDEST = (
    2,
    7,
    4,
)  # windows were one tuple before 2.7, and lse was padded to the longest segment before 2.6.2


class FlashAttention2(SegmentsKernel):
    """flash-attn 2, one native call per layer of segments."""

    name = "fa2"
    features = Features(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims="multiples of 8 up to 256",
        native="full, causal, windows, documents",
        lowering="varlen",
        softcap=True,
    )

    def version(self) -> str:
        return f"flash-attn {metadata.version('flash-attn')}"

    def unavailable(self) -> str | None:
        try:
            version = metadata.version("flash-attn")
        except metadata.PackageNotFoundError:
            return "flash-attn is not installed: pip install flash-attn --no-build-isolation"
        if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
            return f"flash-attn {version} is older than what this calls: pip install 'flash-attn>=2.7.4'"
        if not torch.cuda.is_available():
            return "needs a CUDA GPU, this machine has none"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"needs compute capability 8.0, {torch.cuda.get_device_name()} has less"
        try:
            _library()
        except Exception as error:  # a build for another torch fails in its own ways
            return f"flash-attn {version} does not import here: {error}"
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
        if q.shape[-1] > 256 or q.shape[-1] % 8:
            return f"head_dim must be a multiple of 8 up to 256, not {q.shape[-1]}"
        if v.shape[-1] != q.shape[-1]:
            return f"value head_dim {v.shape[-1]} differs from the query's {q.shape[-1]}"
        return too_deep(mask)

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        # csrc/flash_attn/src/flash_fwd_launch_template.h, as on A100 and H100
        wide = 128 if head_dim <= 64 else 64
        return segments.explain(mask, (128 if head_dim <= 192 else 64, wide))

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Segments, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        out, lse, _, _ = _library()._flash_attn_varlen_forward(q, k, v, **_common(plan, options))
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
        _library()._flash_attn_varlen_backward(
            dout,
            q,
            k,
            v,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=options.deterministic,
            **_common(plan, options),
        )
        return dq, dk, dv


def _library() -> Any:
    return import_module("flash_attn.flash_attn_interface")


def _common(plan: Segments, options: KernelOptions) -> dict[str, Any]:
    """What forward and backward are both given."""
    return {
        "cu_seqlens_q": plan.cu_q,
        "cu_seqlens_k": plan.cu_k,
        "max_seqlen_q": plan.max_q,
        "max_seqlen_k": plan.span,
        "dropout_p": 0.0,
        "softmax_scale": options.scale,
        "causal": False,
        "window_size_left": plan.left,
        "window_size_right": plan.right,
        "softcap": options.softcap or 0.0,
        "alibi_slopes": None,
    }


KERNEL = FlashAttention2()
