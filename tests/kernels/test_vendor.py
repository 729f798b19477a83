"""NVIDIA's libraries behind their published signatures, emulated on the CPU as they are documented."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import families
from kernels import bindings, published
from kernels.agreement import disagreement, merged_disagreement
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lcab_plugin import layout, masks
from lcab_plugin.kernels import KernelOptions, cudnn, cudnn_limits, get
from lcab_plugin.kernels.lowering import varlen_calls
from lcab_plugin.kernels.segments import Segments
from lcab_plugin.masks.lengths import sample_lengths

MASKS = families()
TE, FRONTEND = "transformer-engine", "nvidia-cudnn-frontend"
FUSED_ATTN = "transformer_engine.pytorch.cpp_extensions.fused_attn"
F16 = object()  # a backend's name in TransformerEngine
BOTTOM_RIGHT = ("bottom right", None, 0)  # causal, by a cuDNN graph's alignment and bounds


# TransformerEngine: packed sequences, a window aligned as said, statistics by cuDNN's version


def te_window(a: dict[str, Any]) -> tuple[int, int]:
    """What ``attn_mask_type``, ``window_size`` and ``bottom_right_diagonal`` show, per segment."""
    assert (a["qkv_layout"], a["o_format"], a["attn_bias_type"]) == ("thd_thd_thd", "thd", "no_bias")
    assert a["fused_attention_backend"] is F16
    assert a["dropout"] == 0.0
    assert a["bottom_right_diagonal"] is True
    left, right = a["window_size"]
    causal = {"padding": False, "padding_causal_bottom_right": True}[a["attn_mask_type"]]
    assert right == 0 or not causal
    if (left, right) != (-1, -1):
        assert a["max_seqlen_q"] <= a["max_seqlen_kv"]  # nvte_get_fused_attn_backend
    for cu, longest in (("q", a["max_seqlen_q"]), ("kv", a["max_seqlen_kv"])):
        assert a[f"cu_seqlens_{cu}"].diff().max() <= longest
        assert torch.equal(a[f"cu_seqlens_{cu}"], a[f"cu_seqlens_{cu}_padded"])
    return left, right


def te_segments(cu: Tensor) -> list[tuple[int, int, int]]:
    return [(i, a, b) for i, (a, b) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False))]


def te_library(packed: bool) -> dict[str, Any]:
    def forward(**a: Any) -> Any:
        assert a["is_training"] is True
        assert a["fake_dtype"] == a["q"].dtype
        window = te_window(a)
        cu = a["cu_seqlens_q"], a["cu_seqlens_kv"]
        out, lse = published.varlen_forward(a["q"], a["k"], a["v"], *cu, window, a["attn_scale"])
        stats = lse.t()
        if not packed:
            stats = lse.new_full((len(cu[0]) - 1, len(lse), a["max_seqlen_q"]), float("nan"))
            for i, begin, end in te_segments(cu[0]):
                stats[i, :, : end - begin] = lse[:, begin:end]
        return out, [stats.unsqueeze(-1), torch.zeros(2, dtype=torch.int64)]

    def backward(**a: Any) -> Any:
        assert (a["do_format"], a["dqkv_layout"]) == ("thd", "thd_thd_thd")
        cu = a["cu_seqlens_q"], a["cu_seqlens_kv"]
        stats, rng_state = a["aux_ctx_tensors"]
        assert rng_state.dtype == torch.int64
        stats = stats.squeeze(-1)
        if packed:
            assert stats.shape == a["q"].shape[:2]
            lse = stats.t()
        else:
            assert stats.shape == (len(cu[0]) - 1, a["q"].shape[1], a["max_seqlen_q"])
            lse = torch.cat([stats[i, :, : end - begin] for i, begin, end in te_segments(cu[0])], 1)
        packed_operands = (a[name] for name in ("d_o", "q", "k", "v", "o"))
        grads = published.varlen_backward(*packed_operands, lse, *cu, te_window(a), a["attn_scale"])
        return [*grads, None, None]

    return {"fused_attn_fwd": forward, "fused_attn_bwd": backward}


def install_te(monkeypatch, packed=True, record=None) -> list[published.Call]:
    calls = published.install(monkeypatch, TE, te_library(packed), record)
    monkeypatch.setattr(
        sys.modules[FUSED_ATTN], "FusedAttnBackend", {"F16_arbitrary_seqlen": F16}, raising=False
    )
    capability = (9, 0) if packed else (12, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    return calls


@pytest.mark.parametrize("packed", [True, False], ids=["packed statistics", "padded statistics"])
@pytest.mark.parametrize("name", MASKS)
def test_transformer_engine(monkeypatch, name, packed):
    calls = install_te(monkeypatch, packed)
    assert disagreement(get("te_fused"), MASKS[name]) < 1e-12
    assert {c.function for c in calls} == {"fused_attn_fwd", "fused_attn_bwd"}


def test_transformer_engine_options(monkeypatch):
    calls = install_te(monkeypatch)
    kernel = get("te_fused")
    assert merged_disagreement(kernel) < 1e-12
    assert disagreement(kernel, MASKS["sliding_window"], (6, 1), 8, deterministic=True) < 1e-12
    assert calls[-1].arguments["deterministic"] is True
    assert disagreement(kernel, masks.AttentionMask(24, 24, [(3, 9, 0, 5), (9, 20, 2, 20, None, 0)])) < 1e-12
    many_rows = masks.AttentionMask(
        130, 8, [(0, 130, 0, 8, 7 - 129, None)]
    )  # a window of more rows than keys
    assert disagreement(kernel, many_rows) < 1e-12


@pytest.mark.parametrize(
    "argument", ["cu_seqlens_q_padded", "window_size", "bottom_right_diagonal", "attn_scale"]
)
@pytest.mark.parametrize("function", ["fused_attn_fwd", "fused_attn_bwd"])
def test_transformer_engine_renamed(monkeypatch, function, argument):
    install_te(monkeypatch, record=published.renamed(published.load(TE), function, argument, argument + "_"))
    with pytest.raises(TypeError, match=argument):
        disagreement(get("te_fused"), MASKS["causal"])


def test_transformer_engine_says_why_not(monkeypatch):
    assert get("te_fused").unavailable() == (
        "TransformerEngine is not installed: pip install transformer-engine[pytorch]"
    )
    record = published.load(TE) | {"version": "2.12.0+5ab1"}
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", stub("transformer_engine_torch"))
    install_te(monkeypatch, record=record)
    assert "2.12.0+5ab1 may have other private functions than 2.15 to 2.20" in get("te_fused").unavailable()
    install_te(monkeypatch)
    if not torch.cuda.is_available():
        assert get("te_fused").unavailable() == "needs a CUDA GPU, this machine has none"


# nvidia-cudnn-frontend: graphs over packed tensors with ragged offsets in elements


class Node:
    """A tensor of a cuDNN graph."""

    def __init__(self, dim: Any = None, stride: Any = None, uid: int = -1, dtype: Any = None) -> None:
        self.dim, self.stride, self.uid, self.dtype, self.output, self.offset = (
            dim,
            stride,
            uid,
            dtype,
            False,
            None,
        )

    def set(self, name: str, value: Any) -> Node:
        setattr(self, name, value)
        return self

    def segment(self, pack: dict[int, Tensor], i: int, length: int) -> Tensor:
        """[length, heads, width] of segment ``i`` in memory."""
        assert length <= self.dim[2]
        assert self.dim[0] + 1 == len(pack[self.offset.uid])
        _, _, row, column = self.stride
        start, memory = int(pack[self.offset.uid][i]), pack[self.uid]
        return memory.view(-1).as_strided((length, *self.dim[1::2]), (row, self.stride[1], column), start)


for _name in ("uid", "output", "dim", "stride", "data_type", "ragged_offset"):
    _attribute = {"data_type": "dtype", "ragged_offset": "offset"}.get(_name, _name)
    setattr(Node, f"set_{_name}", lambda self, value, attribute=_attribute: self.set(attribute, value))


class Graphs:
    """What ``cudnn.pygraph`` does with an attention node: ``built`` and ``executed`` count."""

    def __init__(self) -> None:
        self.node: tuple[str, dict[str, Any], tuple[Node, ...]] | None = None
        self.built = self.executed = 0

    def forward(self, **a: Any) -> tuple[Node, ...]:
        assert a["generate_stats"] is True
        self.node = "forward", a, (Node(), Node())
        return self.node[2]

    def backward(self, **a: Any) -> tuple[Node, ...]:
        self.node = "backward", a, (Node(), Node(), Node())
        return self.node[2]

    def build(self, graph: Any) -> None:
        self.built += 1
        graph.node = self.node

    def execute(self, graph: Any, pack: dict[int, Tensor], workspace: Tensor, handle: Any) -> None:
        self.executed += 1
        direction, a, results = graph.node
        assert workspace.dtype == torch.uint8
        assert a["use_padding_mask"] is True
        assert all(r.output for r in results)
        lengths = pack[a["seq_len_q"].uid], pack[a["seq_len_kv"].uid]
        assert all(a[name].dim[0] == len(lengths[0]) == len(lengths[1]) for name in ("q", "k", "seq_len_q"))
        for i, (rows, keys) in enumerate(zip(*(x.tolist() for x in lengths), strict=True)):
            sizes = {"q": rows, "o": rows, "dO": rows, "stats": rows, "k": keys, "v": keys}
            x = {n: a[n].segment(pack, i, size) for n, size in sizes.items() if n in a}
            cu = (torch.tensor([0, n], dtype=torch.int32) for n in (rows, keys))
            window = cudnn_window(a, keys - rows)
            if direction == "forward":
                out, lse = published.varlen_forward(x["q"], x["k"], x["v"], *cu, window, a["attn_scale"])
                values: Any = (out, lse.t().unsqueeze(-1))
            else:
                lse = x["stats"].squeeze(-1).t().double()
                given = (x[n] for n in ("dO", "q", "k", "v", "o"))
                values = published.varlen_backward(*given, lse, *cu, window, a["attn_scale"])
            for result, value in zip(results, values, strict=True):
                result.segment(pack, i, len(value)).copy_(value)


def cudnn_window(a: dict[str, Any], more_keys: int) -> tuple[int | None, int | None]:
    """Of a segment with so many more keys than rows, as a window aligned to the bottom right."""
    left, right = a.get("diagonal_band_left_bound"), a.get("diagonal_band_right_bound")
    assert left is None or left > 0
    assert right is None or right >= 0
    if a["diagonal_alignment"] == "top left" and (left, right) != (None, None):
        assert more_keys == 0, "the corners of a segment that is not square are different diagonals"
    return None if left is None else left - 1, right


def stub(name: str) -> Any:
    module = type(sys)(name)
    module.__spec__ = SimpleNamespace(name=name)
    return module


@pytest.fixture
def frontend(monkeypatch):
    """Installs the emulated frontend with a record; gives its ``Graphs``."""
    kernel = sys.modules[type(get("cudnn")).__module__]

    def install(record=None) -> Graphs:
        graphs = Graphs()
        emulated = {"pygraph.sdpa": graphs.forward, "pygraph.sdpa_backward": graphs.backward}
        published.install(monkeypatch, FRONTEND, emulated, record)
        library = sys.modules["cudnn"]
        for name in ("validate", "build_operation_graph", "check_support"):
            setattr(library.pygraph, name, lambda self: None)
        library.pygraph.build_plans = lambda self: graphs.build(self)
        library.pygraph.__init__ = lambda self, **keywords: None
        library.pygraph.create_execution_plans = lambda self, modes: None
        library.pygraph.get_workspace_size = lambda self: 16
        library.pygraph.execute = lambda self, pack, workspace, handle: graphs.execute(
            self, pack, workspace, handle
        )
        library.pygraph.tensor = lambda self, name, uid, dim, stride, data_type: Node(
            dim, stride, uid, data_type
        )
        library.data_type = SimpleNamespace(BFLOAT16=1, HALF=2, FLOAT=3, INT32=4, INT64=5)
        library.diagonal_alignment = SimpleNamespace(TOP_LEFT="top left", BOTTOM_RIGHT="bottom right")
        library.heur_mode = SimpleNamespace(A=1, FALLBACK=2)
        library.cudnnGraphNotSupportedError = type("cudnnGraphNotSupportedError", (RuntimeError,), {})
        library.set_stream = lambda handle, stream: None
        library.backend_version = lambda: 91900
        return graphs

    monkeypatch.setattr(kernel, "_handle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    kernel._graph.cache_clear()
    yield install
    kernel._graph.cache_clear()


@pytest.mark.parametrize("name", MASKS)
def test_cudnn_graph(frontend, name):
    frontend()
    assert disagreement(get("cudnn"), MASKS[name]) < 1e-5  # its statistics are float32


def test_cudnn_graph_options(frontend):
    graphs = frontend()
    kernel = get("cudnn")
    assert merged_disagreement(kernel) < 1e-5
    assert disagreement(kernel, MASKS["sliding_window"], (6, 1), 8, deterministic=True) < 1e-5
    assert graphs.node is not None
    assert graphs.node[1]["use_deterministic_algorithm"] is True
    assert "max_total_seq_len_q" not in graphs.node[1]  # a width of 8: the frontend warns against it
    assert disagreement(kernel, masks.AttentionMask(24, 24, [(3, 9, 0, 5), (9, 20, 2, 20, None, 0)])) < 1e-5


@pytest.mark.parametrize(
    ("mask", "band"),
    [
        (masks.causal(24), ("top left", None, 0)),
        (masks.causal_document([10, 8, 6]), ("top left", None, 0)),
        (masks.sliding_window_causal(24, 5), ("top left", 6, 0)),
        (masks.sliding_window(24, 5, 3), ("top left", 6, 3)),
        (masks.full(24), ("top left", None, None)),
        (masks.AttentionMask(8, 24, [(0, 8, 0, 24)]), ("top left", None, None)),
        (masks.AttentionMask(8, 24, [(0, 8, 0, 24, None, 16)]), BOTTOM_RIGHT),
        (masks.AttentionMask(8, 24, [(0, 8, 0, 24, 11, 16)]), ("bottom right", 6, 0)),
        # one of two segments has more keys than rows
        (masks.AttentionMask(24, 32, [(0, 12, 0, 12, None, 0), (12, 24, 12, 32, None, 8)]), BOTTOM_RIGHT),
    ],
)
def test_cudnn_diagonals_begin_at_the_top_left_of_square_segments(frontend, mask, band):
    """Where both corners are on one diagonal: the other alignment's backward computes what is hidden."""
    graphs, kernel, options = frontend(), get("cudnn"), KernelOptions(0.25)
    q, k = (torch.randn(1, n, 2, 16, dtype=torch.float64) for n in (mask.q_len, mask.k_len))
    names = "diagonal_alignment", "diagonal_band_left_bound", "diagonal_band_right_bound"
    out, lse = kernel.forward(q, k, k, mask, options)
    assert tuple(graphs.node[1][name] for name in names) == band
    kernel.backward(out, q, k, k, out, lse, mask, options)
    assert graphs.node[0] == "backward"
    assert tuple(graphs.node[1][name] for name in names) == band
    assert (graphs.built, graphs.executed) == (2, 2)
    for name in ("use_causal_mask", "use_causal_mask_bottom_right", "sliding_window_length"):
        assert not graphs.node[1].get(name)


