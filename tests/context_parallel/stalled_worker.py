"""A training loop over gloo in which one rank dies or stalls in the middle of a step."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.context_parallel import collectives, group_cast
from lcab_plugin.operation import Local

N, STEPS = 128, 4


def main(strategy: str, degrees: str, end: str, when: str, victim: int, timeout: float) -> None:
    torch.set_num_threads(1)
    group_cast.FEW = 0  # else what group cast receives is too little for two steps
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    port = int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=180)  # to start on a busy machine; the short timeout is for the training
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=patience)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    mask = masks.causal(N)
    cp = lcab.context_parallel(strategy, **json.loads(degrees), mask=mask)
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.Linear(16, 3 * 4 * 8)
    optimizer = torch.optim.SGD(weight.parameters(), 0.1)
    compute = getattr(Local, when)

    def ends(*args: object) -> None:
        if end == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2 * timeout)
        compute(*args)

    for step in range(STEPS):
        if (rank, step) == (victim, 2):
            setattr(Local, when, ends)
        x = cp.shard(torch.randn(1, N, 16, generator=g))
        q, k, v = weight(x).unflatten(-1, (12, 8)).split(4, 2)
        lcab.attention(q, k, v, mask, kernel="naive", cp=cp).square().sum().backward()
        for parameter in weight.parameters():
            collectives.all_reduce_sum(parameter.grad)
        optimizer.step()
    raise SystemExit(f"rank {rank} of {world} trained to the end")


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]), float(sys.argv[6]))
