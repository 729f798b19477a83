"""The collectives file by itself: transfers under way, and the bytes it counts."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.collectives import AllToAllExchange, RingExchange
from lcab_plugin.kernels import KernelOptions


def payload(source: int, target: int, dtype: torch.dtype, amount: int) -> torch.Tensor:
    return torch.full((amount,), 10 * source + target + 1).to(dtype)


def uneven(rank: int, world: int) -> None:
    group = collectives.world()
    exchange = AllToAllExchange(group, "rows", 1)
    tables = [
        [[3 * s + t for t in range(world)] for s in range(world)],
        [[0 if s == t else 5 for t in range(world)] for s in range(world)],
        [[7 if (s, t) == (0, world - 1) else 0 for t in range(world)] for s in range(world)],  # one edge
        [[0] * world for _ in range(world)],
    ]
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float16):
        for table in tables:
            sends = table[rank]
            receives = [table[s][rank] for s in range(world)]
            packed = torch.cat([payload(rank, t, dtype, n) for t, n in enumerate(sends)])
            exchange.start(packed, sends, receives)
            want = torch.cat([payload(s, rank, dtype, n) for s, n in enumerate(receives)])
            got = exchange.wait()
            assert got.dtype == dtype
            assert torch.equal(got, want)


def test_uneven_all_to_alls():
    run(uneven, 4)


def at_once(rank: int, world: int) -> None:
    """Rank 1 begins only after word from rank 0, which has begun; two exchanges are under way together."""
    group = collectives.world()
    first, second = (AllToAllExchange(group, name, 1) for name in ("rows", "gradients"))
    word = torch.zeros(1)
    if rank == 1:
        dist.recv(word, 0)
    amounts = [100_000] * world
    for exchange, value in ((first, 1.0), (second, 2.0)):
        exchange.start(torch.full((sum(amounts),), value + rank), amounts, amounts)
    if rank == 0:
        dist.send(word, 1)
    want = torch.arange(world).repeat_interleave(100_000)
    assert torch.equal(second.wait(), want + 2.0)
    assert torch.equal(first.wait(), want + 1.0)


def test_starting_does_not_wait_for_the_others():
    run(at_once, 2)


def counted(rank: int, world: int) -> None:
    group = collectives.world()

    def of(action) -> dict[str, int]:
        collectives.reset_bytes()
        action()
        return collectives.bytes_sent()

    x = torch.ones(world, 6, dtype=torch.bfloat16)
    assert of(lambda: collectives.all_gather(x, group)) == {"all_gather": (world - 1) * x.nbytes}
    assert of(lambda: collectives.reduce_scatter(x.float()[:, None], group)) == {
        "reduce_scatter": (world - 1) * 6 * 4
    }
    assert of(lambda: collectives.all_reduce_sum(x.clone())) == {"all_reduce": 2 * (world - 1) * 6 * 2}
    assert of(lambda: collectives.all_reduce_max(x.clone())) == {"all_reduce": 2 * (world - 1) * 6 * 2}

    def ring() -> None:
        exchange = RingExchange(group, "keys", 2, 6)
        for _ in range(2):
            exchange.start((x, x.float()), 6)
            exchange.wait()

    assert of(ring) == {"ring": 2 * (x.nbytes + 2 * x.nbytes)}
    sizes = [rank + 1 + t for t in range(world)]
    arriving = [s + 1 + rank for s in range(world)]
    others = sum(sizes) - sizes[rank]
    packed = torch.ones(sum(sizes))
    sends = [[torch.full((n,), float(rank)), torch.full((2, n), i + 0.5)] for i, n in enumerate(sizes)]
    receives = [[torch.zeros(n), torch.zeros(2, n)] for n in arriving]
    assert of(lambda: collectives.all_to_all(sends, receives, group)) == {"all_to_all": 3 * 4 * others}
    for i, (first, second) in enumerate(receives):
        assert torch.equal(first, torch.full_like(first, i if i != rank else 0))
        assert torch.equal(second, torch.full_like(second, rank + 0.5 if i != rank else 0))

    def exchange() -> None:
        under_way = AllToAllExchange(group, "rows", 1)
        under_way.start(packed, sizes, arriving)
        under_way.wait()

    assert of(exchange) == {"group_cast": 4 * others}
    assert of(lambda: collectives.all_gather_object(rank)) == {}
    snapshot = collectives.bytes_sent()
    snapshot["ring"] = 1
    assert collectives.bytes_sent() == {}


def test_bytes_to_others_are_counted_by_kind():
    run(counted, 4)


def test_a_group_of_one_sends_nothing():
    collectives.reset_bytes()
    collectives.all_reduce_sum(torch.ones(4))
    assert collectives.bytes_sent() == {}


# Nothing makes the host wait for a GPU


class Watch(TorchDispatchMode):
    """Lists operations that touch the host's memory. With tensors on the meta device as on a GPU those are
    index tensors built and copied call by call; what reads a value back (`item`, `nonzero`, a comparison in
    an `if`) cannot run on that device at all."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if any(x.device.type != "meta" for x in tensors):
            self.found.append(str(func))
        return out