def test_cudnn_graphs_are_reused(frontend):
    """Lengths of one bucket share a graph, and a graph serves fewer segments than it has."""
    graphs = frontend()
    kernel, options = get("cudnn"), KernelOptions(0.25)
    for lengths in ([50, 40, 6], [30, 60, 6], [10] * 17, [8] * 18):
        n = sum(lengths)
        q = torch.randn(1, n, 2, 16, dtype=torch.float64)
        kernel.forward(q, q, q, masks.causal_document(lengths), options)
    assert (graphs.built, graphs.executed) == (2, 4)


@pytest.mark.parametrize(("declining", "asked"), [(set(), [[1]]), ({1}, [[1], [2]])])
def test_cudnn_asks_one_heuristic_at_a_time(frontend, declining, asked):
    """Of a list frontend 1.32 keeps the exception of one that declined, with all callers' tensors."""
    graphs, modes_asked = frontend(), []
    library = sys.modules["cudnn"]

    def create(graph: object, modes: list[int]) -> None:
        modes_asked.append(modes)
        if declining.issuperset(modes):
            raise library.cudnnGraphNotSupportedError("no engine")

    library.pygraph.create_execution_plans = create
    q = torch.randn(1, 96, 2, 16, dtype=torch.float64)
    get("cudnn").forward(q, q, q, masks.causal(96), KernelOptions(0.25))
    assert (modes_asked, graphs.executed) == (asked, 1)


