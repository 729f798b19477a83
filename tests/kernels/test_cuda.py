"""The conformance matrix on a GPU, at lengths where a kernel has several blocks."""

from __future__ import annotations

import pytest
import torch
from cases import eager, errors, inputs, reference, twelve

import lcab_plugin as lcab

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

N = 777
MASKS = twelve(N)


def run(kernel, q, k, v, dout, mask, **options):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = lcab.attention(q, k, v, mask, kernel=kernel, return_lse=True, **options)
    out.backward(dout)
    return {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)], ids=lambda h: f"heads{h[0]}:{h[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["sdpa_math", "sdpa_flash"])
def test_within_the_error_budget(kernel, dtype, heads, dim, name):
    x = [t.cuda() for t in inputs(N, N, *heads, dim, dtype)]
    want = reference(*x, MASKS[name])
    budget = errors(eager(*x, MASKS[name]), want)
    worst = errors(run(kernel, *x, MASKS[name]), want)
    for tensor, error in worst.items():
        assert error <= 2 * budget[tensor] + 4 * torch.finfo(dtype).eps, (tensor, error, budget[tensor])


@pytest.mark.parametrize("name", MASKS)
def test_deterministic_backward_is_repeatable(name):
    x = [t.cuda() for t in inputs(N, N, 8, 2, 64, torch.bfloat16)]
    a, b = (run("sdpa_flash", *x, MASKS[name], deterministic=True) for _ in range(2))
    assert all(torch.equal(a[t], b[t]) for t in a)
    assert not torch.are_deterministic_algorithms_enabled()


def test_float32_is_refused():
    x = [t.cuda() for t in inputs(N, N, 4, 4, 64, torch.float32)]
    with pytest.raises(lcab.UnsupportedError, match="float16 and bfloat16, not float32"):
        run("sdpa_flash", *x, MASKS["causal"])
