"""FlashMask: a mask as the rows that each key column hides, and the attention library built on it.

FlashMask (arXiv 2410.01359) stores for every key up to two intervals of hidden query rows, in Paddle's
``startend_row_indices`` [batch, 1 or kv_heads, k_len, 1, 2 or 4], int32: LT start (and end) of the one in the
lower left triangle, UT (start and) end of the one in the upper right. ``to_startend`` and ``from_startend``
convert it from and to slices. Interface: PaddlePaddle/flash-attention at commit 9985af5, the files
``flash_api_torch.cpp`` and ``interface_torch.py`` of ``flashmask/flash_mask/flashmask_attention_v3``: the
PyTorch build of FlashMask V3, published as source; the released wheels are Paddle's.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcab_plugin.errors import LcabError
from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall
from lcab_plugin.kernels.merge import RowSum, Softmax
from lcab_plugin.masks import NO_HI, NO_LO, AttentionMask

Ints = np.ndarray

MAX_CALLS = 4  # calls whose results are merged; a deeper mask is refused rather than slow and rounded
BLOCK = 128  # rows and keys of a block that the forward skips when every cell is hidden, head_dim 128


class Columns(NamedTuple):
    """One call's mask: ``startend`` int32 [1, 1, k_len, n], ``causal``, and the ``rows`` that see a key, bool
    [q_len] (None where all do)."""

    startend: Tensor
    causal: bool
    rows: Tensor | None


class FlashMask:
    """FlashMask V3: one call where no key hides more than two intervals, else one a visible interval."""

    name = "flashmask"
    features = Features(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims="multiples of 8 up to 256 (Hopper only); deterministic up to 128",
        native="at most two hidden intervals of rows a key, by start and end rows",
        lowering=f"one call per visible interval of a key, at most {MAX_CALLS}",
        softcap=True,
    )

    def version(self) -> str:
        return f"flashmask {metadata.version('flashmask')}"

    def unavailable(self) -> str | None:
        if find_spec("flashmask") is None:
            return (
                "flashmask for PyTorch is not installed and has no public wheel: build setup_torch.py of "
                "github.com/PaddlePaddle/flash-attention, flashmask/flash_mask/flashmask_attention_v3"
            )
        if not torch.cuda.is_available():
            return "needs a CUDA GPU, this machine has none"
        if torch.cuda.get_device_capability() != (9, 0):
            return f"needs a Hopper GPU (compute capability 9.0), not {torch.cuda.get_device_name()}"
        return None

    def unsupported(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        options: KernelOptions,
        needs_backward: bool,
    ) -> str | None:
        if q.dtype not in self.features.dtypes:
            return f"it takes bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
        if q.shape[-1] > 256 or q.shape[-1] % 8:
            return f"head_dim must be a multiple of 8 up to 256, not {q.shape[-1]}"
        if v.shape[-1] != q.shape[-1]:
            return f"value head_dim {v.shape[-1]} differs from the query's {q.shape[-1]}"
        if options.deterministic and needs_backward and q.shape[-1] > 128:
            return f"its deterministic backward reaches head_dim 128, not {q.shape[-1]}"
        if isinstance(calls := _columns(mask), str):
            return calls
        return None if q.is_cuda else f"it takes CUDA tensors, not {q.device.type}"

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        if mask.empty:
            return []
        calls = _columns(mask)
        if isinstance(calls, str):
            raise LcabError(f"flashmask cannot serve this mask: {calls}.")
        parts = [mask] if len(calls) == 1 else [from_startend(*c[:2], mask.q_len) for c in calls]
        return [
            NativeCall(
                f"flashmask, startend_row_indices [.., {call.startend.shape[-1]}], causal={call.causal}",
                1,
                part.area,
                int(part.block_map(BLOCK, BLOCK).length.sum()) * BLOCK * BLOCK,
                merged=mask.q_len if i else 0,
            )
            for i, (call, part) in enumerate(zip(calls, parts, strict=True))
        ]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        total = Softmax(q, v)
        for columns in _on_device(mask, q.device):
            out, lse = _operators().fwd(q=q, k=k, v=v, **_common(columns, q, options))
            if columns.rows is not None:  # what the library writes for a row without keys is not documented
                out = out.masked_fill(~columns.rows[:, None, None], 0.0)
                lse = lse.masked_fill(~columns.rows, float("-inf"))
            total.add(range(mask.q_len), out, lse)
        return total.result()

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: AttentionMask,
        options: KernelOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = RowSum(q), RowSum(k), RowSum(v)
        # rows without keys: exp(s - inf) is 0, where -inf would be read as a sum of exponentials of 1
        lse = lse.masked_fill(lse == float("-inf"), float("inf")).contiguous()
        for columns in _on_device(mask, q.device):
            grads = _operators().bwd(
                dout=dout.contiguous(),
                q=q,
                k=k,
                v=v,
                out=out.contiguous(),
                softmax_lse=lse,
                deterministic=options.deterministic,
                **_common(columns, q, options),
            )
            for total, x, grad in zip(sums, (q, k, v), grads, strict=True):
                total.add(range(x.shape[1]), grad)
        dq, dk, dv = (total.result() for total in sums)
        return dq, dk, dv


def to_startend(mask: AttentionMask) -> tuple[Tensor, bool] | str:
    """``startend_row_indices`` int32 [1, 1, k_len, n] and ``causal``, or why one call cannot say the mask.

    n is 1 (causal: LT start), 2 (causal: LT start, end; else LT start, UT end) or 4 (LT start, end, UT start,
    end), the fewest that do. ``causal`` hides the rows above the diagonal of a square mask. Of two hidden
    intervals the upper one is UT; a single one is LT where it lies below the diagonal.
    """
    start, stop = mask.transposed().row_intervals()
    return _startend(start, stop, mask.q_len)


def from_startend(startend: Tensor, causal: bool, q_len: int) -> AttentionMask:
    """The mask of ``startend_row_indices`` [1, 1, k_len, n] for ``q_len`` query rows.

    Raises LcabError for a shape that FlashMask does not define, and for causal where q_len is not k_len.
    """
    shape = tuple(startend.shape)
    if len(shape) != 4 or shape[:2] != (1, 1) or shape[3] not in ((1, 2) if causal else (2, 4)):
        allowed = "1 or 2" if causal else "2 or 4"
        raise LcabError(f"startend_row_indices must be [1, 1, k_len, {allowed}], not {list(shape)}.")
    k_len = shape[2]
    if causal and k_len != q_len:
        raise LcabError(f"causal startend_row_indices need as many queries as keys, not {q_len} and {k_len}.")
    values = startend[0, 0].cpu().numpy().astype(np.int64).clip(0, q_len).T
    zero, end, column = np.zeros(k_len, np.int64), np.full(k_len, q_len), np.arange(k_len)
    if causal:
        lower = (values[0], values[1] if shape[3] == 2 else end)
        upper = (zero, column)
    elif shape[3] == 2:
        lower, upper = (values[0], end), (zero, values[1])
    else:
        lower, upper = (values[0], values[1]), (values[2], values[3])
    hidden = np.array([lower, upper])  # [2, start or stop, k_len]
    hidden *= hidden[:, :1] < hidden[:, 1:]  # an interval of no rows is [0, 0)
    hidden = np.take_along_axis(hidden, np.argsort(hidden[:, :1], axis=0, kind="stable"), axis=0)
    start = np.array([zero, hidden[0, 1], hidden[:, 1].max(axis=0)])
    stop = np.array([hidden[0, 0], hidden[1, 0], end])
    parts = [_slices(first, last) for first, last in zip(start, stop, strict=True)]
    return AttentionMask.from_disjoint(q_len, k_len, np.concatenate(parts))


def _startend(start: Ints, stop: Ints, q_len: int) -> tuple[Tensor, bool] | str:
    """``to_startend`` of the rows [start, stop) that each key shows: int64 [intervals, k_len], ascending."""
    column = np.arange(start.shape[1])
    count = (start < stop).sum(axis=0)
    first = np.where(count > 0, start[0], q_len)  # a key that no row sees hides [0, q_len)
    last = stop.max(axis=0)
    if q_len == len(column) and (first >= column).all():  # nothing above the diagonal
        above, below = first > column, last < q_len
        hidden = np.where(count > 0, above.astype(int) + (count - 1) + below, 1)
        if (hidden <= 1).all():
            gap = _gap(start, stop, count, np.where(above, column, last), np.where(above, first, q_len))
            lt_start, lt_end = np.where(hidden > 0, gap, q_len)
            needed = [lt_start] if (lt_end == q_len).all() else [lt_start, lt_end]
            return _tensor(needed), True
    if (count <= 1).all():
        return _tensor([last, np.where(count > 0, first, 0)]), False
    hidden = np.where(count > 0, (first > 0) + (count - 1) + (last < q_len), 1)
    if (worst := hidden.max()) > 2:
        key = int(np.argmax(hidden))
        return f"key {key} hides {worst} separate intervals of query rows, FlashMask stores two a key"
    return _four(start, stop, q_len), False


def _gap(start: Ints, stop: Ints, count: Ints, otherwise_start: Ints, otherwise_stop: Ints) -> Ints:
    """The first hidden interval between two visible ones, or the other one given: [2, k_len]."""
    if len(start) == 1:
        return np.array([otherwise_start, otherwise_stop])
    return np.where(count > 1, [stop[0], start[1]], [otherwise_start, otherwise_stop])


def _four(start: Ints, stop: Ints, q_len: int) -> Tensor:
    """LT start, LT end, UT start, UT end of keys with at most two hidden intervals.

    FlashMask V3's backward walks down the rows of a block of keys past all UT, then past all LT, so an unused
    UT is at row 0, an unused LT at the last, and of two intervals the upper one is UT.
    """
    k_len = start.shape[1]
    count = (start < stop).sum(axis=0)
    unused = np.arange(len(start))[:, None] >= count
    begin = np.vstack([np.zeros((1, k_len), np.int64), np.where(unused, q_len, stop)])
    end = np.vstack([np.where(unused, q_len, start), np.full((1, k_len), q_len)])
    order = np.argsort(begin >= end, axis=0, kind="stable")[:2]  # hidden intervals first, in their order
    (one, two), (one_end, two_end) = (np.take_along_axis(x, order, axis=0) for x in (begin, end))
    none = two >= two_end
    lower = none & (one > np.arange(k_len))  # the only hidden interval lies below the diagonal
    lt = np.where(lower, [one, one_end], np.where(none, q_len, [two, two_end]))
    ut = np.where(lower, 0, np.where(one < one_end, [one, one_end], 0))
    return _tensor([*lt, *ut])


def _tensor(values: list[Ints]) -> Tensor:
    return torch.from_numpy(np.stack(values, axis=-1).astype(np.int32))[None, None]


def _slices(start: Ints, stop: Ints) -> Ints:
    """Slices [n, 6] of one interval of visible rows [start, stop) a key, int64 [k_len].

    Neighbouring keys make one slice while each end of the interval stays, or each moves by one row a key.
    """
    column = np.flatnonzero(start < stop)
    if not len(column):
        return np.empty((0, 6), dtype=np.int64)
    start, stop = start[column], stop[column]
    step = np.diff([start, stop])
    joins = (np.diff(column) == 1) & ((step == 0) | (step == 1)).all(axis=0)
    turns = joins[1:] & joins[:-1] & (step[:, 1:] != step[:, :-1]).any(axis=0)
    at = np.arange(len(turns))
    straight = np.maximum.accumulate(np.where(turns, -1, at)) if len(at) else at
    joins[1:] &= ~(turns & ((at - straight) % 2 == 1))  # after a break the next key begins a slice of its own
    begin, end = np.flatnonzero(np.append(True, ~joins)), np.flatnonzero(np.append(~joins, True))
    q0, q1 = start[begin], stop[end]
    hi = np.where(start[begin] < start[end], column[begin] - start[begin], NO_HI)
    lo = np.where(stop[begin] < stop[end], column[begin] - stop[begin] + 1, NO_LO)
    return np.stack([q0, q1, column[begin], column[end] + 1, lo, hi], axis=1)


@lru_cache(maxsize=64)
def _columns(mask: AttentionMask) -> tuple[Columns, ...] | str:
    """The calls of a mask: one, or one for each visible interval of its keys; or why it has too many."""
    if mask.empty:
        return ()
    start, stop = mask.transposed().row_intervals()
    whole = _startend(start, stop, mask.q_len)
    if not isinstance(whole, str):
        return (_call(whole, start, stop, mask.q_len),)
    if len(start) > MAX_CALLS:
        return f"{whole}, and {len(start)} calls would be merged, more than {MAX_CALLS}"
    layers = []
    for first, last in zip(start[:, None], stop[:, None], strict=True):
        layer = _startend(first, last, mask.q_len)
        assert not isinstance(layer, str)
        layers.append(_call(layer, first, last, mask.q_len))
    return tuple(layers)


def _call(startend: tuple[Tensor, bool], start: Ints, stop: Ints, q_len: int) -> Columns:
    seen = np.zeros(q_len + 1, dtype=np.int64)
    np.add.at(seen, start, 1)
    np.add.at(seen, stop, -1)
    rows = torch.from_numpy(np.cumsum(seen)[:q_len] > 0)
    return Columns(*startend, None if bool(rows.all()) else rows)


@lru_cache(maxsize=16)  # holds up to four integers a key on the device
def _on_device(mask: AttentionMask, device: torch.device) -> tuple[Columns, ...]:
    calls = _columns(mask)
    if isinstance(calls, str):
        raise LcabError(f"flashmask cannot serve this mask: {calls}.")
    return tuple(
        c._replace(startend=c.startend.to(device), rows=None if c.rows is None else c.rows.to(device))
        for c in calls
    )


def _common(columns: Columns, q: Tensor, options: KernelOptions) -> dict[str, Any]:
    return {
        "startend_row_indices": columns.startend.expand(q.shape[0], -1, -1, -1).contiguous(),
        "softmax_scale": options.scale,
        "is_causal": columns.causal,
        "softcap": options.softcap or 0.0,
    }


def _operators() -> Any:
    import flashmask._C  # type: ignore[import-not-found]  # noqa: F401  registers torch.ops.flashmask

    return torch.ops.flashmask


KERNEL = FlashMask()