def test_cudnn_buckets_are_no_smaller_and_at_most_twice_as_large():
    for n in (*range(1, 4097), 32768, 32769, 100_000, 1 << 20):
        assert max(n, 256) <= cudnn._bucket(n, 256) < max(257, 2 * n)


@pytest.mark.parametrize(("ranks", "most"), [(1, 16), (2, 192)])
def test_cudnn_builds_few_graphs_for_documents(ranks, most):
    """What a rank's queries see differs more from step to step than the documents do."""
    found = set()
    for step in range(200):
        mask = masks.causal_document(sample_lengths(16384 * ranks, "pile", step))
        own = layout.make("balanced", ranks, mask.q_len, mask).ranges[0]
        local = mask.local(own, mask.needed_keys(own))
        for call in varlen_calls(local):
            plan = Segments(call, local, 1, torch.device("cpu"))
            q, k = (torch.empty(len(x), 1, 64) for x in (plan.rows, plan.keys))
            found |= {
                cudnn._shape(backward, q, k, k, plan, KernelOptions(0.125)) for backward in (False, True)
            }
    assert len(found) <= most < cudnn._graph.cache_parameters()["maxsize"] / 4


@pytest.mark.parametrize(
    "argument", ["attn_scale", "diagonal_band_left_bound", "seq_len_kv", "use_padding_mask"]
)
@pytest.mark.parametrize("function", ["pygraph.sdpa", "pygraph.sdpa_backward"])
def test_cudnn_graph_renamed(frontend, function, argument):
    frontend(published.renamed(published.load(FRONTEND), function, argument, argument + "_"))
    with pytest.raises(TypeError, match=argument):
        disagreement(get("cudnn"), MASKS["causal"])