class Shapes:
    """A kernel that returns tensors of the right shapes, for any device."""

    name = "shapes"

    def unavailable(self) -> None:
        return None

    def unsupported(self, *args) -> None:
        return None

    def forward(self, q, k, v, mask, options):
        return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(
            *q.shape[:1], q.shape[2], q.shape[1]
        ).float()

    def backward(self, dout, q, k, v, out, lse, mask, options):
        return tuple(map(torch.empty_like, (q, k, v)))


def network(me: int, world: int) -> SimpleNamespace:
    """What is used of torch.distributed, as rank ``me`` sees it where nothing is ever sent."""

    class Group:
        _device_types = ()

        def __init__(self, ranks, **_):
            self.ranks = list(ranks)

    everyone = Group(range(world))
    work = SimpleNamespace(wait=lambda: None)

    def members(group=None):
        return (everyone if group is None else group).ranks

    def gather(values, value, group=None):
        values[:] = [value] * len(values)

    return SimpleNamespace(
        group=SimpleNamespace(WORLD=everyone),
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_backend=lambda: "nccl",
        get_rank=lambda group=None: members(group).index(me),
        get_world_size=lambda group=None: len(members(group)),
        get_process_group_ranks=members,
        new_group=Group,
        all_gather_object=gather,
        all_reduce=lambda *args, **kwargs: None,
        P2POp=lambda *args: args,
        isend=None,
        irecv=None,
        batch_isend_irecv=lambda ops: [work],
        all_to_all_single=lambda *args, **kwargs: work,
    )


@pytest.mark.parametrize(
    ("strategy", "degrees"),
    [
        ("ulysses", {}),
        ("ring_p2p", {}),
        ("ring_all_gather", {}),
        ("usp", {"ulysses": 2}),
        ("loongtrain", {"ulysses": 1, "inner_ring": 2}),
        ("group_cast", {}),
    ],
)
def test_no_step_waits_for_the_device(strategy, degrees, monkeypatch):
    world, n = 4, 4099
    monkeypatch.setattr(collectives, "dist", network(1, world))
    monkeypatch.setattr(collectives, "_all_gather", lambda *args, **kwargs: None)
    monkeypatch.setattr(collectives, "_reduce_scatter", lambda *args, **kwargs: None)
    cp = lcab.context_parallel(strategy, **degrees)
    documents = masks.causal_document([700, 1, 2000, n - 2701])
    for mask, layout in itertools.product((masks.causal(n), documents), ("zigzag", "striped", "balanced")):
        cp = cp.with_layout(layout, mask=mask)
        own = cp.layout.length(cp.rank)
        q, k, v, dout = (
            torch.empty(2, own, heads, 16, device="meta", dtype=torch.bfloat16) for heads in (8, 4, 4, 8)
        )
        sink = torch.empty(8, device="meta")
        for x in (q, k, v, sink):
            x.requires_grad_()

        def step():
            out, _ = cp.attend(q, k, v, mask, Shapes(), KernelOptions(0.25), True, sink)  # noqa: B023
            out.backward(dout)  # noqa: B023

        step()  # indices are made and copied once for a layout
        with Watch() as watch:
            step()
        assert not watch.found, (strategy, layout, mask, watch.found)


def test_the_watch_sees_what_it_is_for():
    x = torch.empty(4, device="meta")
    with Watch() as watch:
        x[:2] + x[2:]
        assert not watch.found
        x.index_select(0, torch.arange(2).to("meta"))
    assert watch.found
    for reads_back in (
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: bool((x > 0).any()),
        lambda: x.cpu(),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)), Watch():
            reads_back()
