"""A rank that dies or stalls in a training step ends the others with one error that names the transfer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import free_port

ROOT = Path(__file__).parents[2]
WORLD, VICTIM, TIMEOUT = 4, 2, 8.0
PATIENCE = 180.0  # seconds to start four processes on a busy machine


def train(tmp_path: Path, *arguments: str) -> tuple[list[int], list[str]]:
    """Exit status of every rank and the last line each wrote. Nobody ends them: they must end by themselves,
    the first error in a rank's collective being due within the timeout."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(WORLD),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("stalled_worker.py")
    logs = [tmp_path / f"{rank}.log" for rank in range(WORLD)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("wb") as file:
            command = [sys.executable, str(script), *arguments, str(VICTIM), str(TIMEOUT)]
            ranks.append(
                subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=file, stderr=file)
            )
    until = time.monotonic() + PATIENCE + 3 * TIMEOUT  # the stalled one sleeps for two timeouts
    try:
        codes = [rank.wait(max(0.0, until - time.monotonic())) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return codes, [log.read_text().strip().splitlines()[-1] if log.read_text() else "" for log in logs]


def check(codes: list[int], lines: list[str], end: str, doing: str) -> None:
    survivors = [rank for rank in range(WORLD) if rank != VICTIM]
    if end == "dies":
        assert codes[VICTIM] == -signal.SIGKILL
    else:
        survivors.append(VICTIM)  # it wakes up to find the others gone
    for rank in survivors:
        assert codes[rank] == 1, (rank, codes, lines)
        assert "TransferError: " in lines[rank], lines
        assert re.search(rf"did not end on rank {rank}: a rank died, stalled, or was slower", lines[rank])
    # who waits for the victim itself says so; ranks farther away may be told by one that ended since
    assert any(re.search(doing, lines[rank]) for rank in survivors), lines


KEYS = r"ring exchange of keys and values, step [1-3] of 3, from rank 2 \(and to rank 0\)"
HOME = r"ring exchange of (their gradients|keys and values), step [1-3] of 3, from rank 2 "


@pytest.mark.parametrize(
    ("end", "when", "doing"),
    [
        ("dies", "backward", HOME),
        ("stalls", "forward", KEYS),
        pytest.param("dies", "forward", KEYS, marks=pytest.mark.nightly),
    ],
)
def test_a_ring(end, when, doing, tmp_path):
    check(*train(tmp_path, "ring_p2p", "{}", end, when), end, doing)


@pytest.mark.nightly
@pytest.mark.parametrize("end", ["dies", "stalls"])
@pytest.mark.parametrize(
    ("strategy", "degrees", "when", "doing"),
    [
        ("ulysses", {}, "forward", "all-to-all of ranks 0, 1, 2, 3"),
        ("ring_all_gather", {}, "backward", "(all-gather|reduce-scatter) of ranks 0, 1, 2, 3"),
        ("group_cast", {}, "backward", "group cast of .*, step [12] of 2, over ranks 0, 1, 2, 3"),
        ("usp", {"ulysses": 2}, "backward", "ring exchange of .* from rank 0|all-to-all of ranks 2, 3"),
        ("loongtrain", {"ulysses": 1, "inner_ring": 2}, "forward", "ring exchange of .* from rank 2"),
    ],
)
def test_other_strategies(strategy, degrees, end, when, doing, tmp_path):
    check(*train(tmp_path, strategy, json.dumps(degrees), end, when), end, doing)
