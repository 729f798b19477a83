"""sdpa_efficient, sdpa_cudnn and varlen on CPU: torch's own operators, by their installed schemas, with what
they document done in float64 in place of their CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor

from lcab_plugin import kernels, masks
from lcab_plugin.kernels import KernelOptions, sdpa_efficient, varlen
from lcab_plugin.masks import NO_HI, NO_LO, AttentionMask

NAMES = ("sdpa_efficient", "sdpa_cudnn", "varlen")
SCALE = 0.3
FAMILIES = cases.families()


def visible(rows: int, keys: int, left: int, right: int, diagonal: int) -> Tensor:
    """Keys j of row i with ``diagonal - left <= j - i <= diagonal + right``; a negative limit is none."""
    distance = torch.arange(keys)[None] - torch.arange(rows)[:, None] - diagonal
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def scores(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[h, rows, keys] of [t, h, d] tensors with as many heads."""
    s = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
    return s.masked_fill(~seen, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    s = scores(q, k, seen, scale)
    assert seen.any(1).all(), "a library is asked for the softmax of an empty row"
    out = torch.einsum("hqk,khd->qhd", s.softmax(-1), v.double())
    return out.to(q.dtype), s.logsumexp(-1).float()


def differentiate(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.exp(scores(q, k, seen, scale) - lse.double().unsqueeze(-1))
    delta = (dout.double() * out.double()).sum(-1).t().unsqueeze(-1)
    ds = p * (torch.einsum("qhd,khd->hqk", dout.double(), v.double()) - delta) * scale
    dq, dk = torch.einsum("hqk,khd->qhd", ds, k.double()), torch.einsum("hqk,qhd->khd", ds, q.double())
    dv = torch.einsum("hqk,qhd->khd", p, dout.double())
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def parts(cu_q: Tensor | None, cu_k: Tensor | None, q: Tensor, k: Tensor) -> list[tuple[int, slice, slice]]:
    """(batch row, its rows, its keys) of every segment."""
    if cu_q is None or cu_k is None:
        return [(b, slice(0, q.shape[1]), slice(0, k.shape[1])) for b in range(len(q))]
    assert cu_q.dtype == cu_k.dtype == torch.int32
    edges = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    return [(0, slice(a, b), slice(c, d)) for a, b, c, d in edges]


def aligned(*tensors: Tensor) -> None:
    for x in tensors:
        unit = 16 // x.element_size()
        assert x.data_ptr() % 16 == 0
        assert x.stride(-1) == 1
        assert all(stride % unit == 0 for stride in x.stride()[:-1])


def efficient_seen(rows: int, keys: int, kind: int, window: int | None, offset_in_window: bool) -> Tensor:
    assert not window or kind, "window_size needs a causal type"
    diagonal = keys - rows if kind == 2 else 0
    seen = visible(rows, keys, -1, 0 if kind else -1, diagonal)
    if window:
        seen &= visible(rows, keys, window - 1, -1, diagonal if offset_in_window else 0)
    return seen


def efficient_forward(
    query, key, value, bias, cu_q, cu_k, max_q, max_k, dropout, kind, with_lse=False, **more
):
    assert bias is None
    assert query.shape[2] == key.shape[2] == value.shape[2]
    aligned(query, key, value)
    segments = parts(cu_q, cu_k, query, key)
    longest = query.shape[1] if cu_q is None else max_q
    out = torch.full((*query.shape[:3], value.shape[3]), float("nan"), dtype=query.dtype)
    lse = torch.full((len(segments), query.shape[2], -(-longest // 32) * 32), float("inf"))
    for n, (b, rows, keys) in enumerate(segments):
        q, k, v = query[b, rows], key[b, keys], value[b, keys]
        seen = efficient_seen(len(q), len(k), kind, more.get("window_size"), True)
        out[b, rows], lse[n, :, : len(q)] = attend(q, k, v, seen, more["scale"])
    nothing = torch.empty((), dtype=torch.int64)
    return out, lse, nothing, nothing, longest, 0


def efficient_backward(
    dout,
    query,
    key,
    value,
    bias,
    out,
    cu_q,
    cu_k,
    max_q,
    max_k,
    lse,
    dropout,
    seed,
    offset,
    kind,
    dbias,
    **more,
):
    aligned(query, key, value)
    assert out.is_contiguous()
    assert lse.shape[-1] % 32 == 0
    grads = [torch.full(x.shape, float("nan"), dtype=x.dtype) for x in (query, key, value)]
    for n, (b, rows, keys) in enumerate(parts(cu_q, cu_k, query, key)):
        q, k, v = query[b, rows], key[b, keys], value[b, keys]
        assert (lse[n, :, len(q) :] == float("inf")).all()
        seen = efficient_seen(len(q), len(k), kind, more.get("window_size"), False)
        got = differentiate(dout[b, rows], q, k, v, out[b, rows], lse[n, :, : len(q)], seen, more["scale"])
        for grad, at, part in zip(grads, (rows, keys, keys), got, strict=True):
            grad[b, at] = part
    return (*grads, torch.empty(0))


def grouped(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[-2] // x.shape[-2], -2)


def ungrouped(grad: Tensor, x: Tensor) -> Tensor:
    return grad.unflatten(-2, (x.shape[-2], -1)).sum(-2)


def cudnn_forward(query, key, value, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
    assert key.shape[2] > 1, "cuDNN does not support one key"
    aligned(query, key, value)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    seen = visible(q.shape[1], k.shape[1], -1, 0 if causal else -1, 0)
    rows = [attend(a, grouped(b, a), grouped(c, a), seen, scale) for a, b, c in zip(q, k, v, strict=True)]
    out, lse = (torch.stack(x) for x in zip(*rows, strict=True))
    nothing = torch.empty((), dtype=torch.int64)
    none = torch.empty(0)
    lengths = q.shape[1], k.shape[1]
    return out.transpose(1, 2), lse.unsqueeze(-1), none, none, *lengths, nothing, nothing, none


def cudnn_backward(
    dout,
    query,
    key,
    value,
    out,
    lse,
    seed,
    offset,
    bias,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout,
    causal,
    *,
    scale=None,
):
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert lse.shape == (*query.shape[:3], 1)
    assert lse.is_contiguous()
    assert out.transpose(1, 2).is_contiguous()
    assert dout.transpose(1, 2).is_contiguous()
    aligned(query, key, value)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, query, key, value, out))
    seen = visible(q.shape[1], k.shape[1], -1, 0 if causal else -1, 0)
    grads = []
    for b in range(len(q)):
        wide = grouped(k[b], q[b]), grouped(v[b], q[b])
        dq, dk, dv = differentiate(dout[b], q[b], *wide, out[b], lse[b, ..., 0], seen, scale)
        grads.append((dq, ungrouped(dk, k[b]), ungrouped(dv, v[b])))
    return tuple(torch.stack(x).transpose(1, 2) for x in zip(*grads, strict=True))


def flash_seen(rows: int, keys: int, max_k: int, causal: bool, left: int, right: int) -> Tensor:
    """FlashAttention 2's reading of a window (csrc/flash_attn/flash_api.cpp)."""
    left, right = (-1 if limit >= max_k else limit for limit in (left, right))
    right = 0 if causal else right
    if left < 0 < right:
        left = max_k
    if left >= 0 > right:
        right = max_k
    return visible(rows, keys, left, right, keys - rows)


def flash_forward(
    query, key, value, cu_q, cu_k, max_q, max_k, dropout, causal, debug=False, return_debug_mask=False, **more
):
    out, lse = torch.full_like(query, float("nan")), torch.full((query.shape[1], len(query)), float("nan"))
    window = more["window_size_left"], more["window_size_right"]
    for _, rows, keys in parts(cu_q, cu_k, query, key):
        q, k, v = query[rows], grouped(key[keys], query), grouped(value[keys], query)
        seen = flash_seen(len(q), len(k), max_k, causal, *window)
        out[rows], lse[:, rows] = attend(q, k, v, seen, more["scale"])
    nothing = torch.empty(2, dtype=torch.uint64)
    return out, lse, nothing, torch.empty(0), torch.empty(0)


def flash_backward(
    dout, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, **more
):
    grads = [torch.full_like(x, float("nan")) for x in (query, key, value)]
    window = more["window_size_left"], more["window_size_right"]
    for _, rows, keys in parts(cu_q, cu_k, query, key):
        q, k, v = query[rows], grouped(key[keys], query), grouped(value[keys], query)
        seen = flash_seen(len(q), len(k), max_k, causal, *window)
        dq, dk, dv = differentiate(dout[rows], q, k, v, out[rows], lse[:, rows], seen, more["scale"])
        grads[0][rows] = dq
        grads[1][keys], grads[2][keys] = ungrouped(dk, key), ungrouped(dv, value)
    return tuple(grads)


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """CUDA's operators on CPU tensors, called through the dispatcher by their real schemas."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in {
        "_efficient_attention_forward": efficient_forward,
        "_efficient_attention_backward": efficient_backward,
        "_scaled_dot_product_cudnn_attention": cudnn_forward,
        "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
        "_flash_attention_forward": flash_forward,
        "_flash_attention_backward": flash_backward,
    }.items():
        library.impl(name, function, "CPU")
    yield
    library._destroy()


def run(
    name: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: AttentionMask, **options: Any
) -> dict[str, Tensor]:
    kernel, call = kernels.get(name), KernelOptions(SCALE, **options)
    out, lse = kernel.forward(q, k, v, mask, call)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, mask, call)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def require_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    off = {name: error for name, error in cases.errors(got, want).items() if not error < 2e-5}
    assert not off


def inputs(mask: AttentionMask, value_dim: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, dout = cases.inputs(mask.q_len, mask.k_len, 4, 2, 16, torch.float32)
    return q, k, v[..., :value_dim], dout[..., :value_dim]


@pytest.mark.parametrize("mask", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_mask_forward_and_backward(name: str, mask: str) -> None:
    tensors = inputs(FAMILIES[mask])
    require_equal(run(name, *tensors, FAMILIES[mask]), cases.reference(*tensors, FAMILIES[mask], SCALE))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_ranks_part_of_a_mask(name: str, ranks: int) -> None:
    """Rows and keys of different number and offset, as a zigzag ring hands them out."""
    chunk = cases.N // (2 * ranks)
    for mask in FAMILIES.values():
        for peer in range(ranks):
            pieces = [[range(i * chunk, (i + 1) * chunk) for i in (r, 2 * ranks - 1 - r)] for r in (0, peer)]
            local = mask.local(pieces[0], [*pieces[1], range(0, 0)])
            if local.empty:
                continue
            tensors = inputs(local)
            require_equal(run(name, *tensors, local), cases.reference(*tensors, local, SCALE))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", [(-18, 18), (-36, 0), (-18, NO_HI), (NO_LO, 0), (NO_LO, -3)])
def test_bands_over_more_rows_than_keys(name: str, limits: tuple[int, int]) -> None:
    """The longest segment has fewer keys than a limit of its window counts."""
    mask = AttentionMask(50, 32, np.array([[0, 50, 0, 32, *limits]]))
    rows, keys = mask.bounds()
    mask = mask.local([rows], [keys])
    tensors = inputs(mask)
    require_equal(run(name, *tensors, mask), cases.reference(*tensors, mask, SCALE))


@pytest.mark.parametrize("name", ["sdpa_efficient", "sdpa_cudnn"])
def test_values_of_another_width(name: str) -> None:
    for mask in (FAMILIES["causal_document"], FAMILIES["sliding_window"]):
        tensors = inputs(mask, 8)
        require_equal(run(name, *tensors, mask), cases.reference(*tensors, mask, SCALE))


@pytest.mark.parametrize("name", NAMES)
def test_backward_of_a_softmax_over_more_keys(name: str) -> None:
    """The gradients of two halves of the keys, from the whole's out and lse, are the whole's."""
    whole, half = FAMILIES["prefix_lm_causal"], cases.N // 2
    q, k, v, dout = inputs(whole)
    want = cases.reference(q, k, v, dout, whole, SCALE)
    kernel, total, keys = kernels.get(name), torch.zeros_like(q), []
    for at in (range(half), range(half, cases.N)):
        part = whole.local([range(cases.N)], [at])
        rest = k[:, at.start : at.stop], v[:, at.start : at.stop]
        out, lse = want["out"].float(), want["lse"].float()
        dq, *dkv = kernel.backward(dout, q, *rest, out, lse, part, KernelOptions(SCALE))
        total += dq
        keys.append(dkv)
    dk, dv = (torch.cat(x, 1) for x in zip(*keys, strict=True))
    require_equal({"dq": total, "dk": dk, "dv": dv}, want)


@pytest.mark.parametrize("name", ["sdpa_efficient", "sdpa_cudnn"])
def test_unaligned_and_strided_tensors_are_copied(name: str) -> None:
    mask = FAMILIES["share_question"]
    tensors = inputs(mask)
    odd = [torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in tensors]
    require_equal(run(name, *odd, mask), cases.reference(*tensors, mask, SCALE))
    packed = [torch.stack([x, x], -1)[..., 0] for x in tensors]
    require_equal(run(name, *packed, mask), cases.reference(*tensors, mask, SCALE))


def test_deterministic_options_reach_the_operators() -> None:
    mask = FAMILIES["sliding_window_causal"]
    tensors = inputs(mask)
    for name in ("sdpa_efficient", "varlen"):
        require_equal(run(name, *tensors, mask, deterministic=True), cases.reference(*tensors, mask, SCALE))
    assert not torch.are_deterministic_algorithms_enabled()


def test_efficient_goes_by_segments_where_its_windows_reach() -> None:
    tiled = {name for name, mask in FAMILIES.items() if not sdpa_efficient.by_segments(mask)}
    assert tiled == {"sliding_window", "global_sliding_window"}
    one_long = (4096, *[2] * 64)  # 65 segments, each with an lse of 4096 rows
    assert not sdpa_efficient.by_segments(masks.causal_document(one_long))


def test_varlen_says_what_an_older_operator_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10's operator: no windows, no grouped heads."""
    old = frozenset({"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "scale"})
    kernel, options = varlen.KERNEL, KernelOptions(SCALE)
    q, k, v, _ = (x.bfloat16() for x in inputs(FAMILIES["causal"]))
    on_gpu = SimpleNamespace(is_cuda=True, dtype=q.dtype, shape=q.shape)
    windowed, plain = FAMILIES["sliding_window"], FAMILIES["causal_document"]
    assert kernel.unsupported(on_gpu, k, v, windowed, options, True) is None
    monkeypatch.setattr(varlen, "arguments", lambda _: old)
    assert "no windows; use torch >= 2.11" in str(kernel.unsupported(on_gpu, k, v, windowed, options, True))
    assert kernel.unsupported(on_gpu, k, v, plain, options, True) is None


def test_varlen_calls_an_older_operator_by_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11's operators, by their schemas there: grouped heads need no word, splits there are none."""
    common = {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "scale"}
    forward = frozenset(common | {"window_size"})
    backward = forward | {"grad_out", "out", "lse", "rng_state"}
    monkeypatch.setattr(varlen, "arguments", lambda name: backward if "backward" in name else forward)
    for mask in (FAMILIES["share_question"], FAMILIES["sliding_window"]):
        tensors = inputs(mask)
        require_equal(run("varlen", *tensors, mask), cases.reference(*tensors, mask, SCALE))


@pytest.mark.parametrize("name", NAMES)
def test_reasons_without_a_gpu(name: str) -> None:
    kernel, mask = kernels.get(name), FAMILIES["causal"]
    tensors = inputs(mask)[:3]
    assert kernel.unsupported(*tensors, mask, KernelOptions(SCALE), True) == "it takes CUDA tensors, not cpu"
    if not torch.cuda.is_available():
        assert kernel.unavailable() == "needs a CUDA GPU, this machine has none"
    assert sum(call.area for call in kernel.explain(mask, 64)) == mask.area
