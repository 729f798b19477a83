"""For ``--spec lcab_plugin.adapters.megatron.layer_spec gpt_layer_spec`` of Megatron's training scripts.

Megatron imports this module in its model provider, on every rank once its groups exist, and reads the spec
from it; importing it therefore makes the plug-in's groups. The settings are the script's ``--lcab-*``
arguments, so it must have been started with ``extra_args_provider=add_arguments``. A script that cannot be
given arguments has a module of its own beside it::

    gpt_layer_spec = swap_core_attention(get_gpt_layer_local_spec(), AttentionConfig.from_json("lcab.json"))
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs

from lcab_plugin.adapters.megatron.arguments import config_from_args
from lcab_plugin.adapters.megatron.spec import swap_core_attention
from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError

_FORWARDED = {
    "num_experts": "num_experts",
    "moe_grouped_gemm": "moe_grouped_gemm",
    "qk_layernorm": "qk_layernorm",
    "multi_latent_attention": "multi_latent_attention",
    "normalization": "normalization",
    "qk_l2_norm": "qk_l2_norm",
    "moe_use_legacy_grouped_gemm": "moe_use_legacy_grouped_gemm",
}


def from_args(args: Namespace) -> Any:
    """The layer spec that Megatron's own functions make of its arguments, with the plug-in in its slot.

    Collective over the world. What was chosen for ``"auto"`` is printed on the first rank.

    Raises:
        LcabError: the arguments have no ``--lcab-*``, or ask for layers that differ, which ``--spec`` cannot
            say.
    """
    if not hasattr(args, "lcab_kernel"):
        raise LcabError(
            "the script does not know --lcab-kernel and the others; start Megatron's pretrain() with "
            "extra_args_provider=lcab_plugin.adapters.megatron.add_arguments"
        )
    if args.num_experts is not None and args.moe_layer_freq != 1:
        raise LcabError(
            f"--moe-layer-freq {args.moe_layer_freq} makes layers that differ, but --spec gives all of them "
            "one; leave --spec out and build the model under swap_provider(config)"
        )
    te = args.transformer_impl == "transformer_engine"
    make = getattr(gpt_layer_specs, f"get_gpt_layer_{'with_transformer_engine' if te else 'local'}_spec")
    known = inspect.signature(make).parameters
    given = {name: getattr(args, source) for name, source in _FORWARDED.items() if hasattr(args, source)}
    spec = make(**{name: value for name, value in given.items() if name in known})
    config = collectives.together(lambda: config_from_args(args))
    if config.chosen and collectives.rank() == 0:
        print(config.chosen.sentence, flush=True)
    return swap_core_attention(spec, config)


def _spec_of_the_running_script() -> Any:
    from megatron.training import get_args

    return from_args(get_args())


gpt_layer_spec = _spec_of_the_running_script()
