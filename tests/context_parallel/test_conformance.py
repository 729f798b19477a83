"""Every mask x strategy x layout x GQA ratio on 1, 2 and 4 gloo processes equals the fp64 result of one."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import errors, inputs, reference, twelve
from distributed import run

import lcab_plugin as lcab
from lcab_plugin.layout import LAYOUTS

DEGREES = {
    "ulysses": lambda world: {},
    "ring_p2p": lambda world: {},
    "ring_all_gather": lambda world: {},
    "usp": lambda world: {"ulysses": min(2, world)},
    "loongtrain": lambda world: {"ulysses": 1, "inner_ring": min(2, world)},
    "group_cast": lambda world: {},
}
HEADS = [(4, 4), (8, 2), (4, 1)]  # kv heads fewer than the Ulysses degree included


def conformance(rank: int, world: int, kernel: str, n: int, dtype: torch.dtype, tolerance: float) -> None:
    """``n`` decides how uneven the shards are."""
    cases = twelve(n)
    for (heads, kv_heads), (name, mask) in itertools.product(HEADS, cases.items()):
        x = inputs(n, n, heads, kv_heads, 16, dtype)
        want = reference(*x, mask)
        for strategy, layout in itertools.product(DEGREES, LAYOUTS):
            cp = groups(strategy, world).with_layout(layout, mask=mask)
            q, k, v = (cp.shard(t, 1).detach().requires_grad_() for t in x[:3])
            out, lse = lcab.attention(q, k, v, mask, kernel=kernel, cp=cp, return_lse=True)
            out.backward(cp.shard(x[3], 1))
            got = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
            local = {t: cp.shard(y, 2 if t == "lse" else 1) for t, y in want.items()}
            for tensor, error in errors(got, local).items():
                assert error < tolerance, (world, strategy, layout, name, (heads, kv_heads), tensor, error)
            assert errors({"out": cp.unshard(out, 1)}, want)["out"] < tolerance


_GROUPS: dict[str, lcab.ContextParallel] = {}


def groups(strategy: str, world: int) -> lcab.ContextParallel:
    if strategy not in _GROUPS:
        _GROUPS[strategy] = lcab.context_parallel(strategy, **DEGREES[strategy](world))
    return _GROUPS[strategy]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_float64_is_exact(world):
    run(conformance, world, "naive", 96, torch.float64, 1e-11)


@pytest.mark.parametrize("world", [2, 4])
def test_uneven_shards_with_flash(world):
    run(conformance, world, "sdpa_flash", 101, torch.float32, 2e-5)
