"""Every call to torch.distributed. No attention here.

Buffers are made contiguous before any ``empty_like``: gloo fills an output of permuted strides wrongly and
without a word, and the mistake shows only in gradients.

Nothing here makes the host wait for a GPU: under NCCL ``wait`` orders the current stream behind the
transfer and returns. Tensors of a transfer under way are referenced until then: the allocator hands freed
memory to the stream it came from at once, and that stream, not yet behind the transfer, would write where
NCCL still reads. After ``wait`` whatever is enqueued comes later, so that memory may be freed or written
without an event or ``record_stream`` (which keeps it from being used again until the host has looked).

A transfer that does not end raises :class:`TransferError` on gloo, where ``wait`` blocks. On NCCL torch's
watchdog ends the process after the group's timeout, and names the group by its description.
"""

from __future__ import annotations

import atexit
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
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


class TransferError(LcabError):
    """A collective or transfer that did not end: a rank died or stalled. No rank can go on from it."""


@contextmanager
def _ends(what: Callable[[], str]) -> Iterator[None]:
    """Where torch gives up inside, raise what it was doing; ``what`` is called only then."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TransferError(
            f"{what()} did not end on rank {rank()}: a rank died, stalled, or was slower than the group's "
            f"timeout; see the log of the rank that stopped first, or raise the timeout ({told})"
        ) from error


def _over(group: Group | None) -> str:
    return f"ranks {', '.join(map(str, global_ranks(group)))}"


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


def meeting_place() -> dist.TCPStore:
    """Where ranks of this machine can meet, open from now on; keep it while they do."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


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


def new_groups(members: Sequence[Sequence[int]], purpose: str = "context parallel") -> Group:
    """Make one group per list of world ranks, all ranks in the same order; returns the one with this rank.

    Collective over the world. Every rank must pass the same lists, and be in exactly one of them.
    ``purpose``: what torch's messages about a group call it.
    """
    mine, timeout = None, _timeout()
    for ranks in members:
        group = dist.new_group(list(ranks), timeout=timeout, group_desc=f"lcab_plugin {purpose}")
        if rank() in ranks:
            mine = group
    if mine is None:
        raise LcabError(f"rank {rank()} is in none of the groups {[list(m) for m in members]}")
    return mine


def _timeout() -> timedelta | None:
    """The world's; torch gives later groups its own default instead (30 minutes on gloo). None where a
    backend does not say."""
    world: Any = dist.group.WORLD
    options = [getattr(world._get_backend(kind), "options", None) for kind in world._device_types]
    known = [getattr(found, "_timeout", None) for found in options]
    return max((timeout for timeout in known if timeout is not None), default=None)


def beside(group: Group | None, purpose: str) -> Group:
    """A second group of the same ranks, with a communicator of its own (collective over the world)."""
    return new_groups(sorted({tuple(m) for m in all_gather_object(global_ranks(group))}), purpose)


def connect(group: Group | None, device: torch.device) -> None:
    """Meet once on ``device``. NCCL makes a communicator at its first use, and all ranks must take part in
    that one, whereas a rank without tokens may have nothing to send in a ring."""
    with _ends(lambda: f"meeting of {_over(group)}"):
        dist.all_reduce(torch.zeros(1, device=device), group=group)


def barrier(group: Group | None = None) -> None:
    """Wait for every rank of the group."""
    if is_initialized():
        with _ends(lambda: f"barrier of {_over(group)}"):
            dist.barrier(group)


def all_reduce_sum(x: Tensor, group: Group | None = None) -> Tensor:
    """Sum ``x`` over the group, in place."""
    if world_size(group) > 1:
        _count_all_reduce(x, group)
        with _ends(lambda: f"sum over {_over(group)}"):
            dist.all_reduce(x, group=group)
    return x


def all_reduce_max(x: Tensor, group: Group | None = None) -> Tensor:
    """Maximum of ``x`` over the group, in place."""
    if world_size(group) > 1:
        _count_all_reduce(x, group)
        with _ends(lambda: f"maximum over {_over(group)}"):
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
    with _ends(lambda: f"handshake of {_over(group)}"):
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
    except TransferError:
        raise  # the other ranks cannot be told
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
    """Sends tensors to the next rank of a ring while the previous rank's arrive, ``steps`` times.

    What arrives lies in one of two sets of buffers in turn, and is good until the next but one ``start``.

    Args:
        group: the ranks of the ring.
        what: what travels, in words, and how many ``steps`` it takes: for a message about one that fails.
        longest: rows (dimension 1) of the longest tensors that will arrive.
        over: another group of the same ranks to send over. NCCL runs what is sent over one communicator one
            after another, so that two things that travel at once need two.
    """

    def __init__(
        self, group: Group, what: str, steps: int, longest: int, *, over: Group | None = None
    ) -> None:
        ranks = global_ranks(group)
        at = rank(group)
        self._group, self._over = group, over if over is not None else group
        self._what, self._steps, self._longest = what, steps, longest
        self._next, self._previous = ranks[(at + 1) % len(ranks)], ranks[at - 1]
        self._step = 0
        self._buffers: list[list[Tensor]] = []
        self._works: list[Any] = []
        self._sent: list[Tensor] = []
        self._received: list[Tensor] = []

    def start(self, sends: Sequence[Tensor], rows: int) -> None:
        """Begin to send ``sends [b, t, ...]`` and to receive as many tensors of ``rows`` rows; returns at
        once."""
        self._sent = [x.contiguous() for x in sends]
        if len(self._buffers) < 2:
            self._buffers.append([x.new_empty(_like(x, self._longest).numel()) for x in self._sent])
        self._received = [
            buffer[: shape.numel()].view(shape)
            for buffer, shape in zip(
                self._buffers[self._step % 2], (_like(x, rows) for x in self._sent), strict=True
            )
        ]
        self._step += 1
        for x in self._sent:
            _count("ring", x.numel(), x)
        ops = [dist.P2POp(dist.irecv, x, self._previous, self._over) for x in self._received if x.numel()]
        ops += [dist.P2POp(dist.isend, x, self._next, self._over) for x in self._sent if x.numel()]
        with _ends(self._doing):
            self._works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> list[Tensor]:
        """The previous rank's tensors; what was sent may be reused."""
        with _ends(self._doing):
            for work in self._works:
                work.wait()
        received = self._received
        self._works, self._sent, self._received = [], [], []
        return received

    def _doing(self) -> str:
        return (
            f"ring exchange of {self._what}, step {self._step} of {self._steps}, from rank "
            f"{self._previous} (and to rank {self._next}),"
        )


