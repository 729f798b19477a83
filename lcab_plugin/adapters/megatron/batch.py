"""What one micro-batch's queries may attend to, from the arguments that Megatron gives its core attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lcab_plugin import layout as layouts
from lcab_plugin import masks
from lcab_plugin.errors import LcabError, UnsupportedError
from lcab_plugin.layout import Layout
from lcab_plugin.masks import NO_HI, NO_LO, AttentionMask

CAUSAL = ("causal", "padding_causal", "causal_bottom_right")  # by name: the last is not in every version
T = TypeVar("T")


class MaskParams(PackedSeqParams):
    """A micro-batch's mask as the ``packed_seq_params`` of a Megatron model: see :func:`mask_params`."""

    def __init__(self, mask: AttentionMask, qkv_format: str) -> None:
        if mask.q_len != mask.k_len:
            raise LcabError(
                f"the mask is for {mask.q_len} queries and {mask.k_len} keys; a sequence has one of each per "
                "token"
            )
        if qkv_format not in ("sbhd", "thd"):
            raise LcabError(f"qkv_format {qkv_format!r} is not known here; choose 'sbhd' or 'thd'")
        whole: dict[str, Any] = {"max_seqlen_q": mask.q_len, "max_seqlen_kv": mask.k_len}
        if qkv_format == "thd":
            device = "cuda" if torch.cuda.is_available() else "cpu"  # fused RoPE reads them on the device
            edges = torch.tensor([0, mask.q_len], dtype=torch.int32, device=device)
            whole |= {"cu_seqlens_q": edges, "cu_seqlens_kv": edges}
        super().__init__(qkv_format=qkv_format, **whole)
        self.mask = mask


def mask_params(mask: AttentionMask, *, qkv_format: str = "sbhd") -> MaskParams:
    """What ``model(..., packed_seq_params=)`` takes so that every layer attends under ``mask``.

    Every micro-batch has its own; it is kept by recomputation and by schedules with several micro-batches
    under way. All rows of the micro-batch share the mask, positions run through from 0, and the batch is
    sliced as without it (zigzag over all context-parallel ranks).

    Args:
        mask: the global mask of the sequence, the same on every context-parallel rank.
        qkv_format: "thd" for micro-batches of one row before megatron-core 0.16, which drops the batch
            dimension of anything packed; "sbhd" else.

    Raises:
        LcabError: the mask is not square, or the format another.
    """
    return MaskParams(mask, qkv_format)


def family_problem(family: str, kind: AttnMaskType, packed: bool) -> str | None:
    """Why a batch that carries no mask of its own is not of ``family``, the settings' mask."""
    causal = kind.name in CAUSAL
    own = ("causal" if causal else "full", "causal_document" if causal else "full_document")
    if family in (own if packed else own[:1]):
        return None
    what = "a packed batch (cu_seqlens)" if packed else "a batch without a mask of its own"
    return (
        f"the settings' mask is {family!r}, but {what} under attn_mask_type {kind.name} is {own[packed]!r}; "
        f"set --lcab-mask {own[packed]}, or give packed_seq_params=mask_params(mask) with each batch"
    )


def windowed(mask: AttentionMask, window: tuple[int, int] | None) -> AttentionMask:
    """``mask`` within Megatron's ``window_size``: (left, right) keys beside the diagonal, -1 for no limit."""
    return mask if window is None else _windowed(mask, window)


@lru_cache(maxsize=64)
def _windowed(mask: AttentionMask, window: tuple[int, int]) -> AttentionMask:
    left, right = window
    diagonal = mask.k_len - mask.q_len  # bottom-right aligned, as a step of generation needs
    array = mask.array.copy()
    if left >= 0:
        array[:, 4] = np.maximum(array[:, 4], diagonal - left)
    if right >= 0:
        array[:, 5] = np.minimum(array[:, 5], diagonal + right)
    return AttentionMask.from_disjoint(mask.q_len, mask.k_len, array)


