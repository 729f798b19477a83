"""Runs the agents of one launch, and tells from what they printed why it failed."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from lcab_plugin.bench.launch import refusal
from lcab_plugin.study import guard

_GRACE = 20.0  # seconds for the other nodes' agents to see that one has failed
_LATE = 60.0  # seconds after which a guard that should have stopped is stopped itself
_OOM = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory|MemoryError|std::bad_alloc")
_RAISED = re.compile(r"^(?:\[?rank\d+\]?: ?)?[\w.]*(?:Error|Exception|Exit)\w*: .+")
_FAREWELL = re.compile(
    r"ChildFailedError|CalledProcessError|SignalException"
)  # of launchers, about their ranks


@dataclass(frozen=True)
class Outcome:
    """How a launch ended. ``status``: done, cannot run, oom, error or timeout; ``reason``: None when done."""

    status: str
    reason: str | None
    seconds: float


def run(commands: Sequence[list[str]], logs: Path, seconds: float, watch: Callable[[], None]) -> Outcome:
    """Run one agent a node, guarded, and wait for all; output goes to ``logs/node<N>.log``.

    ``watch`` is called a few times a second. None of their processes is left when this returns or raises.
    """
    begin, running = time.monotonic(), []
    with ExitStack() as files:
        try:
            for number, command in enumerate(commands):
                log = files.enter_context((logs / f"node{number}.log").open("wb"))
                running.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # an interrupt at the terminal is ours
                    )
                )
            _wait(running, begin + seconds + _LATE, watch)
        finally:
            _stop(running)
    took = time.monotonic() - begin
    codes = [process.returncode for process in running]
    if guard.TIMED_OUT in codes:
        return Outcome("timeout", f"still running after {seconds:.0f} s; see {logs}", took)
    if not any(codes):
        return Outcome("done", None, took)
    return Outcome(*explain(codes, logs), took)


def _wait(running: Sequence[subprocess.Popen[bytes]], deadline: float, watch: Callable[[], None]) -> None:
    """Until all have ended, or a while after one failed."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in running]
        if None not in codes:
            break
        if any(codes):
            deadline = min(deadline, time.monotonic() + _GRACE)
        watch()
        time.sleep(0.2)
    watch()


def _stop(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Closing its standard input tells a guard to end everything."""
    for process in running:
        if process.stdin:
            with suppress(OSError):
                process.stdin.close()
    for process in running:
        try:
            process.wait(guard.GRACE + _LATE)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def explain(codes: Sequence[int], logs: Path) -> tuple[str, str]:
    """Status and reason of a failure: a refusal or missing memory on any node explains the others."""
    texts = [(logs / f"node{number}.log").read_text(errors="replace") for number in range(len(codes))]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    if (reason := refusal(lines, lcab=True)) is not None:
        return "cannot run", reason
    for line in lines:
        if _OOM.search(line):
            return "oom", line
    raised = [line for line in lines if _RAISED.match(line) and not _FAREWELL.search(line)]
    failed = [(n, c) for n, c in enumerate(codes) if c]  # of which some were ended because of the others
    node, code = next((f for f in failed if f[1] != guard.ABANDONED), failed[0])
    said = (raised or lines or ["no output"])[-1]
    return "error", f"node {node}, exit status {code}: {said}; see {logs}"
