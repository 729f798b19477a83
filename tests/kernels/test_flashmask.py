"""FlashMask's start and end rows from and to slices, and its operators behind their published schemas."""

from __future__ import annotations

import importlib.metadata
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import families
from hypothesis import given, settings
from kernels import published
from kernels.agreement import disagreement, merged_disagreement, sub_masks
from torch import Tensor

from lcab_plugin import LcabError, masks
from lcab_plugin.kernels import KernelOptions, get
from lcab_plugin.kernels.flashmask import from_startend, to_startend

MASKS = families()
KERNEL = get("flashmask")
# Its last keys are seen by three separate runs of rows, none of them the first or the last.
STRIPES = masks.AttentionMask(40, 12, [(0, 40, 0, 4), (4, 10, 4, 12), (16, 24, 4, 12), (30, 36, 4, 12)])


def dense(startend: Tensor, causal: bool, q_len: int) -> Tensor:
    """What flashmask_attention's docstring says of startend_row_indices, key by key."""
    k_len = startend.shape[2]
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    for j, row in enumerate(startend[0, 0].tolist()):
        lower = slice(row[0], row[1] if len(row) == 4 or (causal and len(row) == 2) else None)
        seen[lower, j] = False
        if causal:
            assert q_len == k_len
            seen[:j, j] = False
        elif len(row) == 2:
            seen[: row[1], j] = False
        else:
            seen[row[2] : row[3], j] = False
    return seen


def test_the_docstrings_examples():
    """Of flashmask_attention: causal documents, share question, prefix LM and global sliding window."""
    causal_documents = masks.causal_document([4, 3, 3])
    startend, causal = to_startend(causal_documents)
    assert (startend[0, 0, :, 0].tolist(), causal) == ([4] * 4 + [7] * 3 + [10] * 3, True)
    blockwise = masks.causal_blockwise([4, 3, 3])
    startend, causal = to_startend(blockwise)
    assert (startend[0, 0].tolist(), causal) == ([[4, 7]] * 4 + [[10, 10]] * 6, True)
    prefix = masks.prefix_lm_causal(10, 5)
    startend, causal = to_startend(prefix)
    assert startend[0, 0].tolist() == [[10, 0]] * 5 + [[10, j] for j in range(5, 10)]
    assert not causal
    lts, lte = [10, 10, *range(4, 10), 10, 10], [10] * 10
    uts, ute = [0] * 4 + [2] * 6, [0] * 4 + [3, 4, 5, 6, 7, 8]
    indices = torch.tensor([lts, lte, uts, ute], dtype=torch.int32).t()[None, None]
    drawn = """1111111111 1111111111 1111000000 1111100000 1101110000
        1100111000 1100011100 1100001110 1100000111 1100000011"""
    want = torch.tensor([[cell == "1" for cell in row] for row in drawn.split()])
    assert torch.equal(from_startend(indices, False, 10).to_dense(), want)
    again = to_startend(from_startend(indices, False, 10))
    assert torch.equal(again[0], indices)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_of_the_twelve(name):
    mask = MASKS[name]
    startend, causal = to_startend(mask)
    assert startend.dtype == torch.int32
    assert torch.equal(dense(startend, causal, mask.q_len), mask.to_dense())
    assert torch.equal(from_startend(startend, causal, mask.q_len).to_dense(), mask.to_dense())


@settings(max_examples=300, deadline=None)
@given(sub_masks())
def test_round_trip(mask):
    result = to_startend(mask)
    seen = mask.to_dense()
    if isinstance(result, str):
        hidden = torch.diff(torch.nn.functional.pad((~seen).int(), (0, 0, 1, 0)), dim=0) == 1
        assert hidden.sum(0).max() > 2
        assert "FlashMask stores two a key" in result
        return
    startend, causal = result
    assert torch.equal(dense(startend, causal, mask.q_len), seen)
    back = from_startend(startend, causal, mask.q_len)
    assert torch.equal(back.to_dense(), seen)
    assert masks.AttentionMask(mask.q_len, mask.k_len, back.array) == back  # disjoint, tight, in order


def test_the_fewest_columns():
    for name, n in {
        "causal": 1,
        "share_question": 1,
        "sliding_window_causal": 1,
        "causal_blockwise": 2,
    }.items():
        startend, causal = to_startend(MASKS[name])
        assert (startend.shape[-1], causal) == (n, True), name
    for name, n in {
        "full": 2,
        "sliding_window": 2,
        "prefix_lm_document": 2,
        "global_sliding_window": 4,
    }.items():
        startend, causal = to_startend(MASKS[name])
        assert (startend.shape[-1], causal) == (n, False), name


def test_masks_of_more_intervals():
    assert to_startend(STRIPES) == (
        "key 4 hides 4 separate intervals of query rows, FlashMask stores two a key"
    )
    calls = KERNEL.explain(STRIPES, 128)
    assert [c.area for c in calls] == [4 * 40 + 6 * 8, 8 * 8, 6 * 8]
    rows = [(4 * i, 4 * i + 2, 0, 8) for i in range(6)]
    many = masks.AttentionMask(24, 8, rows)
    q = torch.zeros(1, 24, 1, 64, dtype=torch.bfloat16)
    reason = KERNEL.unsupported(q, q[:, :8], q[:, :8], many, KernelOptions(0.1), True)
    assert "6 calls would be merged, more than 4" in reason


