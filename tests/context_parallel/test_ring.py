"""What a ring promises beyond the right numbers: memory, overlap, skipped blocks, float32 sums."""

from __future__ import annotations

import pytest
import torch
from cases import errors, inputs, reference
from distributed import run

import lcab_plugin as lcab
from lcab_plugin import kernels, masks
from lcab_plugin.attention import Local
from lcab_plugin.context_parallel import collectives
from lcab_plugin.kernels import KernelOptions

N = 256


def saved_bytes(rank: int, world: int, strategy: str, file: str) -> None:
    cp = lcab.context_parallel(strategy, seqlen=N)
    x = inputs(N, N, 4, 2, 16, torch.float32, batch=1)
    q, k, v = (cp.shard(t, 1).requires_grad_() for t in x[:3])
    storages = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = lcab.attention(q, k, v, masks.causal(N), cp=cp)
    if rank == 0:
        torch.save(sum(storages.values()), file)
    out.sum().backward()


@pytest.mark.parametrize("strategy", ["ring_p2p", "ring_all_gather"])
def test_memory_saved_for_backward_falls_with_the_ranks(strategy, tmp_path):
    saved = {}
    for world in (1, 2, 4):
        run(saved_bytes, world, strategy, str(tmp_path / f"{world}"))
        saved[world] = torch.load(tmp_path / f"{world}")
    per_token = 4 * (16 * 4 + 16 * 2 * 2 + 16 * 4 + 4)  # q, k and v, out, lse
    assert saved == {world: per_token * N // world for world in (1, 2, 4)}


class Recording:
    """A kernel that records what it was asked to do, around the real one."""

    name = "recording"

    def __init__(self) -> None:
        self.kernel = kernels.get("sdpa_flash")
        self.log: list[str] = []
        self.keys: list[int] = []

    def __getattr__(self, name):
        return getattr(self.kernel, name)

    def forward(self, q, k, v, mask, options):
        self.log.append("forward")
        self.keys.append(k.shape[1])
        return self.kernel.forward(q, k, v, mask, options)

    def backward(self, *args):
        self.log.append("backward")
        return self.kernel.backward(*args)


def recorded(rank: int, world: int) -> None:
    """Under a contiguous layout rank r of a causal mask has r + 1 blocks to compute, the others are empty."""
    cp = lcab.context_parallel("ring_p2p", layout="contiguous", seqlen=N)
    x = inputs(N, N, 4, 2, 16, torch.float32)
    q, k, v = (cp.shard(t, 1).requires_grad_() for t in x[:3])
    kernel, options = Recording(), KernelOptions(0.25)
    out, _ = cp.attend(q, k, v, masks.causal(N), kernel, options, False)
    out.backward(cp.shard(x[3], 1))
    assert kernel.log == ["forward"] * (rank + 1) + ["backward"] * (rank + 1)
    kernel.keys.clear()
    cp.attend(q, k, v, masks.sliding_window_causal(N, 3), kernel, options, False)
    assert kernel.keys == [N // world, 3][: 1 + (rank > 0)], "only the keys that the mask shows"


def test_empty_blocks_are_skipped_and_keys_cropped():
    run(recorded, 4)


def overlapped(rank: int, world: int) -> None:
    """Every transfer has begun before the block that hides it is computed, and is waited for after."""
    events: list[str] = []
    start, wait = collectives.RingExchange.start, collectives.RingExchange.wait
    forward, backward = Local.forward, Local.backward

    def logged(name, f):
        def call(*args, **kwargs):
            events.append(name)
            return f(*args, **kwargs)

        return call

    collectives.RingExchange.start = logged("start", start)
    collectives.RingExchange.wait = logged("wait", wait)
    Local.forward, Local.backward = logged("compute", forward), logged("compute", backward)
    cp = lcab.context_parallel("ring_p2p", seqlen=N)
    x = inputs(N, N, 4, 2, 16, torch.float32)
    q, k, v = (cp.shard(t, 1).requires_grad_() for t in x[:3])
    out = lcab.attention(q, k, v, masks.causal(N), cp=cp)
    steps = ["start", "compute", "wait"] * (world - 1)
    assert events == [*steps, "compute"]
    events.clear()
    out.backward(cp.shard(x[3], 1))
    # keys start, block computed, the sum of its gradients so far arrives and leaves, keys arrive; the own
    # block's gradients stay, and the next one's have nothing to wait for
    first = ["start", "compute", "wait", "start", "compute", "start", "wait"]
    middle = ["start", "compute", "wait", "start", "wait"] * (world - 3)
    assert events == [*first, *middle, "compute", "wait", "start", "wait"]


def clocked(rank: int, world: int, transfer: float) -> None:
    """A clock that only blocks (1 each) and waits for transfers (``transfer`` each) advance. A group's link
    carries one transfer at a time: gradients have their own, or they would hold keys up."""
    now, blocks = 0.0, 0
    links: dict[object, float] = {}
    arrivals: dict[object, float] = {}
    memory: dict[object, set[int]] = {}
    start, wait = collectives.RingExchange.start, collectives.RingExchange.wait

    def slow_start(self, sends, rows):
        links[self._over] = arrivals[self] = max(now, links.get(self._over, 0.0)) + transfer
        start(self, sends, rows)

    def slow_wait(self):
        nonlocal now
        now = max(now, arrivals[self])
        received = wait(self)
        memory.setdefault(self, set()).update(x.untyped_storage().data_ptr() for x in received)
        return received

    def block(compute):
        def timed(*args):
            nonlocal now, blocks
            now, blocks = now + 1.0, blocks + 1
            compute(*args)

        return timed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives.RingExchange, "start", slow_start)
        patch.setattr(collectives.RingExchange, "wait", slow_wait)
        patch.setattr(Local, "forward", block(Local.forward))
        patch.setattr(Local, "backward", block(Local.backward))
        cp = lcab.context_parallel("ring_p2p", seqlen=N + 1)
        x = inputs(N + 1, N + 1, 4, 2, 16, torch.float32)
        q, k, v = (cp.shard(t, 1).requires_grad_() for t in x[:3])
        out = lcab.attention(q, k, v, masks.causal(N + 1), cp=cp)
        steps = (world - 1) * max(1.0, transfer)  # each hides the transfer or is hidden by it
        assert (now, blocks, len(links)) == (steps + 1.0, world, 1)
        now, blocks = 0.0, 0
        links.clear()
        out.backward(cp.shard(x[3], 1))
        # after the last block its gradient goes home, and nothing is left to hide that
        assert (now, blocks, len(links)) == (steps + 1.0 + transfer, world, 2)
        # keys and values, forward and backward, and their gradients: two sets of buffers each, in turn
        assert sorted(map(len, memory.values())) == [4, 4, 4]


def ring_times(rank: int, world: int) -> None:
    for transfer in (0.5, 1.0, 2.0):
        clocked(rank, world, transfer)
    overlapped(rank, world)


def test_transfers_overlap_the_compute():
    run(ring_times, 4)


def sums_in_float32(rank: int, world: int) -> None:
    """bfloat16 over four ranks loses no more than on one: partial results merge in float32, cast once."""
    mask = masks.causal(N)
    x = inputs(N, N, 4, 4, 32, torch.bfloat16)
    want = reference(*x, mask)

    def run_one(cp):
        q, k, v = (t if cp is None else cp.shard(t, 1) for t in x[:3])
        q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
        out = lcab.attention(q, k, v, mask, cp=cp)
        out.backward(x[3] if cp is None else cp.shard(x[3], 1))
        return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}

    alone = errors(run_one(None), want)
    for strategy in ("ring_p2p", "ring_all_gather"):
        cp = lcab.context_parallel(strategy, seqlen=N)
        got = errors({t: cp.unshard(y, 1) for t, y in run_one(cp).items()}, want)
        for tensor, error in got.items():
            assert error <= 1.5 * alone[tensor] + 2**-9, (strategy, tensor, error, alone[tensor])


def test_sums_are_float32():
    run(sums_in_float32, 4)
