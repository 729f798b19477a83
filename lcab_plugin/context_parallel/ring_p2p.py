"""Ring attention (Liu et al., arXiv 2310.01889): keys and values travel, queries stay."""

from __future__ import annotations

from torch import Tensor

from lcab_plugin.context_parallel.collectives import Group, RingExchange
from lcab_plugin.context_parallel.gradients import home, sums_for
from lcab_plugin.context_parallel.topology import Axis
from lcab_plugin.kernels.contract import KernelOptions
from lcab_plugin.kernels.merge import Softmax
from lcab_plugin.layout import View
from lcab_plugin.operation import Operation, Saved, Sums


class RingP2P:
    """A ring along ``axis`` around ``inner``. Memory is O(own shard): two K/V blocks live at a time, and in
    backward two blocks of float32 gradients beside the kernel's, and the kernel's gradients of the own block,
    which stay until the others' arrive."""

    def __init__(self, inner: Operation, axis: Axis) -> None:
        self.inner, self.axis = inner, axis

    def forward(
        self, total: Softmax, q: Tensor, k: Tensor, v: Tensor, view: View, options: KernelOptions
    ) -> None:
        if self.axis.size == 1:
            self.inner.forward(total, q, k, v, view, options)
            return
        ring = _Ring(self.axis, view)
        keys = ring.exchange("keys and values", ring.size - 1)
        for step in range(ring.size):
            if step < ring.size - 1:
                keys.start((k, v), ring.rows(step + 1))
            self.inner.forward(total, q, k, v, ring.view(step), options)
            if step < ring.size - 1:
                k, v = keys.wait()

    def backward(self, sums: Sums, saved: Saved, view: View, options: KernelOptions) -> None:
        if self.axis.size == 1:
            self.inner.backward(sums, saved, view, options)
            return
        ring = _Ring(self.axis, view)
        keys = ring.exchange("keys and values", ring.size - 1)
        way_home = ring.exchange("their gradients", ring.size - 1, home(self.axis))
        k, v, own = saved.k, saved.v, sums_for(saved.k, saved.v)
        for step in range(ring.size):
            if step < ring.size - 1:
                keys.start((k, v), ring.rows(step + 1))
            dk, dv = sums_for(k, v) if step > 0 else own
            here = saved._replace(k=k, v=v)
            self.inner.backward((sums[0], dk, dv), here, ring.view(step), options)
            if step > 0:
                # a block's gradient follows it around the ring from the first rank that is not its home, one
                # step behind, while the next is computed
                block = [dk.result(), dv.result()]
                if step > 1:
                    block = [x.add_(part) for x, part in zip(way_home.wait(), block, strict=True)]
                way_home.start(block, ring.rows(step + 1))
            if step < ring.size - 1:
                k, v = keys.wait()
        for total, grad, kept in zip(sums[1:], way_home.wait(), own, strict=True):
            total.add(range(grad.shape[1]), grad.add_(kept.result()))


class _Ring:
    """Who holds which keys when: at step s this rank has those of the rank s places before it."""

    def __init__(self, axis: Axis, view: View) -> None:
        self.size, self._axis = axis.size, axis
        self._views = [axis.keys_from(view, (axis.index - s) % axis.size) for s in range(axis.size + 1)]
        self._rows = [sum(map(view.keys.length, at.k_ranks)) for at in self._views]

    def view(self, step: int) -> View:
        return self._views[step]

    def rows(self, step: int) -> int:
        return self._rows[step]

    def exchange(self, what: str, steps: int, over: Group | None = None) -> RingExchange:
        assert self._axis.group is not None
        return RingExchange(self._axis.group, what, steps, max(self._rows), over=over)
