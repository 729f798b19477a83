"""How benchmarks time: several callables in turn (A B C, C A B ...), so that their ratios hold on a machine
whose speed drifts. Every round has an order of its own, drawn from a fixed seed, so that none always runs in
the caches and clocks that the same other one left, and all ranks of a group agree.

A measurement warms up, then repeats until the 95% confidence interval of every median is as narrow as asked
for, or a callable's time is spent. On CUDA every repeat starts with a cold L2 cache and a GPU that is kept
busy while the host enqueues, so a short kernel is not timed by its launch: what the host needs is measured
apart, by `host_us`.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lcab_plugin.training import measure as core
from lcab_plugin.training.measure import Timing, relative_ci, summary

Call = Callable[[], Any]

_FLUSH_SECONDS = 2e-3  # the GPU is kept busy before a repeat for at most this long
_HOST_CALLS = 20
_EQUAL = 5  # series of one call in the noise floor: two alone are often close by chance


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
    seed: int = 0  # of the order in each round


@dataclass(frozen=True)
class NoiseFloor:
    """What a timing cannot tell apart: an empty callable's ms, and how far the medians of one and the same
    callable, measured as if it were five, lie from each other (0.01: 1%)."""

    empty_ms: float
    same_relative: float

    def record(self) -> dict[str, float]:
        """As a record has it."""
        return {"noise_empty_ms": self.empty_ms, "noise_same_relative": self.same_relative}

    def __str__(self) -> str:
        return f"noise floor: {self.empty_ms:.2g} ms, and {self.same_relative:.1%} between equal calls"


class Clock(core.Clock, Protocol):
    """Where the time of repeats is read."""

    def prepare(self, host_seconds: float) -> None:
        """Bring the device to the state in which a repeat starts; not timed."""


class HostClock(core.HostClock):
    """Caches are left as they are."""

    def prepare(self, host_seconds: float) -> None:
        pass


class CudaClock(core.EventClock):
    """The L2 cache is overwritten (twice its size) before every repeat."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__(device)
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=device)
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
    order = random.Random(limits.seed)
    with _no_garbage_collection():
        for run in runs.values():
            _warm_up(run, clock, limits)
        while True:
            active = [run for run in runs.values() if run.open(limits)]
            if all(run.converged(limits) for run in active):
                break
            _batch(active, min(run.rounds(limits) for run in active), clock, order)
            gc.collect(1)  # the young only: cycles that hold a call's tensors
    return {name: run.failure or summary(run.times) for name, run in runs.items()}


def noise_of(device: torch.device | str, clock: Clock) -> NoiseFloor:
    """The noise floor of a device, by a product of small matrices."""
    x = torch.randn(512, 512, device=device)
    return noise_floor(lambda: x @ x, clock, Limits(seconds=0.2))


def noise_floor(call: Call, clock: Clock, limits: Limits | None = None) -> NoiseFloor:
    """Measure nothing, and the same thing several times over, all in turn.

    Raises:
        Exception: what ``call`` raised.
    """
    found = measure({"empty": _nothing, **{str(i): call for i in range(_EQUAL)}}, clock, limits)
    medians = []
    for timing in found.values():
        if isinstance(timing, Exception):
            raise timing
        medians.append(timing.median)
    empty, *equal = medians
    return NoiseFloor(empty, max(equal) / min(equal) - 1 if min(equal) else 0.0)


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


def _batch(runs: list[_Run], rounds: int, clock: Clock, order: random.Random) -> None:
    """All in turn, `rounds` times, then one synchronisation and the times."""
    marks: list[tuple[_Run, Any, Any]] = []
    for _ in range(rounds):
        for run in order.sample(runs, len(runs)):
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