@pytest.mark.parametrize(
    ("shape", "causal", "q_len", "message"),
    [
        ((1, 1, 8, 3), False, 8, r"\[1, 1, k_len, 2 or 4\], not \[1, 1, 8, 3\]"),
        ((1, 1, 8, 4), True, 8, r"\[1, 1, k_len, 1 or 2\], not \[1, 1, 8, 4\]"),
        ((1, 2, 8, 1), True, 8, r"not \[1, 2, 8, 1\]"),
        ((1, 1, 8, 1), True, 9, "as many queries as keys, not 9 and 8"),
    ],
)
def test_bad_indices(shape, causal, q_len, message):
    with pytest.raises(LcabError, match=message):
        from_startend(torch.zeros(shape, dtype=torch.int32), causal, q_len)


# The operators of the PyTorch build, defined with the schemas it has published


def mask_of(a: dict[str, Any]) -> masks.AttentionMask:
    startend = a["startend_row_indices"]
    assert startend.shape[:3] == (len(a["k"]), 1, a["k"].shape[1])
    assert (startend == startend[:1]).all()
    return masks.from_dense(dense(startend[:1], a["is_causal"], a["q"].shape[1]))


def forward(**a: Any) -> tuple[Tensor, Tensor]:
    mask = mask_of(a)
    options = KernelOptions(a["softmax_scale"], a["softcap"] or None)
    out, lse = get("naive").forward(a["q"], a["k"], a["v"], mask, options)
    empty = ~mask.to_dense().any(1)  # nothing is documented of rows without keys
    return out.masked_fill(empty[:, None, None], float("nan")), lse.masked_fill(empty, float("inf"))


def backward(**a: Any) -> tuple[Tensor, Tensor, Tensor]:
    assert not (a["softmax_lse"] == float("-inf")).any()
    options = KernelOptions(a["softmax_scale"], a["softcap"] or None)
    lse = a["softmax_lse"].masked_fill(a["softmax_lse"] == float("inf"), float("-inf"))
    operands = (a[name] for name in ("dout", "q", "k", "v", "out"))
    return get("naive").backward(*operands, lse, mask_of(a), options)


@pytest.fixture
def operators(monkeypatch):
    """Defines torch.ops.flashmask by the schemas on record, one argument renamed where asked."""
    libraries = []

    def install(function: str = "", old: str = "", new: str = "") -> None:
        library = torch.library.Library("flashmask", "DEF")
        libraries.append(library)
        for name, implementation in (("fwd", forward), ("bwd", backward)):
            record = published.load("flashmask")["functions"][name]
            schema = record["schema"]
            if name == function:
                schema = schema.replace(f" {old},", f" {new},").replace(f" {old}=", f" {new}=")
            library.define(schema)
            library.impl(name, by_name(record["args"], implementation), "CPU")
        for name in ("flashmask", "flashmask._C"):
            module = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
            monkeypatch.setitem(sys.modules, name, module)

    yield install
    for library in libraries:
        library._destroy()


def by_name(names: list[str], implementation: Any) -> Any:
    """The dispatcher passes arguments by position and leaves out those at their default."""
    defaults = {"softcap": 0.0, "is_causal": False}

    def function(*args: Any, **kwargs: Any) -> Any:
        return implementation(**(defaults | dict(zip(names, args, strict=False)) | kwargs))

    return function


@pytest.mark.parametrize("name", MASKS)
def test_against_the_specification(operators, name):
    operators()
    assert disagreement(KERNEL, MASKS[name]) < 1e-12


def test_options(operators):
    operators()
    assert merged_disagreement(KERNEL) < 1e-12
    assert disagreement(KERNEL, STRIPES, (6, 1), deterministic=True) < 1e-12
    assert disagreement(KERNEL, masks.AttentionMask(24, 24, [(3, 9, 0, 5), (9, 20, 2, 20, None, 0)])) < 1e-12
    assert disagreement(KERNEL, masks.AttentionMask(8, 8, [])) == 0.0


@pytest.mark.parametrize(("function", "argument"), [("fwd", "startend_row_indices"), ("bwd", "softmax_lse")])
def test_a_renamed_argument_fails(operators, function, argument):
    operators(function, argument, argument + "_")
    with pytest.raises(RuntimeError, match=argument):
        disagreement(KERNEL, MASKS["causal"])


def test_it_says_why_not(monkeypatch, operators):
    assert "flashmask for PyTorch is not installed and has no public wheel" in KERNEL.unavailable()
    operators()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.0.0b1")
    assert KERNEL.version() == "flashmask 3.0.0b1"
    if not torch.cuda.is_available():
        assert KERNEL.unavailable() == "needs a CUDA GPU, this machine has none"


@pytest.mark.parametrize(
    ("dim", "value_dim", "dtype", "reason"),
    [
        (128, 128, torch.float32, "bfloat16 and float16, not float32"),
        (264, 264, torch.bfloat16, "multiple of 8 up to 256, not 264"),
        (128, 64, torch.bfloat16, "value head_dim 64 differs from the query's 128"),
        (256, 256, torch.bfloat16, "deterministic backward reaches head_dim 128, not 256"),
        (128, 128, torch.bfloat16, "CUDA tensors, not cpu"),
    ],
)
def test_what_it_does_not_take(dim, value_dim, dtype, reason):
    q = torch.zeros(1, 8, 2, dim, dtype=dtype)
    said = KERNEL.unsupported(q, q, q[..., :value_dim], masks.causal(8), KernelOptions(0.1, None, True), True)
    assert reason in said
