"""Ring attention (Liu et al., arXiv 2310.01889): keys and values travel, queries stay."""

from __future__ import annotations

import torch
from torch import Tensor

from lcab_plugin.context_parallel.collectives import RingExchange
from lcab_plugin.context_parallel.topology import Axis
from lcab_plugin.kernels.contract import KernelOptions, accumulation_dtype
from lcab_plugin.kernels.merge import RowSum, Softmax
from lcab_plugin.layout import View
from lcab_plugin.operation import Operation, Saved, Sums


class RingP2P:
    """A ring along ``axis`` around ``inner``. Memory is O(own shard): two K/V blocks live at a time."""

    def __init__(self, inner: Operation, axis: Axis) -> None:
        self.inner, self.axis = inner, axis

    def forward(
        self, total: Softmax, q: Tensor, k: Tensor, v: Tensor, view: View, options: KernelOptions
    ) -> None:
        travel = _Travel(self.axis, view)
        for step in range(self.axis.size):
            travel.start_keys(step, k, v)
            self.inner.forward(total, q, k, v, travel.view(step), options)
            k, v = travel.wait_keys(step, k, v)

    def backward(self, sums: Sums, saved: Saved, view: View, options: KernelOptions) -> None:
        travel = _Travel(self.axis, view)
        k, v = saved.k, saved.v
        home = RingExchange(self.axis.group) if self.axis.group is not None else None
        dtype = accumulation_dtype(k.dtype)
        for step in range(self.axis.size):
            travel.start_keys(step, k, v)
            block = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v)]
            parts = RowSum.into(block[0]), RowSum.into(block[1])
            self.inner.backward((sums[0], *parts), saved._replace(k=k, v=v), travel.view(step), options)
            if home is not None and self.axis.size > 1:
                # a block's gradient follows it around the ring, one step behind, while the next is computed
                if step > 0:
                    for mine, arrived in zip(block, home.wait(), strict=True):
                        mine += arrived
                home.start(block, [travel.shape(step + 1, x) for x in block])
            k, v = travel.wait_keys(step, k, v)
        if home is not None and self.axis.size > 1:
            block = home.wait()
        for total, grad in zip(sums[1:], block, strict=True):
            total.add(range(grad.shape[1]), grad)


class _Travel:
    """Keys and values on their way round: at step s this rank holds those of the rank s places before it."""

    def __init__(self, axis: Axis, view: View) -> None:
        self._views = [axis.keys_from(view, (axis.index - s) % axis.size) for s in range(axis.size + 1)]
        self._last = axis.size - 1
        self._exchange = RingExchange(axis.group) if axis.size > 1 and axis.group is not None else None

    def view(self, step: int) -> View:
        return self._views[step]

    def shape(self, step: int, x: Tensor) -> tuple[int, ...]:
        """The shape of a tensor like ``x`` for the keys of ``step``."""
        view = self._views[step]
        return (x.shape[0], sum(view.layout.length(r) for r in view.k_ranks), *x.shape[2:])

    def start_keys(self, step: int, k: Tensor, v: Tensor) -> None:
        if self._exchange is not None and step < self._last:
            self._exchange.start((k, v), [self.shape(step + 1, x) for x in (k, v)])

    def wait_keys(self, step: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self._exchange is None or step == self._last:
            return k, v
        k, v = self._exchange.wait()
        return k, v
