"""cuDNN's attention graph through nvidia-cudnn-frontend.

What it gives beyond aten's cuDNN operator (``sdpa_cudnn``, full and causal tiles): packed segments by ragged
offsets, a diagonal band on both sides, a value head_dim of its own and a deterministic backward, so that a
windowed or document mask is one call. Interface: NVIDIA/cudnn-frontend v1.23.0, ``python/pygraph/sdpa.cpp``
and ``test/python/sdpa/fp16.py`` (the 1.32.0 wheel keeps it); the bounds of a band as in TransformerEngine
v2.18, ``fused_attn_f16_arbitrary_seqlen.cu``.

A band is aligned to the top left where all segments are square, so that its limits are constants of the
graph (right bound 0 is then the frontend's ``use_causal_mask``): cuDNN 9.19 on an H200, 16K tokens, backward
of causal 524 TFLOP/s over the visible area, of a causal window 365. Of a window on both sides, or aligned to
the bottom right by each segment's lengths, the backward computes the whole rectangle: 61.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcab_plugin.kernels import cudnn_limits, segments
from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall
from lcab_plugin.kernels.lowering import VarlenCall, varlen_calls
from lcab_plugin.kernels.segments import Segments, SegmentsKernel
from lcab_plugin.masks import AttentionMask

Grads = tuple[Tensor, Tensor, Tensor]

FIRST = (1, 14)  # generate_stats, without which the older is_inference must be given
BACKEND = 91002  # bands without a causal limit; 9.10.0 and 9.10.1 are refused by the frontend
PACKED = ("q", "k", "v", "o", "stats")  # layouts of packed tensors, each with ragged offsets of its own
LAYOUT = {name: name for name in PACKED} | {"dq": "q", "dk": "k", "dv": "v", "do": "o"}
NAMES = (*LAYOUT, "seq_len_q", "seq_len_kv", *(f"{name}_offset" for name in PACKED))
UIDS = {name: uid for uid, name in enumerate(NAMES, 1)}


class Shape(NamedTuple):
    """What a compiled graph depends on; lengths and the number of segments in buckets."""

    backward: bool
    device: torch.device
    dtype: torch.dtype
    segments: int
    max_q: int
    max_k: int
    rows: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    left: int
    right: int
    top_left: bool
    scale: float
    deterministic: bool


class Cudnn(SegmentsKernel):
    """cuDNN attention over packed segments with a band, one graph execution per layer of segments."""

    name = "cudnn"
    features = Features(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims="multiples of 8 up to 128, up to 256 on Hopper",
        native="full, causal, windows and documents, as packed segments",
        lowering="varlen",
        value_dim=True,
    )

    def version(self) -> str:
        return f"nvidia-cudnn-frontend {_installed()}, cuDNN {_library().backend_version()}"

    def unavailable(self) -> str | None:
        version = _installed()
        if version is None:
            return "nvidia-cudnn-frontend is not installed: pip install nvidia-cudnn-frontend"
        if tuple(map(int, version.split(".")[:2])) < FIRST:
            return f"nvidia-cudnn-frontend {version} is too old: install 1.14 or newer"
        if not torch.cuda.is_available():
            return "needs a CUDA GPU, this machine has none"
        if torch.cuda.get_device_capability()[0] not in (9, 10):
            return (
                "packed segments with their statistics need compute capability 9.x or 10.x, not "
                f"{torch.cuda.get_device_name()}"
            )
        backend = _library().backend_version()
        if backend < BACKEND or backend == 91400:
            return f"needs cuDNN 9.10.2 or newer but not 9.14.0 (window bug), not {backend}"
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
        blackwell = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 10
        if options.deterministic and blackwell and _library().backend_version() < 91800:
            return "a deterministic backward on this GPU needs cuDNN 9.18 or newer"
        return None

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        calls = zip(varlen_calls(mask), segments.explain(mask, (128, 128)), strict=True)
        return [replace(native, rectangle=0) if _constant(call) else native for call, native in calls]

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Segments, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        stats = q.new_empty(*q.shape[:2], 1, dtype=torch.float32)
        tensors = {"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous(), "o": out, "stats": stats}
        _execute(_shape(False, q, k, v, plan, options), plan, tensors)
        return out, stats.squeeze(-1).t().contiguous()

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
        given = {"q": q, "k": k, "v": v, "o": out, "do": dout, "stats": lse.t().unsqueeze(-1)}
        tensors = {name: x.contiguous() for name, x in given.items()}
        grads = dq, dk, dv = tuple(torch.empty_like(tensors[name]) for name in ("q", "k", "v"))
        tensors |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        _execute(_shape(True, q, k, v, plan, options), plan, tensors)
        return dq, dk, dv


def _shape(backward: bool, q: Tensor, k: Tensor, v: Tensor, plan: Segments, options: KernelOptions) -> Shape:
    max_q, max_k = _bucket(plan.max_q, 256), _bucket(plan.max_k, 256)
    banded = (plan.left, plan.right) != (-1, -1)
    return Shape(
        backward,
        q.device,
        q.dtype,
        _bucket(len(plan.cu_q) - 1, 1),
        max_q,
        max(max_q, max_k) if banded else max_k,
        _bucket(len(q), 256),
        _bucket(len(k), 256),
        q.shape[1],
        k.shape[1],
        q.shape[2],
        v.shape[2],
        plan.left,
        plan.right,
        plan.square or not banded,
        options.scale,
        backward and options.deterministic,
    )


def _constant(call: VarlenCall) -> bool:
    """Whether the call's band is causal and of squares, so that the backward skips what it hides."""
    rows, keys = (call.segments[:, 1::2] - call.segments[:, ::2]).T
    return call.right == 0 and bool((rows == keys).all())


