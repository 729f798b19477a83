"""How the ranks of `lcab bench cp` and `lcab bench peers` meet, share a clock, and end together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lcab_plugin.bench import timing
from lcab_plugin.bench.cp import Settings
from lcab_plugin.context_parallel import collectives


class RankLostError(BaseException):
    """This rank failed where the others go on to the next collective: the run cannot go on. No `Exception`,
    so that nobody takes it for a failure that all ranks share."""


@contextmanager
def process_group(settings: Settings, local_rank: int) -> Iterator[torch.device]:
    """The ranks meet (address and rank are in torchrun's variables); gives this rank's device."""
    cuda = settings.device == "cuda"
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    collectives.join("nccl" if cuda else "gloo", settings.timeout)
    yield device
    collectives.leave()


class SlowestRank:
    """The clock of a group: a repeat starts when all ranks are there, and took what the slowest took."""

    def __init__(self, clock: timing.Clock, device: torch.device) -> None:
        self._clock, self._device = clock, device
        self._meet = torch.zeros(1, device=device)
        self.mark, self.wait = clock.mark, clock.wait

    def prepare(self, host_seconds: float) -> None:
        """Meet. On CUDA the ranks' devices meet, while the hosts go on to enqueue."""
        self._clock.prepare(host_seconds)
        collectives.all_reduce_sum(self._meet)

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Of the slowest rank; collective."""
        took = torch.tensor([self._clock.elapsed_ms(begin, end)], dtype=torch.float64, device=self._device)
        return collectives.all_reduce_max(took).item()


def or_lost(call: timing.Call) -> timing.Call:
    """A call whose failure nobody survives: the other ranks are in the middle of it."""

    def guarded() -> Any:
        try:
            return call()
        except Exception as error:
            raise RankLostError(f"{type(error).__name__}: {error}") from error

    return guarded
