"""The first calls of a contender: whether it runs at all, is right, and what memory it takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcab_plugin.bench import accuracy, timing
from lcab_plugin.bench.accuracy import Case, Sample
from lcab_plugin.bench.contenders import Attend, Contender
from lcab_plugin.errors import UnsupportedError
from lcab_plugin.training.memory import GIB, forget_peak_rss, resident_peak_gib

Ending = tuple[str, str]  # status and reason of a cell that was not measured

_ROOM_UNKNOWN = 8 * 2**30  # bytes, where the system does not say what is free


@dataclass
class Entry:
    """A contender among those of one mask and length.

    ``ended``: the passes that will not be measured, and why. ``memory``: GiB by pass, as `held` tells it.
    ``fatal``: the device did not answer after it.
    """

    contender: Contender
    steps: list[str]
    attend: Attend | None = None
    ended: dict[str, Ending] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    first_call_s: float | None = None
    fatal: bool = False

    def open(self) -> list[str]:
        """The passes still to be measured."""
        return [step for step in self.steps if step not in self.ended]

    def end(self, steps: Iterable[str], ending: Ending) -> None:
        """These passes are not measured."""
        self.ended.update(dict.fromkeys(steps, ending))

    def bound(self, case: Case) -> Attend:
        """The call, made once."""
        if self.attend is None:
            self.attend = self.contender.bind(case)
        return self.attend


class Machine:
    """The device that is measured."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.clock = timing.clock(self.device)

    def room(self) -> float:
        """Bytes that tensors growing with [q, k] may take: most of what is free."""
        if self.cuda:
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return 0.8 * (torch.cuda.mem_get_info(self.device)[0] + cached)
        with suppress(OSError):
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return 0.5 * int(line.split()[1]) * 1024
        return _ROOM_UNKNOWN

    def allocated(self) -> int:
        """Bytes that tensors hold; 0 on a CPU, where nobody counts them."""
        return torch.cuda.memory_allocated(self.device) if self.cuda else 0

    def release(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.cuda:
            with suppress(RuntimeError):  # from a device that does not answer
                torch.cuda.empty_cache()

    def answers(self) -> bool:
        """Whether the device still works: after a fault in a CUDA kernel every later call fails."""
        try:
            self.clock.wait()
        except RuntimeError:
            return False
        return True


def ending(error: Exception) -> Ending:
    """Status and reason that an exception stands for."""
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, UnsupportedError):
        return "unsupported", line
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in line:
        return "oom", line or "out of memory"
    return "error", f"{type(error).__name__}: {line}"


def call(attend: Attend, case: Case, step: str) -> Callable[[], Any]:
    """The callable that is timed. That of ``bwd`` runs a forward here and keeps its graph."""
    if step == "fwd":
        return lambda: _forward(attend, case)
    if step == "bwd":
        leaves = _leaves(case)
        out = attend(*leaves)
        return lambda: torch.autograd.grad(out, leaves, case.dout, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        leaves = _leaves(case)
        return torch.autograd.grad(attend(*leaves), leaves, case.dout)

    return both


@contextmanager
def collector_waits() -> Iterator[None]:
    """What libraries left in reference cycles stays until the end: freed in between, it would be missing from
    the bytes that were allocated before, over which a peak is told. What is young goes first."""
    gc.collect(1)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@collector_waits()
def first_calls(entry: Entry, case: Case, sample: Sample, machine: Machine) -> None:
    """Run what is open of ``entry`` once, forward and then backward: compiles, checks, counts memory.

    What it raises ends the passes concerned: a backward that fails leaves the forward to be measured.
    """
    base = machine.allocated()
    for backward in (False, True):
        if not any(backward == (step != "fwd") for step in entry.open()):
            continue
        try:
            _check(entry, case, sample, backward, machine)
            gc.collect(0)  # what that call left; all that is older stays, as `base` counted it
            _count(entry, case, backward, base, machine)
            continue
        except Exception as error:
            entry.end([step for step in entry.open() if not backward or step != "fwd"], ending(error))
        entry.fatal = entry.fatal or not machine.answers()
        machine.release()  # now that the exception no longer holds the tensors of its frames
        base = min(base, machine.allocated())


def _check(entry: Entry, case: Case, sample: Sample, backward: bool, machine: Machine) -> None:
    """Raises ArithmeticError where the results are wrong: a wrong kernel has no speed."""
    begin = time.perf_counter()
    attend = entry.bound(case)
    results = _with_gradients(attend, case) if backward else {"out": _forward(attend, case)}
    machine.clock.wait()
    entry.first_call_s = (entry.first_call_s or 0.0) + time.perf_counter() - begin
    entry.errors |= sample.errors(**results)
    worst = max(entry.errors, key=entry.errors.__getitem__)
    if not entry.errors[worst] <= accuracy.GROSS[case.q.dtype]:
        raise ArithmeticError(
            f"wrong result: {worst} is off by {entry.errors[worst]:.1e} of its largest value"
        )


def held(machine: Machine, base: int, made: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result of a call and the GiB it held at most, those that can be had.

    On CUDA, by the counters of torch's allocator: ``peak_memory_gib`` over ``base`` bytes that were allocated
    before, ``peak_reserved_gib`` of all that it held. On Linux ``peak_rss_gib``: all that was resident on the
    host in the call.
    """
    known = forget_peak_rss()
    if machine.cuda:
        torch.cuda.reset_peak_memory_stats(machine.device)
    result = made()
    machine.clock.wait()
    resident = resident_peak_gib() if known else None
    found = {} if resident is None else {"peak_rss_gib": resident}
    if machine.cuda:
        found["peak_memory_gib"] = (torch.cuda.max_memory_allocated(machine.device) - base) / GIB
        found["peak_reserved_gib"] = torch.cuda.max_memory_reserved(machine.device) / GIB
    return result, found


def _count(entry: Entry, case: Case, backward: bool, base: int, machine: Machine) -> None:
    """Of a second call: the first also held what compiling and tuning took."""
    attend, memory = entry.bound(case), entry.memory
    if not backward:
        _, memory["fwd"] = held(machine, base, lambda: _forward(attend, case))
        return
    gradients, forward = held(machine, base, lambda: call(attend, case, "bwd"))
    _, memory["bwd"] = held(machine, base, gradients)
    memory["fwd+bwd"] = {name: max(most, memory["bwd"][name]) for name, most in forward.items()}


def _forward(attend: Attend, case: Case) -> Tensor:
    with torch.no_grad():
        return attend(case.q, case.k, case.v)


def _with_gradients(attend: Attend, case: Case) -> dict[str, Tensor]:
    leaves = _leaves(case)
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, case.dout)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def _leaves(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v that ask for their gradients, on the same memory."""
    return (
        case.q.detach().requires_grad_(),
        case.k.detach().requires_grad_(),
        case.v.detach().requires_grad_(),
    )
