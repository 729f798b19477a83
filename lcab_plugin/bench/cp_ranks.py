"""How the ranks of `lcab bench cp` and `lcab bench peers` meet, share a clock, and end together."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
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


def host() -> str:
    """What tells this node from others, by NCCL's own rule: its name and, where Linux has it, the boot's id.
    Names repeat over virtual machines; containers of other names do not share a node's links."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with suppress(OSError):
        return f"{platform.node()} {boot.read_text().strip()}"
    return platform.node()


def nodes(hosts: Sequence[str]) -> int | None:
    """Of ranks on these ``hosts``, as launchers deal them: neighbours together, equally many on each node.
    None where they lie otherwise."""
    count = len(set(hosts))
    each = len(hosts) // count
    dealt = [host for host in dict.fromkeys(hosts) for _ in range(each)]
    return count if list(hosts) == dealt else None


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
