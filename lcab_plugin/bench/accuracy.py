"""How far an attention's results are from float64, on a sample that stays cheap at any length.

Sampled are a few query rows of a few heads: out and dq of a row follow exactly from the keys it sees, at
O(rows x keys). dk and dv of a key need the softmax of every row, so they are sampled at lengths up to
`EXACT_KEYS` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lcab_plugin.masks import AttentionMask

EXACT_KEYS = 4096  # float64 scores of all rows: 4096 of them take seconds on two CPU cores
_ROWS = 16
_COLUMNS = 16
_HEADS = 2
_CHUNK = 1024  # rows whose scores are held at once

# Beyond these (largest absolute difference over largest value) a result is wrong, not rounded.
GROSS = {torch.bfloat16: 0.1, torch.float16: 0.05, torch.float32: 0.01, torch.float64: 1e-6}


@dataclass(frozen=True)
class Case:
    """One attention problem: tensors ``[b, t, heads or kv_heads, d]``, the mask and the softmax scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: AttentionMask
    scale: float

    @property
    def group(self) -> int:
        """Query heads of one key/value head."""
        return self.q.shape[2] // self.k.shape[2]


@dataclass(frozen=True)
class Sample:
    """Positions, and the float64 results there: out and dq ``[b, rows, heads, d]``; dk and dv
    ``[b, columns, 1, d]`` of one key/value head, absent at greater lengths."""

    rows: Tensor
    heads: Tensor
    columns: Tensor
    kv_head: int
    want: Mapping[str, Tensor]

    @property
    def what(self) -> str:
        """In words, for a record."""
        sampled = f"out and dq: {len(self.rows)} rows x {len(self.heads)} heads"
        if "dk" not in self.want:
            return f"{sampled}; dk and dv: not above {EXACT_KEYS} keys"
        return f"{sampled}; dk and dv: {len(self.columns)} keys x 1 head"

    def errors(self, **results: Tensor) -> dict[str, float]:
        """Largest absolute difference of ``out``, ``dq``, ``dk``, ``dv`` over the largest value sampled; inf
        where one is not finite."""
        return {name: self._error(name, x) for name, x in results.items() if name in self.want}

    def _error(self, name: str, x: Tensor) -> float:
        want = self.want[name]
        if name in ("out", "dq"):
            got = x.detach().index_select(1, self.rows).index_select(2, self.heads).double()
        else:
            got = x.detach().index_select(1, self.columns)[:, :, self.kv_head, None].double()
        if not got.isfinite().all():
            return float("inf")
        difference, largest = (got - want).abs().max().item(), want.abs().max().item()
        return difference / largest if largest else difference


def sample(case: Case, seed: int = 0) -> Sample:
    """The float64 results at positions drawn by ``seed``, the last row and the first key among them."""
    rng = np.random.default_rng(seed)
    mask, device = case.mask, case.q.device

    def draw(n: int, count: int, always: int) -> list[int]:
        drawn: list[int] = rng.choice(n, size=min(count, n), replace=False).tolist()
        if always not in drawn:
            drawn[0] = always
        return sorted(drawn)

    rows = draw(mask.q_len, _ROWS, mask.q_len - 1)
    columns = draw(mask.k_len, _COLUMNS, 0)
    heads = sorted(rng.choice(case.q.shape[2], size=min(_HEADS, case.q.shape[2]), replace=False).tolist())
    kv_head = heads[0] // case.group
    want = _rows(case, rows, heads)
    if mask.k_len <= EXACT_KEYS:
        want |= _columns(case, columns, kv_head)
    at_rows, at_heads, at_columns = (torch.tensor(x, device=device) for x in (rows, heads, columns))
    return Sample(at_rows, at_heads, at_columns, kv_head, want)


def _rows(case: Case, rows: list[int], heads: list[int]) -> dict[str, Tensor]:
    """out and dq ``[b, rows, heads, d]``."""
    visible = case.mask.local([range(r, r + 1) for r in rows], [range(case.mask.k_len)]).to_dense(
        case.q.device
    )
    at = torch.tensor(rows, device=case.q.device)
    out, dq = [], []
    for head in heads:
        q, k, v, dout = _head(case, head, at)
        p, o = _softmax(q, k, v, visible, case.scale)
        delta = (dout * o).sum(-1, keepdim=True)
        ds = p * (dout @ v.transpose(1, 2) - delta) * case.scale
        out.append(o)
        dq.append(ds @ k)
    return {"out": torch.stack(out, 2), "dq": torch.stack(dq, 2)}


def _columns(case: Case, columns: list[int], kv_head: int) -> dict[str, Tensor]:
    """dk and dv ``[b, columns, 1, d]``: the softmax of all rows, a chunk of them at a time."""
    mask, at = case.mask, torch.tensor(columns, device=case.q.device)
    shape = case.k.shape[0], len(columns)
    dk = case.q.new_zeros(*shape, case.k.shape[-1], dtype=torch.float64)
    dv = case.q.new_zeros(*shape, case.v.shape[-1], dtype=torch.float64)
    for start in range(0, mask.q_len, _CHUNK):
        rows = range(start, min(start + _CHUNK, mask.q_len))
        visible = mask.local([rows], [range(mask.k_len)]).to_dense(case.q.device)
        index = torch.arange(rows.start, rows.stop, device=case.q.device)
        for head in range(kv_head * case.group, (kv_head + 1) * case.group):
            q, k, v, dout = _head(case, head, index)
            p, o = _softmax(q, k, v, visible, case.scale)
            p, delta = p[:, :, at], (dout * o).sum(-1, keepdim=True)
            ds = p * (dout @ v[:, at].transpose(1, 2) - delta) * case.scale
            dk += ds.transpose(1, 2) @ q
            dv += p.transpose(1, 2) @ dout
    return {"dk": dk[:, :, None], "dv": dv[:, :, None]}


def _head(case: Case, head: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and dout of these rows, k and v of all keys: ``[b, t, d]`` in float64."""
    kv_head = head // case.group
    return (
        case.q[:, :, head].index_select(1, rows).double(),
        case.k[:, :, kv_head].double(),
        case.v[:, :, kv_head].double(),
        case.dout[:, :, head].index_select(1, rows).double(),
    )


def _softmax(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Probabilities ``[b, rows, keys]`` and out ``[b, rows, d]``; zero in rows that see no key."""
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
    p = scores.softmax(-1).nan_to_num(0.0)
    return p, p @ v
