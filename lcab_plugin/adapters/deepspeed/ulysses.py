"""A drop-in for DeepSpeed's own Ulysses module, so that an existing Ulysses model needs no change."""

from __future__ import annotations

from typing import Any

from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

from lcab_plugin import masks
from lcab_plugin.attention import Attention, refuse_dropout
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask

_DROPOUT = ("dropout", "dropout_p", "attention_dropout", "attn_dropout")


class UlyssesAttention(Attention):
    """Called as DeepSpeed's DistributedAttention is, on tensors [batch, local tokens, heads, head_dim]."""

    family: str | None = None

    def bind(self, config: Any, cp: Any = None) -> None:
        """As Attention.bind; keeps the config's mask family."""
        super().bind(config, cp)
        if config is not None:
            self.family = config.mask

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        *args: Any,
        mask: AttentionMask | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention output, shaped as ``query``.

        ``mask`` is the batch's global mask. Without it the config's family is used where it needs nothing but
        the length ("causal", "full"), over equal shards.

        Raises:
            LcabError: another argument than these, tensors not batch first, a family that needs more, or
                attention dropout while training.
        """
        if batch_dim_idx != 0:
            raise LcabError(
                f"batch_dim_idx {batch_dim_idx}: lay tensors out as [batch, tokens, heads, head_dim] (0)"
            )
        for name in _DROPOUT:
            refuse_dropout(kwargs.pop(name, 0.0), self.training)
        ignored = [a for a in (*args, *kwargs.values()) if a is not None]
        if ignored:
            raise LcabError(
                f"{len(ignored)} further arguments ({', '.join(type(a).__name__ for a in ignored)}) were "
                "given to the attention; apply rotary embeddings before it, and give the mask as mask="
            )
        if mask is None:
            mask = self._family_mask(query.shape[1] * self.cp.size)
        return super().forward(query, key, value, mask)

    def _family_mask(self, seqlen: int) -> AttentionMask:
        if self.family not in ("causal", "full"):
            raise LcabError(
                f"mask {self.family!r} needs more than a length: give the batch's own mask to the attention "
                "as mask="
            )
        return masks.from_name(self.family, seqlen)


def swap_distributed_attention(model: nn.Module, layout_given: bool) -> None:
    """Replace every DistributedAttention of the model.

    Raises:
        LcabError: one that an Attention cannot stand in for, or no layout was chosen: such a model shards the
            sequence itself, and only its author knows how.
    """
    found = [
        (f"{path}.{name}" if path else name, parent, name, child)
        for path, parent in list(model.named_modules())
        for name, child in parent.named_children()
        if isinstance(child, DistributedAttention)
    ]
    if found and not layout_given:
        raise LcabError(
            'the model shards the sequence for DistributedAttention itself: say how in section "lcab", '
            '"layout": "contiguous" for one consecutive part per rank'
        )
    for path, parent, name, child in found:
        _check(path, child)
        setattr(parent, name, UlyssesAttention())


def _check(path: str, module: DistributedAttention) -> None:
    if (module.scatter_idx, module.gather_idx) != (2, 1):
        raise LcabError(
            f"{path} has scatter_idx {module.scatter_idx} and gather_idx {module.gather_idx}; tensors must "
            "be [batch, tokens, heads, head_dim], with 2 and 1"
        )
    local = module.local_attn
    if not isinstance(local, nn.Module):
        return
    if any(True for _ in local.parameters()):
        raise LcabError(
            f"the attention inside {path} has parameters, which would be lost; move them out of it"
        )
    for inner in local.modules():
        names = ("p",) if isinstance(inner, nn.Dropout) else _DROPOUT
        for name in names:
            rate = getattr(inner, name, 0)
            if isinstance(rate, float | int) and rate > 0:
                raise LcabError(
                    f"the attention inside {path} has {name} = {rate}; set attention dropout to 0"
                )
