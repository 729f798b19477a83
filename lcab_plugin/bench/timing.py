"""The one way anything here is timed: several callables in turn (A B C A B C ...), so that their ratios hold
on a machine whose speed drifts.

A measurement warms up, then repeats until the 95% confidence interval of every median is as narrow as asked
for, or a callable's time is spent. On CUDA every repeat starts with a cold L2 cache and a GPU that is kept
busy while the host enqueues, so a short kernel is not timed by its launch: what the host needs is measured
apart, by `host_us`.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

Call = Callable[[], Any]

_FLUSH_SECONDS = 2e-3  # the GPU is kept busy before a repeat for at most this long
_HOST_CALLS = 20


@dataclass(frozen=True)
class Limits:
    """When to stop measuring a callable.

    ``relative_ci``: half the width of the median's 95% confidence interval, as a share of the median.
    ``seconds``: of its own running time, warm-up included; at least one repeat is timed whatever it takes.
    Fewer than 6 repeats have no 95% interval of the median.
    """

    relative_ci: float = 0.02
    seconds: float = 5.0
    min_repeats: int = 6
    max_repeats: int = 200
    warm_up: int = 2


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one callable. ``relative_ci`` is None for a single repeat."""

    median: float
    p10: float
    p90: float
    min: float
    repeats: int
    relative_ci: float | None


@dataclass(frozen=True)
class NoiseFloor:
    """What a timing cannot tell apart: an empty callable's ms, and how far the medians of one and the same
    callable, measured as if it were two, lie from each other (0.01: 1%)."""

    empty_ms: float
    same_relative: float


class Clock(Protocol):
    """Where time is read. Marks are set in the course of work and turned into ms once `wait` has returned."""

    def prepare(self, host_seconds: float) -> None:
        """Bring the device to the state in which a repeat starts; not timed."""

    def mark(self) -> Any:
        """This moment."""

    def wait(self) -> None:
        """Until all work is done."""

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Between two marks."""


class HostClock:
    """`time.perf_counter`: for work that is done when the call returns. Caches are left as they are."""

    def prepare(self, host_seconds: float) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        pass

    def elapsed_ms(self, begin: float, end: float) -> float:
        return (end - begin) * 1e3


class CudaClock:
    """Events on the current stream; the L2 cache is overwritten (twice its size) before every repeat."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        size = 2 * torch.cuda.get_device_properties(self._device).L2_cache_size
        self._buffer = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=self._device)
        self._flush_seconds = 1e-5
        for _ in range(3):  # the first writes pay for loading the kernel
            begin, _, end = self.mark(), self._buffer.zero_(), self.mark()
            self.wait()
            self._flush_seconds = max(1e-6, self.elapsed_ms(begin, end) * 1e-3)

    def prepare(self, host_seconds: float) -> None:
        """Flush, as often as it takes to keep the GPU busy until the host has enqueued the call."""
        busy = min(1.5 * host_seconds, _FLUSH_SECONDS)
        for _ in range(max(1, math.ceil(busy / self._flush_seconds))):
            self._buffer.zero_()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def elapsed_ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end)


def clock(device: torch.device | str) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if torch.device(device).type == "cuda" else HostClock()


def measure(
    calls: Mapping[str, Call], clock: Clock, limits: Limits | None = None
) -> dict[str, Timing | Exception]:
    """Time the callables in turn; one that raises leaves the rotation, and its exception is its result.

    A callable that has reached its confidence interval stays in the rotation until all have, or their time is
    spent, so that the medians are of the same minutes.
    """
    limits = limits or Limits()
    runs = {name: _Run(call) for name, call in calls.items()}
    with _no_garbage_collection():
        for run in runs.values():
            _warm_up(run, clock, limits)
        while True:
            active = [run for run in runs.values() if run.open(limits)]
            if all(run.converged(limits) for run in active):
                break
            _batch(active, min(run.rounds(limits) for run in active), clock)
            gc.collect(1)  # the young only: cycles that hold a call's tensors
    return {name: run.failure or _summary(run.times) for name, run in runs.items()}


