"""Megatron-core 0.12 to 0.19: the plug-in in the ``core_attention`` slot of Megatron's own layers.

After ``initialize_model_parallel``, on every rank:

    config = lcab_megatron.config_from_args(args)  # or an AttentionConfig of your own
    with lcab_megatron.swap_provider(config):  # what Megatron's own spec functions make, 0.13 and later
        model = model_provider()
    print(*lcab_megatron.describe(model), sep="\\n")

or ``swap_core_attention(spec, config)`` on a spec that is already built. docs/megatron.md has the rest.
"""

from __future__ import annotations

from lcab_plugin.adapters.megatron.arguments import add_arguments, config_from_args, decided
from lcab_plugin.adapters.megatron.batch import MaskParams, mask_params
from lcab_plugin.adapters.megatron.core_attention import CoreAttention
from lcab_plugin.adapters.megatron.recompute import keep_attention
from lcab_plugin.adapters.megatron.spec import describe, swap_core_attention, swap_provider

__all__ = [
    "CoreAttention",
    "MaskParams",
    "add_arguments",
    "config_from_args",
    "decided",
    "describe",
    "keep_attention",
    "mask_params",
    "swap_core_attention",
    "swap_provider",
]
