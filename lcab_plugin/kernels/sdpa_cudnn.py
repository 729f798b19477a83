"""PyTorch's cuDNN attention (``aten::_scaled_dot_product_cudnn_attention`` and its backward), by tiles.

cuDNN builds and keeps a plan for every shape, stride, mask kind and pass it meets (per thread, for the life
of the process), which takes far longer than running it: masks of many different tile shapes, such as
documents of changing lengths, are slow at first sight. Facts of its sources (ATen/native/cudnn/MHA.cpp and
transformers/cuda/sdp_utils.cpp, torch 2.11 to 2.13, and cudnn-frontend):

- ``is_causal`` is the frontend's top-left diagonal, also with more rows than keys: as the tiles want it.
- lse is [b, h, rows, 1], natural, float32.
- A backward plan is found again by q, k and v alone, though it was built for the strides of ``out``, ``dout``
  and lse too: these are always given contiguous, or a second call would read them wrongly and silently.
- Its gradients of tensors of 2^31 elements or more are wrong, without an error: refused.
- One key is not supported, so tiles one key wide are computed here.
- GQA is native; the backward is not deterministic and torch sets no option for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcab_plugin.kernels import tiled
from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall
from lcab_plugin.kernels.cudnn_limits import too_large
from lcab_plugin.masks import AttentionMask

Grads = tuple[Tensor, Tensor, Tensor]


class SdpaCudnn:
    """aten's cuDNN attention, one native call per batch of tiles."""

    name = "sdpa_cudnn"
    features = Features(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims="multiples of 8 up to 128, up to 256 on Hopper",
        native="full, causal",
        lowering="tiles",
        deterministic=False,
        value_dim=True,
    )

    def version(self) -> str:
        return f"torch {torch.__version__}, cuDNN {_dotted(torch.backends.cudnn.version() or 0)}"

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "needs a CUDA GPU, this machine has none"
        if torch.version.hip or not torch.backends.cudnn.is_available():
            return f"torch {torch.__version__} is built without cuDNN; install a CUDA build of it"
        if (version := torch.backends.cudnn.version() or 0) < 90000:
            return f"cuDNN {_dotted(version)} is older than 9.0; install a newer torch"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"needs compute capability 8.0, {torch.cuda.get_device_name()} has less"
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
            return "PyTorch's scaled_dot_product_attention has no logit soft cap"
        if options.deterministic and needs_backward:
            return "cuDNN's backward as PyTorch calls it is not deterministic"
        for name, dim in (("head_dim", q.shape[-1]), ("value head_dim", v.shape[-1])):
            if dim % 8:
                return f"{name} must be a multiple of 8, not {dim}"
        if needs_backward and (reason := too_large(q, v)):
            return reason
        limit = _largest_head_dim(q, v)
        if max(q.shape[-1], v.shape[-1]) > limit:
            return f"head_dim must be at most {limit} here, not {max(q.shape[-1], v.shape[-1])}"
        return None

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        return tiled.explain(mask, (128, 128))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        return tiled.forward(self, q, k, v, mask, options)

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
        return tiled.backward(self, dout, q, k, v, out, lse, mask, options)

    def tile_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        if k.shape[2] == 1:
            return _one_key(q, k, v, options)
        q, k, v = map(_aligned, (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=options.scale
        )
        return out, lse.reshape(q.shape[:3])

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
        if k.shape[2] == 1:
            return _one_key_backward(dout, q, k, v, out, lse, options)
        q, k, v = map(_aligned, (q, k, v))
        unused = torch.empty(
            (), dtype=torch.int64, device=q.device
        )  # dropout's seed and offset; there is none
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _rows_end_to_end(dout),
            q,
            k,
            v,
            _rows_end_to_end(out),
            lse.unsqueeze(-1).contiguous(),
            unused,
            unused,
            None,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            scale=options.scale,
        )


def _largest_head_dim(q: Tensor, v: Tensor) -> int:
    capability, version = torch.cuda.get_device_capability(q.device), torch.backends.cudnn.version() or 0
    if capability == (9, 0) and version >= 91000:
        return 256
    if capability[0] == 10 and version >= 91100 and (q.shape[-1], v.shape[-1]) == (192, 128):
        return 192
    return 128


def _dotted(version: int) -> str:
    """91002 as 9.10.2."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _rows_end_to_end(x: Tensor) -> Tensor:
    """[b, h, t, d] whose memory is [b, t, h, d]: what the forward writes for such queries."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _aligned(x: Tensor) -> Tensor:
    """``x``, copied where its address or strides are not multiples of 16 bytes."""
    strides = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    if strides and x.stride(-1) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _one_key(q: Tensor, k: Tensor, v: Tensor, options: KernelOptions) -> tuple[Tensor, Tensor]:
    """Attention of [b, h, t, d] queries to one key: its value, and the score as lse."""
    group = q.shape[1] // k.shape[1]
    score = (q.unflatten(1, (-1, group)).float() * k.unsqueeze(2).float()).sum(-1) * options.scale
    out = v.repeat_interleave(group, 1).expand(*q.shape[:3], v.shape[-1])
    return out, score.flatten(1, 2)


def _one_key_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: KernelOptions
) -> Grads:
    _, score = _one_key(q, k, v, options)
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    dout, query, out = (x.float().unflatten(1, heads) for x in (dout, q, out))
    key, value = k.float().unsqueeze(2), v.float().unsqueeze(2)
    p = torch.exp(score - lse).unflatten(1, heads).unsqueeze(-1)
    ds = p * (dout * (value - out)).sum(-1, keepdim=True) * options.scale
    dk, dv = ((x * y).sum((2, 3)).unsqueeze(2) for x, y in ((ds, query), (p, dout)))
    return (ds * key).flatten(1, 2), dk, dv


KERNEL = SdpaCudnn()
