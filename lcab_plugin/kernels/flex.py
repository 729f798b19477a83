"""PyTorch's FlexAttention, compiled, under every mask in one call.

The mask reaches it twice: as a ``BlockMask`` laid out from ``mask.block_map`` (empty blocks are never
touched, full ones skip the mask), and inside partial blocks as one mask_mod that compares a key with the
few intervals of keys that its row sees, or, for more of them on a grid (block-sparse masks), looks its block
of the grid up. Both are tensors, so another mask of the same lengths is another input of the same compiled
kernel.

Backward: the public function takes no ``out`` and ``lse`` from outside, so it computes the forward once more
under autograd and weights both of its outputs (one forward more than a fused backward; nothing is kept
between the passes). CPU: forward only, and its kernel returns no lse, which two more calls recover.

On an H100 (torch 2.11) the templates have no configuration that fits float32 with head_dim 192, and read
outside of tensors that span 2^31 elements; both are refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import count
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lcab_plugin.kernels.contract import Features, KernelOptions, NativeCall
from lcab_plugin.masks import FULL, PARTIAL, AttentionMask
from lcab_plugin.masks.geometry import NO_HI, NO_LO, Ints, expand

BLOCK = 128  # FlexAttention's default, and a multiple of every tile its templates choose
MAX_INTERVALS = 8  # of visible keys in one row; the mask_mod compares with each of them
LEAST_GRAIN = 16  # tokens of a grid's block
MAX_GRID = 1 << 24  # blocks of a grid, a byte each
WHOLE_TABLE = (
    1 << 20
)  # entries of a block table up to which its width does not depend on the mask: 128K tokens

Grads = tuple[Tensor, Tensor, Tensor]


class Flex:
    """``torch.nn.attention.flex_attention`` under ``torch.compile``."""

    name = "flex"
    features = Features(
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        head_dims="16 to 256",
        native=f"every mask with at most {MAX_INTERVALS} runs of visible keys in a row, or on a grid of "
        f"{LEAST_GRAIN} tokens or more; forward only on CPU",
        lowering="none",
        softcap=True,
        value_dim=True,
    )

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self) -> str | None:
        if find_spec("torch.nn.attention.flex_attention") is None or _torch_release() < (2, 6):
            return f"torch {torch.__version__} has no FlexAttention with lengths of its own; use torch >= 2.6"
        if torch.cuda.is_available():
            if find_spec("triton") is None:
                return "Triton is not installed: pip install triton"
            return None
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "it is compiled for the CPU by a C++ compiler and none is found: install g++"
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            return "its CPU kernel needs AVX2, which this processor lacks"
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
        if q.device.type not in ("cpu", "cuda"):
            return f"device {q.device.type!r} is not one it is compiled for here: cuda, cpu"
        if q.dtype not in self.features.dtypes:
            return f"it takes float32, bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
        if q.is_cpu and needs_backward:
            return "FlexAttention has no backward on a CPU"
        if q.is_cpu and options.softcap is not None:
            return "FlexAttention's CPU kernel returns no lse, and under a soft cap it cannot be recovered"
        if (runs := _runs(mask)) > MAX_INTERVALS and not _grain(mask):
            return f"a row of this mask sees {runs} separate runs of keys, and it compares {MAX_INTERVALS}"
        return _unfit(q, k, v)

    def explain(self, mask: AttentionMask, head_dim: int) -> list[NativeCall]:
        counts = mask.block_map(BLOCK, BLOCK).counts()
        blocks = counts[PARTIAL] + counts[FULL]
        what = (
            f"flex_attention, {counts[FULL]} full and {counts[PARTIAL]} partial blocks of {BLOCK} x {BLOCK}"
        )
        return [NativeCall(what, blocks, mask.area, blocks * BLOCK * BLOCK)] if blocks else []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: KernelOptions
    ) -> tuple[Tensor, Tensor]:
        table = block_table(mask, q.device)
        with torch.no_grad():
            if q.is_cpu:
                return attend(q, k, v, table, options, with_lse=False), _cpu_lse(q, k, mask, options)
            return attend(q, k, v, table, options)

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
    ) -> Grads:
        """With ``o, l`` of these keys alone and ``w = exp(l - lse)`` their weight in the whole softmax, the
        whole's gradient ``p (dp - dout . out)`` is that of ``o`` for ``w dout`` plus that of ``l`` for
        ``w dout . (o - out)``."""
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            own_out, own_lse = attend(q, k, v, block_table(mask, q.device), options)
        with torch.no_grad():
            # a row without keys here has weight 0 also where it has none at all (-inf - -inf is NaN)
            weight = torch.exp(own_lse - lse).masked_fill_(own_lse == float("-inf"), 0.0)
            weighted = weight.transpose(1, 2).unsqueeze(-1) * dout
            dlse = (weighted * (own_out.float() - out.float())).sum(-1).transpose(1, 2)
        grads = torch.autograd.grad([own_out, own_lse], [q, k, v], [weighted.to(own_out.dtype), dlse])
        dq, dk, dv = grads
        return dq, dk, dv


def _unfit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why its templates cannot take tensors of these sizes."""
    for name, dim in (("head_dim", q.shape[-1]), ("value head_dim", v.shape[-1])):
        if not 16 <= dim <= 256:
            return f"{name} must be 16 to 256, not {dim}"
        if q.is_cuda and q.dtype == torch.float32 and 128 < dim < 256:
            return f"FlexAttention has no configuration for float32 and {name} {dim}"
    out = q.numel() // q.shape[-1] * v.shape[-1]
    if max(out, *map(_span, (q, k, v))) >= 2**31:
        return "FlexAttention indexes with 32 bits, and a tensor of this call spans 2^31 elements or more"
    return None