def noise_floor(call: Call, clock: Clock, limits: Limits | None = None) -> NoiseFloor:
    """Measure nothing, and the same thing twice.

    Raises:
        Exception: what ``call`` raised.
    """
    found = measure({"empty": _nothing, "first": call, "second": call}, clock, limits)
    medians = []
    for timing in found.values():
        if isinstance(timing, Exception):
            raise timing
        medians.append(timing.median)
    empty, first, second = medians
    return NoiseFloor(empty, abs(first - second) / min(first, second) if min(first, second) else 0.0)


def host_us(call: Call, clock: Clock) -> float:
    """Microseconds until a call that only enqueues work returns: the median of a few, the device idle before
    each. Where the device is the host itself, this is the whole call."""
    spent = []
    for _ in range(_HOST_CALLS):
        clock.wait()
        begin = time.perf_counter()
        call()
        spent.append((time.perf_counter() - begin) * 1e6)
    clock.wait()
    return statistics.median(spent)


@dataclass
class _Run:
    """A callable and what is known of it so far. ``spent``: seconds it ran, warm-up included."""

    call: Call
    times: list[float] = field(default_factory=list)  # ms
    spent: float = 0.0
    warm: float = 0.0  # seconds of its last warm-up call
    host_seconds: float = 0.0
    failure: Exception | None = None

    def fail(self, failure: Exception) -> None:
        """Leave the rotation. Without its traceback, which would keep the call's tensors alive."""
        self.failure = failure.with_traceback(None)

    @property
    def typical(self) -> float:
        """Seconds that one more repeat is expected to take."""
        return statistics.median(self.times) * 1e-3 if self.times else self.warm

    def open(self, limits: Limits) -> bool:
        """Whether it takes part in the next batch."""
        if self.failure is not None or len(self.times) >= limits.max_repeats:
            return False
        return not self.times or self.spent + self.typical <= limits.seconds

    def converged(self, limits: Limits) -> bool:
        if len(self.times) < limits.min_repeats:
            return False
        half_width = relative_ci(self.times)
        return half_width is not None and half_width <= limits.relative_ci

    def rounds(self, limits: Limits) -> int:
        """How many more repeats it can take before anyone looks at the results."""
        left = limits.max_repeats - len(self.times)
        if self.typical > 0:
            left = min(left, int((limits.seconds - self.spent) / self.typical))
        return max(1, min(limits.min_repeats, left))


def _warm_up(run: _Run, clock: Clock, limits: Limits) -> None:
    """A few calls, fewer if one alone takes a tenth of the time; the last tells what a repeat costs."""
    for _ in range(max(1, limits.warm_up)):
        clock.wait()
        begin, host_begin = clock.mark(), time.perf_counter()
        try:
            run.call()
        except Exception as failure:
            run.fail(failure)
            return
        run.host_seconds = time.perf_counter() - host_begin
        end = clock.mark()
        clock.wait()
        run.warm = clock.elapsed_ms(begin, end) * 1e-3
        run.spent += run.warm
        if run.warm > limits.seconds / 10:
            return


def _batch(runs: list[_Run], rounds: int, clock: Clock) -> None:
    """The rotation, `rounds` times, then one synchronisation and the times."""
    marks: list[tuple[_Run, Any, Any]] = []
    for _ in range(rounds):
        for run in runs:
            if run.failure is not None:
                continue
            clock.prepare(run.host_seconds)
            begin = clock.mark()
            try:
                run.call()
            except Exception as failure:
                run.fail(failure)
                continue
            marks.append((run, begin, clock.mark()))
    clock.wait()
    for run, begin, end in marks:
        took = clock.elapsed_ms(begin, end)
        run.times.append(took)
        run.spent += took * 1e-3


def _summary(times: list[float]) -> Timing:
    p10, median, p90 = np.percentile(times, [10, 50, 90]).tolist()
    return Timing(median, p10, p90, min(times), len(times), relative_ci(times))


def relative_ci(times: list[float]) -> float | None:
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


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a repeat costs milliseconds."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _nothing() -> None:
    pass
