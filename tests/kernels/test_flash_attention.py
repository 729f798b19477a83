"""fa2, fa3 and fa4 on a CPU: their calls run for real, against the libraries' published argument lists and
what their sources say a call does (`published.py`). That the libraries do so too, only a GPU can show."""

from __future__ import annotations

import importlib
import math
from importlib.metadata import PackageNotFoundError
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from cases import errors, families, inputs
from kernels import published
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lcab_plugin import kernels, masks
from lcab_plugin.kernels import KernelOptions
from lcab_plugin.masks import AttentionMask

DIM = 16
SCALE = 0.3


def _fa2_window(a: dict[str, Any]) -> tuple[int, int]:
    """csrc/flash_attn/flash_api.cpp of 2.8.3: mha_varlen_fwd and mha_varlen_bwd, then set_params_fprop."""
    left, right, longest = a["window_size_left"], a["window_size_right"], a["max_seqlen_k"]
    right = 0 if a["causal"] else right
    left = -1 if left >= longest else left
    right = -1 if right >= longest else right
    if left < 0 and right == 0:
        return -1, 0  # the causal kernel
    if left < 0 <= right:
        left = longest
    if right < 0 <= left:
        right = longest
    return left, right


def _fa3_window(a: dict[str, Any]) -> tuple[int, int]:
    """hopper/flash_api.cpp of 3.0.0: mha_fwd and mha_bwd, then set_params_fprop."""
    left, right = a["window_size_left"], a["window_size_right"]
    rows, keys = a["max_seqlen_q"], a["max_seqlen_k"]
    left = -1 if left >= keys - 1 else left
    right = -1 if right >= rows - 1 else right
    right = 0 if a.get("causal", a.get("is_causal")) else right
    if (left < 0 and right == 0) or (left < 0 and right < 0):
        return left, right
    return (keys - 1 if left < 0 else left), (rows - 1 if right < 0 else right)


def _fa4_window(a: dict[str, Any]) -> tuple[int | None, int | None]:
    """flash_attn/cute/interface.py of 4.0.0b36, _resolve_causal_local_window."""
    left, right = a["window_size_left"], a["window_size_right"]
    assert all(limit is None or limit >= 0 for limit in (left, right))  # -1 beside a limit would be one
    # one block of up to 256 rows (two query tiles on Blackwell) or 128 keys is part of its compile keys
    assert min(a["max_seqlen_q"], a["max_seqlen_k"]) > 256
    return left, 0 if a.get("causal") else right


def _check(a: dict[str, Any]) -> None:
    """What all of them ask of a variable-length call."""
    for cu, longest in ((a["cu_seqlens_q"], a["max_seqlen_q"]), (a["cu_seqlens_k"], a["max_seqlen_k"])):
        assert cu.is_contiguous()
        assert type(longest) is int
        assert longest >= cu.diff().max()
    assert a["cu_seqlens_q"][-1] == len(a["q"])
    assert a["cu_seqlens_k"][-1] == len(a["k"]) == len(a["v"])
    assert type(a["softcap"]) is float
    assert a.get("dropout_p", 0.0) == 0.0
    assert a.get("alibi_slopes") is None
    if "dout" in a:
        assert _lse(a).is_contiguous()
        assert _lse(a).shape == (a["q"].shape[1], len(a["q"]))


def _lse(a: dict[str, Any]) -> Tensor:
    return a["softmax_lse"] if "softmax_lse" in a else a["lse"]


def _forward(a: dict[str, Any], window: tuple[int | None, int | None], empty: float) -> tuple[Tensor, Tensor]:
    _check(a)
    cu = a["cu_seqlens_q"], a["cu_seqlens_k"]
    return published.varlen_forward(
        a["q"], a["k"], a["v"], *cu, window, a["softmax_scale"], a["softcap"], empty
    )


def _backward(a: dict[str, Any], window: tuple[int | None, int | None]) -> tuple[Tensor, Tensor, Tensor]:
    _check(a)
    cu = a["cu_seqlens_q"], a["cu_seqlens_k"]
    tensors = a["dout"], a["q"], a["k"], a["v"], a["out"], _lse(a)
    return published.varlen_backward(*tensors, *cu, window, a["softmax_scale"], a["softcap"])


