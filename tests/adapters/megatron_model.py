"""A small GPTModel in Megatron's slot, and the loss and gradients of one batch, with and without the plug-in.

The reference is Megatron's own DotProductAttention in one process under a dense mask (for MLA an eager one).
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcab_plugin import layout as layouts
from lcab_plugin import masks
from lcab_plugin.config import AttentionConfig
from lcab_plugin.masks import AttentionMask

warnings.filterwarnings("ignore")

import megatron.core  # noqa: E402
from megatron.core import parallel_state as ps  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402

from lcab_plugin.adapters import megatron as lcab_megatron  # noqa: E402
from lcab_plugin.adapters.megatron import cpu  # noqa: E402

VOCABULARY, LENGTH, LAYERS = 96, 64, 2
# Real lengths of three documents; padded, every segment divides by 2 * 4 ranks.
DOCUMENTS, SEGMENTS = (13, 24, 9), (16, 32, 16)


@dataclass
class Cell:
    """One model and batch. ``mask``: None for the model's own, a mask that the batch carries, several for
    micro-batches that are all under way before the first backward, or "packed" for documents in thd.
    ``settings`` are Megatron's, ``spec`` the arguments of its spec function; ``want`` and ``want_settings``
    replace mask and settings for the reference."""

    name: str
    cp: int = 1
    tp: int = 1
    lcab: dict[str, Any] = field(default_factory=dict)
    mask: AttentionMask | tuple[AttentionMask, ...] | str | None = None
    batch: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    qkv_format: str = "sbhd"
    how: str = "spec"
    keep: bool = False
    want: AttentionMask | None = None
    want_settings: dict[str, Any] | None = None


def start_megatron(tp: int = 1, cp: int = 1, pp: int = 1) -> None:
    """Megatron's groups for these degrees, in place of earlier ones."""
    cpu.install()
    if ps.model_parallel_is_initialized():
        ps.destroy_model_parallel()
    ps.initialize_model_parallel(
        tensor_model_parallel_size=tp, context_parallel_size=cp, pipeline_model_parallel_size=pp
    )


def known(cell: Cell) -> bool:
    """Whether this megatron-core has what the cell needs: its settings, providers since 0.13, rows of a batch
    of one before 0.16, and MLA without TransformerEngine."""
    version = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
    if cell.how == "provider" and version < (0, 13):
        return False
    if cell.batch == 1 and isinstance(cell.mask, AttentionMask) and cell.qkv_format == "sbhd":
        return version >= (0, 16)
    if "multi_latent_attention" in cell.settings:
        padded = cell.mask != "packed" or version >= (0, 14)  # before, MLA's RoPE knew no cu_seqlens_padded
        return padded and version in ((0, 12), (0, 13), (0, 15), (0, 19))
    if cell.settings.get("softmax_type") == "learnable" and version < (0, 16):
        return False  # 0.15's own attention leaves its offsets as they lie in memory, and draws no numbers
    return set(cell.settings) <= set(TransformerConfig.__dataclass_fields__)


def transformer_config(cell: Cell, cp: int, tp: int) -> TransformerConfig:
    settings: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "tensor_model_parallel_size": tp,
        "context_parallel_size": cp,
        "use_cpu_initialization": True,  # the same weights whatever the degrees
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        **cell.settings,
    }
    mla = settings.get("multi_latent_attention", False)
    if mla:
        settings["num_query_groups"] = None
    return (MLATransformerConfig if mla else TransformerConfig)(**settings)


class EagerAttention(torch.nn.Module):
    """Dense attention for MLA's reference: Megatron's own local one takes no head sizes that differ."""

    def __init__(self, softmax_scale: float, **others: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, **others: Any) -> Tensor:
        scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * self.scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, v).flatten(2)


def build(cell: Cell, cp: int, tp: int, plugged: bool) -> GPTModel:
    """The model, its weights from one seed."""
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1234)
    config = AttentionConfig.from_dict(cell.lcab)
    if plugged and cell.how == "provider":
        with lcab_megatron.swap_provider(config):
            spec = get_gpt_layer_local_spec(**cell.spec)
    else:
        spec = get_gpt_layer_local_spec(**cell.spec)
    if not plugged and "multi_latent_attention" in cell.settings:
        spec.submodules.self_attention.submodules.core_attention = EagerAttention
    if plugged and cell.how != "provider":
        spec = lcab_megatron.swap_core_attention(spec, config)
    model = GPTModel(
        transformer_config(cell, cp, tp),
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
    )
    generator = torch.Generator().manual_seed(11)
    for name, p in model.named_parameters():
        if name.endswith("softmax_offset"):  # of the size of logits, else a wrong one hardly shows
            offsets = torch.randn(len(p) * tp, generator=generator)
            p.data.copy_(offsets.view(tp, -1)[ps.get_tensor_model_parallel_rank() if tp > 1 else 0])
    return model


def data(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and loss mask [batch, LENGTH]; few early tokens count, so that ranks differ."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCABULARY, (batch, LENGTH + 1), generator=generator)
    counted = torch.rand(batch, LENGTH, generator=generator) < torch.linspace(0.1, 1, LENGTH)
    return tokens[:, :-1], tokens[:, 1:], counted.float()


def packed_params() -> PackedSeqParams:
    real = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()], dtype=torch.int32)
    padded = torch.tensor(segment_edges(), dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max(SEGMENTS),
        max_seqlen_kv=max(SEGMENTS),
    )


