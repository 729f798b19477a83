"""PyTorch's memory-efficient attention on CUDA (``aten::_efficient_attention_forward/_backward``).

One operator, called in two ways. Variable-length segments in one call where each is full, causal (aligned
bottom-right) or, if it has as many rows as keys, causal with a window; any other mask as full and top-left
causal tiles. Facts of its sources (ATen/native/transformers/cuda, torch 2.11 to 2.13):

- ``window_size`` counts keys, the row's own included, and needs a causal type. The backward kernel forgets
  the offset of a bottom-right diagonal in it (kernel_backward.h), so windows are only for square segments.
- lse is [segments, heads, longest rounded up to 32], natural, and the backward reads +inf as padding.
- No GQA: keys and values are copied for each query head, their gradients summed over the group.
- ``num_splits_key=1`` makes the backward repeatable: one thread block then adds up each row's dq in order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcab_plugin.kernels import segments, tiled
from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall
from lcab_plugin.kernels.lowering import too_deep, varlen_calls
from lcab_plugin.kernels.segments import Segments
from lcab_plugin.masks import AttentionMask

NO_MASK, TOP_LEFT, BOTTOM_RIGHT = range(3)  # aten's CustomMaskType
LSE_BLOCK = 32
MAX_PADDING = 8  # rows of lse the library may allocate for each row there is

Grads = tuple[Tensor, Tensor, Tensor]


class SdpaEfficient:
    """aten's memory-efficient attention: the one of PyTorch's fused kernels that takes float32."""

    name = "sdpa_efficient"
    features = Features(
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        head_dims="multiples of 8 (of 4 in float32)",
        native="full, causal, causal windows, documents",
        lowering="varlen where its windows do, else tiles",
        value_dim=True,
    )

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "needs a CUDA GPU, this machine has none"
        if torch.version.hip:
            return "on ROCm the operator is another library's, without windows; it is not adapted here"
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
        if not q.is_cuda:
            return f"it takes CUDA tensors, not {q.device.type}"
        if q.dtype not in self.features.dtypes:
            return f"it takes float32, bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
        if options.softcap is not None:
            return "PyTorch's scaled_dot_product_attention has no logit soft cap"
        unit = _unit(q)
        for name, dim in (("head_dim", q.shape[-1]), ("value head_dim", v.shape[-1])):
            if dim % unit:
                return (
                    f"{name} must be a multiple of {unit} in {str(q.dtype).removeprefix('torch.')}, not {dim}"
                )
        if torch.cuda.get_device_capability(q.device) < (8, 0) and q.dtype == torch.bfloat16:
            return f"bfloat16 needs compute capability 8.0, {torch.cuda.get_device_name(q.device)} has less"
        return None

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        blocks = (64, 64) if head_dim <= 64 else (32, 128)
        return segments.explain(mask, blocks) if by_segments(mask) else tiled.explain(mask, blocks)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        runner = segments if by_segments(mask) else tiled
        return runner.forward(self, q, k, v, mask, options)

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
        runner = segments if by_segments(mask) else tiled
        return runner.backward(self, dout, q, k, v, out, lse, mask, options)

    def tile_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = _forward(q, k, v, None, TOP_LEFT if causal else NO_MASK, None, options)
        return out.transpose(1, 2), lse[..., : q.shape[1]]

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
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        lse = pad(lse, (0, -lse.shape[-1] % LSE_BLOCK), value=float("inf"))
        kind = TOP_LEFT if causal else NO_MASK
        dq, dk, dv = _backward(dout, q, k, v, out, lse, None, kind, None, options)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Segments, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        out, lse = _forward(q, k, v, plan, *_mask_type(plan), options)
        segment, place = _places(plan, q.shape[1])
        return out[0], lse[segment, :, place].t()

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
        segment, place = _places(plan, q.shape[0])
        padded = plan.max_q + -plan.max_q % LSE_BLOCK
        apart = lse.new_full((len(plan.cu_q) - 1, q.shape[1], padded), float("inf"))
        apart[segment, :, place] = lse.t()
        dout, q, k, v, out = (x.unsqueeze(0) for x in (dout, q, k, v, out))
        dq, dk, dv = _backward(dout, q, k, v, out, apart, plan, *_mask_type(plan), options)
        return dq[0], dk[0], dv[0]


@lru_cache(maxsize=512)
def by_segments(mask: AttentionMask) -> bool:
    """Whether every segment of the mask is one that the operator's own masks say, without an lse that is
    mostly padding; else it goes by tiles."""
    if too_deep(mask):
        return False
    for call in varlen_calls(mask):
        lengths = call.segments[:, 1::2] - call.segments[:, ::2]
        square = bool((lengths[:, 0] == lengths[:, 1]).all())
        if (call.left, call.right) not in ((-1, -1), (-1, 0)) and not (call.right == 0 and square):
            return False
        if len(lengths) * lengths[:, 0].max() > MAX_PADDING * lengths[:, 0].sum():
            return False
    return True


def _mask_type(plan: Segments) -> tuple[int, int | None]:
    """aten's mask type and window of flash-attn's (left, right)."""
    return NO_MASK if plan.right else BOTTOM_RIGHT, None if plan.left < 0 else plan.left + 1


def _places(plan: Segments, rows: int) -> tuple[Tensor, Tensor]:
    """The segment of each row and its place therein, on the device."""
    lengths = plan.cu_q.diff()
    segment = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=rows)
    return segment, torch.arange(rows, device=lengths.device) - plan.cu_q[segment]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Segments | None,
    kind: int,
    window: int | None,
    options: KernelOptions,
) -> tuple[Tensor, Tensor]:
    """``out`` and the padded lse of [b, t, h, d] tensors; with a plan b is 1."""
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        _aligned(q),
        _aligned(_per_query_head(k, q)),
        _aligned(_per_query_head(v, q)),
        None,
        plan and plan.cu_q,
        plan and plan.cu_k,
        plan and plan.max_q,
        plan and plan.max_k,
        0.0,
        kind,
        True,
        scale=options.scale,
        window_size=window,
    )
    return out, lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Segments | None,
    kind: int,
    window: int | None,
    options: KernelOptions,
) -> Grads:
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # dropout's seed and offset; there is none
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        dout.contiguous(),
        _aligned(q),
        _aligned(_per_query_head(k, q)),
        _aligned(_per_query_head(v, q)),
        None,
        out.contiguous(),  # the kernel takes its rows to lie end to end
        plan and plan.cu_q,
        plan and plan.cu_k,
        plan.max_q if plan else q.shape[1],
        plan.max_k if plan else k.shape[1],
        lse,
        0.0,
        unused,
        unused,
        kind,
        False,
        scale=options.scale,
        num_splits_key=1 if options.deterministic else None,
        window_size=window,
    )
    return dq, _per_kv_head(dk, k), _per_kv_head(dv, v)


def _unit(x: Tensor) -> int:
    """Elements of 16 bytes, which its loads take at once."""
    return 16 // x.element_size()


def _aligned(x: Tensor) -> Tensor:
    """``x``, copied where its address or strides are not whole loads."""
    strides = all(stride % _unit(x) == 0 for stride in x.stride()[:-1])
    return (
        x
        if strides and x.stride(-1) == 1 and x.data_ptr() % 16 == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x if x.shape[2] == q.shape[2] else x.repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _per_kv_head(grad: Tensor, x: Tensor) -> Tensor:
    if grad.shape[2] == x.shape[2]:
        return grad
    return grad.unflatten(2, (x.shape[2], -1)).sum(3, dtype=torch.float32)


KERNEL = SdpaEfficient()