def _like(x: Tensor, rows: int) -> torch.Size:
    """The shape of ``x`` with another number of rows."""
    return torch.Size((x.shape[0], rows, *x.shape[2:]))


class AllToAllExchange:
    """Uneven all-to-alls, one at a time under way while this rank does something else.

    Args:
        group: the ranks that take part.
        what: what travels, in words, and how many ``steps`` it takes: for a message about one that fails.
        over: another group of the same ranks to send over, as in :class:`RingExchange`.
    """

    def __init__(self, group: Group, what: str, steps: int, *, over: Group | None = None) -> None:
        self._group, self._over = group, over if over is not None else group
        self._what, self._steps, self._step = what, steps, 0
        self._work: Any = None
        self._kept: tuple[Tensor, ...] = ()

    def start(self, send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> None:
        """Begin to send the first ``send_sizes[0]`` elements of the flat ``send`` to rank 0 of the group, the
        next to rank 1 and so on, and to receive as ``receive_sizes`` says; returns at once.

        Collective: ranks that neither send nor receive anything take part.
        """
        received = send.new_empty(sum(receive_sizes))
        self._kept = send, received
        self._step += 1
        own = send_sizes[rank(self._group)]
        _count("group_cast", send.numel() - own, send)
        with _ends(self._doing):
            self._work = dist.all_to_all_single(
                received, send, list(receive_sizes), list(send_sizes), group=self._over, async_op=True
            )

    def wait(self) -> Tensor:
        """What arrived, flat, in the order of the ranks."""
        with _ends(self._doing):
            self._work.wait()
        received = self._kept[1]
        self._work, self._kept = None, ()
        return received

    def _doing(self) -> str:
        return f"group cast of {self._what}, step {self._step} of {self._steps}, over {_over(self._group)}"


def all_to_all(
    sends: Sequence[Sequence[Tensor]],
    receives: Sequence[Sequence[Tensor]],
    group: Group,
    kind: str = "all_to_all",
) -> None:
    """Send ``sends[i]`` to rank i of the group, and fill ``receives[i]`` with what it sends here; the own
    rank's are not looked at. ``kind``: what this is, for the count of bytes and for messages.

    Every tensor is contiguous and travels from and to where it lies, all in one launch under NCCL: an
    all-to-all of one flat tensor would have everything packed before and unpacked after.
    """
    ranks, own = global_ranks(group), rank(group)
    others = [(own + step) % len(ranks) for step in range(1, len(ranks))]
    ops = [dist.P2POp(dist.irecv, x, ranks[i], group) for i in others[::-1] for x in receives[i] if x.numel()]
    for i in others:
        for x in sends[i]:
            _count(kind, x.numel(), x)
        ops += [dist.P2POp(dist.isend, x, ranks[i], group) for x in sends[i] if x.numel()]
    with _ends(lambda: f"{kind.replace('_', '-')} of {_over(group)}"):
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()


def landing(part: Tensor) -> Tensor:
    """Where a part of a tensor arrives: there itself if its rows are consecutive in memory, else beside."""
    return part if part.is_contiguous() else part.new_empty(part.shape)


def settle(parts: Sequence[Tensor], arrived: Sequence[Tensor]) -> None:
    """Bring what arrived beside its place (``landing``) there."""
    for part, x in zip(parts, arrived, strict=True):
        if x is not part:
            part.copy_(x)


# torch 2.13 renamed these two and deprecates the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, group: Group) -> Tensor:
    """``x`` of every rank (equal shapes), ``[ranks, *x.shape]``."""
    size = world_size(group)
    _count("all_gather", (size - 1) * x.numel(), x)
    out = x.new_empty(size * x.shape[0], *x.shape[1:])  # gloo insists on ranks joined along dim 0
    with _ends(lambda: f"all-gather of {_over(group)}"):
        _all_gather(out, x.contiguous(), group=group)
    return out.unflatten(0, (size, x.shape[0]))


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """Sum ``x [ranks, ...]`` over the group; returns this rank's entry."""
    x = x.contiguous()
    _count("reduce_scatter", x.numel() - x[0].numel(), x)
    with _ends(lambda: f"reduce-scatter of {_over(group)}"):
        if x.device.type == "cpu":  # gloo would sum every entry on every rank, and send twice as much
            received = torch.empty_like(x)
            dist.all_to_all_single(received, x, group=group)
            return received.sum(0)
        out = x.new_empty(x.shape[1:])
        _reduce_scatter(out, x.flatten(0, 1), group=group)
    return out


def describe_world_of_one(variables: MutableMapping[str, str]) -> None:
    """Set, where they are absent, the variables by which a launcher would tell this process that it is the
    only rank, with a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in alone.items():
        variables.setdefault(name, str(value))