def _into_buffers(a: dict[str, Any], grads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        assert a[name].is_contiguous()
        a[name].copy_(grad)
    return torch.empty(0)  # softmax_d


def _fa2_forward(**a: Any) -> Any:
    return *_forward(a, _fa2_window(a), math.inf), torch.empty(0), torch.empty(2, dtype=torch.int64)


def _fa2_backward(**a: Any) -> Any:
    return _into_buffers(a, _backward(a, _fa2_window(a)))


def _fa3_forward(**a: Any) -> Any:
    assert a["pack_gqa"] is None
    return *_forward(a, _fa3_window(a), -math.inf), torch.empty(0), torch.empty(0)


def _fa3_backward(**a: Any) -> Any:
    assert a["sequed_q"] is a["sequed_k"] is None
    return _into_buffers(a, _backward(a, _fa3_window(a)))


def _fa4_forward(**a: Any) -> Any:
    out, lse = _forward(a, _fa4_window(a), -math.inf)
    return out, lse if a.get("return_lse") else None, None, None, None


def _fa4_backward(**a: Any) -> Any:
    return _backward(a, _fa4_window(a))


class Library(NamedTuple):
    name: str
    functions: dict[str, published.Implementation]
    positional: dict[str, tuple[str, ...]]


LIBRARIES = {
    "fa2": Library(
        "flash-attn",
        {"_flash_attn_varlen_forward": _fa2_forward, "_flash_attn_varlen_backward": _fa2_backward},
        {
            "_flash_attn_varlen_forward": ("q", "k", "v"),
            "_flash_attn_varlen_backward": ("dout", "q", "k", "v"),
        },
    ),
    "fa3": Library(
        "flash-attn-3",
        {"_flash_attn_forward": _fa3_forward, "_flash_attn_backward": _fa3_backward},
        {"_flash_attn_forward": ("q", "k", "v"), "_flash_attn_backward": ("dout", "q", "k", "v")},
    ),
    "fa4": Library(
        "flash-attn-4",
        {"_flash_attn_fwd": _fa4_forward, "_flash_attn_bwd": _fa4_backward},
        {"_flash_attn_fwd": ("q", "k", "v"), "_flash_attn_bwd": ("q", "k", "v", "out", "dout", "lse")},
    ),
}


def _band(rows: range, keys: range, left: int, right: int) -> AttentionMask:
    return masks.from_name("sliding_window", 96, left=left, right=right).local([rows], [keys])


# More rows than keys under one limit: where FlashAttention 2 takes a window for something else.
UNEVEN = {
    "causal, 96 rows of 32 keys": masks.causal(96).local([range(96)], [range(32)]),
    "lower limit, 60 rows of 20 keys": _band(range(36, 96), range(40), left=40, right=40),
    "band, 90 rows of 30 keys": _band(range(6, 96), range(30, 60), left=20, right=20),
    "upper limit, 69 rows of 25 keys": _band(range(96), range(30, 55), left=95, right=3),
}


@pytest.fixture(params=LIBRARIES)
def fa(request: pytest.FixtureRequest) -> str:
    return request.param


def _install(
    monkeypatch: pytest.MonkeyPatch, fa: str, record: dict[str, Any] | None = None
) -> list[published.Call]:
    library = LIBRARIES[fa]
    return published.install(monkeypatch, library.name, library.functions, record)


def _both(
    name: str, mask: AttentionMask, options: KernelOptions, value_dim: int = DIM
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a kernel and ``naive`` compute, in float64 with grouped heads."""
    q, k, v, dout = inputs(mask.q_len, mask.k_len, 4, 2, DIM, torch.float64)
    v, dout = v[..., :value_dim], dout[..., :value_dim]
    results = []
    for kernel in (kernels.get(name), kernels.get("naive")):
        out, lse = kernel.forward(q, k, v, mask, options)
        grads = kernel.backward(dout, q, k, v, out, lse, mask, options)
        results.append({"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True)))
    return results[0], results[1]


def _agree(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert max(errors(got, want).values()) < 1e-12


@pytest.mark.parametrize("mask", [*families().values(), *UNEVEN.values()], ids=[*families(), *UNEVEN])
def test_every_mask_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, fa: str, mask: AttentionMask
) -> None:
    calls = _install(monkeypatch, fa)
    _agree(*_both(fa, mask, KernelOptions(SCALE)))
    assert {call.function for call in calls} == set(LIBRARIES[fa].functions)


@pytest.mark.parametrize("mask", UNEVEN.values(), ids=UNEVEN)
def test_the_uneven_masks_have_a_segment_of_more_rows_than_keys(mask: AttentionMask) -> None:
    calls = kernels.lowering.varlen_calls(mask)
    assert any(
        rows > keys
        for call in calls
        if (call.left, call.right) != (-1, -1)
        for rows, keys in zip(*(call.segments[:, i + 1] - call.segments[:, i] for i in (0, 2)), strict=True)
    )


def test_fa2_would_be_wrong_with_the_longest_key_count_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("lcab_plugin.kernels.fa2")
    common = module._common
    monkeypatch.setattr(module, "_common", lambda p, o: common(p, o) | {"max_seqlen_k": p.max_k})
    _install(monkeypatch, "fa2")
    worst = {name: max(errors(*_both("fa2", m, KernelOptions(SCALE))).values()) for name, m in UNEVEN.items()}
    assert {name for name, error in worst.items() if error > 1e-3} == set(UNEVEN)


@pytest.mark.parametrize("fa", ["fa3", "fa4"])
def test_value_head_dim(monkeypatch: pytest.MonkeyPatch, fa: str) -> None:
    _install(monkeypatch, fa)
    _agree(*_both(fa, families()["sliding_window"], KernelOptions(SCALE), value_dim=8))


def test_soft_cap_and_determinism_are_passed_on(monkeypatch: pytest.MonkeyPatch, fa: str) -> None:
    calls = _install(monkeypatch, fa)
    mask = families()["share_question"]
    _agree(*_both(fa, mask, KernelOptions(SCALE, softcap=1.5, deterministic=True)))
    assert {call.arguments["softcap"] for call in calls} == {1.5}
    assert {call.arguments["deterministic"] for call in calls if "dout" in call.arguments} == {True}
    calls.clear()
    _agree(*_both(fa, mask, KernelOptions(SCALE)))
    assert {call.arguments["deterministic"] for call in calls if "dout" in call.arguments} == {False}


def test_backward_of_out_and_lse_merged_over_more_keys(monkeypatch: pytest.MonkeyPatch, fa: str) -> None:
    _install(monkeypatch, fa)
    kernel, options = kernels.get(fa), KernelOptions(SCALE)
    mask = families()["prefix_lm_document"]
    q, k, v, dout = inputs(96, 96, 4, 2, DIM, torch.float64)
    out, lse = kernels.get("naive").forward(q, k, v, mask, options)
    want = kernels.get("naive").backward(dout, q, k, v, out, lse, mask, options)
    parts = []
    for keys in (range(48), range(48, 96)):
        at = slice(keys.start, keys.stop)
        part = mask.local([range(96)], [keys])
        parts.append(kernel.backward(dout, q, k[:, at], v[:, at], out, lse, part, options))
    (dq, dk, dv), (dq2, dk2, dv2) = parts
    got = {"dq": dq + dq2, "dk": torch.cat((dk, dk2), 1), "dv": torch.cat((dv, dv2), 1)}
    _agree(got, dict(zip(("dq", "dk", "dv"), want, strict=True)))


def test_every_renamed_argument_is_found(monkeypatch: pytest.MonkeyPatch, fa: str) -> None:
    library, mask = LIBRARIES[fa], families()["causal"]
    calls = _install(monkeypatch, fa)
    _both(fa, mask, KernelOptions(SCALE))
    given = {(call.function, name) for call in calls for name in call.arguments}
    assert len(given) > 20
    for function, name in sorted(given):
        record = published.renamed(published.load(library.name), function, name, "anew")
        with monkeypatch.context() as patch:
            _install(patch, fa, record)
            # one given by position reaches the emulation under a name it does not know
            wrong = (KeyError, TypeError) if name in library.positional[function] else TypeError
            with pytest.raises(wrong):
                _both(fa, mask, KernelOptions(SCALE))


def test_a_new_required_argument_is_found(monkeypatch: pytest.MonkeyPatch, fa: str) -> None:
    library = LIBRARIES[fa]
    for function in library.functions:
        record = published.load(library.name)
        record["functions"][function]["args"].insert(0, "anew")
        with monkeypatch.context() as patch:
            _install(patch, fa, record)
            with pytest.raises(TypeError):
                _both(fa, families()["causal"], KernelOptions(SCALE))


@pytest.mark.parametrize(
    ("fa", "install"),
    [
        ("fa2", "pip install flash-attn --no-build-isolation"),
        ("fa3", "build the hopper folder of github.com/Dao-AILab/flash-attention"),
        ("fa4", "pip install --pre flash-attn-4"),
    ],
)
def test_unavailable_names_what_to_install(monkeypatch: pytest.MonkeyPatch, fa: str, install: str) -> None:
    missing = mock.Mock(side_effect=PackageNotFoundError)
    monkeypatch.setattr("importlib.metadata.version", missing)
    monkeypatch.setattr("lcab_plugin.kernels.fa3.find_spec", lambda _: None)
    assert install in (kernels.get(fa).unavailable() or "")


def _pretend(patch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """A GPU of that capability, or none."""
    patch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    patch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Test")


@pytest.mark.parametrize(
    ("fa", "works", "fails"),
    [
        ("fa2", ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)), ((7, 5),)),
        ("fa3", ((9, 0),), ((8, 0), (10, 0))),
        ("fa4", ((9, 0), (10, 0), (10, 3), (11, 0)), ((8, 0), (12, 0))),
    ],
)
def test_available_on_its_gpus(
    monkeypatch: pytest.MonkeyPatch, fa: str, works: tuple[Any, ...], fails: tuple[Any, ...]
) -> None:
    _install(monkeypatch, fa)
    kernel = kernels.get(fa)
    _pretend(monkeypatch, None)
    assert kernel.unavailable() == "needs a CUDA GPU, this machine has none"
    for capability in works:
        _pretend(monkeypatch, capability)
        assert kernel.unavailable() is None
    for capability in fails:
        _pretend(monkeypatch, capability)
        assert "NVIDIA Test" in kernel.unavailable()
    assert published.load(LIBRARIES[fa].name)["version"] in kernel.version()


def test_older_libraries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (9, 0))
    old = published.load("flash-attn") | {"version": "2.6.3"}
    _install(monkeypatch, "fa2", old)
    assert "flash-attn 2.6.3 is older" in kernels.get("fa2").unavailable()
    old = published.renamed(
        published.load("flash-attn-3"), "_flash_attn_forward", "window_size_left", "window_size"
    )
    _install(monkeypatch, "fa3", old)
    assert "of before September 2025" in kernels.get("fa3").unavailable()


@pytest.mark.parametrize("fa", ["fa2", "fa4"])
def test_a_library_that_does_not_import_is_a_reason(monkeypatch: pytest.MonkeyPatch, fa: str) -> None:
    _install(monkeypatch, fa)
    _pretend(monkeypatch, (9, 0))
    broken = mock.Mock(side_effect=ImportError("undefined symbol: _ZN3c10"))
    monkeypatch.setattr(f"lcab_plugin.kernels.{fa}._library", broken)
    assert "does not import here: undefined symbol" in kernels.get(fa).unavailable()


HOPPER, BLACKWELL = (9, 0), (10, 0)


class Asked(NamedTuple):
    """A call and the words its refusal holds, None where it is served."""

    fa: str
    words: str | None
    dim: int = 128
    value_dim: int | None = None
    dtype: torch.dtype = torch.bfloat16
    kv_heads: int = 2
    capability: tuple[int, int] = HOPPER
    mask: str = "sliding_window"
    backward: bool = True
    deterministic: bool = True
    softcap: float | None = 30.0


ASKED = [
    *(Asked(fa, None) for fa in LIBRARIES),
    *(Asked(fa, "bfloat16 and float16, not float32", dtype=torch.float32) for fa in LIBRARIES),
    *(Asked(fa, "multiple of 8", dim=60) for fa in LIBRARIES),
    *(Asked(fa, "up to 256, not 264", dim=264) for fa in LIBRARIES),
    Asked("fa2", None, dim=256),
    Asked("fa2", "value head_dim 64 differs from the query's 128", value_dim=64),
    Asked("fa3", None, dim=192, value_dim=128),
    Asked("fa3", None, dim=64, value_dim=256, deterministic=False),
    Asked("fa3", "deterministic backward has head_dims up to 192, not 256", dim=64, value_dim=256),
    Asked("fa3", "value head_dims up to 256, not 512", dim=64, value_dim=512),
    Asked("fa3", None, dim=64, value_dim=512, backward=False),
    Asked("fa3", "value head_dim 64 does not go with head_dim 128", value_dim=64),
    Asked("fa3", "deterministic backward has head_dims up to 192", dim=256),
    Asked("fa3", None, dim=256, deterministic=False),
    Asked("fa4", "needs equal head_dims, not 192 with value head_dim 128", dim=192, value_dim=128),
    Asked("fa4", None, dim=192, value_dim=128, kv_heads=4),
    Asked("fa4", None, dim=192, value_dim=128, backward=False),
    Asked("fa4", None, dim=192, value_dim=128, capability=BLACKWELL),
    Asked("fa4", "192 with 128, or 256 with 256, not 192 with 192", dim=192, capability=BLACKWELL),
    Asked("fa4", "no window at head_dim 256", dim=256, capability=BLACKWELL, softcap=None),
    Asked("fa4", None, dim=256, capability=BLACKWELL, softcap=None, mask="causal_document"),
    Asked("fa4", "no logit soft cap at head_dim 256", dim=256, capability=BLACKWELL, mask="causal"),
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_unsupported(monkeypatch: pytest.MonkeyPatch, asked: Asked) -> None:
    _pretend(monkeypatch, asked.capability)
    value_dim = asked.dim if asked.value_dim is None else asked.value_dim
    shapes = ((4, asked.dim), (asked.kv_heads, asked.dim), (asked.kv_heads, value_dim))
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 96, *shape, dtype=asked.dtype, device="cuda") for shape in shapes)
    options = KernelOptions(SCALE, asked.softcap, asked.deterministic)
    reason = kernels.get(asked.fa).unsupported(q, k, v, families()[asked.mask], options, asked.backward)
    assert (reason is None) == (asked.words is None), reason
    assert (asked.words or "") in (reason or "")


def test_a_mask_of_too_many_calls_is_refused(monkeypatch: pytest.MonkeyPatch, fa: str) -> None:
    _pretend(monkeypatch, HOPPER)
    monkeypatch.setattr(f"lcab_plugin.kernels.{fa}.too_deep", lambda mask: "too deep")
    with FakeTensorMode():
        q = torch.empty(1, 96, 4, 64, dtype=torch.bfloat16, device="cuda")
    assert (
        kernels.get(fa).unsupported(q, q, q, families()["causal"], KernelOptions(SCALE), True) == "too deep"
    )


def test_tensors_of_the_cpu_are_refused(fa: str) -> None:
    q, k, v, _ = inputs(96, 96, 4, 2, 64, torch.bfloat16)
    mask = families()["causal"]
    reason = kernels.get(fa).unsupported(q, k, v, mask, KernelOptions(SCALE), True)
    assert reason == "it takes CUDA tensors, not cpu"


def test_the_emulation_follows_each_librarys_window() -> None:
    """Five rows more than keys: FlashAttention 2 drops a right limit that still limits, the others do not."""
    a = {
        "window_size_left": -1,
        "window_size_right": 4,
        "max_seqlen_q": 8,
        "max_seqlen_k": 3,
        "causal": False,
    }
    assert _fa2_window(a) == (-1, -1)
    assert _fa3_window(a) == (2, 4)
