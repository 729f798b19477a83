"""Runs a function on real processes, gloo on a CPU or NCCL on GPUs. One launch costs seconds, so a
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

from lcab_plugin.context_parallel import group_cast


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
    group_cast.FEW = 0  # else all that group cast receives in a test is too little for its stages
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if device == "cuda":
        take_gpu(rank, world)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    try:
        (results / str(rank)).write_bytes(pickle.dumps(fn(rank, world, *args)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def take_gpu(rank: int, world: int) -> None:
    """A GPU for each rank; with fewer GPUs than ranks, several ranks on one.

    NCCL refuses two ranks of one host on one GPU. Each round of ranks over the GPUs is given to it as a host
    of its own: NVLink within, sockets between, as on several machines. What that computes is what counts, as
    ranks that take turns on a GPU wait for each other.
    """
    gpus = torch.cuda.device_count()
    torch.cuda.set_device(rank % gpus)
    if world > gpus:
        sockets = {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo", "NCCL_MAX_NCHANNELS": "2"}
        os.environ.update(sockets, NCCL_HOSTID=f"host {rank // gpus}")


def run(fn: Callable[..., Any], world: int, *args: Any, device: str = "cpu") -> list[Any]:
    """What ``fn(rank, world, *args)`` returned on each of ``world`` processes; the first failure is raised
    here. ``device``: ``cpu`` (gloo), or ``cuda`` (NCCL, see ``take_gpu``)."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        mp.spawn(_worker, (fn, world, free_port(), args, device, results), world)
        return [pickle.loads((results / str(rank)).read_bytes()) for rank in range(world)]