def test_cudnn_graph_says_why_not(monkeypatch):
    missing = "nvidia-cudnn-frontend is not installed: pip install nvidia-cudnn-frontend"
    assert get("cudnn").unavailable() == missing
    published.install(monkeypatch, FRONTEND, {}, published.load(FRONTEND) | {"version": "1.9.0"})
    assert get("cudnn").unavailable() == "nvidia-cudnn-frontend 1.9.0 is too old: install 1.14 or newer"
    published.install(monkeypatch, FRONTEND, {})
    if not torch.cuda.is_available():
        assert get("cudnn").unavailable() == "needs a CUDA GPU, this machine has none"


@pytest.mark.parametrize("kernel", ["te_fused", "cudnn"])
@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ({"dtype": torch.float32}, {}, "bfloat16 and float16, not float32"),
        ({"dim": 260}, {}, "multiple of 8 up to 256, not 260"),
        ({"dim": 256, "value_dim": 128}, {}, "no query head_dim 256 with value head_dim 128"),
        ({"dim": 192, "value_dim": 64}, {}, "CUDA tensors, not cpu"),
        ({}, {"softcap": 30.0}, "no logit soft cap"),
        ({"dim": 192, "value_dim": 128}, {}, "CUDA tensors, not cpu"),
        ({"dim": 256}, {"deterministic": True}, "CUDA tensors, not cpu"),
    ],
)
def test_what_nvidia_does_not_take(kernel, shape, options, reason):
    shape = {"dim": 64, "dtype": torch.bfloat16} | shape
    q = torch.zeros(1, 8, 2, shape["dim"], dtype=shape["dtype"])
    v = q[..., : shape.get("value_dim", shape["dim"])]
    said = get(kernel).unsupported(q, q, v, masks.causal(8), KernelOptions(0.25, **options), True)
    assert reason in said


