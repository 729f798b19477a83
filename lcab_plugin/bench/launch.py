"""Starts a training script on the ranks of this machine, and leaves nothing running behind; where the example
scripts are, and how a program that refused its input is told from one that broke."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError

SCRIPTS = {"deepspeed": "train_gpt.py", "megatron": "train_gpt_megatron.py"}  # of examples/, by framework
# What a program prints when it refuses its input: the last line of a traceback, which torch and DeepSpeed
# mark with the rank, `script.py: sentence`, or `error: sentence` of lcab.
_REFUSAL = re.compile(
    r"^(?:\[?rank\d+\]?: ?)?"
    r"(?P<who>(?:[\w.]*\.)?(?:LcabError|UnsupportedError)|[\w-]+\.py(?:: error)?|error): (?P<why>.+)$"
)
_GRACE = 5.0  # seconds for the other ranks to stop by themselves, and after SIGTERM


@dataclass(frozen=True)
class Outcome:
    """How a launch ended. ``status``: done, cannot run (the script raised an LcabError), crashed or timeout;
    ``reason``: the sentence of the refusal or what is known of the crash, None when done."""

    status: str
    reason: str | None
    seconds: float


def launch(
    script: Path,
    arguments: Sequence[str],
    *,
    world: int,
    device: str,
    logs: Path,
    timeout: float,
    watch: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run ``script`` on ``world`` ranks of this machine and wait for them.

    The ranks get torchrun's variables, so what torchrun or deepspeed can start runs here; without an agent a
    launch is two seconds shorter and every process is known. They meet at a store that is served from here:
    a free port that rank 0 were to open, once it has imported torch, may be taken by then. Their output goes
    to ``logs/rank<N>.log``. ``device``: ``cpu`` hides the GPUs. ``watch`` is called about ten times a second.

    Never raises for what the script does; the ranks are killed after ``timeout`` seconds, when one of them
    has failed, and when this call is interrupted.
    """
    logs.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    ranks: list[subprocess.Popen[bytes]] = []
    store = collectives.meeting_place()
    with ExitStack() as files:
        try:
            for environment in _environments(world, device, store.port):
                log = files.enter_context((logs / f"rank{environment['RANK']}.log").open("wb"))
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, str(script), *arguments],
                        env=os.environ | environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a process group of its own, so that its children go with it
                    )
                )
            timed_out = _wait(ranks, begin + timeout, watch)
            codes = [rank.poll() for rank in ranks]
        finally:
            _stop(ranks)
    seconds = time.monotonic() - begin
    if timed_out:
        return Outcome("timeout", f"still running after {timeout:.0f} s; see {logs}", seconds)
    if not any(codes):
        return Outcome("done", None, seconds)
    return Outcome(*_failure(codes, logs), seconds)


def _environments(world: int, device: str, port: int) -> list[dict[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch: no rank opens the store
        "TORCHELASTIC_RESTART_COUNT": "0",  # which older releases ask for then
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // world))),
        "PYTHONUNBUFFERED": "1",
    }
    if device == "cpu":
        shared |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _wait(ranks: Sequence[subprocess.Popen[bytes]], deadline: float, watch: Callable[[], None]) -> bool:
    """Wait until all ranks are done, or until a little after one failed. True for a time-out."""
    failed_at = None
    while any(rank.poll() is None for rank in ranks):
        now = time.monotonic()
        if failed_at is None and any(rank.poll() for rank in ranks):
            failed_at = now
        if failed_at is not None and now > failed_at + _GRACE:
            return False
        if now > deadline:
            return True
        watch()
        time.sleep(0.1)
    watch()
    return False


def _stop(ranks: Sequence[subprocess.Popen[Any]]) -> None:
    """End the process groups of all ranks, whatever is left of them."""
    for number, grace in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _GRACE)):
        for rank in ranks:
            try:
                os.killpg(rank.pid, number)
            except ProcessLookupError:
                continue
        until = time.monotonic() + grace
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
            time.sleep(0.05)


def example(name: str, option: str | None = None) -> Path:
    """A file of examples/, from the current folder or from the checkout this package runs from. ``option``:
    the flag that gives another.

    Raises:
        LcabError: there is none.
    """
    for root in (Path.cwd(), Path(__file__).parents[2]):
        if (path := root / "examples" / name).is_file():
            return path
    instead = f", or give {option}" if option else ""
    raise LcabError(f"there is no examples/{name} here; run in a checkout of lcab_plugin{instead}.")


def refusal(lines: Sequence[str], *, lcab: bool = False) -> str | None:
    """The last sentence in a program's output with which it refused its input; None if it did not.

    ``lcab``: whether that may be `lcab` itself. In the output of a script `error: ...` is a compiler's.
    """
    for line in reversed(lines):
        match = _REFUSAL.match(line)
        if match and (lcab or match["who"] != "error"):
            return match["why"]
    return None


def _failure(codes: Sequence[int | None], logs: Path) -> tuple[str, str]:
    """Status and reason of a launch in which a rank failed: a refusal on any rank explains the others."""
    last = []
    for number, code in enumerate(codes):
        if not code:
            continue
        lines = (logs / f"rank{number}.log").read_text(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        if (reason := refusal(lines)) is not None:
            return "cannot run", reason
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        last.append(f"rank {number}, {ended}: {lines[-1] if lines else 'no output'}")
    return "crashed", last[0]
