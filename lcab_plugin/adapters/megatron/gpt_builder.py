"""The plug-in in the model builders of ``megatron.training``, 0.19 and later: ``pretrain`` takes a model's
config there, and finds the builder by the name that the config gives."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from lcab_plugin.adapters.megatron.pretrain import with_plugin
from lcab_plugin.errors import UnsupportedError


class LcabGPTModelBuilder(GPTModelBuilder):
    """Megatron's builder under the plug-in's spec provider."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """One pipeline stage or model chunk."""
        build = with_plugin(super().build_model)
        return build(
            pg_collection=pg_collection, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )


@dataclass(kw_only=True)
class LcabGPTModelConfig(GPTModelConfig):
    """Megatron's config of a GPT, built by :class:`LcabGPTModelBuilder`."""

    builder: ClassVar[str] = f"{LcabGPTModelBuilder.__module__}.{LcabGPTModelBuilder.__qualname__}"


def model_config_class(args: Namespace) -> type[LcabGPTModelConfig]:
    """What ``gpt_config_from_args`` takes as ``model_config_cls``.

    Raises:
        UnsupportedError: ModelOpt, which builds models with specs of its own.
    """
    if getattr(args, "modelopt_enabled", False):
        raise UnsupportedError(
            "ModelOpt builds the model with specs of its own; start pretrain_gpt.py without the plug-in"
        )
    return LcabGPTModelConfig