def plain(kind: AttnMaskType, q_len: int, k_len: int) -> AttentionMask:
    """The mask that ``attn_mask_type`` alone says.

    Raises:
        LcabError: it says none (arbitrary), or is causal without saying which corner it is aligned to.
    """
    if kind is AttnMaskType.arbitrary:
        raise LcabError("attn_mask_type arbitrary needs a mask: give packed_seq_params=mask_params(mask)")
    if kind.name in CAUSAL and q_len != k_len and kind.name != "causal_bottom_right":
        raise UnsupportedError(
            f"attn_mask_type {kind.name} with {q_len} queries and {k_len} keys does not say which corner it "
            "is aligned to; use causal_bottom_right"
        )
    return _plain(kind.name in CAUSAL, q_len, k_len)


@lru_cache(maxsize=256)
def _plain(causal: bool, q_len: int, k_len: int) -> AttentionMask:
    hi = k_len - q_len if causal else NO_HI
    return AttentionMask.from_disjoint(q_len, k_len, np.array([[0, q_len, 0, k_len, NO_LO, hi]]))


class _PerTensor:
    """What was derived from a tensor, kept while the tensor lives and is not written to: reading one waits
    for the device, and every layer is given the same one."""

    def __init__(self) -> None:
        self._kept: Any = WeakTensorKeyDictionary()

    def get(self, tensor: Tensor, key: object, derive: Callable[[], T]) -> T:
        version = 0 if tensor.is_inference() else tensor._version
        entry = self._kept.setdefault(tensor, {})
        if (version, key) not in entry:
            entry.clear()
            entry[version, key] = derive()
        return entry[version, key]


_numbers, _hidden, _rows = _PerTensor(), _PerTensor(), _PerTensor()


def _edges(tensor: Tensor) -> tuple[int, ...]:
    return _numbers.get(tensor, None, lambda: tuple(tensor.tolist()))


def documents(params: PackedSeqParams, tokens: int, ranks: int, causal: bool) -> tuple[AttentionMask, Layout]:
    """Mask and layout of a packed (thd) batch, ``tokens`` over all ``ranks``.

    Every document has its padded segment; what is left of a segment after the document sees nothing and is
    seen by nothing.

    Raises:
        LcabError: cu_seqlens are missing, differ for queries and keys, do not fit each other or the tokens.
    """
    q, q_padded = params.cu_seqlens_q, params.cu_seqlens_q_padded
    kv, kv_padded = params.cu_seqlens_kv, params.cu_seqlens_kv_padded
    if q is None and q_padded is None:
        raise LcabError("a packed batch (qkv_format thd) needs cu_seqlens_q in its packed_seq_params")
    edges = _edges(q if q is not None else q_padded)
    padded = edges if q_padded is None else _edges(q_padded)
    for name, tensor, expected in (("", kv, edges), ("_padded", kv_padded, padded)):
        if tensor is not None and _edges(tensor) != expected:
            raise UnsupportedError(
                f"cu_seqlens_kv{name} differs from cu_seqlens_q{name}; queries and keys must be the same "
                "documents"
            )
    if padded[-1] != tokens and ranks > 1:
        raise LcabError(
            f"cu_seqlens end at {padded[-1]}, but the batch has {tokens} tokens over {ranks} "
            "context-parallel ranks; count the padding after the last document in cu_seqlens_q_padded"
        )
    if len(edges) != len(padded) or padded[-1] > tokens:
        raise LcabError(
            f"cu_seqlens_q {edges} and cu_seqlens_q_padded {padded} do not describe {tokens} tokens"
        )
    mask = _documents(edges, padded, tokens, causal)
    return mask, layouts.zigzag_documents((*padded, tokens) if padded[-1] < tokens else padded, ranks)