def _span(x: Tensor) -> int:
    """Elements from the first of ``x`` to its last in memory."""
    steps = zip(x.shape, x.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) if x.numel() else 0


def _torch_release() -> tuple[int, ...]:
    return tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))


class _Signature(NamedTuple):
    """What one compiled kernel is made for; batch and lengths are not in it, masks are its inputs."""

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    runs: int  # intervals a row may have
    grain: int  # tokens of a grid's block, 0 for a mask by intervals
    scale: float
    softcap: float | None
    with_lse: bool
    with_grad: bool


def attend(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, options: KernelOptions, *, with_lse: bool = True
) -> Any:
    """The compiled ``flex_attention``: ``out [b, t, h, dv]`` and, where wanted, ``lse [b, h, t]``."""
    (heads, dim), value_dim = q.shape[2:], v.shape[-1]
    shapes = q.device.type, q.dtype, heads, k.shape[2], dim, value_dim, table.runs, table.grain
    signature = _Signature(*shapes, options.scale, options.softcap, with_lse, torch.is_grad_enabled())
    return compiled(signature)(q, k, v, table.block_mask)


@cache
def compiled(signature: _Signature) -> Callable[..., Any]:
    """``(q, k, v, block_mask) -> out[, lse]`` on [b, t, h, d] tensors, compiled when first called: for those
    lengths alone, and at the second ones once more for any."""
    from torch.nn.attention import flex_attention as library

    asked: dict[str, Any] = {}
    if signature.with_lse and hasattr(library, "AuxRequest"):  # torch 2.9
        asked = {"return_aux": library.AuxRequest(lse=True)}
    elif signature.with_lse:
        asked = {"return_lse": True}
    score_mod = None if signature.softcap is None else _capped(signature.softcap)
    grouped = signature.heads != signature.kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        got = library.flex_attention(
            q, k, v, score_mod, block_mask, signature.scale, enable_gqa=grouped, **asked
        )
        if not signature.with_lse:
            return got.transpose(1, 2)
        out, stats = got
        return out.transpose(1, 2), getattr(stats, "lse", stats)

    # Lengths that happen to be equal (of queries, keys, rows of blocks) are compiled apart: the blocks of a
    # ring pass the compiler's limit of 8.
    return torch._dynamo.config.patch(recompile_limit=64)(torch.compile(apart(attention), fullgraph=True))


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy whose code has a name of its own: the compiler counts and compares what one code object was
    compiled for, and so keeps the lengths that this function meets apart from every other's."""
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_SERIAL)}")
    return FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)


