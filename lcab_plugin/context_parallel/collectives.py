"""Every call to torch.distributed. No attention here.

Buffers are made contiguous before any ``empty_like``: gloo fills an output of permuted strides wrongly and
without a word, and the mistake shows only in gradients.
"""

from __future__ import annotations

import atexit
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lcab_plugin.errors import LcabError

Group = dist.ProcessGroup
T = TypeVar("T")

_sent: Counter[str] = Counter()


def bytes_sent() -> dict[str, int]:
    """Bytes of tensors this rank has sent to others since :func:`reset_bytes`, per kind of collective.

    ``ring``, ``all_to_all``, ``group_cast``: what left this rank. ``all_gather``, ``reduce_scatter``,
    ``all_reduce``: the least a rank must send for one, whatever algorithm the backend takes. Barriers and the
    Python objects of handshakes are not counted.
    """
    return dict(_sent)


def reset_bytes() -> None:
    """Count from zero."""
    _sent.clear()


def _count(kind: str, elements: int, like: Tensor) -> None:
    if elements:
        _sent[kind] += elements * like.element_size()


def is_initialized() -> bool:
    """Whether a default process group exists."""
    return dist.is_available() and dist.is_initialized()


def settle_gloo_at_exit() -> None:
    """Let gloo's worker threads finish before the interpreter goes; for other backends nothing is done.

    A worker drops the tensors of a collective after that has returned, which takes the GIL. One that asks for
    it while the interpreter finalises is ended by Python, and the process aborts: "terminate called without
    an active exception" after a run that did everything right (torch 2.13, every tenth short run on a busy
    machine). Sleeping gives the GIL away while threads may still have it.
    """
    if is_initialized() and "gloo" in dist.get_backend():
        _sleep_at_exit()


@cache
def _sleep_at_exit() -> None:
    atexit.register(time.sleep, 0.2)


def join(backend: str, timeout: float) -> None:
    """Meet the other ranks; address and rank are in torchrun's variables. ``timeout``: seconds."""
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    settle_gloo_at_exit()


def leave() -> None:
    """The end of the process group; not after a failure: it may wait for ranks that wait for this one."""
    dist.destroy_process_group()


def rank(group: Group | None = None) -> int:
    """This process's rank in ``group`` (the world if None; 0 without a process group)."""
    return dist.get_rank(group) if is_initialized() else 0


def world_size(group: Group | None = None) -> int:
    """Number of ranks in ``group`` (the world if None; 1 without a process group)."""
    return dist.get_world_size(group) if is_initialized() else 1


def world() -> Group | None:
    """The group of all ranks; None without a process group."""
    return dist.group.WORLD if is_initialized() else None


def global_ranks(group: Group | None = None) -> list[int]:
    """The world's numbers of the ranks of ``group``, in group order."""
    if not is_initialized():
        return [0]
    return dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)


def new_groups(members: Sequence[Sequence[int]]) -> Group:
    """Make one group per list of world ranks, all ranks in the same order; returns the one with this rank.

    Collective over the world. Every rank must pass the same lists, and be in exactly one of them.
    """
    mine = None
    for ranks in members:
        group = dist.new_group(list(ranks))
        if rank() in ranks:
            mine = group
    if mine is None:
        raise LcabError(f"rank {rank()} is in none of the groups {[list(m) for m in members]}")
    return mine


def barrier(group: Group | None = None) -> None:
    """Wait for every rank of the group."""
    if is_initialized():
        dist.barrier(group)


def all_reduce_sum(x: Tensor, group: Group | None = None) -> Tensor:
    """Sum ``x`` over the group, in place."""
    if world_size(group) > 1:
        _count_all_reduce(x, group)
        dist.all_reduce(x, group=group)
    return x