@pytest.mark.parametrize("library", [TE, FRONTEND])
def test_records_say_where_they_come_from(library):
    record = json.loads((published.FOLDER / f"{library}.json").read_text())
    assert len(record["sha256"]) == 64
    assert record["version"] in record["url"]


def test_bindings_are_read_from_their_source():
    pybind = """
        std::array<std::shared_ptr<T>, 2> PyGraph::sdpa(A& q, py::object const& scale) {}
        m.def("sdpa", &PyGraph::sdpa, py::arg("q"), py::arg_v("scale", py::none()), R"pbdoc(py::args)pbdoc");
        m.def("other", &PyGraph::other, py::arg("x"));"""
    record = bindings.described(pybind, "sdpa")
    assert (record["args"], record["defaults"], record["returns"]) == (["q", "scale"], 1, 2)
    torch_library = """
        m.def("fwd("
              "Tensor q, "
              // "int chunk = 0,"
              "Tensor(out!)? out = None) -> (Tensor(out!), Tensor)");
        m.impl("fwd", &mha_fwd);"""
    record = bindings.described(torch_library, "fwd")
    assert (record["args"], record["defaults"], record["returns"]) == (["q", "out"], 1, 2)
    assert record["schema"] == "fwd(Tensor q, Tensor(out!)? out=None) -> (Tensor(out!), Tensor)"


@pytest.mark.parametrize("name", ["cudnn", "te_fused", "sdpa_cudnn"])
def test_cudnn_refuses_gradients_past_2_to_the_31_elements(name, monkeypatch):
    """Measured on an H200, of the frontend and of PyTorch's operator: they are wrong there, without an error;
    the forward is right."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    n = 2**17
    with FakeTensorMode():
        x, fewer, one = (
            torch.empty(1, n, heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (128, 127, 1)
        )
    cells = ((x, x, True, True), (x, x, False, False), (fewer, fewer, True, False), (x, one, True, True))
    for q, k, backward, refused in cells:
        reason = get(name).unsupported(q, k, k, masks.causal(n), KernelOptions(1.0), backward)
        assert ("2^31" in str(reason)) is refused, reason
    assert cudnn_limits.too_large(one, x)  # few queries, many keys
