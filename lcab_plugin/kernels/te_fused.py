"""TransformerEngine's fused attention (cuDNN), through the functions that its own context parallelism calls.

``fused_attn_fwd`` and ``fused_attn_bwd`` of ``transformer_engine.pytorch.cpp_extensions.fused_attn`` (read at
v2.15, v2.16, v2.18 and in the 2.20.2 wheel) are private. The backward takes out and, in ``aux_ctx_tensors``,
the softmax statistics, which is how TransformerEngine merges its own ring. Packed sequences (``thd_thd_thd``)
carry the segments of a mask; ``bottom_right_diagonal`` aligns a window.
"""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lcab_plugin.kernels import cudnn_limits, segments
from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall
from lcab_plugin.kernels.segments import Segments, SegmentsKernel
from lcab_plugin.masks import AttentionMask

Grads = tuple[Tensor, Tensor, Tensor]

# 2.15 brought o_format and took dqkv_dtype away; 2.20 is the newest whose source was read.
FIRST, LAST = (2, 15), (2, 20)
CUDNN = 91002  # windows without a causal limit; 9.10.0 and 9.10.1 are refused by TransformerEngine
ROUND = 64  # TransformerEngine keeps one cuDNN plan a length: lengths are rounded as its own attention does


class TeFused(SegmentsKernel):
    """cuDNN attention over packed segments, one native call per layer of segments."""

    name = "te_fused"
    features = Features(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims="multiples of 8 up to 128, up to 256 on Hopper",
        native="full, causal, windows and documents, as packed segments",
        lowering="varlen",
        value_dim=True,
    )

    def version(self) -> str:
        return f"transformer-engine {_installed()}, cuDNN {torch.backends.cudnn.version()}"

    def unavailable(self) -> str | None:
        version = _installed()
        if version is None:
            return "TransformerEngine is not installed: pip install transformer-engine[pytorch]"
        if not FIRST <= tuple(map(int, re.findall(r"\d+", version)[:2])) <= LAST:
            return (
                f"transformer-engine {version} may have other private functions than "
                f"{FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}, which this calls: install 2.20"
            )
        if not torch.cuda.is_available():
            return "needs a CUDA GPU, this machine has none"
        if torch.cuda.get_device_capability() < (9, 0):
            return f"packed sequences need compute capability 9.0, {torch.cuda.get_device_name()} has less"
        cudnn = torch.backends.cudnn.version() or 0
        if cudnn < CUDNN or cudnn == 91400:
            return f"needs cuDNN 9.10.2 or newer but not 9.14.0 (window bug), not {cudnn}"
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
        if reason := cudnn_limits.refused(q, v, mask, options, needs_backward):
            return reason
        blackwell = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (10, 0)
        if options.deterministic and blackwell and (torch.backends.cudnn.version() or 0) < 91801:
            return "a deterministic backward on this GPU needs cuDNN 9.18.1 or newer"
        return None

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        return segments.explain(mask, (128, 128))

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Segments, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        library = _library()
        out, (stats, *_) = library.fused_attn_fwd(
            is_training=True,  # without it there are no statistics
            q=q.contiguous(),
            k=k.contiguous(),
            v=v.contiguous(),
            **_common(library, q, plan, options),
        )
        stats = stats.squeeze(-1)
        if stats.ndim == 3:  # [segments, h, max_q]
            owner, row = _places(plan, len(q))
            stats = stats[owner, :, row]
        return out, stats.t().contiguous()

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
        library = _library()
        common = _common(library, q, plan, options)
        if _packed_statistics(q.device):
            stats = lse.t().contiguous()
        else:
            n, longest = len(plan.cu_q) - 1, common["max_seqlen_q"]
            stats = lse.new_full((n, q.shape[1], longest), float("inf"))  # exp(s - inf) is 0
            owner, row = _places(plan, len(q))
            stats[owner, :, row] = lse.t()
        no_dropout = torch.zeros(2, dtype=torch.int64, device=q.device)
        dq, dk, dv, *_ = library.fused_attn_bwd(
            q=q.contiguous(),
            k=k.contiguous(),
            v=v.contiguous(),
            o=out.contiguous(),
            d_o=dout.contiguous(),
            aux_ctx_tensors=[stats.unsqueeze(-1), no_dropout],
            do_format="thd",
            dqkv_layout="thd_thd_thd",
            deterministic=options.deterministic,
            **common,
        )
        return dq, dk, dv


def _common(library: Any, q: Tensor, plan: Segments, options: KernelOptions) -> dict[str, Any]:
    """What both passes say. A causal limit is spelled as a mask type, any other window only by its sizes.

    With a window cuDNN wants no more rows than keys; the longest may be stated longer than it is.
    """
    causal = plan.right == 0
    return {
        "max_seqlen_q": _rounded(plan.max_q),
        "max_seqlen_kv": _rounded(plan.span),
        "cu_seqlens_q": plan.cu_q,
        "cu_seqlens_kv": plan.cu_k,
        "cu_seqlens_q_padded": plan.cu_q,  # where segments begin in memory: without gaps
        "cu_seqlens_kv_padded": plan.cu_k,
        "fake_dtype": q.dtype,
        "fused_attention_backend": library.FusedAttnBackend["F16_arbitrary_seqlen"],
        "attn_scale": options.scale,
        "dropout": 0.0,
        "qkv_layout": "thd_thd_thd",
        "o_format": "thd",
        "attn_bias_type": "no_bias",
        "attn_mask_type": "padding_causal_bottom_right" if causal else "padding",
        "window_size": (plan.left, plan.right),
        "bottom_right_diagonal": True,
    }


def _packed_statistics(device: torch.device) -> bool:
    """Whether the statistics of packed sequences are [t, h, 1], not [segments, h, max_q, 1].

    From cuDNN 9.6 on they are but on sm120 (``use_ragged_stats`` of fused_attn_f16_arbitrary_seqlen.cu).
    """
    return torch.cuda.get_device_capability(device) != (12, 0)


def _places(plan: Segments, rows: int) -> tuple[Tensor, Tensor]:
    """The segment of each packed row, and its place in it; ``rows`` spares a synchronisation."""
    lengths = plan.cu_q.diff().long()
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=rows)
    return owner, torch.arange(rows, device=lengths.device) - plan.cu_q[owner]


def _rounded(length: int) -> int:
    return -(-length // ROUND) * ROUND


def _installed() -> str | None:
    """TransformerEngine's version where its PyTorch part is there too."""
    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return None
    return version if find_spec("transformer_engine") and find_spec("transformer_engine_torch") else None


def _library() -> Any:
    import transformer_engine.pytorch  # noqa: F401  loads transformer_engine_torch's symbols first
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    return fused_attn


KERNEL = TeFused()
