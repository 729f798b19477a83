"""What the calls of a cell of `lcab bench cp` send and hold on one rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lcab_plugin.bench.trial import Machine
from lcab_plugin.context_parallel import collectives
from lcab_plugin.kernels.contract import Kernel
from lcab_plugin.training.memory import GIB, forget_peak_rss, resident_peak_gib

# Fields of a record; of the fullest rank.
MEMORY = (
    "peak_memory_gib",
    "peak_reserved_gib",
    "peak_rss_gib",
    "kernels_memory_gib",
    "communication_memory_gib",
)


class Recorder:
    """A kernel that keeps every call made of it, to be made again without anything around it."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.calls: dict[str, list[Callable[[], Any]]] = {"fwd": [], "bwd": []}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def forward(self, *arguments: Any) -> Any:
        """The kernel's, kept."""
        self.calls["fwd"].append(partial(self._kernel.forward, *arguments))
        return self._kernel.forward(*arguments)

    def backward(self, *arguments: Any) -> Any:
        """The kernel's, kept."""
        self.calls["bwd"].append(partial(self._kernel.backward, *arguments))
        return self._kernel.backward(*arguments)

    def again(self, step: str) -> None:
        """The kernel calls of a pass, one after another."""
        with torch.no_grad():
            for call in (call for part in step.split("+") for call in self.calls[part]):
                call()


class Counts:
    """Bytes sent and memory, by pass.

    ``sent``: by `collectives.bytes_sent`. ``memory``: GiB by the names of `MEMORY`, those that can be had.
    On CUDA, by the counters of torch's allocator, over what was allocated when counting began:
    ``peak_memory_gib`` of the call, ``kernels_memory_gib`` of its kernel calls alone, one after another,
    which are attention's own buffers and results, and ``communication_memory_gib``, the first less the
    second: buffers of transfers, and partial results that wait to be merged. ``peak_reserved_gib`` is all
    that the allocator held. On Linux ``peak_rss_gib`` is all that was resident on the host in the call.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._base = torch.cuda.memory_allocated(machine.device) if machine.cuda else 0
        self.sent: dict[str, int] = {}
        self.memory: dict[str, dict[str, float]] = {}

    def count(self, step: str, call: Callable[[], Any]) -> Any:
        """Make the call, which is pass ``step``; returns its result."""
        collectives.reset_bytes()
        result, self.memory[step] = self._held(call)
        self.sent[step] = sum(collectives.bytes_sent().values())
        return result

    def join(self) -> None:
        """``fwd+bwd``, by its parts."""
        forward, backward = self.memory["fwd"], self.memory["bwd"]
        self.sent["fwd+bwd"] = self.sent["fwd"] + self.sent["bwd"]
        self.memory["fwd+bwd"] = {name: max(forward[name], backward[name]) for name in forward}

    def split(self, recorder: Recorder) -> None:
        """Tell the kernels' memory from that of what is around them."""
        if not self._machine.cuda:
            return
        for step, memory in self.memory.items():
            self._base = torch.cuda.memory_allocated(self._machine.device)
            _, held = self._held(partial(recorder.again, step))
            memory["kernels_memory_gib"] = held["peak_memory_gib"]
            memory["communication_memory_gib"] = max(0.0, memory["peak_memory_gib"] - held["peak_memory_gib"])

    def _held(self, call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        device, cuda = self._machine.device, self._machine.cuda
        known = forget_peak_rss()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        result = call()
        self._machine.clock.wait()
        resident = resident_peak_gib() if known else None
        held = {} if resident is None else {"peak_rss_gib": resident}
        if cuda:
            held["peak_memory_gib"] = (torch.cuda.max_memory_allocated(device) - self._base) / GIB
            held["peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
        return result, held
