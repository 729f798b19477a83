"""The context-parallel group as users see it: shards, positions, and attention over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcab_plugin import layout as layouts
from lcab_plugin.context_parallel import collectives
from lcab_plugin.context_parallel.gradients import home, with_homes
from lcab_plugin.context_parallel.group_cast import GroupCast
from lcab_plugin.context_parallel.ring_all_gather import RingAllGather
from lcab_plugin.context_parallel.ring_p2p import RingP2P
from lcab_plugin.context_parallel.topology import (
    PLACEMENTS,
    Axis,
    axis_sizes,
    build_axes,
    members_of,
    require_placement,
    resolve_degrees,
    strategy_name,
    with_mesh,
)
from lcab_plugin.context_parallel.ulysses import HeadExchange, ToHeads, ToTokens, require_heads
from lcab_plugin.errors import LcabError
from lcab_plugin.kernels.contract import Kernel, KernelOptions
from lcab_plugin.layout import Layout, View
from lcab_plugin.masks import AttentionMask
from lcab_plugin.operation import Local, Operation, attend, needs_backward, require_supported
from lcab_plugin.recompute import once

_RINGS: dict[str, type[RingP2P] | type[RingAllGather] | type[GroupCast]] = {
    "ring_p2p": RingP2P,
    "ring_all_gather": RingAllGather,
    "usp": RingP2P,
    "loongtrain": RingP2P,
    "group_cast": GroupCast,
}


def context_parallel(
    strategy: str,
    group: Any = None,
    *,
    ulysses: int | None = None,
    ring: int | None = None,
    inner_ring: int | None = None,
    placement: str = PLACEMENTS[0],
    layout: str = "zigzag",
    mask: AttentionMask | None = None,
    seqlen: int | None = None,
) -> ContextParallel:
    """Split sequences over the ranks of ``group``.

    Collective over the group, and over the world where groups are made: for ``ring_p2p``, ``usp``,
    ``loongtrain`` and ``group_cast`` (their gradients travel over groups of their own), and where ``group``
    is a DeviceMesh. Call it on every rank of the world, with its GPU set as the current device.

    Args:
        strategy: ``ulysses``, ``ring_p2p``, ``ring_all_gather``, ``group_cast``, ``usp`` (Ulysses around a
            ring), ``loongtrain`` (Ulysses around a ring of rings), ``none``, or Megatron's ``a2a``, ``p2p``,
            ``all_gather``, ``a2a+p2p``: its hierarchical context parallelism is ``usp``, ``head_first``.
        group: a ProcessGroup, a DeviceMesh, or None for the world. Several dimensions of a mesh that are
            called like the strategy's axes (``ulysses``, ``inner_ring``, ``ring``) give its degrees.
        ulysses, ring: degrees; one that is left out follows from the group's size.
        inner_ring: LoongTrain's, divides ``ring``: keys go round rings of this many ranks while the next
            ring's are on their way.
        placement: which ranks are neighbours in the group, and so in one node. ``head_first``: those that
            share a sequence's heads (Ulysses), and the rings go between nodes; ``context_first``: those of a
            ring (the inner ring first), and Ulysses goes between nodes.
        layout: ``contiguous``, ``zigzag``, ``striped`` or ``balanced``, which needs ``mask``, here or later.
        mask, seqlen: shape the layout; either may come later with :meth:`ContextParallel.with_layout`.

    Raises:
        LcabError: unknown strategy, placement or layout, or degrees that do not make the group's size.
    """
    name = strategy_name(strategy)
    require_placement(placement, name)
    given = {"ulysses": ulysses, "ring": ring, "inner_ring": inner_ring}
    degrees = resolve_degrees(name, len(members_of(group)), with_mesh(name, group, given, placement))
    whole, axes = build_axes(group, axis_sizes(degrees, placement))
    layouts.require_name(layout)
    if any(axis.size > 1 for axis in axes.values()):
        collectives.require_agreement("the context-parallel strategy", (name, list(degrees.items())), whole)
    if name in _RINGS and _RINGS[name] is not RingAllGather:
        axes = with_homes(axes, (axis for axis in axes if axis != "ulysses"))
    cp = ContextParallel(name, whole, axes, layout, None, None, _Handshake())
    return cp if mask is None and seqlen is None else cp.with_layout(mask=mask, seqlen=seqlen)


class _Handshake:
    """Whether the ranks have compared a call yet; shared by all layouts of one group."""

    def __init__(self) -> None:
        self.done = False


class ContextParallel:
    """One strategy over one group, with the layout of one sequence length, or of the two of cross-attention:
    the queries' here, and that of keys and values in :attr:`keys`.

    Attributes: ``strategy``, ``degrees`` (per axis, innermost first; a double ring's axes are ``inner_ring``
    and ``outer_ring``), ``placement`` (None where there are no two axes), ``composition`` (in words),
    ``size``, ``rank`` (within the group), ``group``, ``layout_name``.
    """

    def __init__(
        self,
        strategy: str,
        group: collectives.Group | None,
        axes: dict[str, Axis],
        layout_name: str,
        layout: Layout | None,
        keys: Layout | None,
        handshake: _Handshake,
    ) -> None:
        self.strategy, self.group, self.layout_name = strategy, group, layout_name
        self.degrees = {name: axis.size for name, axis in axes.items()}
        self.size = 1
        for degree in self.degrees.values():
            self.size *= degree
        self.rank = sum(axis.index * axis.stride for axis in axes.values())
        self._axes, self._layout, self._keys, self._handshake = axes, layout, keys, handshake
        self._rings = [axis for name, axis in axes.items() if name != "ulysses"]
        self.placement: str | None = None
        if len(axes) > 1:
            self.placement = PLACEMENTS[0] if next(iter(axes)) == "ulysses" else PLACEMENTS[1]
        self.composition = self._composition()

    def _composition(self) -> str:
        """The operations, outermost first, as in ``Ulysses(2) around RingP2P(4) of RingP2P(2)``."""
        rings = [f"{_RINGS[self.strategy].__name__}({axis.size})" for axis in reversed(self._rings)]
        inside = " of ".join(rings) or "kernel"
        return f"Ulysses({self.degrees['ulysses']}) around {inside}" if "ulysses" in self._axes else inside

    @property
    def layout(self) -> Layout:
        """The layout of the current sequence.

        Raises:
            LcabError: no sequence length was given yet.
        """
        if self._layout is None:
            raise LcabError("this group has no layout yet; make one for the batch: cp.with_layout(mask=mask)")
        return self._layout

    def with_layout(
        self, name: str | None = None, *, mask: AttentionMask | None = None, seqlen: int | None = None
    ) -> ContextParallel:
        """The same process groups with a layout for the next batch; no collective, layouts are cached.

        Args:
            name: another layout, or None for the one this group has.
            mask, seqlen: what the layout is for; one of them. ``balanced`` needs the mask, the same on every
                rank, and then holds for every layer of the batch, whatever their masks. A mask with another
                number of keys than of queries has a layout for each: see :attr:`keys`.

        Raises:
            LcabError: an unknown name, no sequence, or ``balanced`` without a mask.
        """
        if seqlen is None and mask is None:
            raise LcabError("a layout needs the sequence: pass mask= or seqlen=")
        tokens = seqlen if seqlen is not None else mask.q_len  # type: ignore[union-attr]
        if mask is not None and tokens != mask.q_len:
            raise LcabError(f"seqlen={tokens} but the mask is for {mask.q_len} queries; pass one of them")
        name = name or self.layout_name
        layout = layouts.make(name, self.size, tokens, mask)
        if mask is None or mask.k_len == tokens:
            return self._with(name, layout, layout)
        return self._with(name, layout, layouts.make_keys(name, self.size, mask))

    def holding(self, layout: Layout, keys: Layout | None = None) -> ContextParallel:
        """The same process groups over layouts made elsewhere: zigzag within every document, or in
        cross-attention the decoder's and the encoder's, ``decoder.holding(decoder.layout, encoder.layout)``.

        Raises:
            LcabError: a layout is for another number of ranks.
        """
        keys = layout if keys is None else keys
        for ranks in (len(layout.ranges), len(keys.ranges)):
            if ranks != self.size:
                raise LcabError(f"a layout for {ranks} ranks, in a group of {self.size}; make it for those")
        return self._with(layout.name, layout, keys)

    def _with(self, name: str, layout: Layout, keys: Layout) -> ContextParallel:
        if layout is self._layout and keys is self._keys:
            return self
        return ContextParallel(self.strategy, self.group, self._axes, name, layout, keys, self._handshake)

    @property
    def keys(self) -> ContextParallel:
        """The same process groups over the sequence of the keys: itself, unless the mask has another number
        of keys than of queries. ``cp.keys.shard(k)``, ``cp.keys.positions()`` and ``cp.keys.unshard(dk)`` are
        then right for keys and values, as ``cp.shard(q)`` is for queries."""
        layout = self.layout
        return self if self._keys is None or self._keys is layout else self.holding(self._keys)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's rows of ``x``, whose dimension ``dim`` is the whole sequence."""
        return self.layout.shard(x, self.rank, dim)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence from every rank's rows (collective). In backward each rank keeps its own rows of
        the gradient, as is right when every rank computes the same thing from the whole."""
        if x.shape[dim] != self.layout.length(self.rank):
            raise LcabError(
                f"dimension {dim} has {x.shape[dim]} rows, this rank's shard "
                f"{self.layout.length(self.rank)}; in cross-attention rows of keys are put together by "
                "cp.keys.unshard"
            )
        return _Unshard.apply(x, dim, self)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Global positions of this rank's rows, int64 [tokens]: for RoPE, labels and the loss."""
        return self.layout.positions(self.rank, device)

    def describe(self) -> str:
        """The strategy as composed, with its degrees and layout."""
        if self.size == 1:
            return "none"
        placement = f"{self.placement}, " if self.placement is not None else ""
        return f"{self.strategy}: {self.composition}, {placement}{self.layout_name} layout"

    def imbalance(self, mask: AttentionMask) -> float:
        """How uneven the ranks' work is under ``mask`` in this layout: visible pairs of the most loaded rank
        over the mean. Ulysses alone shares the work by heads, whatever the layout."""
        return layouts.imbalance(self.layout, mask)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        kernel: Kernel,
        options: KernelOptions,
        return_lse: bool,
        sink: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``out [b, t, h, dv]`` of this rank's rows under the global ``mask``, and ``lse [b, h, t]`` where it
        is wanted (Ulysses must exchange it). ``sink``: all heads', on every rank."""
        self._check(q, k, v, mask, kernel, options, sink)
        view = View(mask, self.layout, (self.rank,), (self.rank,), self._keys)  # type: ignore[arg-type]
        op: Operation = Local(kernel, needs_backward(q, k, v))
        for axis in self._rings:
            op = _RINGS[self.strategy](op, axis)
        ulysses = self._axes.get("ulysses")
        if ulysses is None or ulysses.size == 1:
            return attend(q, k, v, sink, op, view, options)
        exchange = HeadExchange(ulysses, view, q, k)
        if sink is not None:
            sink = sink[exchange.queries.slices[ulysses.index]]
        q, k, v = ToHeads.apply(exchange, q, k, v)
        out, lse = attend(q, k, v, sink, op, ulysses.all_rows(view), options)
        if return_lse:
            by_head = (lse.transpose(1, 2).unsqueeze(-1),)
            lse = once(lambda: tuple(exchange.to_tokens(by_head, (exchange.queries,))))[0]
            lse = lse.squeeze(-1).transpose(1, 2)
        return ToTokens.apply(exchange, out), lse if return_lse else None

    def _check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        kernel: Kernel,
        options: KernelOptions,
        sink: Tensor | None,
    ) -> None:
        """What is wrong with this call, raised on every rank at the group's first call."""
        problem = None
        try:
            self._check_own(q, k, v, mask, kernel, options)
        except LcabError as error:
            problem = str(error)
            if self._handshake.done or self.size == 1:
                raise
        if self._handshake.done or self.size == 1:
            return
        collectives.raise_together(problem, self.group)
        call = {
            "strategy": self.strategy,
            "degrees": list(self.degrees.items()),
            "kernel": kernel.name,
            "options": options,
            "layout": (self.layout_name, self.layout.digest, self.keys.layout.digest),
            "mask": mask.digest,
            "dtype": str(q.dtype),
            "sink": sink is not None,
            "batch, heads, kv_heads": (q.shape[0], q.shape[2], k.shape[2]),
            "head_dim, value head_dim": (q.shape[3], v.shape[3]),
        }
        collectives.require_agreement("the attention call", call, self.group)
        for axis in self._axes.values():
            for group in (axis.group, home(axis)):
                if group is not None:
                    collectives.connect(group, q.device)
        self._handshake.done = True

    def _check_own(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, kernel: Kernel, options: KernelOptions
    ) -> None:
        layout, keys = self.layout, self.keys.layout
        if (mask.q_len, mask.k_len) != (layout.seqlen, keys.seqlen):
            raise LcabError(
                f"the mask is for {mask.q_len} queries and {mask.k_len} keys, the layout for {layout.seqlen} "
                f"and {keys.seqlen}; use cp.with_layout(mask=mask)"
            )
        rows, own = (q.shape[1], k.shape[1]), (layout.length(self.rank), keys.length(self.rank))
        if rows != own:
            how = "them with cp.shard(x, dim=1)"
            if keys is not layout:
                how = "q with cp.shard(q, dim=1), k and v with cp.keys.shard(k, dim=1)"
            raise LcabError(
                f"this rank holds {own[0]} of {layout.seqlen} queries and {own[1]} of {keys.seqlen} keys, "
                f"but q has {rows[0]} rows and k {rows[1]}; shard {how}"
            )
        if "ulysses" in self.degrees:
            require_heads(q.shape[2], k.shape[2], self.degrees["ulysses"], self.size)
        require_supported(kernel, q, k, v, mask, options, needs_backward(q, k, v))


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, cp: ContextParallel) -> Tensor:
        ctx.dim, ctx.cp = dim, cp
        if cp.size == 1 or cp.group is None:
            return x.clone()
        layout, ranks = cp.layout, range(cp.size)
        longest = max(layout.length(r) for r in ranks)
        rows = x.movedim(dim, 0)
        padded = torch.cat((rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])))
        gathered = collectives.all_gather(padded, cp.group)
        whole = torch.cat([gathered[r, : layout.length(r)] for r in ranks])
        order = layout.ascending(tuple(ranks), x.device)
        return (whole if order is None else whole[order]).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.cp.shard(grad, ctx.dim), None, None
