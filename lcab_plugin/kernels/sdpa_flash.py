"""PyTorch's own flash attention operators, by lowering under every mask.

CPU: ``aten::_scaled_dot_product_flash_attention_for_cpu``: full and top-left causal rectangles, GQA, any
float dtype; it divides by zero on an empty tensor, so no empty tile is ever passed.
CUDA: ``aten::_flash_attention_forward/backward`` (FlashAttention 2 in torch's build) over variable-length
segments with windows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcab_plugin.kernels import segments, tiled
from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall, deterministic_algorithms
from lcab_plugin.kernels.lowering import too_deep
from lcab_plugin.kernels.segments import Segments
from lcab_plugin.masks import AttentionMask

Grads = tuple[Tensor, Tensor, Tensor]


class SdpaFlash:
    """aten's flash attention, one native call per batch of tiles (CPU) or layer of segments (CUDA)."""

    name = "sdpa_flash"
    features = Features(
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        head_dims="any on CPU, multiples of 8 up to 256 on CUDA",
        native="full, causal; on CUDA also windows and documents",
        lowering="tiles on CPU, varlen on CUDA",
    )

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self) -> str | None:
        if hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return None
        return f"torch {torch.__version__} has no flash attention operator that returns lse; use torch >= 2.5"

    def unsupported(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        options: KernelOptions,
        needs_backward: bool,
    ) -> str | None:
        if options.softcap is not None:
            return "PyTorch's scaled_dot_product_attention has no logit soft cap"
        if v.shape[-1] != q.shape[-1]:
            return f"value head_dim {v.shape[-1]} differs from the query's {q.shape[-1]}"
        if q.device.type not in ("cpu", "cuda"):
            return f"device {q.device.type!r} has no flash attention operator in torch"
        if q.is_cuda and q.dtype not in (torch.float16, torch.bfloat16):
            return f"on CUDA it takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
        if q.is_cuda and (q.shape[-1] > 256 or q.shape[-1] % 8):
            return f"on CUDA head_dim must be a multiple of 8 up to 256, not {q.shape[-1]}"
        if q.is_cuda and (reason := too_deep(mask)):
            return reason
        if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
            return f"needs compute capability 8.0, {torch.cuda.get_device_name(q.device)} has less"
        return None

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        if torch.cuda.is_available():
            return segments.explain(mask, (128, 64))
        return tiled.explain(mask, (64, 512), bands=True, ragged=True)  # row blocks of 32 to 256, all alike

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        if q.is_cuda:
            return segments.forward(self, q, k, v, mask, options)
        return tiled.forward(self, q, k, v, mask, options, bands=self)

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
    ) -> Grads:
        if q.is_cuda:
            return segments.backward(self, dout, q, k, v, out, lse, mask, options)
        return tiled.backward(self, dout, q, k, v, out, lse, mask, options, bands=self)

    def tile_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=options.scale
        )

    def tile_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        options: KernelOptions,
    ) -> Grads:
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=options.scale
        )

    def band_forward(
        self, q: Tensor, k: Tensor, v: Tensor, added: Tensor, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=added, scale=options.scale
        )

    def band_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        added: Tensor,
        options: KernelOptions,
    ) -> Grads:
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, False, attn_mask=added, scale=options.scale
        )

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Segments, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            plan.cu_q,
            plan.cu_k,
            plan.max_q,
            plan.span,
            0.0,
            False,
            False,
            scale=options.scale,
            window_size_left=plan.left,
            window_size_right=plan.right,
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
    ) -> Grads:
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # dropout's random state; there is none
        with deterministic_algorithms(options.deterministic):
            return torch.ops.aten._flash_attention_backward(
                dout,
                q,
                k,
                v,
                out,
                lse,
                plan.cu_q,
                plan.cu_k,
                plan.max_q,
                plan.span,
                0.0,
                False,
                unused,
                unused,
                scale=options.scale,
                window_size_left=plan.left,
                window_size_right=plan.right,
            )


KERNEL = SdpaFlash()
