"""The cells of context parallelism: masks x strategies as composed x layouts x shapes x precisions, which of
them are refused, and how one is run on real processes and judged.

``cells(world, tier)`` lists a tier's. ``default`` holds every mask x strategy x layout, and takes the shapes,
the degrees and the precisions in turn so that any two values of any two axes meet; ``nightly`` holds every
mask x composition x layout, each with several shapes (``SHAPES_EACH``). Refusals are declared in ``REFUSED``
and ``REFUSED_VALUES``: a refused cell runs too, and must be refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from cases import Expected, expected, families, inputs
from torch import Tensor

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.context_parallel import AXES, STRATEGIES
from lcab_plugin.context_parallel.topology import PLACEMENTS
from lcab_plugin.layout import LAYOUTS
from lcab_plugin.masks import AttentionMask


@dataclass(frozen=True)
class Composition:
    """A strategy with its degrees; a ring that is no double ring has ``inner`` 1."""

    strategy: str
    ulysses: int = 1
    inner: int = 1
    outer: int = 1
    placement: str = PLACEMENTS[0]

    def __str__(self) -> str:
        return f"{self.strategy} {self.ulysses}x{self.inner}x{self.outer} {self.placement}"

    def group(self, group: Any = None) -> lcab.ContextParallel:
        """Over ``group`` (the world if None), without a layout."""
        degrees = {"ulysses": self.ulysses, "ring": self.inner * self.outer, "inner_ring": self.inner}
        given = {axis: degrees[axis] for axis in AXES[self.strategy]}
        return lcab.context_parallel(self.strategy, group, placement=self.placement, **given)


def compositions(world: int) -> dict[str, list[Composition]]:
    """Every way to put each strategy together over ``world`` ranks."""
    found: dict[str, list[Composition]] = {name: [] for name in STRATEGIES if name != "none"}
    degrees = [d for d in range(1, world + 1) if world % d == 0]
    for ulysses, inner in itertools.product(degrees, degrees):
        outer, rest = divmod(world, ulysses * inner)
        if rest:
            continue
        for name, axes in AXES.items():
            fits = (
                ("ulysses" in axes or ulysses == 1)
                and ("inner_ring" in axes or inner == 1)
                and ("ring" in axes or outer == 1)
            )
            if name == "none" or not fits:
                continue
            two_axes = 1 < ulysses < world
            for placement in PLACEMENTS if two_axes else PLACEMENTS[:1]:
                found[name].append(Composition(name, ulysses, inner, outer, placement))
    return found


class Shape(NamedTuple):
    """Query and key/value heads, head_dim and the values', and what to add to the tokens."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    more: int = 0


class Precision(NamedTuple):
    """A kernel and the dtype it is judged in; on a GPU the kernels run at their own head_dim."""

    kernel: str
    dtype: torch.dtype