def segment_edges() -> tuple[int, ...]:
    return (0, *torch.tensor(SEGMENTS).cumsum(0).tolist())


def real_tokens() -> Tensor:
    """1 for tokens of documents, 0 for their padding: [LENGTH]."""
    out, start = torch.zeros(LENGTH), 0
    for length, room in zip(DOCUMENTS, SEGMENTS, strict=True):
        out[start : start + length] = 1
        start += room
    return out


@dataclass
class Result:
    """Mean loss, gradients by name, and their norm, of the whole model; each rank's part under TP."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]


def reference(cell: Cell) -> Result:
    """In this process alone, with Megatron's own attention. Packed documents are rows of their own, because
    its positions restart in each."""
    if cell.want_settings is not None:
        cell = replace(cell, settings=cell.want_settings)
    model = build(cell, 1, 1, plugged=False)
    tokens, labels, counted = data(cell.batch)
    if cell.mask == "packed":
        return _packed_reference(model, tokens, labels, counted)
    total = torch.zeros(())
    for mask in alive(cell.want or cell.mask):
        hidden = ~(mask or masks.causal(LENGTH)).to_dense()[None, None]
        total = total + (model(tokens, None, hidden, labels=labels) * counted).sum()
    return _result(model, total, counted.sum(), None)


def alive(mask: Any) -> tuple[Any, ...]:
    return mask if isinstance(mask, tuple) else (mask,)


def _packed_reference(model: GPTModel, tokens: Tensor, labels: Tensor, counted: Tensor) -> Result:
    counted = counted * real_tokens()
    total, start = torch.zeros(()), 0
    for length, room in zip(DOCUMENTS, SEGMENTS, strict=True):
        part = slice(start, start + length)
        hidden = ~masks.causal(length).to_dense()[None, None]
        losses = model(tokens[:, part], None, hidden, labels=labels[:, part])
        total = total + (losses * counted[:, part]).sum()
        start += room
    return _result(model, total, counted.sum(), None)


def run(cell: Cell) -> Result:
    """With the plug-in, over the context-parallel ranks of this process."""
    model = build(cell, cell.cp, cell.tp, plugged=True)
    model.train()
    tokens, labels, counted = data(cell.batch)
    layout = layouts.make("zigzag", cell.cp, LENGTH)
    if cell.mask == "packed":
        counted = counted * real_tokens()
        layout = layouts.zigzag_documents(segment_edges(), cell.cp)
    rank = ps.get_context_parallel_rank()
    tokens, labels, mine = (layout.shard(x, rank, 1) for x in (tokens, labels, counted))
    attention_mask = None
    if cell.how == "dense":
        attention_mask = ~masks.causal(LENGTH).to_dense()[None, None]
        attention_mask = layout.shard(attention_mask, rank, 2)
    total = torch.zeros(())
    with lcab_megatron.keep_attention() if cell.keep else nullcontext():
        for mask in alive(cell.mask):
            params: PackedSeqParams | None = None
            if mask is not None:
                given = {"qkv_format": cell.qkv_format}
                params = packed_params() if mask == "packed" else lcab_megatron.mask_params(mask, **given)
            losses = model(tokens, None, attention_mask, labels=labels, packed_seq_params=params)
            total = total + (losses * mine).sum()
        return _result(model, total, counted.sum(), ps.get_context_parallel_group())


def _result(model: GPTModel, total: Tensor, count: Tensor, group: Any) -> Result:
    model.zero_grad()
    (total / count).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss = (total / count).detach().clone()
    squares = torch.zeros(())
    for name, p in model.named_parameters():
        if group is not None:
            dist.all_reduce(gradients[name], group=group)
        if getattr(p, "tensor_model_parallel", False) or ps.get_tensor_model_parallel_rank() == 0:
            squares += gradients[name].double().square().sum().float()
    if group is not None:
        dist.all_reduce(loss, group=group)
        dist.all_reduce(squares, group=ps.get_tensor_model_parallel_group())
    return Result(loss.item(), squares.sqrt().item(), gradients)


def difference(got: Result, want: Result) -> dict[str, float]:
    """Relative deviations of loss and norm, and of every gradient from its largest entry."""
    rank, worst = ps.get_tensor_model_parallel_rank(), 0.0
    largest = max(g.abs().max().item() for g in want.gradients.values())
    assert got.gradients.keys() == want.gradients.keys()
    for name, mine in got.gradients.items():
        whole = want.gradients[name]
        for dim in range(whole.dim()):
            if whole.shape[dim] != mine.shape[dim]:
                whole = whole.narrow(dim, rank * mine.shape[dim], mine.shape[dim])
        scale = max(whole.abs().max().item(), 1e-3 * largest)
        worst = max(worst, (mine - whole).abs().max().item() / scale)
    return {
        "loss": abs(got.loss / want.loss - 1),
        "norm": abs(got.norm / want.norm - 1),
        "gradients": worst,
    }