def all_reduce_max(x: Tensor, group: Group | None = None) -> Tensor:
    """Maximum of ``x`` over the group, in place."""
    if world_size(group) > 1:
        _count_all_reduce(x, group)
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def _count_all_reduce(x: Tensor, group: Group | None) -> None:
    size = world_size(group)
    _count("all_reduce", 2 * (size - 1) * x.numel() // size, x)  # a reduce-scatter and an all-gather


def all_gather_object(value: Any, group: Group | None = None) -> list[Any]:
    """Every rank's ``value``, in group order."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def require_agreement(what: str, value: object, group: Group | None = None) -> None:
    """Raise the same error on every rank unless all of them have the same ``value``.

    Raises:
        LcabError: names a rank that differs, its value and the first rank's.
    """
    values = all_gather_object(value, group)
    numbers = global_ranks(group)
    for other, number in zip(values, numbers, strict=True):
        if other != values[0]:
            raise LcabError(
                f"ranks disagree on {what}: rank {numbers[0]} has {values[0]!r}, rank {number} has "
                f"{other!r}; start every rank with the same settings"
            )


def together(action: Callable[[], T], group: Group | None = None) -> T:
    """Run ``action``; what goes wrong on one rank is raised on every rank (collective).

    Raises:
        LcabError: ``action`` raised it on some rank of the group.
    """
    problem: LcabError | None = None
    try:
        result = action()
    except LcabError as error:
        problem = error
    raise_together(None if problem is None else str(problem), group)
    return result


def raise_together(problem: str | None, group: Group | None = None) -> None:
    """Raise the first rank's problem on every rank, so that none waits for one that stopped.

    Raises:
        LcabError: some rank of the group has a problem.
    """
    problems = all_gather_object(problem, group)
    for number, text in zip(global_ranks(group), problems, strict=True):
        if text is not None:
            raise LcabError(text if len(set(problems)) == 1 else f"rank {number}: {text}")


class RingExchange:
    """Sends tensors to the next rank of a ring while the previous rank's arrive."""

    def __init__(self, group: Group) -> None:
        ranks = global_ranks(group)
        at = rank(group)
        self._group = group
        self._next, self._previous = ranks[(at + 1) % len(ranks)], ranks[at - 1]
        self._works: list[Any] = []
        self._sent: list[Tensor] = []
        self._received: list[Tensor] = []

    def start(self, sends: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> None:
        """Begin to send ``sends`` and to receive tensors of ``shapes``; returns at once."""
        self._sent = [x.contiguous() for x in sends]
        self._received = [x.new_empty(tuple(shape)) for x, shape in zip(self._sent, shapes, strict=True)]
        for x in self._sent:
            _count("ring", x.numel(), x)
        ops = [dist.P2POp(dist.isend, x, self._next, self._group) for x in self._sent if x.numel()]
        ops += [dist.P2POp(dist.irecv, x, self._previous, self._group) for x in self._received if x.numel()]
        self._works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> list[Tensor]:
        """The previous rank's tensors; what was sent may be reused."""
        for work in self._works:
            work.wait()
        received = self._received
        self._works, self._sent, self._received = [], [], []
        return received


class AllToAllExchange:
    """One uneven all-to-all under way, while this rank does something else."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._work: Any = None
        self._kept: tuple[Tensor, ...] = ()

    def start(self, send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> None:
        """Begin to send the first ``send_sizes[0]`` elements of the flat ``send`` to rank 0 of the group, the
        next to rank 1 and so on, and to receive as ``receive_sizes`` says; returns at once.

        Collective: ranks that neither send nor receive anything take part.
        """
        received = send.new_empty(sum(receive_sizes))
        self._kept = send, received
        own = send_sizes[rank(self._group)]
        _count("group_cast", send.numel() - own, send)
        self._work = dist.all_to_all_single(
            received, send, list(receive_sizes), list(send_sizes), group=self._group, async_op=True
        )

    def wait(self) -> Tensor:
        """What arrived, flat, in the order of the ranks. On CUDA the current stream waits and the host does
        not; both buffers live until then, so that no other work is given their memory before."""
        self._work.wait()
        received = self._kept[1]
        self._work, self._kept = None, ()
        return received


def all_to_all(sends: Sequence[Tensor], receive_sizes: Sequence[int], group: Group) -> list[Tensor]:
    """Send the flat tensor ``sends[i]`` to rank i of the group; returns one flat tensor from every rank.

    ``receive_sizes``: elements expected from each rank. One ``all_to_all_single`` with uneven splits.
    """
    packed = torch.cat(list(sends))
    received = packed.new_empty(sum(receive_sizes))
    _count("all_to_all", packed.numel() - sends[rank(group)].numel(), packed)
    dist.all_to_all_single(received, packed, list(receive_sizes), [x.numel() for x in sends], group=group)
    return list(received.split(list(receive_sizes)))


# torch 2.13 renamed these two and deprecates the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, group: Group) -> Tensor:
    """``x`` of every rank (equal shapes), ``[ranks, *x.shape]``."""
    size = world_size(group)
    _count("all_gather", (size - 1) * x.numel(), x)
    out = x.new_empty(size * x.shape[0], *x.shape[1:])  # gloo insists on ranks joined along dim 0
    _all_gather(out, x.contiguous(), group=group)
    return out.unflatten(0, (size, x.shape[0]))


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """Sum ``x [ranks, ...]`` over the group; returns this rank's entry."""
    x = x.contiguous()
    out = x.new_empty(x.shape[1:])
    _count("reduce_scatter", x.numel() - out.numel(), x)
    _reduce_scatter(out, x.flatten(0, 1), group=group)
    return out
