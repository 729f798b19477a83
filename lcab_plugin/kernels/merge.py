"""The one place where partial results are combined: softmaxes over disjoint key sets, and row-block sums.

Both keep a first contribution that covers every row as it is, and move to float32 buffers when a second
one arrives, so that a mask served by one kernel call costs no copy and a merged one is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcab_plugin.kernels.contract import accumulation_dtype

Rows = range | Tensor  # consecutive rows, or an index


class Softmax:
    """A softmax over the keys seen so far: ``out [b, t, h, dv]`` and ``lse [b, h, t]``."""

    def __init__(self, q: Tensor, v: Tensor) -> None:
        self._shape = (*q.shape[:3], v.shape[-1])
        self._like, self._dtype = q, accumulation_dtype(q.dtype)
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._owned = False

    def add(self, rows: Rows, out: Tensor, lse: Tensor, *, fresh: bool = False) -> None:
        """Merge in the attention of query rows ``rows`` over keys not seen before.

        ``fresh``: nothing was added to these rows yet, so a copy is enough.
        """
        if self._out is None and isinstance(rows, range) and len(rows) == self._shape[1]:
            self._out, self._lse = out, lse
            return
        acc_out, acc_lse = self._buffers()
        at = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        if fresh:
            acc_out[:, at], acc_lse[:, :, at] = out.to(self._dtype), lse.to(self._dtype)
            return
        part_out, part_lse = acc_out[:, at], acc_lse[:, :, at]
        merge_(part_out, part_lse, out, lse)
        if not isinstance(at, slice):  # an index takes copies
            acc_out[:, at], acc_lse[:, :, at] = part_out, part_lse

    def result(self) -> tuple[Tensor, Tensor]:
        """``out`` in the dtype of the queries, and ``lse``."""
        out, lse = self._buffers() if self._out is None or self._lse is None else (self._out, self._lse)
        return out.to(self._like.dtype), lse

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Buffers this object owns, in the accumulation dtype."""
        b, t, h, _ = self._shape
        if self._out is None or self._lse is None:
            self._out = self._like.new_zeros(self._shape, dtype=self._dtype)
            self._lse = self._like.new_full((b, h, t), float("-inf"), dtype=self._dtype)
        elif not self._owned:
            self._out = self._out.to(self._dtype, copy=True)
            self._lse = self._lse.to(self._dtype, copy=True)
        self._owned = True
        return self._out, self._lse


def merge_(acc_out: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge ``(out, lse)`` into ``(acc_out, acc_lse)`` in place (FlashAttention's online softmax).

    ``acc * (1 - w) + out * w`` with ``w = sigmoid(lse - acc_lse)``; a row that sees no key in ``lse`` has
    ``w = 0`` also where the accumulator is empty too (``-inf - -inf`` would be NaN).
    """
    weight = torch.sigmoid(lse - acc_lse).masked_fill_(lse == float("-inf"), 0.0)
    acc_out.lerp_(out.to(acc_out.dtype), weight.transpose(1, 2).unsqueeze(-1))
    torch.logaddexp(acc_lse, lse, out=acc_lse)


class RowSum:
    """A sum of row blocks of one ``[b, t, h, d]`` tensor."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._value: Tensor | None = None
        self._owned = False

    @classmethod
    def into(cls, buffer: Tensor) -> RowSum:
        """A sum that adds into ``buffer`` itself."""
        total = cls(buffer)
        total._value, total._owned = buffer, True
        return total

    def add(self, rows: Rows, value: Tensor) -> None:
        """Add ``value`` to rows ``rows``; an index may name a row twice."""
        if isinstance(rows, range):
            if self._value is None and len(rows) == self._like.shape[1]:
                self._value = value
            else:
                self._buffer()[:, rows.start : rows.stop] += value
        else:
            buffer = self._buffer()
            buffer.index_add_(1, rows, value.to(buffer.dtype))

    def result(self) -> Tensor:
        """The sum in the dtype of the tensor it is for; zeros where nothing was added."""
        return (self._buffer() if self._value is None else self._value).to(self._like.dtype)

    def _buffer(self) -> Tensor:
        dtype = accumulation_dtype(self._like.dtype)
        if self._value is None:
            self._value = torch.zeros(self._like.shape, dtype=dtype, device=self._like.device)
        elif not self._owned:
            self._value = self._value.to(dtype, copy=True)
        self._owned = True
        return self._value
