"""Every kernel of the table that runs on the device at hand x masks x dtypes x GQA x head_dim x lengths
against the fp64 specification, forward and backward.

A cell that a kernel refuses must be a gap declared in ``gaps.json`` (``--update-gaps`` writes it); what a run
proved goes to the records with ``--record-verified lcab_plugin/kernels/verified.json``.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import gaps
import pytest
import torch
from cases import N as SHORT
from cases import eager, enlarged, expected, families, inputs, last
from torch import Tensor
from verified import CELL

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.kernels import KernelOptions, get

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = SHORT if DEVICE == "cpu" else 777  # on a GPU several blocks of any kernel, and a remainder
MASKS = families(N)
DENSE = {"naive", "sdpa_math"}  # [q, k] by their nature
# Times eager attention's error that float32 gradients may have, as in FlashAttention's tests, where not 2: of
# libraries that add thousands of rows one after another, not in blocks.
FLOAT32_GRADIENTS = {"flex": 3.0}

# One skipped test each says why a kernel is not in the matrix of this machine.
NOT_HERE = {name: reason for name, reason in lcab.kernels.availability().items() if reason}
if DEVICE == "cpu":
    NOT_HERE |= {
        "triton": "on a CPU only Triton's interpreter runs it: tests/kernels/test_triton.py",
        "flex": "compiled for minutes on a CPU: tests/kernels/test_flex.py",
    }
KERNELS = [name for name in lcab.kernels.names() if name not in NOT_HERE]


@dataclass(frozen=True)
class Shape:
    """Heads, head_dim and tokens of one row of the matrix."""

    heads: tuple[int, int]
    dim: int
    n: int = N

    def __str__(self) -> str:
        return f"{self.heads[0]}:{self.heads[1]}x{self.dim}n{self.n}"


def shapes() -> Iterator[Any]:
    nightly = pytest.mark.nightly
    if DEVICE == "cpu":
        yield from (Shape(heads, 32) for heads in ((4, 4), (6, 2), (4, 1)))
        yield from (pytest.param(Shape((4, 2), dim, 130), marks=nightly) for dim in (64, 96, 128, 192, 256))
    else:
        yield from (Shape(heads, dim) for heads in ((4, 4), (8, 2), (4, 1)) for dim in (64, 128))
        more = [Shape((8, 2), dim) for dim in (96, 192, 256)] + [Shape((8, 2), d, 2048) for d in (64, 128)]
        yield from (pytest.param(shape, marks=nightly) for shape in more)


def run(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: masks.AttentionMask, **options: Any
):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = lcab.attention(q, k, v, mask, kernel=kernel, return_lse=True, **options)
    out.backward(dout)
    return {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}


@dataclass
class Cell:
    """A kernel in one test; remembers what it ran."""

    kernel: str
    calls: list[dict[str, Any]] = field(default_factory=list)

    def attempt(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: masks.AttentionMask, **options: Any
    ):
        """out, lse and gradients; no gradients where backward is refused, nothing where the call is. A
        refusal must be a declared gap."""
        try:
            got = run(self.kernel, q, k, v, dout, mask, **options)
        except lcab.UnsupportedError as refusal:
            self.declared(refusal, q, v)
            try:
                with torch.no_grad():
                    out = lcab.attention(q, k, v, mask, kernel=self.kernel, return_lse=True, **options)
                got = dict(zip(("out", "lse"), out, strict=True))
            except lcab.UnsupportedError as refusal:
                self.declared(refusal, q, v)
                return {}
        self.ran(q, "dq" in got)
        return got

    def judge(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: masks.AttentionMask, **options: Any):
        """``attempt``, within the error budget."""
        got = self.attempt(q, k, v, dout, mask, **options)
        if got:
            assert not expected(q, k, v, dout, mask, **options).problems(got)

    def supports(self, dtype: torch.dtype, dim: int, backward: bool = False) -> bool:
        q = torch.empty(1, N, 4, dim, dtype=dtype, device=DEVICE)
        return not get(self.kernel).unsupported(q, q, q, MASKS["causal"], KernelOptions(1.0), backward)

    def dtype(self, dim: int, backward: bool = False) -> torch.dtype:
        """What the kernel is made for on this device."""
        order = (torch.float32, torch.bfloat16, torch.float16)
        order = order if DEVICE == "cpu" else (*order[1:], order[0])
        return next(d for d in order if self.supports(d, dim, backward))

    def ran(self, q: Tensor, backward: bool) -> None:
        self.calls.append(
            {"dtype": str(q.dtype).removeprefix("torch."), "head_dim": q.shape[-1], "backward": backward}
        )

    def declared(self, refusal: lcab.UnsupportedError, q: Tensor, v: Tensor) -> None:
        reason = str(refusal).split("cannot run this attention: ", 1)[1]
        reason = gaps.template(reason.removesuffix(". `lcab kernels` lists the others."), q, v)
        assert reason in gaps.reasons(self.kernel, DEVICE), f"undeclared gap; if it is meant: {gaps.UPDATE}"


@pytest.fixture(params=KERNELS)
def cell(request: pytest.FixtureRequest) -> Cell:
    made = Cell(request.param)
    request.node.user_properties.append((CELL, made.calls))
    return made


def on_device(*args: Any, **kwargs: Any) -> list[Tensor]:
    return [x.to(DEVICE) for x in inputs(*args, **kwargs)]


@pytest.mark.parametrize("name", lcab.kernels.names())
def test_in_the_matrix(name):
    if name in NOT_HERE:
        pytest.skip(f"{name}: {NOT_HERE[name]}")


def test_the_specification_is_attention():
    """naive itself, against autograd through torch's softmax."""
    mask = families()["share_question"]
    q, k, v, dout = inputs(SHORT, SHORT, 4, 2, 16, torch.float64)
    for options in ({}, {"scale": 0.1}, {"softcap": 2.0}):
        got, want = run("naive", q, k, v, dout, mask, **options), eager(q, k, v, dout, mask, **options)
        for name in want:
            torch.testing.assert_close(got[name], want[name])


