"""The collectives file by itself: transfers under way, and the bytes it counts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed import run

from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.collectives import AllToAllExchange, RingExchange


def payload(source: int, target: int, dtype: torch.dtype, amount: int) -> torch.Tensor:
    return torch.full((amount,), 10 * source + target + 1).to(dtype)


def uneven(rank: int, world: int) -> None:
    group = collectives.world()
    exchange = AllToAllExchange(group)
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
    first, second = AllToAllExchange(group), AllToAllExchange(group)
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
        exchange = RingExchange(group)
        for _ in range(2):
            exchange.start((x, x.float()), [x.shape, x.shape])
            exchange.wait()

    assert of(ring) == {"ring": 2 * (x.nbytes + 2 * x.nbytes)}
    sizes = [rank + 1 + t for t in range(world)]
    arriving = [s + 1 + rank for s in range(world)]
    others = sum(sizes) - sizes[rank]
    sends = [torch.ones(n) for n in sizes]
    assert of(lambda: collectives.all_to_all(sends, arriving, group)) == {"all_to_all": 4 * others}

    def exchange() -> None:
        under_way = AllToAllExchange(group)
        under_way.start(torch.cat(sends), sizes, arriving)
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
