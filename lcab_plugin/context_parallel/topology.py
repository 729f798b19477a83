"""Which ranks stand on which axis of a strategy, and the process groups of those axes.

Ranks that are neighbours in a group belong in one node, so the order of the axes says what stays inside it.
``head_first``: Ulysses ranks are neighbours and the rings go between nodes. Megatron-core's hierarchical
``a2a+p2p`` is ``usp`` in this order: all-to-all in the first of its ``hierarchical_context_parallel_sizes``,
neighbours, and point-to-point in the second. ``context_first``: ring ranks are neighbours (of a double ring
the inner ring's first), and Ulysses goes between nodes. The words are LoongTrain's (arXiv 2406.18485).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.collectives import Group
from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.layout import View

# strategy: the degrees it takes, in the order head_first has their axes, innermost (neighbours) first;
# loongtrain's ``ring`` is the whole ring, of which ``inner_ring`` ranks are an inner one
AXES: dict[str, tuple[str, ...]] = {
    "none": (),
    "ulysses": ("ulysses",),
    "ring_p2p": ("ring",),
    "ring_all_gather": ("ring",),
    "usp": ("ulysses", "ring"),
    "loongtrain": ("ulysses", "inner_ring", "ring"),
    "group_cast": ("ring",),
}
ALIASES = {
    "a2a": "ulysses",
    "p2p": "ring_p2p",
    "all_gather": "ring_all_gather",
    "a2a+p2p": "usp",
}  # Megatron's
PLACEMENTS = ("head_first", "context_first")


@dataclass(frozen=True)
class Axis:
    """One axis of the context-parallel mesh: rank ``r`` stands at ``r // stride % size`` on it."""

    name: str
    size: int
    stride: int
    index: int
    group: Group | None

    def at(self, ranks: tuple[int, ...], index: int) -> tuple[int, ...]:
        """``ranks`` moved to position ``index`` of this axis."""
        return tuple(r + (index - r // self.stride % self.size) * self.stride for r in ranks)

    def keys_from(self, view: View, index: int) -> View:
        """The same queries against the keys that position ``index`` holds."""
        return replace(view, k_ranks=self.at(view.k_ranks, index))

    def all_keys(self, view: View) -> View:
        """The same queries against the keys of every position."""
        ranks = tuple(r for i in range(self.size) for r in self.at(view.k_ranks, i))
        return replace(view, k_ranks=ranks)

    def all_rows(self, view: View) -> View:
        """The queries and keys of every position."""
        q_ranks = tuple(r for i in range(self.size) for r in self.at(view.q_ranks, i))
        return replace(self.all_keys(view), q_ranks=q_ranks)


def strategy_name(name: str) -> str:
    """The strategy called ``name``, or by Megatron's word for it.

    Raises:
        LcabError: no strategy has that name; the message gives the nearest.
    """
    name = ALIASES.get(name, name)
    if name not in AXES:
        raise unknown("strategy", name, (*AXES, *ALIASES))
    return name


def require_placement(placement: str, strategy: str | None = None) -> None:
    """Check that a placement is called ``placement``, and that ``strategy`` has one to choose.

    Raises:
        LcabError: the name is unknown, or the strategy has only one axis.
    """
    if placement not in PLACEMENTS:
        raise unknown("placement", placement, PLACEMENTS)
    if placement != PLACEMENTS[0] and strategy is not None and len(AXES[strategy]) < 2:
        users = ", ".join(name for name, axes in AXES.items() if len(axes) > 1)
        raise LcabError(
            f"strategy {strategy!r} has no two axes to place, but placement={placement!r}; leave it out "
            f"(used by: {users})"
        )


def resolve_degrees(strategy: str, size: int, given: dict[str, int | None]) -> dict[str, int]:
    """The degrees of ``strategy`` over ``size`` ranks, in the order of ``AXES``.

    What ``given`` leaves out (one of those whose product is ``size``) follows from ``size``. ``inner_ring``
    is part of ``ring`` and never left out.

    Raises:
        LcabError: a degree is not positive, belongs to no axis of this strategy, or they do not make
            ``size``; ``inner_ring`` is missing or does not divide ``ring``.
    """
    axes = AXES[strategy]
    known = {name: degree for name, degree in given.items() if degree is not None}
    for name, degree in known.items():
        if degree < 1:
            raise LcabError(f"{name}={degree} is not a positive degree; leave it out or give 1 or more")
        if name not in axes and degree != 1:
            users = ", ".join(s for s, a in AXES.items() if name in a) or "no strategy here"
            raise LcabError(
                f"strategy {strategy!r} has no {name} axis, but {name}={degree} (used by: {users})"
            )
    factors = _factors(strategy)
    missing = [name for name in factors if name not in known]
    product = math.prod(known.get(name, 1) for name in factors)
    if len(missing) == 1 and size % product == 0:
        known[missing[0]] = size // product
    elif missing or product != size:
        wanted = " x ".join(f"{name}={known.get(name, '?')}" for name in factors) or "1"
        raise LcabError(
            f"strategy {strategy!r} with {wanted} does not make {size} ranks; "
            f"give degrees whose product is {size}" + (f" ({', '.join(missing)} missing)" if missing else "")
        )
    if "inner_ring" in axes:
        inner, ring = known.get("inner_ring"), known["ring"]
        if inner is None or ring % inner:
            fitting = ", ".join(str(n) for n in range(1, ring + 1) if ring % n == 0)
            found = "is missing" if inner is None else f"= {inner} does not divide it"
            raise LcabError(
                f"strategy {strategy!r} with ring={ring}: inner_ring {found}; give one of: {fitting}"
            )
    return {name: known[name] for name in axes}


def ranks_of(strategy: str, given: dict[str, int | None]) -> int | None:
    """How many ranks these degrees make; None where one that counts is left out."""
    degrees = [given[name] for name in _factors(strategy)]
    return None if None in degrees else math.prod(d for d in degrees if d is not None)


def _factors(strategy: str) -> list[str]:
    """The degrees whose product is the number of ranks."""
    return [name for name in AXES[strategy] if name != "inner_ring"]


def axis_sizes(degrees: dict[str, int], placement: str) -> dict[str, int]:
    """Sizes of the axes, innermost first. A double ring's are ``inner_ring`` and ``outer_ring``."""
    sizes = dict(degrees)
    if "inner_ring" in sizes:
        sizes["outer_ring"] = sizes.pop("ring") // sizes["inner_ring"]
    if placement == "context_first" and "ulysses" in sizes:
        sizes["ulysses"] = sizes.pop("ulysses")  # the outermost now
    return sizes


def with_mesh(
    strategy: str, group: Any, given: dict[str, int | None], placement: str
) -> dict[str, int | None]:
    """``given`` and what a DeviceMesh of several dimensions called like the strategy's axes adds to it; any
    other group, and a mesh with other names, adds nothing. In such a mesh ``ring`` beside ``inner_ring`` is
    the outer ring (``outer_ring`` will do too), as dimensions of a mesh cannot overlap.

    Raises:
        LcabError: a dimension differs from the degree given, or their order from the placement.
    """
    names = list(reversed(getattr(group, "mesh_dim_names", None) or ()))
    order = list(axis_sizes(dict.fromkeys(AXES[strategy], 1), placement))
    if "inner_ring" in names:
        names = ["outer_ring" if name == "ring" else name for name in names]
    elif "outer_ring" in order:
        order[order.index("outer_ring")] = "ring"
    if len(names) < 2 or not set(names) <= set(order):
        return given
    if names != [name for name in order if name in names]:
        raise LcabError(
            f"the mesh's dimensions, innermost first, are {', '.join(names)}, but {strategy!r} with "
            f"placement={placement!r} has {', '.join(order)}; change the placement or the order in the mesh"
        )
    sizes = dict(zip(names, reversed(group.mesh.shape), strict=True))
    if "outer_ring" in sizes:
        sizes["ring"] = sizes.pop("outer_ring") * sizes["inner_ring"]
    for name, size in sizes.items():
        if given.get(name) not in (None, size):
            raise LcabError(f"the mesh has {name}={size}, but {name}={given[name]} was given; leave it out")
    return {**given, **sizes}


def members_of(group: Any) -> list[int]:
    """World ranks of a ProcessGroup, a DeviceMesh (row-major) or, for None, the world."""
    if hasattr(group, "mesh_dim_names"):
        return [int(r) for r in group.mesh.flatten().tolist()]
    return collectives.global_ranks(group)


def build_axes(group: Any, degrees: dict[str, int]) -> tuple[Group | None, dict[str, Axis]]:
    """The group over all members, and every axis with its own group.

    Groups that do not exist yet are made once, in one order on all ranks: ``new_group`` is collective over
    the world, and a rank that is given only its own group cannot know its siblings, so memberships are
    gathered first.

    Args:
        degrees: sizes of the axes, innermost first.

    Raises:
        LcabError: ranks that make groups have other axes than this one.
    """
    collectives.settle_gloo_at_exit()
    members = members_of(group)
    size, index = len(members), members.index(collectives.rank())
    is_mesh = hasattr(group, "mesh_dim_names")
    whole = collectives.world() if group is None else None if is_mesh else group
    if size > 1 and (is_mesh or any(1 < degree < size for degree in degrees.values())):
        collectives.require_agreement("the context-parallel axes", list(degrees.items()))
        cells = sorted({tuple(m) for m in collectives.all_gather_object(members)})
    else:
        cells = []
    if size > 1 and is_mesh:
        whole = collectives.new_groups(cells)
    axes, stride = {}, 1
    for name, degree in degrees.items():
        own: Group | None = whole
        if size > 1 and 1 < degree < size:
            own = collectives.new_groups([line for cell in cells for line in _lines(cell, degree, stride)])
        axes[name] = Axis(name, degree, stride, index // stride % degree, own)
        stride *= degree
    return whole, axes


def _lines(cell: tuple[int, ...], degree: int, stride: int) -> list[tuple[int, ...]]:
    """The ranks of ``cell`` that differ on this axis alone, one line each."""
    starts = [r for r in range(len(cell)) if r // stride % degree == 0]
    return [tuple(cell[start + i * stride] for i in range(degree)) for start in starts]