@lru_cache(maxsize=3)  # kernels vary fastest
def case(name: str, dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    """Inputs and mask, and what to expect."""
    mask = MASKS[name] if shape.n == N else families(shape.n)[name]
    x = (*on_device(shape.n, shape.n, *shape.heads, shape.dim, dtype), mask)
    return x, expected(*x)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", gaps.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", list(shapes()), ids=str)
def test_within_the_error_budget(shape, dtype, name, cell):
    """At most twice what eager attention loses in the same precision, plus a few ulp; float64 is exact."""
    x, answer = case(name, dtype, shape)
    assert not answer.problems(cell.attempt(*x), FLOAT32_GRADIENTS.get(cell.kernel, 2.0))


@pytest.mark.parametrize("name", MASKS)
def test_paints_the_mask(name, cell):
    """With one-hot values a row of out lists the keys it saw; with one-hot dout a row of dv its queries."""
    mask, dim = MASKS[name], 32 if DEVICE == "cpu" else 64
    heads = -(-N // dim)  # head h has the one-hots of tokens h * dim to (h + 1) * dim
    dtype = cell.dtype(dim)
    one_hot = torch.eye(N, heads * dim, dtype=dtype, device=DEVICE).view(1, N, heads, dim)
    visible = mask.to_dense(DEVICE)
    random = on_device(N, N, heads, heads, dim, dtype, batch=1)[:2]
    for q, k in ((torch.zeros_like(one_hot), random[1]), random):
        got = cell.attempt(q, k, one_hot, one_hot, mask)
        torch.testing.assert_close(got["out"][0].flatten(1)[:, :N] != 0, visible)
        if "dv" in got:
            torch.testing.assert_close(got["dv"][0].flatten(1)[:, :N] != 0, visible.T)
        if not q.any():
            count = visible.sum(1).log().expand(1, heads, N)
            torch.testing.assert_close(got["lse"], count.to(got["lse"].dtype), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_merged_out_and_lse(name, cell):
    """Backward from an out and lse over twice the keys gives this half's share of the gradients; many rows
    see no key of one half."""
    dim = 16 if DEVICE == "cpu" else 64
    exact = cell.supports(torch.float64, dim, backward=True)
    q, k, v, dout = on_device(N, N, 4, 2, dim, torch.float64 if exact else cell.dtype(dim))
    answer = expected(q, k, v, dout, MASKS[name])
    want = answer.want
    out, lse = want["out"].to(q.dtype), want["lse"].to(torch.float64 if exact else torch.float32)
    got = {"dq": torch.zeros_like(q), "dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
    for part in (range(N // 2), range(N // 2, N)):
        mask, keys = MASKS[name].local([range(N)], [part]), slice(part.start, part.stop)
        if mask.empty:
            continue
        call = (q, k[:, keys], v[:, keys]), (mask, KernelOptions(dim**-0.5))
        if refusal := get(cell.kernel).unsupported(*call[0], *call[1], True):
            assert gaps.template(refusal, q, v) in gaps.reasons(cell.kernel, DEVICE)
            return
        dq, dk, dv = get(cell.kernel).backward(dout, *call[0], out, lse, *call[1])
        got["dq"] += dq
        got["dk"][:, keys] += dk
        got["dv"][:, keys] += dv
    cell.ran(q, True)
    assert not answer.problems(got)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("cell", [k for k in KERNELS if k not in DENSE], indirect=True)
def test_work_and_memory_are_not_q_by_k(name, cell, monkeypatch):
    """Forward, and backward from a given softmax: no dense product or softmax, no tensor of [q, k]."""
    mask = enlarged(16 if DEVICE == "cpu" else 128)[name]
    monkeypatch.setattr(masks.AttentionMask, "to_dense", None)
    n, dim = mask.q_len, 16 if DEVICE == "cpu" else 64
    q, k, v, dout = on_device(n, n, 1, 1, dim, cell.dtype(dim), batch=1)
    call, kernel = (mask, KernelOptions(dim**-0.5)), get(cell.kernel)
    backward = not kernel.unsupported(q, k, v, *call, True)

    def both() -> None:
        out, lse = kernel.forward(q, k, v, *call)
        if backward:
            kernel.backward(dout, q, k, v, out, lse, *call)

    names, largest = watched(both)
    cell.ran(q, backward)
    fused = re.compile("flash|fmha|sdpa|attention|attn|triton|flex", re.IGNORECASE)
    dense = re.compile("softmax|gemm|nvjet|mm$|einsum|matmul", re.IGNORECASE)
    assert not [x for x in names if dense.search(x) and not fused.search(x)]
    assert largest < n * n / 16


def watched(call: Any) -> tuple[set[str], int]:
    """What ran, and the elements of the largest tensor: on a GPU of one as large as all memory that was
    added at the peak, divided among four tensors of two bytes an element."""
    if DEVICE == "cpu":
        names, largest = set(), [0]

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                names.add(func.overloadpacket.__name__)
                parts = out if isinstance(out, tuple | list) else (out,)
                largest.extend(t.numel() for t in parts if isinstance(t, Tensor))
                return out

        with Watch():
            call()
        return names, max(largest)
    call()  # compile and tune
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    grown = torch.cuda.max_memory_allocated() - before
    return {event.key for event in profile.key_averages()}, grown // 8


@contextmanager
def poisoned() -> Iterator[None]:
    """What nobody wrote reads NaN: memory given out uninitialised, on a GPU also what was freed before."""
    if DEVICE == "cuda":
        freed = [torch.full((2**bits,), math.nan, device=DEVICE) for bits in range(7, 26)]
        del freed
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", [*MASKS, "islands"])
def test_every_output_is_written(name, cell):
    islands = masks.AttentionMask(N, N, [(3, 9, 0, 5), (9, 20, 2, 20, None, 0), (N - 9, N - 3, 7, N - 5)])
    mask = (MASKS | {"islands": islands})[name]
    x = on_device(N, N, 4, 2, 64, cell.dtype(64))
    with poisoned():
        assert torch.empty(9, device=DEVICE).isnan().all()
        got = cell.attempt(*x, mask)
    assert not expected(*x, mask).problems(got)
    if name == "islands":
        rows, keys = ~mask.to_dense(DEVICE).any(1), ~mask.to_dense(DEVICE).any(0)
        assert (got["lse"][:, :, rows] == float("-inf")).all()
        assert not any(got[t][:, at].any() for t, at in (("out", rows), ("dq", rows)) if t in got)
        assert not any(got[t][:, keys].any() for t in ("dk", "dv") if t in got)


def test_a_mask_that_shows_nothing(cell):
    x = on_device(8, 8, 2, 1, 64, cell.dtype(64))
    got = cell.attempt(*x, masks.AttentionMask(8, 8, []))
    assert not any(got[name].any() for name in got if name != "lse")
    assert (got["lse"] == float("-inf")).all()


@pytest.mark.parametrize("lengths", [(1, N), (N // 3, N), (N, N // 3)], ids=lambda x: f"{x[0]}:{x[1]}")
def test_different_lengths(lengths, cell):
    x = on_device(*lengths, 4, 2, 64, cell.dtype(64))
    tq, tk = lengths
    for types in (0, 1, 2, 3) if tq <= tk else (0, 1, 2):
        cell.judge(*x, masks.from_ranges([(0, tq)], [(0, tk)], [types]))


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("name", ["causal_document", "global_sliding_window"])
def test_options(name, options, cell):
    cell.judge(*on_device(N, N, 4, 2, 64, cell.dtype(64)), MASKS[name], **options)


@pytest.mark.parametrize("name", ["causal_document", "global_sliding_window"])
def test_uneven_value_head_dim(name, cell):
    q, k, v, dout = on_device(N, N, 4, 2, 64, cell.dtype(64))
    cell.judge(q, k, v[..., :32].contiguous(), dout[..., :32].contiguous(), MASKS[name])


@pytest.mark.parametrize("name", MASKS)
def test_deterministic_is_repeatable(name, cell):
    x = on_device(N, N, 4, 2, 64, cell.dtype(64))
    a, b = (cell.attempt(*x, MASKS[name], deterministic=True) for _ in range(2))
    assert all(torch.equal(a[t], b[t]) for t in a)
    assert not torch.are_deterministic_algorithms_enabled()


def laid_out(x: list[Tensor], layout: str) -> list[Tensor]:
    """q, k, v, dout of the same values in another layout, with NaN around them."""
    q, k, v, dout = x
    if layout == "slices of one projection":
        fused = torch.cat([q, k, v, torch.full_like(q[:, :, :1], math.nan)], 2)
        return [*fused[:, :, :-1].split([q.shape[2], k.shape[2], v.shape[2]], 2), dout]
    if layout == "heads before tokens":
        return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    if layout == "one element past an aligned address":
        padded = [torch.nn.functional.pad(t.flatten(), (1, 999), value=math.nan) for t in x]
        return [p[1 : 1 + t.numel()].view_as(t) for p, t in zip(padded, x, strict=True)]
    if layout == "the gradient of a sum":
        return [q, k, v, dout.new_ones(()).expand_as(dout)]
    assert layout == "logits x 30"
    return [q * 30, k, v, dout]


@pytest.mark.parametrize("name", ["causal_document", "global_sliding_window"])
@pytest.mark.parametrize(
    "layout",
    [
        "slices of one projection",
        "heads before tokens",
        "one element past an aligned address",
        "the gradient of a sum",
        "logits x 30",
    ],
)
def test_inputs(layout, name, cell):
    x = on_device(N, N, 4, 2, 64, cell.dtype(64))
    cell.judge(*laid_out(x, layout), MASKS[name])


@pytest.mark.nightly
@pytest.mark.usefixtures("most_of_the_memory")
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 20 GiB free")
def test_strides_past_2_to_the_31_elements(cell):
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = on_device(N, N, 4, 2, 64, cell.dtype(64), batch=1)
    row = 2**32 // N // 64 * 64
    wide = torch.empty(N * row, dtype=x[0].dtype, device=DEVICE).view(1, N, row)
    far = []
    for at, t in enumerate(x):
        far.append(wide[:, :, at * 1024 : at * 1024 + t[0, 0].numel()].unflatten(2, t.shape[2:]))
        far[-1].copy_(t)
    assert far[0].stride(1) * (N - 1) > 2**31
    cell.judge(*far, MASKS["causal_document"])


@pytest.mark.nightly
@pytest.mark.usefixtures("most_of_the_memory")
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 60 GiB free")
@pytest.mark.parametrize("cell", [k for k in KERNELS if k not in DENSE], indirect=True)
def test_outputs_past_2_to_the_31_elements(cell):
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    n, heads, dim, left, seen = 2**17 + 77, 128, 128, 63, 500
    dtype = cell.dtype(dim)
    q, dout = (torch.randn(1, n, heads, dim, dtype=dtype, device=DEVICE) for _ in range(2))
    k, v = (torch.randn(1, n, 1, dim, dtype=dtype, device=DEVICE) for _ in range(2))
    got = cell.attempt(q, k, v, dout, masks.sliding_window_causal(n, left))
    tail = [t[:, -seen:].contiguous() for t in (q, k, v, dout)]  # its rows after the first `left` see only it
    answer = expected(*tail, masks.sliding_window_causal(seen, left))
    assert not answer.last(seen - left).problems(last(got, seen - left))


def test_declared_gaps(pytestconfig):
    """Every refusal over the product of the tables is in the committed list, and nothing else is."""
    found = gaps.declared()
    if pytestconfig.getoption("--update-gaps"):
        gaps.write(found)
    changed = gaps.difference(json.loads(gaps.FILE.read_text()), found)
    assert not changed, f"if it is meant: {gaps.UPDATE}\n" + "\n".join(changed)


def test_lse_is_not_differentiable():
    q, k, v = (t.requires_grad_() for t in on_device(N, N, 4, 2, 64, torch.bfloat16)[:3])
    _, lse = lcab.attention(q, k, v, MASKS["causal"], return_lse=True)
    assert not lse.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "sdpa_flush"}, "did you mean 'sdpa_flash'"),
        ({"mask": masks.causal(95)}, "the mask is for 95 queries"),
        ({"k": torch.zeros(2, SHORT, 3, 16)}, "4 query heads are not a multiple of 3|share batch"),
        ({"v": torch.zeros(2, SHORT, 2, 16, dtype=torch.float64)}, "one floating dtype"),
        ({"softcap": -1.0}, "softcap -1.0"),
        ({"q": torch.zeros(2, SHORT, 16)}, r"must be \[batch"),
    ],
)
def test_bad_input(change, message):
    q, k, v, _ = inputs(SHORT, SHORT, 4, 2, 16, torch.float32)
    call = {"q": q, "k": k, "v": v, "mask": masks.causal(SHORT), "kernel": "sdpa_flash"} | change
    with pytest.raises(lcab.LcabError, match=message):
        lcab.attention(**call)


def test_the_yardstick_notices_one_wrong_row():
    """A row of small numbers that is off by a fifth, which the largest value of the tensor hides."""
    answer = expected(*inputs(SHORT, SHORT, 2, 2, 32, torch.bfloat16), families()["causal"])
    got = {name: tensor.clone() for name, tensor in answer.want.items()}
    got["out"][0, 90, 1] *= 0.8
    assert [problem.split(":")[0] for problem in answer.problems(got)] == ["out by row"]
