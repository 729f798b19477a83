"""examples/train_gpt.py with a mistake in every context-parallel strategy, which `lcab parity` must find.

ring_p2p: the gradient of one peer's keys is dropped. ulysses: the backward of an all-to-all reads its input
with the strides of another order. ring_all_gather: every gradient is doubled, the reported loss is not.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcab_plugin.adapters import loss_window
from lcab_plugin.context_parallel import ring_p2p, ulysses
from lcab_plugin.kernels.merge import RowSum

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_gpt.py"


class WithoutAPeersDk:
    """An operation that forgets dK of the keys that came from the next rank."""

    def __init__(self, inner: Any, axis: Any) -> None:
        self.inner, self.axis = inner, axis

    def forward(self, *args: Any) -> None:
        self.inner.forward(*args)

    def backward(self, sums: Any, saved: Any, view: Any, options: Any) -> None:
        dq, dk, dv = sums
        if view.k_ranks == self.axis.at(view.q_ranks, (self.axis.index + 1) % self.axis.size):
            dk = RowSum.into(torch.zeros(saved.k.shape))
        self.inner.backward((dq, dk, dv), saved, view, options)


def drop_a_peers_dk() -> None:
    build = ring_p2p.RingP2P.__init__

    def init(self: Any, inner: Any, axis: Any) -> None:
        build(self, WithoutAPeersDk(inner, axis), axis)

    ring_p2p.RingP2P.__init__ = init  # type: ignore[method-assign]


def stride_an_all_to_all_wrongly() -> None:
    backward = ulysses.ToHeads.backward

    def strided(ctx: Any, *grads: Tensor) -> Any:
        return backward(ctx, *(g.transpose(1, 2).contiguous().view(g.shape) for g in grads))

    ulysses.ToHeads.backward = staticmethod(strided)  # type: ignore[method-assign]


def double_the_gradient() -> None:
    loss = loss_window.LossWindow.loss
    loss_window.LossWindow.loss = lambda *args, **kwargs: 2 * loss(*args, **kwargs)  # type: ignore[method-assign]


FAULTS = {
    "ring_p2p": drop_a_peers_dk,
    "ulysses": stride_an_all_to_all_wrongly,
    "ring_all_gather": double_the_gradient,
}

if __name__ == "__main__":
    strategy = sys.argv[sys.argv.index("--strategy") + 1]
    if strategy in FAULTS:
        FAULTS[strategy]()
    runpy.run_path(str(EXAMPLE), run_name="__main__")
