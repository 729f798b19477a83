"""FlexAttention on CPU: its compiled forward under every mask, and what it is told of a mask."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from lcab_plugin import masks
from lcab_plugin.kernels import KernelOptions, flex
from lcab_plugin.masks import NO_HI, NO_LO, AttentionMask, from_dense

KERNEL = flex.KERNEL
CPU = torch.device("cpu")
N = 200  # two blocks, the second ragged

pytestmark = pytest.mark.skipif(KERNEL.unavailable() is not None, reason=str(KERNEL.unavailable()))


def evaluated(mask: AttentionMask) -> Tensor:
    """The mask_mod on every cell, at once."""
    rows, keys = torch.arange(mask.q_len)[:, None], torch.arange(mask.k_len)[None]
    zero = torch.zeros((), dtype=torch.int64)
    return flex.visible_in(*flex.intervals(mask))(zero, zero, rows, keys)


def require_equal(
    mask: AttentionMask, heads: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.float32
) -> None:
    q, k, v, dout = cases.inputs(mask.q_len, mask.k_len, *heads, 32, dtype)
    options = KernelOptions(0.3)
    assert KERNEL.unsupported(q, k, v, mask, options, False) is None
    out, lse = KERNEL.forward(q, k, v, mask, options)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    error = cases.errors({"out": out, "lse": lse}, cases.reference(q, k, v, dout, mask, options.scale))
    assert error["out"] < (2e-6 if dtype == torch.float32 else 1e-2)
    assert error["lse"] < 2e-6


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_all_families_and_one_compilation() -> None:
    """The second to the last mask of a length are inputs of what was compiled for the first."""
    full, *others = cases.families(N).values()
    require_equal(full)
    before = compilations()
    for mask in others:
        require_equal(mask)
    rows = [np.array([[1, 150, 3, 90, NO_LO, NO_HI]]), np.array([[1, 150, 0, N, NO_LO, -40]])]
    for array in rows:  # rows that see no key
        require_equal(AttentionMask.from_disjoint(N, N, array))
    assert compilations() == before


@pytest.mark.nightly
def test_lengths_share_a_compilation_after_the_second() -> None:
    for mask in (cases.families(N)["causal"], cases.families(300)["causal"]):
        require_equal(mask)
    before = compilations()
    for n in (150, 333, 512):
        require_equal(cases.families(n)["prefix_lm_document"])
    assert compilations() == before


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_other_lengths_of_keys(dtype: torch.dtype) -> None:
    whole = cases.families(N)["share_question"]
    require_equal(whole, (4, 4), dtype)
    require_equal(whole.local([range(50, 180)], [range(100), range(130, 170)]), (4, 4), dtype)


@pytest.mark.nightly
def test_logits_of_any_size_keep_the_recovered_lse() -> None:
    mask = cases.families(N)["causal"]
    q, k, v, dout = cases.inputs(N, N, 4, 2, 32, torch.float32)
    for factor in (0.0, 30.0):
        out, lse = KERNEL.forward(q * factor, k, v, mask, KernelOptions(0.3))
        error = cases.errors({"out": out, "lse": lse}, cases.reference(q * factor, k, v, dout, mask, 0.3))
        assert error["out"] < 2e-5
        assert error["lse"] < 2e-6


@st.composite
def dense_masks(draw: st.DrawFn) -> Tensor:
    rows, keys = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    cells = draw(st.lists(st.booleans(), min_size=rows * keys, max_size=rows * keys))
    return torch.tensor(cells).view(rows, keys)


@settings(max_examples=200, deadline=None)
@given(dense_masks())
def test_intervals_say_any_mask(dense: Tensor) -> None:
    mask = from_dense(dense)
    starts, _ = flex.intervals(mask)
    assert starts.dtype == torch.int32
    assert len(starts) in (2, 4, 8)  # at most 6 runs in 12 keys
    assert torch.equal(evaluated(mask), dense)


def test_intervals_of_all_families() -> None:
    for mask in cases.families(N).values():
        assert len(flex.intervals(mask)[0]) == 2
        assert torch.equal(evaluated(mask), mask.to_dense())


@pytest.mark.parametrize("n", [256, 300, 700])
def test_blocks_are_what_the_library_finds_by_evaluation(n: int) -> None:
    for name, mask in cases.families(n).items():
        ours = flex.block_table(mask, CPU).block_mask
        theirs = create_block_mask(ours.mask_mod, None, None, n, n, device="cpu")
        for table in ("kv", "full_kv", "q", "full_q"):
            counts, indices = (getattr(ours, f"{table}_{x}") for x in ("num_blocks", "indices"))
            want_counts, want = (getattr(theirs, f"{table}_{x}") for x in ("num_blocks", "indices"))
            assert counts.dtype == indices.dtype == torch.int32
            assert torch.equal(counts, want_counts), (name, table)
            used = torch.arange(indices.shape[-1]) < counts[..., None]
            assert torch.equal(indices[used], want[..., : indices.shape[-1]][used]), (name, table)
        assert ours.seq_lengths == (n, n)


def test_tables_of_large_masks_are_as_narrow_as_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of both kinds' tables lie equally far apart: the library reads both with one stride."""
    rows, columns = np.array([0, 1, 1, 2, 2, 2]), np.array([0, 5, 0, 1, 2, 6])
    for entries, width in ((24, 8), (23, 4)):
        monkeypatch.setattr(flex, "WHOLE_TABLE", entries)
        assert flex._width(rows, 3, 8) == width
        counts, indices = flex._ordered(rows, columns, 3, width)
        assert counts.tolist() == [[[1, 2, 3]]]
        assert indices.shape == (1, 1, 3, width)
        used = [row[:n] for row, n in zip(indices[0, 0].tolist(), (1, 2, 3), strict=True)]
        assert used == [[0], [0, 5], [1, 2, 6]]
    narrow = flex.block_table.__wrapped__(
        cases.families(128 * 16)["sliding_window_causal"], torch.device("meta")
    )
    for at in ("kv", "full_kv", "q", "full_q"):
        assert getattr(narrow.block_mask, f"{at}_indices").stride() == (32, 32, 2, 1)


