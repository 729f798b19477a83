"""Time and memory of one process."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Milliseconds spent in named parts of a step; waits for the device at both ends of a part.

    Example:
        >>> timer = StepTimer("cpu", parts=("forward", "backward"))
        >>> with timer("forward"):
        ...     pass
        >>> sorted(timer.take())
        ['backward_ms', 'forward_ms']
    """

    def __init__(self, device: torch.device | str, parts: tuple[str, ...]) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._device = device
        self._spent = dict.fromkeys(parts, 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the time of the block to ``part``."""
        start = self._now()
        yield
        self._spent[part] += (self._now() - start) * 1e3

    def take(self) -> dict[str, float]:
        """``{part}_ms`` of every part since the last call."""
        spent, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        return {f"{part}_ms": milliseconds for part, milliseconds in spent.items()}

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def peak_memory_gib(device: torch.device | str) -> float:
    """The most memory this process has held: allocated on its CUDA device, or resident on the host."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
