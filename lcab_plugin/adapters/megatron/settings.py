"""What a Megatron config says about attention: taken over, or refused with the reason."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import AttnBackend

from lcab_plugin.adapters.megatron.groups import Plug
from lcab_plugin.context_parallel import ALIASES
from lcab_plugin.context_parallel.collectives import global_ranks
from lcab_plugin.errors import LcabError, UnsupportedError

# Settings of TransformerEngine's attention, or of other attentions, that no kernel here implements.
_REFUSED = {
    "fp8_dot_product_attention": "attention in fp8 is TransformerEngine's",
    "fp8_multi_head_attention": "attention in fp8 is TransformerEngine's",
    "qk_clip": "it needs the largest logit of every head, which kernels here do not return",
    "log_max_attention_logit": "it needs the largest logit of every head, which kernels here do not return",
    "batch_invariant_mode": "kernels here may sum in an order that depends on the batch",
    "flash_decode": "it bypasses the core-attention slot while generating",
    "hybrid_context_parallel": "groups that change from batch to batch are not supported",
    "dynamic_context_parallel": "groups that change from batch to batch are not supported",
}


def require(config: Any, plug: Plug, group: Any, cp_comm_type: str | None) -> None:
    """Refuse a Megatron config that a slot with this plug cannot serve.

    Raises:
        LcabError: names the setting and what to write instead.
    """
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            raise UnsupportedError(
                f"{name} = {getattr(config, name)!r} cannot be had with the plug-in's attention: {reason}; "
                "turn it off"
            )
    backend = getattr(config, "attention_backend", AttnBackend.auto)
    if backend not in (AttnBackend.auto, AttnBackend.local):
        raise LcabError(
            f"attention_backend {backend.name!r} is a choice among TransformerEngine's kernels; leave it at "
            f"auto (the kernel here is --lcab-kernel {plug.config.kernel})"
        )
    if config.context_parallel_size != plug.cp.size or global_ranks(group) != global_ranks(plug.cp.group):
        raise LcabError(
            f"--context-parallel-size {config.context_parallel_size} over ranks {global_ranks(group)} is not "
            f"the group of {plug.cp.size} that {plug.cp.strategy!r} was made for; swap the core attention "
            "after initialize_model_parallel, with the pg_collection of this model"
        )
    _require_comm_type(cp_comm_type if cp_comm_type is not None else config.cp_comm_type, plug)


def _require_comm_type(named: Any, plug: Plug) -> None:
    """Megatron's own choice of strategy must be ours. Its training scripts say p2p unless told another, so
    that p2p cannot be told from nothing."""
    names = set(named) if isinstance(named, list) else {named}
    wrong = [n for n in names if n not in (None, "p2p") and ALIASES.get(n, n) != plug.config.strategy]
    if wrong and plug.cp.size > 1:
        raise LcabError(
            f"--cp-comm-type {wrong[0]} and --lcab-strategy {plug.config.strategy} both choose how ranks "
            "communicate; leave --cp-comm-type out"
        )


def window(config: Any, layer_number: int) -> tuple[int, int] | None:
    """(left, right) of the layers that have a window; ``layer_number`` counts from 1."""
    size = getattr(config, "window_size", None)
    skip = getattr(config, "window_attn_skip_freq", None)
    if not size:
        return None
    has = skip is None or bool(layer_number % skip if isinstance(skip, int) else skip[layer_number - 1])
    return (int(size[0]), int(size[1])) if has else None


def scale(config: Any, plug: Plug, given: float | None) -> float | None:
    """The softmax scale; None for head_dim ** -0.5.

    ``apply_query_key_layer_scaling`` divides logits by the layer's number and multiplies them back inside the
    softmax, against overflow in fp16; kernels here hold logits in float32, so there is nothing to do.

    Raises:
        LcabError: Megatron and the settings give different ones.
    """
    given = given if given is not None else getattr(config, "softmax_scale", None)
    own = plug.config.scale
    if own is not None and given is not None and own != given:
        raise LcabError(
            f"softmax scale {own} of the settings is not Megatron's {given}; leave one of them out"
        )
    return own if given is None else given
