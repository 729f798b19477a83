"""Every strategy, degree, placement and layout that so many ranks admit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lcab_plugin.context_parallel.topology import AXES, PLACEMENTS
from lcab_plugin.planner.shape import Cluster


@dataclass(frozen=True)
class Candidate:
    """``cp`` ranks share a sequence, ``dp`` groups of them take sequences of their own; ``degrees`` by the
    names ``context_parallel()`` takes."""

    cp: int
    dp: int
    strategy: str
    degrees: tuple[tuple[str, int], ...]
    placement: str
    layout: str
    kernel: str


def divisors(n: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def sizes(cluster: Cluster) -> list[int]:
    """Context-parallel sizes at which the step's sequences fill all devices evenly."""
    return [cp for cp in divisors(cluster.world) if cluster.batch % (cluster.world // cp) == 0]


def splits(strategy: str, cp: int, trivial: bool = False) -> Iterator[dict[str, int]]:
    """Degrees that make ``cp`` ranks. Unless ``trivial`` ones count, those are left out that leave an axis at
    1, which is another strategy; a double ring without Ulysses is none."""
    if strategy == "usp":
        few = divisors(cp) if trivial else divisors(cp)[1:-1]
        yield from ({"ulysses": u, "ring": cp // u} for u in few)
    elif strategy == "loongtrain":
        for u in divisors(cp):
            rings = divisors(cp // u) if trivial else divisors(cp // u)[1:-1]
            yield from ({"ulysses": u, "inner_ring": g, "ring": cp // u} for g in rings)
    elif cp > 1:
        yield {AXES[strategy][0]: cp}


def every(
    cluster: Cluster,
    cps: list[int],
    strategies: list[str],
    layouts: list[str],
    kernels: list[str],
    trivial: bool = False,
) -> Iterator[Candidate]:
    """All of them; ``trivial`` as for ``splits``. Where one rank, or Ulysses alone, computes all rows, one
    layout stands for all: zigzag if it may be chosen."""
    one = ["zigzag"] if "zigzag" in layouts else layouts[:1]
    for cp in cps:
        dp = cluster.world // cp
        if cp == 1:
            yield from (Candidate(1, dp, "none", (), PLACEMENTS[0], one[0], k) for k in kernels)
            continue
        for strategy in strategies:
            for degrees in splits(strategy, cp, trivial) if strategy != "none" else ():
                shared = tuple(degrees.items())
                free = len(AXES[strategy]) > 1 and degrees.get("ulysses", 1) > 1
                for placement in PLACEMENTS if free else PLACEMENTS[:1]:
                    for layout in one if strategy == "ulysses" else layouts:
                        yield from (
                            Candidate(cp, dp, strategy, shared, placement, layout, k) for k in kernels
                        )
