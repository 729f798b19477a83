"""Memory of one process: what was held at most, and by what as far as that can be told."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

GIB = 2**30


def peak_rss_gib() -> float:
    """The most memory that this process has had resident on the host."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def forget_peak_rss() -> bool:
    """Let the peak begin anew at what is resident now; False where the system cannot (Linux alone can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_peak_gib() -> float | None:
    """The most that was resident since `forget_peak_rss`; None where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / GIB
    except OSError:
        pass
    return None


def held_bytes(device: torch.device | str) -> int:
    """Bytes of all tensors that Python can reach on a device, a storage that several share counted once."""
    kind = torch.device(device).type
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if not issubclass(type(found), Tensor) or issubclass(type(found), FakeTensor):
            continue  # a compiler's fake tensors hold nothing
        for x in (found, found.grad if found.is_leaf else None):
            if x is not None and x.device.type == kind and x.layout == torch.strided:
                with suppress(RuntimeError):  # one that wraps others has no address of its own
                    storage = x.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    storages.pop(0, None)
    return sum(storages.values())


class Meter:
    """Follows one process through a run.

    Measured on CUDA, by the counters of torch's allocator:

    - ``peak_allocated_gib``, ``peak_reserved_gib``: of the whole run.
    - ``model_states_gib``: allocated when the last step began: parameters, gradients that stay, optimizer
      state.
    - ``activations_gib``: the most allocated when a part ``forward`` ended over what was when its step began;
      of all micro-batches under way, as in a pipeline. Once a part ``backward`` has ended the step is not
      looked at any more: gradients have come.
    - ``attention_buffers_gib``: what one attention call held at most beyond what it left behind. Under
      context parallelism the buffers of its transfers are among them, so that
      ``communication_buffers_gib`` is None there (`lcab bench cp` tells them apart), and 0 without.

    The last two are looked at in the steps whose time does not count: to ask the allocator takes the host
    longer than to launch a kernel.

    On a CPU torch counts no allocations. ``model_states_gib`` is computed there: the sizes of all tensors
    that are alive after the last step, its batch among them. ``peak_rss_gib`` is the process's; the others
    are None.
    """

    def __init__(self, device: torch.device | str, attentions: Iterable[nn.Module], cp: int) -> None:
        self._device, self._cp = torch.device(device), cp
        self._cuda = self._device.type == "cuda"
        self._inside = self._cuda  # whether parts of a step are looked at, before gradients have come
        self._peak = self._cached = self._states = self._activations = self._buffers = 0
        self._hooks: list[RemovableHandle] = []
        if self._cuda:
            for module in attentions:
                self._hooks.append(module.register_forward_pre_hook(self._enter_attention))
                self._hooks.append(module.register_forward_hook(self._leave_attention))

    def begin(self, timed: bool) -> None:
        """A step begins. ``timed``: its time counts, and that of those to come."""
        self._inside = self._cuda and not timed
        while timed and self._hooks:
            self._hooks.pop().remove()
        if self._cuda:
            self._states = torch.cuda.memory_allocated(self._device)

    def ended(self, part: str) -> None:
        """A part of the step has ended, as `StepTimer` tells."""
        self._inside &= part != "backward"
        if self._inside and part == "forward":
            grown = torch.cuda.memory_allocated(self._device) - self._states
            self._activations = max(self._activations, grown)

    def peak_gib(self) -> float:
        """So far: allocated on the GPU, or resident on the host."""
        return self._fold() / GIB if self._cuda else peak_rss_gib()

    def record(self) -> dict[str, Any]:
        """Of this process, at the end of its last step."""
        found: dict[str, float | None] = dict.fromkeys(
            (
                "peak_allocated_gib",
                "peak_reserved_gib",
                "peak_rss_gib",
                "model_states_gib",
                "activations_gib",
                "attention_buffers_gib",
                "communication_buffers_gib",
            )
        )
        found["peak_rss_gib"] = peak_rss_gib()
        if not self._cuda:
            return found | {"model_states_gib": held_bytes(self._device) / GIB}
        return found | {
            "peak_allocated_gib": self._fold() / GIB,
            "peak_reserved_gib": self._cached / GIB,
            "model_states_gib": self._states / GIB,
            "activations_gib": self._activations / GIB,
            "attention_buffers_gib": self._buffers / GIB,
            "communication_buffers_gib": 0.0 if self._cp == 1 else None,
        }

    def _fold(self) -> int:
        """The peak so far; torch's own begins anew."""
        self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device))
        self._cached = max(self._cached, torch.cuda.max_memory_reserved(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)
        return self._peak

    def _enter_attention(self, *call: Any) -> None:
        self._fold()

    def _leave_attention(self, *call: Any) -> None:
        highest = torch.cuda.max_memory_allocated(self._device)
        self._buffers = max(self._buffers, highest - torch.cuda.memory_allocated(self._device))
        self._fold()
