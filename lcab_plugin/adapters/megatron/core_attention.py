"""The module in Megatron's ``core_attention`` slot."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from lcab_plugin import kernels
from lcab_plugin.adapters.megatron import batch, settings
from lcab_plugin.adapters.megatron.groups import Plug, cp_group
from lcab_plugin.attention import attention, refuse_dropout
from lcab_plugin.context_parallel import ContextParallel
from lcab_plugin.context_parallel.collectives import rank, world_size
from lcab_plugin.errors import LcabError, UnsupportedError
from lcab_plugin.layout import Layout
from lcab_plugin.masks import AttentionMask


class CoreAttention(MegatronModule):
    """Attention of one layer with the plug-in's kernels, strategies and masks.

    Megatron builds it where its own DotProductAttention stood, with the arguments of any version from 0.12 to
    0.19. The settings and process groups are the ``plug`` of a subclass: see ``spec.swap_core_attention``.
    """

    plug: ClassVar[Plug | None] = None

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        **groups: Any,
    ) -> None:
        """``groups``: Megatron's ``pg_collection`` or ``model_comm_pgs``; MLA's ``k_channels`` and
        ``v_channels``, which the tensors say as well."""
        super().__init__(config=config)
        if self.plug is None:
            raise LcabError(
                "CoreAttention has no settings of its own; put it into a spec with swap_core_attention or "
                "swap_provider"
            )
        unknown = set(groups) - {"pg_collection", "model_comm_pgs", "k_channels", "v_channels"}
        if any(groups[name] is not None for name in unknown):
            raise LcabError(f"core attention is given {sorted(unknown)}, which the plug-in does not know")
        collection = groups.get("pg_collection") or groups.get("model_comm_pgs")
        settings.require(config, self.plug, cp_group(collection), cp_comm_type)
        self.tp_group = getattr(collection, "tp", None) or parallel_state.get_tensor_model_parallel_group()
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window = settings.window(config, self.layer_number)
        self.scale = settings.scale(config, self.plug, softmax_scale)
        self.deterministic = self.plug.config.deterministic or bool(config.deterministic_mode)
        self._add_sinks()

    def _add_sinks(self) -> None:
        """``softmax_offset`` of this tensor-parallel rank's heads, as Megatron's ``softmax_type`` says."""
        config = self.config
        kind = getattr(config, "softmax_type", "vanilla")
        size, index = world_size(self.tp_group), rank(self.tp_group)
        heads = config.num_attention_heads // size
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        offset: Tensor | None = None
        if kind == "off-by-one":
            offset = torch.zeros(heads, device=device)
        elif kind == "learnable":
            # all heads' first values from one generator state, so that they do not depend on the split
            whole = torch.empty(heads * size if config.use_cpu_initialization else heads, device=device)
            if config.perform_initialization:
                with torch.no_grad():
                    if config.use_cpu_initialization:
                        config.init_method(whole)
                    else:
                        with tensor_parallel.get_cuda_rng_tracker().fork():
                            config.init_method(whole)
            own = whole.view(-1, heads)[index if config.use_cpu_initialization else 0]
            offset = torch.nn.Parameter(own.to(config.params_dtype).clone())
            tensor_parallel.set_tensor_model_parallel_attributes(offset, True, 0, 1)
        elif kind != "vanilla":
            raise UnsupportedError(
                f"softmax_type {kind!r} is not known here; vanilla, off-by-one or learnable"
            )
        if isinstance(offset, torch.nn.Parameter):
            self.softmax_offset = offset
        else:
            self.register_buffer("softmax_offset", offset, persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **others: Any,
    ) -> Tensor:
        """Context of this rank's rows: query [s, b, h, d] to [s, b, h * dv]; packed (thd), [t, h, d] to
        [t, h * dv].

        Raises:
            LcabError: an argument that the plug-in neither follows nor may ignore.
        """
        assert self.plug is not None
        refuse_dropout(self.dropout, self.training)
        self._refuse(attention_bias, packed_seq_params, others)
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        q, k, v = _batch_first(query, key, value, packed)
        kind = attn_mask_type if attn_mask_type is not None else self.attn_mask_type
        rows, cp = self._batch(q, k, attention_mask, kind, packed_seq_params)
        rows = tuple(batch.windowed(row, self.window) for row in rows)
        mask = rows[0] if len(rows) == 1 else batch.stacked(rows)
        if len(rows) > 1:
            q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
        settings = self.plug.config
        out = attention(
            q,
            k,
            v,
            mask,
            kernel=settings.kernel,
            scale=self.scale,
            softcap=settings.softcap,
            deterministic=self.deterministic,
            sink=self.softmax_offset,
            cp=cp,
        )
        if packed:
            return out.reshape(out.shape[1], -1)
        out = out.view(query.shape[1], -1, *out.shape[2:]) if len(rows) > 1 else out
        return out.transpose(0, 1).flatten(2)

    def _refuse(self, bias: Tensor | None, params: PackedSeqParams | None, others: dict[str, Any]) -> None:
        given = [name for name, x in {"attention_bias": bias, **others}.items() if x is not None]
        if given:
            raise UnsupportedError(
                f"core attention is given {', '.join(given)}, which no kernel here takes; leave it out"
            )
        if params is None:
            return
        if params.qkv_format not in ("sbhd", "thd"):
            raise LcabError(f"qkv_format {params.qkv_format!r} is not Megatron's; use 'sbhd' or 'thd'")
        group, size = getattr(params, "cp_group", None), getattr(params, "local_cp_size", None)
        assert self.plug is not None
        if group is not None or size not in (None, self.plug.cp.size):
            raise UnsupportedError(
                "packed_seq_params changes the context-parallel group for one batch (dynamic context "
                f"parallelism, local_cp_size {size}); the plug-in's group of {self.plug.cp.size} is fixed"
            )

    def _batch(
        self,
        q: Tensor,
        k: Tensor,
        attention_mask: Tensor | None,
        kind: AttnMaskType,
        params: PackedSeqParams | None,
    ) -> tuple[tuple[AttentionMask, ...], ContextParallel | None]:
        """The mask of all rows, or one for each, and the group with this batch's layout."""
        assert self.plug is not None
        cp, family = self.plug.cp, self.plug.config.mask
        q_len, k_len = q.shape[1] * cp.size, k.shape[1] * cp.size
        rows: tuple[AttentionMask, ...]
        layout: Layout | None = None
        if cp.size > 1 and (q_len != k_len or q.shape[1] % 2):
            raise UnsupportedError(
                f"a rank of {cp.size} has {q.shape[1]} queries and {k.shape[1]} keys: with context "
                "parallelism both must be the same even number (a key-value cache needs "
                "--context-parallel-size 1)"
            )
        if isinstance(params, batch.MaskParams):
            if attention_mask is not None:
                raise LcabError("give the batch's mask once: attention_mask=None beside mask_params(mask)")
            if params.mask.q_len != q_len:
                raise LcabError(
                    f"the batch's mask is for {params.mask.q_len} tokens, but it has {q_len}; build the mask "
                    "for the whole sequence"
                )
            rows = (params.mask,)
        elif params is not None and params.qkv_format == "thd":
            _require(batch.family_problem(family, kind, packed=True))
            if kind is AttnMaskType.arbitrary or attention_mask is not None:
                raise UnsupportedError(
                    "a packed batch's mask is its documents; give no attention_mask with it"
                )
            mask, layout = batch.documents(params, q_len, cp.size, kind.name in batch.CAUSAL)
            rows = (mask,)
        else:
            if params is not None and params.cu_seqlens_q is not None:
                raise LcabError("packed_seq_params has cu_seqlens but qkv_format 'sbhd'; use 'thd'")
            rows = self._unpacked(attention_mask, kind, q_len, k_len)
        if cp.size == 1:
            return rows, None
        return rows, cp.with_layout(seqlen=q_len) if layout is None else cp.holding(layout)

    def _unpacked(
        self, attention_mask: Tensor | None, kind: AttnMaskType, q_len: int, k_len: int
    ) -> tuple[AttentionMask, ...]:
        """The masks of a batch that is not packed, by ``attn_mask_type`` and ``attention_mask``."""
        assert self.plug is not None
        cp = self.plug.cp
        if attention_mask is None or cp.size > 1:
            mask = batch.plain(kind, q_len, k_len)
            if q_len == k_len:  # a step of generation sees its whole cache
                _require(batch.family_problem(self.plug.config.mask, kind, packed=False))
            if attention_mask is not None:
                layout = cp.with_layout(seqlen=q_len).layout
                batch.require_causal_rows(attention_mask, kind, layout, cp.rank)
            return (mask,)
        if kind is not AttnMaskType.arbitrary:
            _require(batch.family_problem(self.plug.config.mask, kind, packed=False))
        return batch.dense(attention_mask, kind, q_len, k_len)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """TransformerEngine's attention saves an ``_extra_state`` of fp8 scales, of no use here, and may save
        its offsets as [1, h, 1, 1]."""
        state_dict.pop(f"{prefix}_extra_state", None)
        name = f"{prefix}softmax_offset"
        if name in state_dict:
            state_dict[name] = state_dict[name].reshape(-1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """The learnable offsets, split by tensor-parallel rank, under the name that Megatron's own attention
        gives them; nothing without them."""
        learnt = isinstance(self.softmax_offset, torch.nn.Parameter)
        state = self.state_dict(keep_vars=True) if learnt else {}
        known = inspect.signature(make_sharded_tensors_for_checkpoint).parameters
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            **{name: group for name, group in groups.items() if name in known and group is not None},
        )

    def describe(self) -> str:
        """What this layer runs, in one line; refuses dropout of a model in training mode.

        Raises:
            UnsupportedError: attention dropout.
        """
        assert self.plug is not None
        refuse_dropout(self.dropout, self.training)
        config, kernel = self.plug.config, kernels.get(self.plug.config.kernel)
        parts = [
            f"kernel {config.kernel} ({kernel.version()})",
            f"strategy {self.plug.cp.describe()}",
            f"mask {config.mask}",
        ]
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.softmax_offset is not None:
            parts.append(f"softmax_type {self.config.softmax_type}")
        return f"CoreAttention: {', '.join(parts)}"

    def extra_repr(self) -> str:
        return self.describe() if not self.dropout else ""


def _require(problem: str | None) -> None:
    if problem is not None:
        raise LcabError(problem)


def _batch_first(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[b, s, h, d] views of Megatron's [s, b, h, d], or of the [t, h, d] of a packed batch.

    Before 0.16 a batch of one row that carries any packed_seq_params comes without its batch dimension, and
    its rotary embedding then broadcasts it to one of ``s`` rows.
    """
    dims = q.dim(), k.dim(), v.dim()
    if packed and dims == (3, 3, 3):
        return q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if dims != (4, 4, 4) or packed:
        raise LcabError(
            f"query, key and value {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} are not "
            + (
                "[tokens, heads, head_dim] of a packed batch; pack rows into one: micro-batch size 1"
                if packed
                else "[tokens, batch, heads, head_dim]; before megatron-core 0.16 a micro-batch of one row "
                "needs mask_params(mask, qkv_format='thd')"
            )
        )
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
