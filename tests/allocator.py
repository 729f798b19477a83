"""The counters of torch.cuda's allocator, as documented, for a test without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

GIB = 2**30


class Allocator:
    """What counts ``held`` GiB, one more of them reserved."""

    def __init__(self) -> None:
        self.held = self.highest = self.reserved = 0.0
        self.asked = 0  # how often a counter was read or reset

    def take(self, gib: float) -> None:
        self.held += gib
        self.highest = max(self.highest, self.held)
        self.reserved = max(self.reserved, self.held + 1)

    def forget(self, device: Any) -> None:
        self.highest, self.reserved = self.held, self.held + 1

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        counters = {
            "memory_allocated": lambda device: int(self.held * GIB),
            "max_memory_allocated": lambda device: int(self.highest * GIB),
            "max_memory_reserved": lambda device: int(self.reserved * GIB),
            "reset_peak_memory_stats": self.forget,
        }
        for name, counter in counters.items():
            monkeypatch.setattr(torch.cuda, name, self._counted(counter))

    def _counted(self, counter: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def ask(device: Any) -> Any:
            self.asked += 1
            return counter(device)

        return ask
