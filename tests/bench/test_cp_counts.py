"""What a cell's call holds, told apart by an allocator that is told what is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcab_plugin.bench.cp_counts import MEMORY, Counts, Recorder
from lcab_plugin.bench.trial import Machine
from tests.allocator import Allocator


class Kernel:
    """Takes 2 GiB in a forward, 3 in a backward; nothing stays."""

    def __init__(self, gpu: Allocator) -> None:
        self.gpu = gpu

    def forward(self, x: int) -> None:
        self.gpu.take(2.0)
        self.gpu.take(-2.0)

    def backward(self, x: int) -> None:
        self.gpu.take(3.0)
        self.gpu.take(-3.0)


def machine(cuda: bool) -> Machine:
    found = Machine("cpu")
    if cuda:
        found.cuda, found.device = True, torch.device("cuda")
    return found


def test_communication_is_what_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Allocator()
    gpu.install(monkeypatch)
    gpu.take(10.0)  # the tensors given
    recorder: Any = Recorder(Kernel(gpu))  # type: ignore[arg-type]
    counts = Counts(machine(cuda=True))

    def forward() -> str:
        gpu.take(1.5)  # a buffer
        recorder.forward(0)
        gpu.take(-1.0)  # the output stays
        return "out"

    def backward() -> None:
        gpu.take(4.0)
        recorder.backward(0)
        gpu.take(-4.5)

    assert counts.count("fwd", forward) == "out"
    counts.count("bwd", backward)
    counts.join()
    counts.split(recorder)
    names = "peak_memory_gib", "kernels_memory_gib", "communication_memory_gib", "peak_reserved_gib"
    found = {step: [memory[name] for name in names] for step, memory in counts.memory.items()}
    assert found == {
        "fwd": [3.5, 2.0, 1.5, 14.5],
        "bwd": [7.5, 3.0, 4.5, 18.5],
        "fwd+bwd": [7.5, 3.0, 4.5, 18.5],
    }
    assert all(memory.keys() <= set(MEMORY) for memory in counts.memory.values())
    assert counts.sent == {"fwd": 0, "bwd": 0, "fwd+bwd": 0}


def test_on_a_cpu_only_resident_memory_is_known() -> None:
    counts = Counts(machine(cuda=False))
    counts.count("fwd", lambda: torch.ones(2**27).sum())  # half a GiB
    recorder: Any = Recorder(None)  # type: ignore[arg-type]
    counts.split(recorder)
    assert counts.memory["fwd"].keys() <= {"peak_rss_gib"}
    assert all(gib > 0.5 for gib in counts.memory["fwd"].values())
