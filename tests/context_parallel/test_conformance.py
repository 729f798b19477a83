"""Masks x strategies as composed x layouts x degrees x shapes on real processes equal the fp64 reference of
one, forward and backward: every cell of ``cp_cells``, many in one launch.

    pytest tests/context_parallel/test_conformance.py                      gloo on 1, 2 and 4 processes
    pytest tests/context_parallel/test_conformance.py --nightly            all degrees, and 8 processes
    pytest tests/context_parallel/test_conformance.py --cp-device cuda     NCCL on the GPUs there are

On GPUs the cells are judged in float64 with ``naive`` and in float32 and bfloat16 with ``triton``, by the
same error budget; degrees that need more GPUs than there are share them, as machines connected by sockets.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch.distributed as dist
from cp_cells import (
    CUDA_PRECISIONS,
    MASKS,
    PRECISIONS,
    REFUSED,
    SHAPES_EACH,
    Cell,
    cells,
    compositions,
    run_cell,
    run_few_tokens,
    shapes,
)
from distributed import run

from lcab_plugin import masks
from lcab_plugin.context_parallel import AXES
from lcab_plugin.context_parallel.ulysses import fits
from lcab_plugin.layout import LAYOUTS


def conformance(rank: int, world: int, tier: str, device: str) -> Counter[Cell]:
    """How often each cell ran. A wrong one fails the launch at its end, on every rank and in words."""
    ran: Counter[Cell] = Counter()
    wrong: list[str] = []
    for cell in cells(world, tier, device):
        try:
            wrong += [f"rank {rank}: {cell}: {problem}" for problem in run_cell(cell, world, device)]
        except Exception as error:
            raise AssertionError(f"rank {rank} of {world}: {cell}") from error
        ran[cell] += 1
    wrong += [f"rank {rank}: {problem}" for problem in run_few_tokens(world, device)]
    everyone: list[list[str]] = [[]] * world
    dist.all_gather_object(everyone, wrong)
    found = list(itertools.chain(*everyone))
    assert not found, f"{len(found)} problems, first:\n" + "\n".join(found[:20])
    return ran


def check(world: int, tier: str, device: str) -> None:
    every = Counter(cells(world, tier, device))
    for ran in run(conformance, world, tier, device, device=device):
        assert ran == every


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.nightly)])
def test_every_mask_strategy_and_layout(world, cp_device):
    check(world, "default", cp_device)


@pytest.mark.nightly
@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_mask_composition_and_layout(world, cp_device):
    check(world, "nightly", cp_device)


def test_one_process():
    """Without a process group every strategy is the kernel itself."""
    for cell in cells(1, "default"):
        if cell.mask in ("share_question", "islands"):
            assert not run_cell(cell, 1, "cpu"), str(cell)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_tables_are_whole(world, device):
    """Every builder, strategy and layout is in; any two values of two axes meet in the default tier."""
    assert set(masks.names()) < set(MASKS)
    composed = compositions(world)
    assert set(composed) == set(AXES) - {"none"}
    names = PRECISIONS if device == "cpu" else CUDA_PRECISIONS
    axes = {
        "mask": MASKS,
        "strategy": tuple(composed),
        "layout": tuple(LAYOUTS),
        "shape": tuple(shapes(world)),
        "precision": tuple(names),
    }
    table = [
        {**cell._asdict(), "strategy": cell.composition.strategy} for cell in cells(world, "default", device)
    ]
    assert {(c["mask"], c["strategy"], c["layout"]) for c in table} == set(
        itertools.product(MASKS, composed, LAYOUTS)
    )
    for (a, values), (b, others) in itertools.combinations(axes.items(), 2):
        missing = set(itertools.product(values, others)) - {(c[a], c[b]) for c in table}
        assert not missing, f"{a} and {b} never meet in {sorted(missing)}"
    every = {c for some in composed.values() for c in some}
    assert {c["composition"] for c in table} == every
    nightly = Counter((c.mask, c.composition, c.layout) for c in cells(world, "nightly", device))
    assert set(nightly) == set(itertools.product(MASKS, every, LAYOUTS))
    assert min(nightly.values()) >= SHAPES_EACH[world]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_declared_refusals_are_the_heads_that_cannot_be_dealt(world):
    for name, shape in shapes(world).items():
        degrees = [d for d in (1, 2, 4, 8) if world % d == 0]
        refused = {d for d in degrees if not fits(shape.heads, shape.kv_heads, d)}
        assert refused == {d for d in REFUSED.get(name, ()) if world % d == 0}