def shapes(world: int) -> dict[str, Shape]:
    """``more`` of 5 leaves shards, chunks and halves of zigzag uneven at every degree."""
    return {
        "heads": Shape(8, 8, 16, 16),
        "groups": Shape(16, 8, 16, 16, more=5),
        "one key head": Shape(8, 1, 16, 16, more=1),
        "fewer key heads than ranks": Shape(2 * world, max(1, world // 2), 16, 16, more=5),
        "uneven groups": Shape(2 * world + 2, world + 1, 16, 16, more=5),
        "groups that would be cut": Shape(6, 2, 16, 16, more=3),
        "wider values": Shape(8, 8, 16, 24, more=5),
        "narrower values": Shape(8, 4, 16, 8),
    }


PRECISIONS = {
    "naive float64": Precision("naive", torch.float64),
    "math float32": Precision("sdpa_math", torch.float32),
    "flash float32": Precision("sdpa_flash", torch.float32),
    "flash bfloat16": Precision("sdpa_flash", torch.bfloat16),
}
CUDA_PRECISIONS = {"naive float64": PRECISIONS["naive float64"]} | {
    f"triton {name}": Precision("triton", dtype)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
}
# shape: the Ulysses degrees that would cut a group of query heads unevenly
REFUSED = {"groups that would be cut": {4, 8}}
# precision: the shapes whose values its kernel does not take
REFUSED_VALUES = {name: {"wider values", "narrower values"} for name in ("flash float32", "flash bfloat16")}


class Cell(NamedTuple):
    """One point of the product, by names."""

    mask: str
    composition: Composition
    layout: str
    shape: str
    precision: str

    def __str__(self) -> str:
        return f"{self.mask} x {self.composition} x {self.layout} x {self.shape} x {self.precision}"

    @property
    def refusal(self) -> str | None:
        """The words of the refusal that is declared for this cell."""
        if self.composition.ulysses in REFUSED.get(self.shape, ()):
            return f"cannot be dealt to {self.composition.ulysses} Ulysses ranks"
        if self.shape in REFUSED_VALUES.get(self.precision, ()):
            return "value head_dim"
        return None


def masks_of(n: int) -> dict[str, AttentionMask]:
    """Every family, and one under which whole ranks have queries or keys that meet nothing."""
    islands = [(3, 9, 0, 5), (9, 20, 2, 20, None, 0), (n - 9, n - 3, 7, n - 5)]
    return families(n) | {"islands": AttentionMask(n, n, islands)}


MASKS = tuple(masks_of(96))


# how many shapes every mask x composition x layout has in the slow tier, which is to end in minutes
SHAPES_EACH = {2: 8, 4: 4, 8: 1}


def cells(world: int, tier: str, device: str = "cpu") -> list[Cell]:
    """The cells of a tier, those of one mask, shape and precision side by side."""
    table = _default if tier == "default" else _nightly
    names = tuple(PRECISIONS if device == "cpu" else CUDA_PRECISIONS)
    # without repetitions and, as ranks must agree, in one order
    every = dict.fromkeys(table(world, names))
    return sorted(every, key=lambda cell: (cell.shape, cell.mask, cell.precision))


def _default(world: int, precisions: tuple[str, ...]) -> Iterator[Cell]:
    names = tuple(shapes(world))
    composed = compositions(world)
    for (a, mask), (b, strategy), (c, layout) in itertools.product(
        enumerate(MASKS), enumerate(composed), enumerate(LAYOUTS)
    ):
        turn = a + len(MASKS) * c
        composition = composed[strategy][turn % len(composed[strategy])]
        yield Cell(mask, composition, layout, names[(a + 3 * c + b) % len(names)], precisions[0])
        if (a + b + c) % 2:  # half of them again
            precision = precisions[1 + (a // 2 + b // 2 + c) % (len(precisions) - 1)]
            yield Cell(mask, composition, layout, names[(turn // 3 + 5 * b) % len(names)], precision)


def _nightly(world: int, precisions: tuple[str, ...]) -> Iterator[Cell]:
    every = [c for composed in compositions(world).values() for c in composed]
    names, each = tuple(shapes(world)), SHAPES_EACH[world]
    for (a, mask), (b, composition), (c, layout) in itertools.product(
        enumerate(MASKS), enumerate(every), enumerate(LAYOUTS)
    ):
        turn = a + b + 3 * c
        for i in range(each):
            shape = names[(turn + i * len(names) // each) % len(names)]
            yield Cell(mask, composition, layout, shape, precisions[0])
        if each > 1 or (a + b + c) % 4 == 0:
            precision = precisions[1 + (turn // 2) % (len(precisions) - 1)]
            yield Cell(mask, composition, layout, names[(turn + 3) % len(names)], precision)


@lru_cache(maxsize=2)  # the cells of one question stand side by side
def question(
    mask: str, shape: Shape, dtype: torch.dtype, device: str
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], AttentionMask, Expected]:
    """q, k, v and dout of the whole sequence, its mask, and the answer. On a GPU there are more tokens, and
    head_dims that its kernels take."""
    n, wider = (96, 1) if device == "cpu" else (768, 4)
    n += shape.more
    drawn = inputs(
        n, n, shape.heads, shape.kv_heads, shape.dim * wider, dtype, value_dim=shape.value_dim * wider
    )
    q, k, v, dout = (x.to(device) for x in drawn)
    m = masks_of(n)[mask]
    return (q, k, v, dout), m, expected(q, k, v, dout, m)


@cache
def _group(composition: Composition) -> lcab.ContextParallel:
    return composition.group()


def attend(
    cp: lcab.ContextParallel, x: tuple[Tensor, ...], mask: AttentionMask, kernel: str, **options: Any
) -> dict[str, Tensor]:
    """out, lse and gradients of this rank's rows of ``x``, the whole q, k, v and dout."""
    q, k, v = (cp.shard(t, 1).detach().requires_grad_() for t in x[:3])
    out, lse = lcab.attention(q, k, v, mask, kernel=kernel, cp=cp, return_lse=True, **options)
    out.backward(cp.shard(x[3], 1))
    return {"out": out.detach(), "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}


def run_cell(cell: Cell, world: int, device: str) -> list[str]:
    """What is wrong with a cell on this rank, in words; none where it is right, or refused as declared."""
    precision = (PRECISIONS | CUDA_PRECISIONS)[cell.precision]
    x, mask, answer = question(cell.mask, shapes(world)[cell.shape], precision.dtype, device)
    cp = _group(cell.composition).with_layout(cell.layout, mask=mask)
    try:
        got = attend(cp, x, mask, precision.kernel)
    except lcab.LcabError as refusal:
        if cell.refusal is None or cell.refusal not in str(refusal):
            return [f"refused, which is not declared: {refusal}"]
        return []
    if cell.refusal is not None:
        return [f"was not refused, and is declared to be: {cell.refusal}"]
    return judged(cp, got, x[0], answer)


def judged(cp: lcab.ContextParallel, got: dict[str, Tensor], q: Tensor, answer: Expected) -> list[str]:
    """What is wrong with this rank's rows, with their positions, or with all rows put together again."""
    positions = cp.positions(q.device)
    if not torch.equal(q[:, positions], cp.shard(q, 1)):
        return ["cp.positions() are not those of the rows"]
    whole = {"out": cp.unshard(got["out"], 1)}
    return answer.problems_of_rows(got, positions) + answer.problems(whole)


def run_few_tokens(world: int, device: str) -> list[str]:
    """Sequences of fewer tokens than ranks, or hardly more: some rank has none; every strategy and layout."""
    found = []
    for n in (1, world - 1, world + 1):
        mask = masks.causal(n)
        x = tuple(t.to(device) for t in inputs(n, n, 2 * world, world, 16, torch.float64))
        answer = expected(*x, mask)
        for composed in compositions(world).values():
            for composition, layout in zip(itertools.cycle(composed), LAYOUTS, strict=False):
                cp = _group(composition).with_layout(layout, mask=mask)
                wrong = judged(cp, attend(cp, x, mask, "naive"), x[0], answer)
                found += [f"{n} tokens x {composition} x {layout}: {problem}" for problem in wrong]
    return found
