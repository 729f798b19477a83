"""The measuring core of benchmarks and training: clocks, what repeated times come to, the parts of a step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch


class Clock(Protocol):
    """Where time is read. Marks are set in the course of work and become ms once ``wait`` has returned."""

    def mark(self) -> Any:
        """This moment."""

    def wait(self) -> None:
        """Until all work is done."""

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Between two marks."""


class HostClock:
    """``time.perf_counter``: for work that is done when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        pass

    def elapsed_ms(self, begin: float, end: float) -> float:
        return (end - begin) * 1e3


class EventClock:
    """Events on a GPU's current stream: a mark is the moment at which the stream gets there, so that setting
    one holds up neither host nor device."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def elapsed_ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of something repeated. ``relative_ci``: half the width of the median's 95% confidence
    interval, as a share of the median; None for a single repeat."""

    median: float
    p10: float
    p90: float
    min: float
    repeats: int
    relative_ci: float | None

    def record(self) -> dict[str, Any]:
        """As a record has it: times with ``_ms``."""
        return {
            name if name in ("repeats", "relative_ci") else f"{name}_ms": x
            for name, x in asdict(self).items()
        }


def summary(times: Sequence[float]) -> Timing:
    """What repeated times come to."""
    p10, median, p90 = np.percentile(times, [10, 50, 90]).tolist()
    return Timing(median, p10, p90, min(times), len(times), relative_ci(times))


def relative_ci(times: Sequence[float]) -> float | None:
    """Half the width of the median's 95% confidence interval over the median, by order statistics: it holds
    whatever the times' distribution. The whole range below 6 times; None for one."""
    n = len(times)
    if n < 2:
        return None
    ordered = sorted(times)
    reach = 1.96 * math.sqrt(n) / 2
    low = max(0, math.floor((n - 1) / 2 - reach))
    high = min(n - 1, math.ceil((n - 1) / 2 + reach))
    width, median = ordered[high] - ordered[low], statistics.median(ordered)
    if not width:
        return 0.0
    return 0.5 * width / median if median else math.inf


class StepTimer:
    """Milliseconds spent in named parts of a step, as the device saw them; nothing waits until ``take``.

    ``ended`` is told the name of each part when the host leaves it.

    Example:
        >>> timer = StepTimer("cpu", parts=("forward", "backward"))
        >>> with timer("forward"):
        ...     pass
        >>> sorted(timer.take())
        ['backward_ms', 'forward_ms']
    """

    def __init__(
        self,
        device: torch.device | str,
        parts: tuple[str, ...],
        ended: Callable[[str], None] = lambda part: None,
    ) -> None:
        cuda = torch.device(device).type == "cuda"
        self._clock: Clock = EventClock(device) if cuda else HostClock()
        self._parts, self._ended = parts, ended
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the time of the block to ``part``."""
        begin = self._clock.mark()
        yield
        self._marks.append((part, begin, self._clock.mark()))
        self._ended(part)

    def take(self) -> dict[str, float]:
        """``{part}_ms`` of every part since the last call."""
        self._clock.wait()
        spent = dict.fromkeys(self._parts, 0.0)
        for part, begin, end in self._marks:
            spent[part] += self._clock.elapsed_ms(begin, end)
        self._marks.clear()
        return {f"{part}_ms": milliseconds for part, milliseconds in spent.items()}
