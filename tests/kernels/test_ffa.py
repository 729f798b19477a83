"""Slices as flex-flash-attention's ranges, and its calls behind their published signature."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import families
from hypothesis import given, settings
from kernels import published
from kernels.agreement import disagreement, merged_disagreement, sub_masks
from torch import Tensor

from lcab_plugin import masks
from lcab_plugin.kernels import KernelOptions, get
from lcab_plugin.kernels.ffa import typed_slices

MASKS = families()
LIBRARY = "magi-attention"
KERNEL = get("ffa")


def painted(q_ranges: Any, k_ranges: Any, types: Any, q_len: int, k_len: int) -> Tensor:
    """How often each cell is visible, [q_len, k_len], by the drawings in flex_flash_attn_func's docstring."""
    seen = torch.zeros(q_len, k_len, dtype=torch.int64)
    for (q0, q1), (k0, k1), kind in zip(q_ranges, k_ranges, types, strict=True):
        row, column = torch.arange(q1 - q0)[:, None], torch.arange(k1 - k0)
        causal = column - (k1 - k0) <= row - (q1 - q0)  # bottom-right aligned
        inverse = column >= row  # top-left aligned
        all_of = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        seen[q0:q1, k0:k1] += (all_of, causal, inverse, causal & inverse)[kind]
    return seen


def test_the_four_types():
    """The docstring's drawings, for 5 queries and 2 keys, 2 and 5, 5 and 5."""
    drawn = {
        (1, 5, 2): "00 00 00 10 11",
        (1, 2, 5): "11110 11111",
        (2, 5, 2): "11 01 00 00 00",
        (2, 2, 5): "11111 01111",
        (3, 5, 2): "00 00 00 00 00",
        (3, 2, 5): "11110 01111",
        (3, 5, 5): "10000 01000 00100 00010 00001",
        (0, 2, 5): "11111 11111",
    }
    for (kind, q, k), rows in drawn.items():
        want = torch.tensor([[int(cell) for cell in row] for row in rows.split()])
        assert torch.equal(painted([(0, q)], [(0, k)], [kind], q, k), want)


@settings(max_examples=300, deadline=None)
@given(sub_masks())
def test_ranges_are_the_mask(mask):
    slices = typed_slices(mask)
    ranges = slices[:, :2].tolist(), slices[:, 2:4].tolist(), slices[:, 4].tolist()
    assert torch.equal(painted(*ranges, mask.q_len, mask.k_len), mask.to_dense().long())
    assert len(slices) <= 3 * len(mask.slices)


@pytest.mark.parametrize(
    ("mask", "want"),
    [
        (masks.causal(96), [(0, 96, 0, 96, 1)]),
        (masks.causal_document([40, 56]), [(0, 40, 0, 40, 1), (40, 96, 40, 96, 1)]),
        (masks.from_ranges([(0, 5)], [(0, 9)], [3]), [(0, 5, 0, 9, 3)]),
        (masks.sliding_window_causal(96, 10), [(0, 10, 0, 10, 1), (10, 96, 0, 96, 3)]),
    ],
)
def test_ranges_of_simple_masks(mask, want):
    assert [tuple(row) for row in typed_slices(mask).tolist()] == want


def overlap(ranges: Tensor) -> bool:
    """Whether two ranges share a position."""
    ends = ranges[ranges[:, 0].argsort()]
    return bool((ends[1:, 0] < ends[:-1, 1]).any())


def seen_mask(a: dict[str, Any]) -> masks.AttentionMask:
    q, k, types = (a[name] for name in ("q_ranges", "k_ranges", "attn_type_map"))
    assert q.dtype == k.dtype == types.dtype == torch.int32
    cells = painted(q.tolist(), k.tolist(), types.tolist(), len(a["q"]), len(a["k"]))
    assert cells.max() <= 1
    assert a["sink"] is None
    assert a["sink_layout"] == "sh"
    return masks.from_dense(cells.bool())