def test_merged_backward_is_the_wholes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights given to autograd, with plain torch in place of the compiled call (which has no backward on
    a CPU): gradients of two halves of the keys, from the whole's out and lse, are the whole's."""

    def plain(
        q: Tensor, k: Tensor, v: Tensor, table: flex.BlockTable, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        rows, keys = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None]
        zero = torch.zeros((), dtype=torch.int64)
        seen = table.block_mask.mask_mod(zero, zero, rows, keys)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * options.scale
        scores = scores.masked_fill(~seen, -1e30)  # empty rows without the NaN of autograd
        lse = scores.logsumexp(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        empty = ~seen.any(1)
        return out.masked_fill(empty[:, None, None], 0.0), lse.masked_fill(empty, float("-inf"))

    monkeypatch.setattr(flex, "attend", plain)
    half, options = cases.N // 2, KernelOptions(0.3)
    for whole in cases.families().values():
        q, k, v, dout = cases.inputs(cases.N, cases.N, 4, 2, 16, torch.float32)
        want = cases.reference(q, k, v, dout, whole, options.scale)
        total, parts = torch.zeros_like(q), []
        for at in (range(half), range(half, cases.N)):
            rest = k[:, at.start : at.stop], v[:, at.start : at.stop]
            part, softmax = whole.local([range(cases.N)], [at]), (want["out"].float(), want["lse"].float())
            dq, *dkv = KERNEL.backward(dout, q, *rest, *softmax, part, options)
            total += dq
            parts.append(dkv)
        dk, dv = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        assert max(cases.errors({"dq": total, "dk": dk, "dv": dv}, want).values()) < 2e-5


def test_reasons() -> None:
    mask = cases.families()["causal"]
    q, k, v, _ = cases.inputs(cases.N, cases.N, 4, 2, 32, torch.float32)
    options = KernelOptions(0.3)
    assert KERNEL.unsupported(q, k, v, mask, options, True) == "FlexAttention has no backward on a CPU"
    assert "soft cap" in str(KERNEL.unsupported(q, k, v, mask, KernelOptions(0.3, softcap=20.0), False))
    wide = (x.double() for x in (q, k, v))
    assert "not float64" in str(KERNEL.unsupported(*wide, mask, options, False))
    comb = from_dense(torch.arange(cases.N).expand(cases.N, -1) % 2 == 0)
    assert "48 separate runs" in str(KERNEL.unsupported(q, k, v, comb, options, False))
    narrow = (x[..., :8] for x in (q, k, v))
    assert "head_dim must be 16 to 256, not 8" in str(KERNEL.unsupported(*narrow, mask, options, False))
    (call,) = KERNEL.explain(cases.families(N)["causal"], 64)
    assert (call.count, call.area) == (3, N * (N + 1) // 2)


def test_a_grid_of_many_blocks_is_looked_up() -> None:
    mask = masks.block_sparse(1024, 32, 0.5)
    assert len(mask.row_intervals()[0]) > flex.MAX_INTERVALS
    assert flex.block_table(mask, torch.device("cpu")).grain == 32
    assert KERNEL.unsupported(*(torch.empty(1, 1024, 2, 32),) * 3, mask, KernelOptions(0.2), False) is None
