"""Runs a function on real processes, gloo on a CPU or NCCL with a GPU each. One launch costs seconds, so a
suite runs its cells inside one."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _worker(
    rank: int,
    fn: Callable[..., Any],
    world: int,
    port: int,
    args: tuple[Any, ...],
    device: str,
    results: Path,
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    try:
        (results / str(rank)).write_bytes(pickle.dumps(fn(rank, world, *args)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(fn: Callable[..., Any], world: int, *args: Any, device: str = "cpu") -> list[Any]:
    """What ``fn(rank, world, *args)`` returned on each of ``world`` processes; the first failure is raised
    here. ``device``: ``cpu`` (gloo), or ``cuda`` (NCCL; rank r has GPU r)."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        mp.spawn(_worker, (fn, world, free_port(), args, device, results), world)
        return [pickle.loads((results / str(rank)).read_bytes()) for rank in range(world)]
