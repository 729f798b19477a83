"""What a cell's call holds, told apart by an allocator that is told what is taken."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import lcab_plugin
from lcab_plugin import masks
from lcab_plugin.bench import accuracy, contenders, trial
from lcab_plugin.bench.accuracy import Case
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


@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_waits_while_memory_is_counted(fails: bool) -> None:
    states, left = [], []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        states.append(gc.isenabled())
        if len(states) % 2 == 0:  # memory is counted of every second call: without what the first one left
            assert left[-1]() is None
        cycle = {torch.ones(1)}
        cycle.add(lambda: cycle)  # type: ignore[arg-type]
        left.append(weakref.ref(next(x for x in cycle if isinstance(x, torch.Tensor))))
        if fails:
            raise RuntimeError("it does not run")
        return lcab_plugin.attention(q, k, v, masks.causal(16), kernel="naive")

    q, k, v, dout = (torch.randn(1, 16, heads, 8) for heads in (2, 1, 1, 2))
    case = Case(q, k, v, dout, masks.causal(16), 8**-0.5)
    entry = trial.Entry(contenders.find("naive"), ["fwd", "bwd"], attend)
    trial.first_calls(entry, case, accuracy.sample(case, 0), Machine("cpu"))
    assert set(states) == {False}
    assert set(entry.ended) == ({"fwd", "bwd"} if fails else set())
    assert gc.isenabled()
