"""PyTorch's variable-length attention (``torch.nn.attention.varlen``), under every mask by segments.

Its registered operators ``torch_attn::_varlen_attn`` and ``_varlen_attn_backward`` are called: the public
``varlen_attn`` cannot take an lse merged over more keys. Their arguments changed from release to release
(windows came in 2.11; grouped heads, paging and splits in 2.13), so they are called by name, and what an
installed one lacks is refused. Unlike ``sdpa_flash`` it follows torch's own choice of what runs beneath:
FlashAttention 2 of torch's build, or what ``torch.nn.attention.activate_flash_attention_impl`` put there.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lcab_plugin.kernels import segments
from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall, deterministic_algorithms
from lcab_plugin.kernels.lowering import too_deep, varlen_calls
from lcab_plugin.kernels.segments import Segments, SegmentsKernel
from lcab_plugin.masks import AttentionMask

Grads = tuple[Tensor, Tensor, Tensor]


class Varlen(SegmentsKernel):
    """torch.nn.attention.varlen, one native call per layer of segments."""

    name = "varlen"
    features = Features(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims="multiples of 8 up to 256",
        native="full, causal, windows, documents",
        lowering="varlen",
    )

    def version(self) -> str:
        return f"torch {torch.__version__}, {_implementation()}"

    def unavailable(self) -> str | None:
        if find_spec("torch.nn.attention.varlen") is None:
            return f"torch {torch.__version__} has no torch.nn.attention.varlen; use torch >= 2.10"
        if not torch.cuda.is_available():
            return "needs a CUDA GPU, this machine has none"
        if torch.version.hip:
            return "on ROCm its lse is laid out otherwise; it is not adapted here"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"needs compute capability 8.0, {torch.cuda.get_device_name()} has less"
        if _implementation() == "cuDNN":
            return (
                "torch's operator runs cuDNN on this GPU, whose lse is laid out otherwise; use torch >= 2.11"
            )
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
            return f"it takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
        if options.softcap is not None:
            return "torch.nn.attention.varlen has no logit soft cap"
        if v.shape[-1] != q.shape[-1]:
            return f"value head_dim {v.shape[-1]} differs from the query's {q.shape[-1]}"
        if q.shape[-1] > 256 or q.shape[-1] % 8:
            return f"head_dim must be a multiple of 8 up to 256, not {q.shape[-1]}"
        if reason := too_deep(mask):
            return reason
        windows = {(call.left, call.right) for call in varlen_calls(mask)}
        if "window_size" not in arguments("_varlen_attn") and windows - {(-1, -1), (-1, 0)}:
            return f"torch {torch.__version__}'s varlen operator has no windows; use torch >= 2.11"
        return None

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        return segments.explain(mask, (128, 64))

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Segments, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        given = {"query": q, "key": k, "value": v, **_segments(plan), "scale": options.scale}
        given["enable_gqa"] = q.shape[1] != k.shape[1]
        given["num_splits"] = 1 if options.deterministic else None
        with deterministic_algorithms(options.deterministic):
            out, lse, *_ = _call("_varlen_attn", given)
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
        given = {"query": q, "key": k, "value": v, **_segments(plan), "scale": options.scale}
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout's; there is none
        given |= {"grad_out": dout, "out": out, "lse": lse, "rng_state": rng_state}
        with deterministic_algorithms(options.deterministic):
            return _call("_varlen_attn_backward", given)


def _segments(plan: Segments) -> dict[str, Any]:
    """The arguments that say the segments and their window."""
    return {
        "cu_seq_q": plan.cu_q,
        "cu_seq_k": plan.cu_k,
        "max_q": plan.max_q,
        "max_k": plan.span,
        "is_causal": (plan.left, plan.right) == (-1, 0),
        "window_size": [plan.left, plan.right],
    }


def _call(operator: str, given: dict[str, Any]) -> Any:
    """The operator on those of the arguments that the installed torch's version of it takes."""
    taken = {name: value for name, value in given.items() if name in arguments(operator)}
    return getattr(torch.ops.torch_attn, operator)(**taken)


@cache
def arguments(operator: str) -> frozenset[str]:
    """The names of the arguments of ``torch_attn::operator`` here; none where torch has no such module."""
    if find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    import_module("torch.nn.attention.varlen")  # registers them
    schema = getattr(torch.ops.torch_attn, operator).default._schema
    return frozenset(argument.name for argument in schema.arguments)


def _implementation() -> str:
    """What the operator runs: torch asks its registry, and in 2.10 cuDNN by device."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if current is not None:
        return f"{current} (activated)"
    on_cudnn = getattr(import_module("torch.nn.attention.varlen"), "_should_use_cudnn", lambda _: False)
    if on_cudnn(torch.cuda.current_device()):
        return "cuDNN"
    return "FlashAttention 2"


KERNEL = Varlen()