@lru_cache(maxsize=64)
def _documents(edges: tuple[int, ...], padded: tuple[int, ...], tokens: int, causal: bool) -> AttentionMask:
    lengths, room = np.diff(edges), np.diff(padded)
    if (lengths < 0).any() or (lengths > room).any():
        raise LcabError(f"documents of {lengths.tolist()} tokens do not fit into segments of {room.tolist()}")
    start = np.array(padded[:-1], dtype=np.int64)
    end = start + lengths
    hi = np.full_like(start, 0 if causal else NO_HI)
    array = np.stack([start, end, start, end, np.full_like(start, NO_LO), hi], axis=1)
    return AttentionMask.from_disjoint(tokens, tokens, array[lengths > 0])


def require_causal_rows(attention_mask: Tensor, kind: AttnMaskType, layout: Layout, rank: int) -> None:
    """Accept Megatron's own causal ``attention_mask`` [b or 1, 1, local queries, keys] beside context
    parallelism, and nothing else: what other ranks' rows hide is not known here.

    Raises:
        UnsupportedError: it hides or shows anything else than a causal mask.
    """

    def causal_rows() -> bool:
        seen = layout.positions(rank, attention_mask.device)[:, None] >= torch.arange(
            layout.seqlen, device=attention_mask.device
        )
        fits = attention_mask.shape[-2:] == seen.shape
        return fits and bool((~attention_mask.bool() == seen).all())

    if kind.name not in CAUSAL or not _rows.get(attention_mask, (layout.digest, rank), causal_rows):
        raise UnsupportedError(
            f"attention_mask {tuple(attention_mask.shape)} under attn_mask_type {kind.name} is not this "
            "rank's part of a causal mask; with context parallelism leave it out and give "
            "packed_seq_params=mask_params(mask)"
        )


def dense(attention_mask: Tensor, kind: AttnMaskType, q_len: int, k_len: int) -> tuple[AttentionMask, ...]:
    """The masks of Megatron's ``attention_mask`` [b or 1, 1, queries or 1, keys], True = hidden, one for each
    row of the batch, or one for all; read on the host once a tensor.

    Raises:
        LcabError: it has another shape, differs by head, or shows what a causal type hides.
    """
    shape = tuple(attention_mask.shape)
    if len(shape) != 4 or shape[1] != 1 or shape[2] not in (1, q_len) or shape[3] != k_len:
        raise LcabError(
            f"attention_mask {shape} is not [batch or 1, 1, {q_len} or 1, {k_len}]; one mask for all heads"
        )
    return _hidden.get(attention_mask, (kind, q_len), lambda: _dense(attention_mask, kind, q_len, k_len))


def _dense(attention_mask: Tensor, kind: AttnMaskType, q_len: int, k_len: int) -> tuple[AttentionMask, ...]:
    seen = ~attention_mask.detach()[:, 0].bool().cpu()  # [b or 1, queries or 1, keys]
    base = None if kind is AttnMaskType.arbitrary else plain(kind, q_len, k_len)
    if base is not None and bool((seen.expand(-1, q_len, -1) == base.to_dense()).all()):
        return (base,)
    allowed = torch.ones(q_len, k_len, dtype=torch.bool) if base is None else base.to_dense()
    if seen.shape[1] > 1 and bool((seen & ~allowed).any()):
        raise LcabError(
            f"attention_mask shows keys that attn_mask_type {kind.name} hides; use attn_mask_type arbitrary"
        )
    seen = seen & allowed
    if bool((seen == seen[:1]).all()):
        seen = seen[:1]
    return tuple(masks.from_dense(row) for row in seen)


@lru_cache(maxsize=64)
def stacked(rows: tuple[AttentionMask, ...]) -> AttentionMask:
    """The mask of sequences laid end to end, each seeing itself by its own of ``rows``."""
    q_len, k_len = rows[0].q_len, rows[0].k_len
    arrays = []
    for number, row in enumerate(rows):
        dq, dk = number * q_len, number * k_len
        array = row.array + np.array([dq, dq, dk, dk, 0, 0])
        for column, none in ((4, NO_LO), (5, NO_HI)):
            limited = array[:, column] != none
            array[limited, column] += dk - dq
        arrays.append(array)
    return AttentionMask.from_disjoint(q_len * len(rows), k_len * len(rows), np.concatenate(arrays))
