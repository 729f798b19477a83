"""Memory is what this process held, and what cannot be told is None."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from lcab_plugin.training import memory
from lcab_plugin.training.memory import GIB, Meter, held_bytes, peak_rss_gib
from tests.allocator import Allocator

FIELDS = {
    "peak_allocated_gib",
    "peak_reserved_gib",
    "peak_rss_gib",
    "model_states_gib",
    "activations_gib",
    "attention_buffers_gib",
    "communication_buffers_gib",
}


def test_the_peak_remembers_what_was_freed() -> None:
    before = peak_rss_gib()
    held = np.ones(2**26)  # half a GiB
    del held
    assert 0.01 < before < peak_rss_gib()
    assert peak_rss_gib() > 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a peak be forgotten")
def test_a_peak_can_begin_anew() -> None:
    held = np.ones(2**26)
    del held
    if not memory.forget_peak_rss():
        pytest.skip("this system refuses to forget the peak")
    low = memory.resident_peak_gib()
    held = np.ones(2**26)
    high = memory.resident_peak_gib()
    del held
    assert low is not None
    assert high is not None
    assert high - low == pytest.approx(0.5, rel=0.1)


def test_tensors_that_live_are_counted_once() -> None:
    before = held_bytes("cpu")
    x = torch.zeros(1000, requires_grad=True)
    views = [x.detach()[:10], x.detach().view(10, 100)]
    assert held_bytes("cpu") - before == 4000
    x.grad = torch.zeros(1000)
    assert held_bytes("cpu") - before == 8000
    assert held_bytes("cuda") == 0
    del x, views
    assert held_bytes("cpu") == before


def test_a_compilers_fake_tensor_has_no_memory() -> None:
    before = held_bytes("cpu")
    with FakeTensorMode():
        fake = torch.empty(1000)
    assert held_bytes("cpu") == before
    del fake


def test_on_a_cpu_states_are_computed_and_what_torch_does_not_count_is_none() -> None:
    model = nn.Linear(256, 256)
    found = Meter("cpu", [model], cp=1).record()
    assert found.keys() == FIELDS
    assert found["model_states_gib"] >= 257 * 256 * 4 / GIB
    assert found["peak_rss_gib"] > 0.01
    assert {name for name, value in found.items() if value is None} == FIELDS - {
        "model_states_gib",
        "peak_rss_gib",
    }


@pytest.mark.parametrize("cp", [1, 2])
def test_on_a_gpu_the_parts_are_told_apart(monkeypatch: pytest.MonkeyPatch, cp: int) -> None:
    gpu = Allocator()
    gpu.install(monkeypatch)

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gpu.take(workspace)
            gpu.take(-workspace + 0.5)  # of which the output stays
            return x + 1

    workspace = 3.0
    attention = Attention()
    meter = Meter("cuda", [attention], cp)
    gpu.take(8.0)  # parameters and optimizer
    for _ in range(2):
        meter.begin(timed=False)
        gpu.take(2.0)
        assert attention(torch.zeros(1)).tolist() == [1.0]  # watched, not changed
        meter.ended("forward")
        gpu.take(-2.5 + 4.0)  # gradients come
        meter.ended("backward")
        gpu.take(2.5)
        meter.ended("forward")  # of another micro-batch
        gpu.take(-6.5)
    assert meter.peak_gib() == 14.5
    meter.begin(timed=True)
    workspace, asked = 6.0, gpu.asked
    attention(torch.zeros(1))
    meter.ended("forward")
    assert gpu.asked == asked  # nothing that would take time of the step
    assert meter.peak_gib() == 14.5  # 14.0 in this step
    found = meter.record()
    assert found["peak_allocated_gib"] == 14.5
    assert found["peak_reserved_gib"] == 15.5
    assert found["model_states_gib"] == 8.0
    assert found["activations_gib"] == 2.5
    assert found["attention_buffers_gib"] == 2.5  # 13 at most, 10.5 after it
    assert found["communication_buffers_gib"] == (0.0 if cp == 1 else None)