_SERIAL = count()


def visible_in(starts: Tensor, stops: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask_mod of every mask: key j is in one of its row's intervals, int32 [intervals, q_len]."""

    def visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = (starts[0, q_idx] <= kv_idx) & (kv_idx < stops[0, q_idx])
        for i in range(1, starts.shape[0]):
            seen = seen | ((starts[i, q_idx] <= kv_idx) & (kv_idx < stops[i, q_idx]))
        return seen

    return visible


def visible_at(grid: Tensor, grain: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask_mod of a mask on a grid of blocks of ``grain`` tokens, bool [query blocks, key blocks]."""

    def visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return grid[q_idx // grain, kv_idx // grain]

    return visible


def _capped(cap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


class BlockTable(NamedTuple):
    """A mask as the compiled kernel reads it; ``runs`` is the number of intervals its mask_mod compares, or
    ``grain`` the block of the grid it looks up."""

    block_mask: Any
    runs: int
    grain: int = 0


@lru_cache(maxsize=16)  # each may hold four index tables of WHOLE_TABLE entries on the device
def block_table(mask: AttentionMask, device: torch.device, least_runs: int = 2) -> BlockTable:
    """``mask`` as FlexAttention's ``BlockMask`` on ``device``."""
    from torch.nn.attention.flex_attention import BlockMask

    grain = _grain(mask) if _runs(mask) > MAX_INTERVALS else 0
    if grain:
        grid = torch.from_numpy(mask.block_map(grain, grain).to_dense() == FULL)
        runs, visible = 0, visible_at(grid.to(device), grain)
    else:
        starts, stops = intervals(mask, least_runs)
        runs, visible = len(starts), visible_in(starts.to(device), stops.to(device))
    rows, columns, kinds = _blocks(mask)
    shape = -(-mask.q_len // BLOCK), -(-mask.k_len // BLOCK)

    tables: dict[str, Any] = {}
    for name, step in (("kv", 1), ("q", -1)):
        at = (rows, columns)[::step]
        width = _width(at[0], *shape[::step]) if device.type != "cpu" else shape[::step][1]
        for kind, prefix in ((PARTIAL, ""), (FULL, "full_")):
            of = kinds == kind
            counts, indices = _ordered(at[0][of], at[1][of], shape[::step][0], width)
            tables[f"{prefix}{name}_num_blocks"] = counts.to(device)
            tables[f"{prefix}{name}_indices"] = indices.to(device)
    lengths = (mask.q_len, mask.k_len)
    block_mask = BlockMask(lengths, **tables, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)
    return BlockTable(block_mask, runs, grain)


def intervals(mask: AttentionMask, least: int = 2) -> tuple[Tensor, Tensor]:
    """Where the runs of keys that each row sees start and stop, int32 [2, 4 or 8, q_len]; unused ones are
    empty. The number is rounded up, since each is compiled for."""
    starts, stops = (torch.from_numpy(x).to(torch.int32) for x in mask.row_intervals())
    missing = max(least, 1 << (len(starts) - 1).bit_length()) - len(starts)
    return pad(starts, (0, 0, 0, missing)), pad(stops, (0, 0, 0, missing))


@lru_cache(maxsize=512)
def _runs(mask: AttentionMask) -> int:
    """The most separate runs of keys that one row sees."""
    return len(mask.row_intervals()[0])


@lru_cache(maxsize=512)
def _grain(mask: AttentionMask) -> int:
    """The largest blocks of a grid that no edge of this mask cuts; 0 under bands or where it is too fine."""
    edges, limits = mask.array[:, :4], mask.array[:, 4:]
    if (limits != [NO_LO, NO_HI]).any():
        return 0
    inner = np.where(edges == [mask.q_len, mask.q_len, mask.k_len, mask.k_len], 0, edges)
    grain = int(np.gcd.reduce(inner, axis=None))
    fits = grain >= LEAST_GRAIN and (mask.q_len // grain + 1) * (mask.k_len // grain + 1) <= MAX_GRID
    return grain if fits else 0


def _blocks(mask: AttentionMask) -> tuple[Ints, Ints, Ints]:
    """Row, column and kind of every block that is not empty, in row order."""
    blocks = mask.block_map(BLOCK, BLOCK)
    run, columns = expand(blocks.first, blocks.length)
    rows = np.repeat(np.arange(blocks.shape[0]), np.diff(blocks.offsets))[run]
    # a ragged block is never full: the library's full blocks have all their cells
    ragged = ((rows + 1) * BLOCK > mask.q_len) | ((columns + 1) * BLOCK > mask.k_len)
    return rows, columns, np.where(ragged, PARTIAL, blocks.kind[run])


def _width(rows: Ints, n_rows: int, n_columns: int) -> int:
    """Columns of both index tables of an orientation, since the library reads them with one stride: all, so
    that one compiled kernel serves every mask; in large tables what the fullest row needs, rounded up."""
    if n_rows * n_columns <= WHOLE_TABLE:
        return n_columns
    fullest = int(np.bincount(rows, minlength=1).max())
    return min(n_columns, 1 << (fullest - 1).bit_length())


def _ordered(rows: Ints, columns: Ints, n_rows: int, width: int) -> tuple[Tensor, Tensor]:
    """How many blocks each row of blocks has, int32 [1, 1, rows], and which, int32 [1, 1, rows, width]."""
    order = np.lexsort((columns, rows))
    rows, columns = rows[order], columns[order]
    counts = np.bincount(rows, minlength=n_rows)
    indices = np.zeros((n_rows, width), dtype=np.int32)
    indices[rows, np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]] = columns
    return torch.from_numpy(counts.astype(np.int32))[None, None], torch.from_numpy(indices)[None, None]


def _cpu_lse(q: Tensor, k: Tensor, mask: AttentionMask, options: KernelOptions) -> Tensor:
    """lse [b, h, t], which the CPU kernel does not return, from two more calls in float32.

    A first call with the keys as values gives each row's mean score r, and lse - r is the entropy of its
    weights: 0 to log(keys). A second one adds a key with score r and value 1 for every row: its output is
    ``1 / (1 + exp(lse - r))``, which neither underflows nor cancels.
    """
    q, k = q.float(), k.float()
    table = block_table(mask, q.device)
    score = (q * attend(q, k, k.clone(), table, options, with_lse=False)).sum(-1, keepdim=True)
    query = torch.cat([q, pad(score, (0, 15))], -1)
    key, value = pad(k, (0, 16, 0, 0, 0, 1)), k.new_zeros(k.shape[0], k.shape[1] + 1, k.shape[2], 16)
    key[:, -1, :, q.shape[-1]] = value[:, -1] = 1.0
    table = block_table(_with_a_key_for_all(mask), q.device, least_runs=4)
    share = attend(query, key, value, table, options, with_lse=False)[..., 0]
    lse = score.squeeze(-1) * options.scale + torch.log((1 - share) / share)
    return lse.transpose(1, 2)


@lru_cache(maxsize=16)
def _with_a_key_for_all(mask: AttentionMask) -> AttentionMask:
    whole = np.array([[0, mask.q_len, mask.k_len, mask.k_len + 1, NO_LO, NO_HI]])
    array = np.concatenate([mask.array, whole])
    return AttentionMask.from_disjoint(mask.q_len, mask.k_len + 1, array)


KERNEL = Flex()
