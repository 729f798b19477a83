"""Our Triton kernel: any mask in one pass over a block table, forward and backward, bitwise repeatable.

EMPTY blocks are never touched, FULL blocks run without mask arithmetic, PARTIAL blocks compare against the
visible intervals of their rows, so work is proportional to the mask's area. GQA reads each key/value head
once per group member without repeating it in memory. After FlashAttention 2 (arXiv 2307.08691); on Hopper
GPUs, for 16-bit types and head_dim up to 128, warp-specialised after FlashAttention 3 (arXiv 2407.08608).
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall
from lcab_plugin.kernels.triton import tuning
from lcab_plugin.kernels.triton.plan import GraphPlans
from lcab_plugin.masks import FULL, AttentionMask

__all__ = ["KERNEL", "GraphPlans"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonKernel:
    """One launch forward and three backward: no lowering, no merge, whatever the mask."""

    name = "triton"
    features = Features(
        devices=("cuda",),
        dtypes=_DTYPES,
        head_dims="up to 256 (padded to a power of two)",
        native="every mask",
        lowering="none",
        softcap=True,
        value_dim=True,
    )

    def version(self) -> str:
        import triton

        return f"triton {triton.__version__}{tuning.suffix()}"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'lcab-plugin[triton]'"
        if not torch.cuda.is_available() and not _interpreted():
            return (
                "needs a CUDA GPU (on a CPU only Triton's interpreter runs it, for tests: TRITON_INTERPRET=1)"
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
        if q.dtype not in _DTYPES:
            return f"it takes float32, bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
        if max(q.shape[-1], v.shape[-1]) > 256:
            return f"head_dim must be at most 256, not {max(q.shape[-1], v.shape[-1])}"
        if options.scale <= 0:
            return f"the softmax scale must be positive, not {options.scale}"
        if q.device.type == "cpu" and not _interpreted():
            return "it runs on CUDA tensors; on a CPU only Triton's interpreter runs it (TRITON_INTERPRET=1)"
        if q.is_cuda and torch.version.cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
            return f"needs compute capability 8.0, {torch.cuda.get_device_name(q.device)} has less"
        return None

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        # As with query heads that come in pairs; without, a Hopper GPU computes blocks of twice the rows.
        shape = tuning.Shape.of("forward", (9, 0), (head_dim, head_dim), torch.bfloat16, 2, mask)
        config = tuning.candidates(shape)[0]
        blocks = mask.block_map(config.rows, config.keys)
        full, count = int(blocks.length[blocks.kind == FULL].sum()), int(blocks.length.sum())
        what = f"block table {config.rows} x {config.keys}: {full} full, {count - full} partial blocks"
        return [NativeCall(what, count, mask.area, count * config.rows * config.keys)]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        from lcab_plugin.kernels.triton import launch

        q, k, v = (launch.unit_stride(x) for x in (q, k, v))
        config = tuning.choose("forward", q, k, v, (q, k, v), mask, options)
        return launch.forward(q, k, v, mask, options, config)

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
        from lcab_plugin.kernels.triton import launch

        dout, q, k, v, out = (launch.unit_stride(x) for x in (dout, q, k, v, out))
        delta, lse2 = launch.row_sums(dout, out, lse.contiguous())
        streamed = dout, q, k, v
        config = tuning.choose("dq", q, k, v, streamed, mask, options)
        dq = launch.sum_dq(dout, q, k, v, lse2, delta, mask, options, config)
        config = tuning.choose("dkv", q, k, v, streamed, mask, options)
        return dq, *launch.sum_dkv(dout, q, k, v, lse2, delta, mask, options, config)


@cache
def _interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (it decides at import)."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


KERNEL = TritonKernel()
