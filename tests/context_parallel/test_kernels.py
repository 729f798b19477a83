"""Every kernel that can run here, under every strategy, for a handful of masks.

On a CPU the conformance suite has those of PyTorch in its product, and this one the two that are compiled or
interpreted there; with ``--cp-device cuda`` it has every kernel whose library is installed.
"""

from __future__ import annotations

import itertools

import gaps
import pytest
import torch
from cp_cells import PRECISIONS, Shape, attend, compositions, question
from distributed import run

import lcab_plugin as lcab
from lcab_plugin.kernels import KernelOptions, get
from lcab_plugin.layout import LAYOUTS

SOME = ("causal", "causal_document", "global_sliding_window", "islands")
SHAPE = Shape(4, 2, 16, 16, more=5)
SLOW_ON_CPU = ("flex", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def every_kernel(rank: int, world: int, kernels: tuple[str, ...], device: str) -> dict[str, bool]:
    """Every cell's name, and whether it had a backward."""
    ran = {}
    for kernel, composed in itertools.product(kernels, compositions(world).values()):
        cp = composed[0].group()
        for mask, layout in zip(SOME, LAYOUTS, strict=True):
            dtype, backward = takes(kernel, device)
            x, m, answer = question(mask, SHAPE, dtype, device)
            own = cp.with_layout(layout, mask=m)
            if backward:
                got = attend(own, x, m, kernel)
            else:
                q, k, v = (own.shard(t) for t in x[:3])
                out = lcab.attention(q, k, v, m, kernel=kernel, cp=own, return_lse=True)
                got = dict(zip(("out", "lse"), out, strict=True))
            wrong = answer.problems_of_rows(got, own.positions(device))
            name = f"{kernel} x {composed[0].strategy} x {mask}"
            assert not wrong, (name, dtype, wrong)
            ran[name] = backward
    return ran


def takes(kernel: str, device: str) -> tuple[torch.dtype, bool]:
    """What it is judged in, and whether it has a backward; a refusal must be a declared gap."""
    for backward in (True, False):
        for dtype in DTYPES if device == "cuda" else DTYPES[::-1]:
            (q, k, v, _), mask, _ = question("causal", SHAPE, dtype, device)
            reason = get(kernel).unsupported(q, k, v, mask, KernelOptions(1.0), backward)
            if reason is None:
                return dtype, backward
            assert gaps.template(reason, q, v) in gaps.reasons(kernel, device), (kernel, reason)
    raise AssertionError(f"{kernel} is said to be available on {device} and takes nothing")


def check(kernels: tuple[str, ...], device: str) -> dict[str, bool]:
    ran = run(every_kernel, 2, kernels, device, device=device)
    assert ran[0] == ran[1]
    product = itertools.product(kernels, compositions(2), SOME)
    assert list(ran[0]) == [" x ".join(cell) for cell in product]
    return ran[0]


@pytest.mark.nightly
def test_those_compiled_or_interpreted_on_a_cpu(cp_device, monkeypatch):
    if cp_device != "cpu":
        pytest.skip("on a GPU they are in test_every_kernel_of_a_gpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read by the processes
    ran = check(SLOW_ON_CPU, "cpu")
    assert {name.split(" x ")[0] for name, backward in ran.items() if not backward} == {"flex"}


@pytest.mark.parametrize("kernel", lcab.kernels.names())
def test_every_kernel_of_a_gpu(kernel, cp_device):
    if cp_device != "cuda":
        pytest.skip("needs GPUs: --cp-device cuda")
    if reason := get(kernel).unavailable():
        pytest.skip(reason)
    assert all(check((kernel,), "cuda").values())


def test_no_kernel_of_a_cpu_is_left_out():
    """Neither here nor in the conformance suite's product."""
    on_cpu = {name for name in lcab.kernels.names() if "cpu" in get(name).features.devices}
    assert on_cpu | {"triton"} == {p.kernel for p in PRECISIONS.values()} | set(SLOW_ON_CPU)
