"""What tests of the slot alone share: a slot without its model, and bad input with its error's words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lcab_plugin import masks
from lcab_plugin.adapters import megatron as lcab_megatron
from lcab_plugin.config import AttentionConfig
from tests.adapters.megatron_model import Cell, transformer_config

HEADS, DIM, ROWS = 8, 8, 16


def has(setting: str) -> bool:
    """Whether this megatron-core has the setting: sinks since 0.15, windows of some layers since 0.15."""
    return setting in TransformerConfig.__dataclass_fields__


def slot(lcab: dict[str, Any] | None = None, cp: int = 1, **how: Any) -> Any:
    """A CoreAttention as Megatron builds one; ``how``: settings of its config, or constructor keywords."""
    names = ("attn_mask_type", "layer_number", "softmax_scale", "cp_comm_type", "pg_collection")
    own = {name: how.pop(name) for name in names if name in how}
    config = transformer_config(Cell("", settings=how), cp, 1)
    spec = lcab_megatron.swap_core_attention(
        get_gpt_layer_local_spec(), AttentionConfig.from_dict(lcab or {})
    )
    module = spec.submodules.self_attention.submodules.core_attention
    own = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, **own}
    return module(config=config, attention_type="self", **own)


def qkv(batch: int = 2, rows: int = ROWS, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, h, d] with half as many key/value heads."""
    generator = torch.Generator().manual_seed(3)
    shapes = (rows, HEADS), (keys or rows, HEADS // 2), (keys or rows, HEADS // 2)
    q, k, v = (torch.randn(s, batch, h, DIM, generator=generator) for s, h in shapes)
    return q, k, v


def eager(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sink: Tensor | None = None) -> Tensor:
    """[s, b, h * d] in float64; ``seen`` [b or 1, queries, keys]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    if sink is not None:
        extra = sink.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, extra), -1)
    weights = scores.softmax(-1)[..., : k.shape[0]].nan_to_num(0.0)
    return torch.einsum("bhqk,kbhd->qbhd", weights, v.double()).flatten(2)


def packed(edges: list[int], **fields: Any) -> PackedSeqParams:
    cu = torch.tensor(edges, dtype=torch.int32)
    return PackedSeqParams(**{"qkv_format": "thd", "cu_seqlens_q": cu, "cu_seqlens_kv": cu, **fields})


def _call(module: Any, *, thd: bool = False, **how: Any) -> Any:
    q, k, v = (x[:, 0] for x in qkv(1)) if thd else qkv()
    mask = how.pop("mask", None)
    return module(q, k, v, mask, **how)


def bad_inputs() -> dict[str, tuple[Callable[[], Any], str]]:
    """Name: what to do on every rank of a context-parallel pair, and words its error must hold."""
    ring = {"strategy": "ring_p2p"}
    n = 2 * ROWS
    kinds = AttnMaskType
    other = torch.tensor([0, ROWS, n], dtype=torch.int32)
    full_rows = torch.zeros(1, 1, ROWS, n, dtype=torch.bool)

    def with_ring(**how: Any) -> Any:
        return slot(ring, 2, **how)

    return {
        "degrees": (
            lambda: slot({"strategy": "usp", "ulysses": 4, "ring": 2}, 2),
            "--context-parallel-size 2",
        ),
        "no strategy": (lambda: slot({}, 2), "--context-parallel-size 2"),
        "config's size": (lambda: slot(ring, 1), "--context-parallel-size 1"),
        "layout": (lambda: slot({**ring, "layout": "striped"}, 2), "leave the layout out"),
        "no such kernel here": (lambda: slot({**ring, "kernel": "fa3"}, 2), "kernel 'fa3' cannot run here"),
        "ranks differ": (
            lambda: slot({**ring, "softcap": 1.0 + ps.get_context_parallel_rank()}, 2),
            "ranks disagree",
        ),
        "cp_comm_type": (lambda: with_ring(cp_comm_type="a2a"), "leave --cp-comm-type out"),
        "cp_comm_type per layer": (
            lambda: with_ring(**{"cp_comm_type": None, "num_layers": 2, **_per_layer()}),
            "leave --cp-comm-type out",
        ),
        "fp8": (lambda: with_ring(fp8_dot_product_attention=True), "fp8_dot_product_attention = True"),
        "backend": (lambda: with_ring(attention_backend=AttnBackend.flash), "--lcab-kernel sdpa_flash"),
        "scale twice": (lambda: slot({**ring, "scale": 0.5}, 2, softmax_scale=0.25), "leave one of them out"),
        "dropout": (lambda: _call(with_ring(attention_dropout=0.1)), "--attention-dropout 0"),
        "bias": (lambda: _call(with_ring(), attention_bias=torch.zeros(1)), "attention_bias"),
        "unknown argument": (lambda: _call(with_ring(), num_splits=2), "num_splits"),
        "padding mask": (
            lambda: _call(with_ring(), mask=torch.ones(2, 1, 1, n, dtype=torch.bool)),
            "mask_params(mask)",
        ),
        "full mask under causal": (lambda: _call(with_ring(), mask=full_rows), "part of a causal mask"),
        "arbitrary": (lambda: _call(with_ring(), attn_mask_type=kinds.arbitrary), "arbitrary needs a mask"),
        "family": (lambda: _call(slot({**ring, "mask": "share_question"}, 2)), "'share_question'"),
        "full under causal settings": (
            lambda: _call(with_ring(), attn_mask_type=kinds.no_mask),
            "--lcab-mask full",
        ),
        "mask twice": (
            lambda: _call(with_ring(), mask=full_rows, packed_seq_params=_params(masks.causal(n))),
            "give the batch's mask once",
        ),
        "mask of another length": (
            lambda: _call(with_ring(), packed_seq_params=_params(masks.causal(ROWS))),
            f"mask is for {ROWS} tokens",
        ),
        "packed contradicts": (
            lambda: _call(
                slot({**ring, "mask": "prefix_lm_causal"}, 2), thd=True, packed_seq_params=packed([0, n])
            ),
            "--lcab-mask causal_document",
        ),
        "packed and a mask": (
            lambda: _call(with_ring(), thd=True, mask=full_rows, packed_seq_params=packed([0, n])),
            "no attention_mask with it",
        ),
        "keys of other documents": (
            lambda: _call(with_ring(), thd=True, packed_seq_params=packed([0, 8, n], cu_seqlens_kv=other)),
            "same documents",
        ),
        "documents too short": (
            lambda: _call(with_ring(), thd=True, packed_seq_params=packed([0, 8, n - 4])),
            "cu_seqlens_q_padded",
        ),
        "document of 6": (
            lambda: _call(with_ring(), thd=True, packed_seq_params=packed([0, 6, n])),
            "multiple of 4",
        ),
        "packed without boundaries": (
            lambda: _call(with_ring(), thd=True, packed_seq_params=PackedSeqParams(qkv_format="thd")),
            "needs cu_seqlens_q",
        ),
        "format": (
            lambda: _call(with_ring(), packed_seq_params=PackedSeqParams(qkv_format="bshd")),
            "'bshd'",
        ),
        "thd of several rows": (
            lambda: _call(with_ring(), packed_seq_params=packed([0, n])),
            "micro-batch size 1",
        ),
        "boundaries in sbhd": (
            lambda: _call(with_ring(), packed_seq_params=packed([0, n], qkv_format="sbhd")),
            "use 'thd'",
        ),
        "key-value cache": (
            lambda: with_ring()(*qkv(2, 2, ROWS), None, attn_mask_type=kinds.no_mask),
            "--context-parallel-size 1",
        ),
        "undecided": (
            lambda: lcab_megatron.swap_core_attention(None, AttentionConfig(kernel="auto")),
            "kernel 'auto' is not decided yet",
        ),
        "unbound": (
            lambda: lcab_megatron.CoreAttention(transformer_config(Cell(""), 2, 1), 1, kinds.causal, "self"),
            "swap_core_attention",
        ),
    } | _of_newer_versions()


def _params(mask: Any) -> Any:
    return lcab_megatron.mask_params(mask)


def _per_layer() -> dict[str, Any]:
    return {"cp_comm_type": "all_gather"}


def _of_newer_versions() -> dict[str, tuple[Callable[[], Any], str]]:
    """What can be said wrong only since 0.15 (sinks) and 0.16 (a group of one batch)."""
    ring = {"strategy": "ring_p2p"}
    found: dict[str, tuple[Callable[[], Any], str]] = {}
    if has("softmax_type"):
        found["softmax_type"] = (lambda: slot(ring, 2, softmax_type="other"), "'other'")
    if "local_cp_size" in PackedSeqParams.__dataclass_fields__:

        def shrunk() -> Any:
            params = replace(packed([0, 2 * ROWS]), local_cp_size=1)
            return _call(slot(ring, 2), thd=True, packed_seq_params=params)

        found["dynamic context parallelism"] = (shrunk, "local_cp_size 1")
    return found
