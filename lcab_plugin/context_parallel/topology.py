"""Which ranks stand on which axis of a strategy, and the process groups of those axes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.collectives import Group
from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.layout import View

# strategy: its axes, innermost first (neighbouring ranks, so inside a node)
AXES: dict[str, tuple[str, ...]] = {
    "none": (),
    "ulysses": ("ulysses",),
    "ring_p2p": ("ring",),
    "ring_all_gather": ("ring",),
    "usp": ("ulysses", "ring"),
}
ALIASES = {
    "a2a": "ulysses",
    "p2p": "ring_p2p",
    "all_gather": "ring_all_gather",
    "a2a+p2p": "usp",
}  # Megatron's


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


def resolve_degrees(strategy: str, size: int, given: dict[str, int | None]) -> dict[str, int]:
    """The degree of every axis of ``strategy`` over ``size`` ranks, innermost first.

    What ``given`` leaves out (one axis at most) follows from ``size``.

    Raises:
        LcabError: a degree is not positive, belongs to no axis of this strategy, or they do not make
            ``size``.
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
    missing = [name for name in axes if name not in known]
    product = 1
    for name in axes:
        product *= known.get(name, 1)
    if len(missing) == 1 and size % product == 0:
        known[missing[0]] = size // product
    elif missing or product != size:
        wanted = " x ".join(f"{name}={known.get(name, '?')}" for name in axes) or "1"
        raise LcabError(
            f"strategy {strategy!r} with {wanted} does not make {size} ranks; "
            f"give degrees whose product is {size}" + (f" ({', '.join(missing)} missing)" if missing else "")
        )
    return {name: known[name] for name in axes}


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
    """
    collectives.settle_gloo_at_exit()
    members = members_of(group)
    size, index = len(members), members.index(collectives.rank())
    is_mesh = hasattr(group, "mesh_dim_names")
    whole = collectives.world() if group is None else None if is_mesh else group
    if size > 1 and (is_mesh or any(1 < degree < size for degree in degrees.values())):
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
