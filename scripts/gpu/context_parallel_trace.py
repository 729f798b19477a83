"""One forward and backward of every strategy under torch's profiler; torchrun starts it, rank 0 writes.

    torchrun --nproc-per-node 8 scripts/gpu/context_parallel_trace.py OUT KERNEL HEADS:KV HEAD_DIM SEQLEN

Prints, per strategy, the time that transfers and other kernels took on rank 0 and how long both ran at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.bench.cp import STRATEGIES, degrees, suited
from lcab_plugin.context_parallel import collectives


def total(spans: list[tuple[float, float]]) -> float:
    """Length of the union, in the unit of the spans."""
    length, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        length += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return length


def report(name: str, profiled: profile) -> str:
    """How long rank 0's GPU transferred, computed, and did both."""
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiled.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            spans["nccl" in event.name.lower()].append(span)
    transfers, others = total(spans[True]), total(spans[False])
    both = transfers + others - total(spans[True] + spans[False])
    shown = {"transfers": transfers, "kernels": others, "at once": both}
    return f"{name}: " + ", ".join(f"{what} {micros / 1e3:.3f} ms" for what, micros in shown.items())


def main(out: Path, kernel: str, heads: tuple[int, int], head_dim: int, seqlen: int) -> None:
    """Every strategy in turn, causal."""
    cuda = torch.cuda.is_available()
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    collectives.join("nccl" if cuda else "gloo", 120.0)
    mask = masks.causal(seqlen)
    for strategy in STRATEGIES:
        axes, layout = degrees(strategy, collectives.world_size()), suited(strategy, "causal")
        cp = lcab.context_parallel(strategy, **axes, layout=layout, mask=mask)
        tokens = cp.layout.length(cp.rank)
        q, k, v, dout = (
            torch.randn(1, tokens, h, head_dim, device=device, dtype=torch.bfloat16)
            for h in (heads[0], heads[1], heads[1], heads[0])
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]

        def step() -> None:
            lcab.attention(*leaves, mask, kernel=kernel, cp=cp).backward(dout)  # noqa: B023
            if cuda:
                torch.cuda.synchronize()

        for _ in range(2):  # compiles, connects
            step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities) as profiled:
            step()
        if collectives.rank() == 0:
            profiled.export_chrome_trace(str(out / f"trace-{strategy}.json.gz"))
            print(report(strategy, profiled) if cuda else f"{strategy}: no GPU, no times", flush=True)
    collectives.barrier()
    collectives.leave()


if __name__ == "__main__":
    folder, chosen, shared, dim, length = sys.argv[1:]
    query_heads, kv_heads = map(int, shared.split(":"))
    main(Path(folder), chosen, (query_heads, kv_heads), int(dim), int(length))