def _bucket(n: int, least: int) -> int:
    """``n`` rounded up to a power of two or, above 32768, to a multiple of that, as TransformerEngine v2.18
    rounds tokens (``fused_attn/utils.cu``): few graphs must serve documents that vary from step to step, for
    each takes 0.07 s to build; what is too many costs thread blocks that return at once.

    Graphs of a rank in 600 steps of 32K tokens of the Pile over two GPUs, and rounded by at most a quarter:
    ``ulysses`` 54 and 202, ``ring_p2p`` 114 and 822, ``ring_all_gather`` 120 and 848, ``group_cast`` 318 and
    1,426.
    """
    return max(least, 1 << (n - 1).bit_length() if n <= 32768 else -(-n // 32768) * 32768)


def _execute(shape: Shape, plan: Segments, tensors: dict[str, Tensor]) -> None:
    """Run the graph over packed ``tensors`` [t, heads, d]; outputs are written in place."""
    cudnn = _library()
    graph, workspace = _graph(shape)
    tensors = tensors | _places(plan, shape._replace(backward=False, deterministic=False))
    handle = _handle(shape.device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(shape.device).cuda_stream)
    scratch = torch.empty(max(workspace, 1), dtype=torch.uint8, device=shape.device)
    graph.execute({UIDS[name]: x for name, x in tensors.items()}, scratch, handle=handle)


@lru_cache(maxsize=64)
def _places(plan: Segments, shape: Shape) -> dict[str, Tensor]:
    """Lengths, and where each segment begins in elements; the bucket's other segments are empty."""
    fill = shape.segments - (len(plan.cu_q) - 1)
    places = {
        name: torch.nn.functional.pad(cu.diff(), (0, fill))
        for name, cu in (("seq_len_q", plan.cu_q), ("seq_len_kv", plan.cu_k))
    }
    for name in PACKED:
        _, heads, _, width = _dims(shape, name)
        begin = (plan.cu_k if name in ("k", "v") else plan.cu_q).long() * (heads * width)
        places[f"{name}_offset"] = torch.cat((begin, begin[-1:].expand(fill)))
    return places


@lru_cache(maxsize=1024)
def _graph(shape: Shape) -> tuple[Any, int]:
    """The compiled graph and the bytes of its workspace."""
    cudnn = _library()
    io = cudnn.data_type.BFLOAT16 if shape.dtype == torch.bfloat16 else cudnn.data_type.HALF
    graph = cudnn.pygraph(
        handle=_handle(shape.device),
        io_data_type=io,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )
    known = ("q", "k", "v", "o", "do", "stats") if shape.backward else ("q", "k", "v")
    offset = {
        name: _tensor(graph, f"{name}_offset", (shape.segments + 1, 1, 1, 1), cudnn.data_type.INT64)
        for name in PACKED
    }
    operands = {}
    for name in known:
        dtype = cudnn.data_type.FLOAT if name == "stats" else io
        operands[name] = _tensor(graph, name, _dims(shape, name), dtype)
        operands[name].set_ragged_offset(offset[LAYOUT[name]])
    if shape.backward:
        operands["dO"] = operands.pop("do")
    for name in ("seq_len_q", "seq_len_kv"):
        operands[name] = _tensor(graph, name, (shape.segments, 1, 1, 1), cudnn.data_type.INT32)
    call = graph.sdpa_backward if shape.backward else graph.sdpa
    results = call(**operands, **_attributes(cudnn, shape))
    for name, result in zip(("dq", "dk", "dv") if shape.backward else ("o", "stats"), results, strict=True):
        dims = _dims(shape, name)
        result.set_output(True).set_uid(UIDS[name]).set_dim(dims).set_stride(_packed(dims))
        result.set_data_type(cudnn.data_type.FLOAT if name == "stats" else io)
        result.set_ragged_offset(offset[LAYOUT[name]])
    graph.validate()
    graph.build_operation_graph()
    # One heuristic at a time: of several, where one declines (FALLBACK knows no attention), frontend 1.32
    # leaves the exception in a cycle with its callers' frames: their tensors wait for Python's collector.
    try:
        graph.create_execution_plans([cudnn.heur_mode.A])
    except cudnn.cudnnGraphNotSupportedError:
        graph.create_execution_plans([cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph, graph.get_workspace_size()


def _attributes(cudnn: Any, shape: Shape) -> dict[str, Any]:
    """Scale, padding and band. The left bound counts the diagonal: one more than a window's left."""
    alignment = "TOP_LEFT" if shape.top_left else "BOTTOM_RIGHT"
    attributes = {
        "attn_scale": float(shape.scale),
        "use_padding_mask": True,
        "diagonal_alignment": getattr(cudnn.diagonal_alignment, alignment),
        "diagonal_band_left_bound": None if shape.left < 0 else shape.left + 1,
        "diagonal_band_right_bound": None if shape.right < 0 else shape.right,
    }
    if not shape.backward:
        return {**attributes, "generate_stats": True}
    attributes["use_deterministic_algorithm"] = shape.deterministic
    if shape.dim % 16 == shape.value_dim % 16 == 0:  # else the frontend warns of wrong results
        attributes |= {"max_total_seq_len_q": shape.rows, "max_total_seq_len_kv": shape.keys}
    return attributes


def _dims(shape: Shape, name: str) -> tuple[int, int, int, int]:
    """``[segments, heads, longest, width]``: cuDNN's view of a packed tensor."""
    layout = LAYOUT[name]
    on_keys = layout in ("k", "v")
    width = {"q": shape.dim, "k": shape.dim, "stats": 1}.get(layout, shape.value_dim)
    heads, longest = (shape.kv_heads, shape.max_k) if on_keys else (shape.heads, shape.max_q)
    return shape.segments, heads, longest, width


def _packed(dims: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Strides of ``[tokens, heads, width]`` seen so; the first is a segment of full length, which the ragged
    offset replaces."""
    _, heads, longest, width = dims
    return longest * heads * width, width, heads * width, 1


def _tensor(graph: Any, name: str, dims: tuple[int, int, int, int], dtype: Any) -> Any:
    stride = (1, 1, 1, 1) if dims[1:] == (1, 1, 1) else _packed(dims)
    return graph.tensor(name=name, uid=UIDS[name], dim=dims, stride=stride, data_type=dtype)


@lru_cache(maxsize=16)
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return _library().create_handle()


def _installed() -> str | None:
    """The frontend's version; another package may be importable under the name it has in Python."""
    try:
        return metadata.version("nvidia-cudnn-frontend") if find_spec("cudnn") else None
    except metadata.PackageNotFoundError:
        return None


def _library() -> Any:
    import cudnn  # type: ignore[import-not-found]

    return cudnn


KERNEL = Cudnn()
