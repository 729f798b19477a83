"""Activation checkpointing that does not repeat attention.

Recomputing a block runs its attention again, and under context parallelism sends everything again. Inside
these contexts the first pass keeps what attention computed and received, and the recomputation is handed it
back; projections, norms and MLPs are recomputed as before. What is kept for every attention call of a block,
per rank: the output and lse (``b * t * h * (dv * itemsize + 4)`` bytes), and under Ulysses also q, k, v and
the output as the all-to-all left them. A step then moves the bytes of one without checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from lcab_plugin.errors import LcabError

Tensors = tuple[Tensor, ...]


class _Tape:
    """What the attention calls of one checkpointed region returned, in order."""

    def __init__(self) -> None:
        self._entries: list[tuple[Tensors, tuple[int, ...]]] = []
        self._at: int | None = None  # None while the first pass writes

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The region's first pass."""
        with self._active():
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """A recomputation of the region; there may be several."""
        self._at = 0
        with self._active():
            yield

    @contextmanager
    def _active(self) -> Iterator[None]:
        token = _TAPE.set(self)
        try:
            yield
        finally:
            _TAPE.reset(token)

    def run(self, compute: Callable[[], Tensors]) -> Tensors:
        """``compute()``, or what it returned in the first pass."""
        if self._at is None:
            result = compute()
            self._entries.append((tuple(x.detach() for x in result), tuple(x._version for x in result)))
            return result
        if self._at == len(self._entries):
            raise LcabError(
                "the recomputation calls attention more often than the first pass did; a checkpointed "
                "function must do the same work each time, or leave keep_attention out"
            )
        kept, versions = self._entries[self._at]
        self._at += 1
        if tuple(x._version for x in kept) != versions:
            raise LcabError(
                "attention's output was changed in place after the first pass, so it cannot stand in for a "
                "recomputation; write out = out + x instead of out += x, or leave keep_attention out"
            )
        return tuple(x.detach() for x in kept)  # autograd marks what a function returns


_TAPE: ContextVar[_Tape | None] = ContextVar("attention kept for recomputation", default=None)


def once(compute: Callable[[], Tensors]) -> Tensors:
    """``compute()``, unless this is a recomputation that was promised what it returned the first time."""
    tape = _TAPE.get()
    return compute() if tape is None else tape.run(compute)


def keep_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a first pass and of its recomputations, for torch's checkpoint::

    checkpoint(block, x, use_reentrant=False, context_fn=lcab.keep_attention)
    """
    tape = _Tape()
    return tape.recording(), _Replays(tape)


class _Replays(AbstractContextManager[None]):
    """A context that may be entered again: one region can be recomputed for several backward passes."""

    def __init__(self, tape: _Tape) -> None:
        self._tape, self._open = tape, []  # type: ignore[var-annotated]

    def __enter__(self) -> None:
        self._open.append(self._tape.replaying())
        self._open[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)


class KeepAttention:
    """A function for checkpointing that calls it twice itself (DeepSpeed's, Megatron's, torch's reentrant)::

        deepspeed.checkpointing.checkpoint(lcab.KeepAttention(block), x)

    Make a new one for every checkpointed call: the first call keeps, later ones are recomputations.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._first, self._again = keep_attention()
        self._called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = self._again if self._called else self._first
        self._called = True
        with context:
            return self._function(*args, **kwargs)