def library() -> dict[str, Any]:
    """The functions under FFA's autograd, over all tokens; lse [t, h], -inf where nothing is seen."""

    def options(a: dict[str, Any]) -> KernelOptions:
        return KernelOptions(a["softmax_scale"], a["softcap"] or None)

    def forward(**a: Any) -> Any:
        assert not (a["disable_fwd_atomic_reduction"] and overlap(a["q_ranges"]))
        assert a["out"] is None
        assert a["lse"] is None
        operands = (a[name].unsqueeze(0) for name in ("q", "k", "v"))
        out, lse = get("naive").forward(*operands, seen_mask(a), options(a))
        return out[0], SimpleNamespace(lse=lse[0].t().contiguous(), max_logits=None)

    def backward(**a: Any) -> Any:
        if a["disable_bwd_dkv_atomic_reduction"]:
            assert not overlap(a["k_ranges"])
            assert (a["k_ranges"][1:, 0] >= a["k_ranges"][:-1, 0]).all()
            assert a["q"].shape[1] == a["k"].shape[1]
        assert a["lse"].shape == a["q"].shape[:2]
        assert a["lse"].is_contiguous()
        assert not (a["lse"] == float("-inf")).any()
        lse = a["lse"].masked_fill(a["lse"] == float("inf"), float("-inf")).t()
        operands = (a[name].unsqueeze(0) for name in ("dout", "q", "k", "v", "out"))
        grads = get("naive").backward(*operands, lse.unsqueeze(0), seen_mask(a), options(a))
        return *(grad[0] for grad in grads), None

    return {"_flex_flash_attn_forward": forward, "_flex_flash_attn_backward": backward}


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=lambda h: f"heads{h[0]}:{h[1]}")
@pytest.mark.parametrize("name", MASKS)
def test_against_the_specification(monkeypatch, name, heads):
    calls = published.install(monkeypatch, LIBRARY, library())
    assert disagreement(KERNEL, MASKS[name], heads) < 1e-12
    assert len(calls) == 2  # every mask is one call a pass


def test_options(monkeypatch):
    calls = published.install(monkeypatch, LIBRARY, library())
    assert merged_disagreement(KERNEL) < 1e-12
    assert disagreement(KERNEL, MASKS["causal"], deterministic=True) < 1e-12
    assert calls[-1].arguments["deterministic"] is True
    assert disagreement(KERNEL, masks.AttentionMask(24, 24, [(3, 9, 0, 5), (9, 20, 2, 20, None, 0)])) < 1e-12
    calls.clear()
    assert disagreement(KERNEL, masks.AttentionMask(8, 8, [])) == 0.0
    assert not calls


def test_atomics_only_where_ranges_overlap(monkeypatch):
    calls = published.install(monkeypatch, LIBRARY, library())
    for name, heads, want in (
        ("causal_document", (2, 2), [True, True]),
        ("causal_document", (4, 2), [True, False]),  # the flag of the backward is for one head a key head
        ("share_question", (2, 2), [False, False]),
    ):
        calls.clear()
        disagreement(KERNEL, MASKS[name], heads)
        flags = [
            a.arguments[f"disable_{f}_atomic_reduction"]
            for a, f in zip(calls, ("fwd", "bwd_dkv"), strict=True)
        ]
        assert flags == want, name


@pytest.mark.parametrize("argument", ["q_ranges", "softmax_scale", "out", "sink_layout"])
@pytest.mark.parametrize("function", ["_flex_flash_attn_forward", "_flex_flash_attn_backward"])
def test_a_renamed_argument_fails(monkeypatch, function, argument):
    record = published.renamed(published.load(LIBRARY), function, argument, argument + "_")
    published.install(monkeypatch, LIBRARY, library(), record)
    with pytest.raises(TypeError, match=argument):
        disagreement(KERNEL, MASKS["causal"])


def test_explain():
    (call,) = KERNEL.explain(masks.sliding_window_causal(1024, 128), 128)
    assert call.what == "flex_flash_attn, ranges: 1 causal, 1 bicausal"
    assert call.area == masks.sliding_window_causal(1024, 128).area
    assert call.computed == (1 + 2 * 7) * 128 * 128
    assert KERNEL.explain(masks.AttentionMask(8, 8, []), 128) == []


def test_it_says_why_not(monkeypatch):
    assert KERNEL.unavailable() == (
        "magi-attention is not installed: build it from the tag v1.1.1 of github.com/SandAI-org/MagiAttention"
    )
    published.install(monkeypatch, LIBRARY, {}, published.load(LIBRARY) | {"version": "1.0.5"})
    assert "magi-attention 1.0.5 may have other private functions than 1.1" in KERNEL.unavailable()
    published.install(monkeypatch, LIBRARY, {})
    if not torch.cuda.is_available():
        assert KERNEL.unavailable() == "needs a CUDA GPU, this machine has none"


@pytest.mark.parametrize(
    ("dim", "value_dim", "dtype", "reason"),
    [
        (128, 128, torch.float32, "bfloat16 and float16, not float32"),
        (192, 192, torch.bfloat16, "multiple of 8 up to 128, not 192"),
        (128, 64, torch.bfloat16, "value head_dim 64 differs from the query's 128"),
        (96, 96, torch.float16, "CUDA tensors, not cpu"),
    ],
)
def test_what_it_does_not_take(dim, value_dim, dtype, reason):
    q = torch.zeros(1, 8, 2, dim, dtype=dtype)
    said = KERNEL.unsupported(q, q, q[..., :value_dim], masks.causal(8), KernelOptions(0.1, 30.0, True), True)
    assert reason in said


def test_importing_the_adapter_imports_no_library():
    assert "magi_attention" not in sys.modules
