"""What the calls of a cell of `lcab bench cp` send and hold on one rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lcab_plugin.bench.trial import Machine, held
from lcab_plugin.context_parallel import collectives
from lcab_plugin.kernels.contract import Kernel

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

    ``sent``: by `collectives.bytes_sent`. ``memory``: GiB by the names of `MEMORY`, those that can be had: of
    the call as `trial.held` tells it; on CUDA also ``kernels_memory_gib`` of its kernel calls alone, one
    after another, which are attention's own buffers and results, and ``communication_memory_gib``, the peak
    less those: buffers of transfers, and partial results that wait to be merged.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._base = machine.allocated()
        self.sent: dict[str, int] = {}
        self.memory: dict[str, dict[str, float]] = {}

    def count(self, step: str, call: Callable[[], Any]) -> Any:
        """Make the call, which is pass ``step``; returns its result."""
        collectives.reset_bytes()
        result, self.memory[step] = held(self._machine, self._base, call)
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
            _, alone = held(self._machine, self._machine.allocated(), partial(recorder.again, step))
            memory["kernels_memory_gib"] = alone["peak_memory_gib"]
            memory["communication_memory_gib"] = max(
                0.0, memory["peak_memory_gib"] - alone["peak_memory_gib"]
            )
