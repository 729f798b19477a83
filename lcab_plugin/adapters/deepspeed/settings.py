"""A DeepSpeed config taken apart: our section, and what DeepSpeed is given."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

from lcab_plugin.adapters.decide import decide
from lcab_plugin.config import AttentionConfig
from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError
from lcab_plugin.planner import AUTO, Workload

# Keys that decide which collectives a rank runs, or what a gradient is.
_AGREED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "bf16",
    "fp16",
)
_AGREED_ZERO = ("stage", "reduce_scatter", "contiguous_gradients", "reduce_bucket_size")

# Optimizers that compile C++ on a CPU (fused_adam 146 s, cpu_adam 283 s); these first can use torch's Adam.
_ADAMS = ("adam", "adamw", "muon")
_COMPILED = ("lamb", "lion")


@dataclass(frozen=True)
class Settings:
    """What a DeepSpeed config asks for.

    Attributes:
        attention: the section ``"lcab"``, with what the planner put for ``"auto"``.
        layout_given: whether the section names its layout.
        cp_size: ranks that share a sequence.
        deepspeed: the config for DeepSpeed itself.
        notes: what was changed in it, for the user to read.
    """

    attention: AttentionConfig
    layout_given: bool
    cp_size: int
    deepspeed: dict[str, Any]
    notes: list[str]

    @staticmethod
    def read(args: Any, config: Any, workload: Workload | None = None) -> Settings:
        """Take apart ``config`` (dict or path) or the file that ``args.deepspeed_config`` names.

        ``workload``: what settings of ``"auto"`` are decided for.

        Raises:
            LcabError: not exactly one of them, unreadable, or a bad value; the message names the section.
        """
        settings = _load(args, config)
        section = settings.pop("lcab", {})
        if not isinstance(section, dict):
            raise LcabError(f'section "lcab" of the DeepSpeed config must be an object, not {section!r}')
        # Taken out: given both sizes DeepSpeed makes a mesh, and does not reduce gradients over the CP ranks.
        sp, dp = settings.pop("sequence_parallel_size", None), settings.pop("data_parallel_size", None)
        try:
            attention = AttentionConfig.from_dict(section)
            cp_size = _cp_size(attention, sp)
            attention = _decided(attention, workload, cp_size)
            attention.degrees(cp_size)
        except LcabError as error:
            raise LcabError(f'section "lcab" of the DeepSpeed config: {error}') from error
        _check_batch(settings, dp, cp_size)
        notes = _without_compiled_optimizer(settings) if get_accelerator().device_name() == "cpu" else []
        if attention.chosen:
            notes.append(attention.chosen.sentence)
        return Settings(attention, section.get("layout", AUTO) != AUTO, cp_size, settings, notes)

    def require_agreement(self) -> None:
        """Raise the same error on every rank unless all were given the same settings (collective).

        Raises:
            LcabError: names two ranks and what each has.
        """
        chosen = self.attention.chosen
        collectives.require_agreement('the workload of "auto"', chosen and chosen.record["workload"])
        collectives.require_agreement('section "lcab"', self.attention.to_dict())
        zero = self.deepspeed.get("zero_optimization") or {}
        agreed = {key: self.deepspeed.get(key) for key in _AGREED}
        agreed["zero_optimization"] = {key: zero.get(key) for key in _AGREED_ZERO}
        for key, value in agreed.items():
            collectives.require_agreement(f'"{key}" of the DeepSpeed config', value)
        collectives.require_agreement("the context-parallel size", self.cp_size)

    def refuse_unmeasured(self, own_groups: bool) -> None:
        """Refuse what would put gradients on other ranks or another scale than ``gradients.factor`` says.

        ``own_groups``: the caller described groups of his own to DeepSpeed.

        Raises:
            LcabError: names the setting.
        """
        if self.cp_size == 1:
            return
        zero = self.deepspeed.get("zero_optimization") or {}
        unmeasured = {
            "mpu or mesh_param": own_groups,
            "gradient_predivide_factor": self.deepspeed.get("gradient_predivide_factor", 1) != 1,
            "compile.deepcompile": (self.deepspeed.get("compile") or {}).get("deepcompile", False),
            "tensor_parallel": (self.deepspeed.get("tensor_parallel") or {}).get("autotp_size", 0) > 1,
            "zero_optimization.zenflow": zero.get("zenflow") is not None,
            "zero_optimization.zero_quantized_gradients": zero.get("zero_quantized_gradients", False),
        }
        for setting, given in unmeasured.items():
            if given:
                raise LcabError(
                    f"{setting} cannot be given with context-parallel size {self.cp_size}: the adapter tells "
                    "DeepSpeed which ranks share a sequence, and this would reduce gradients over other "
                    "ranks or with another scale; leave it out"
                )


def _load(args: Any, config: Any) -> dict[str, Any]:
    """The DeepSpeed config as a dict that is ours to change."""
    named = getattr(args, "deepspeed_config", None)
    if (config is None) == (named is None):
        raise LcabError(
            "give the DeepSpeed config once, as config= or as --deepspeed_config "
            f"(config={config!r}, --deepspeed_config={named!r})"
        )
    source: Any = named if config is None else config
    if isinstance(source, dict):
        return copy.deepcopy(source)
    try:
        return dict(load_ds_config(os.fspath(source)))
    except (OSError, TypeError, ValueError) as error:
        raise LcabError(f"cannot read the DeepSpeed config {source!r}: {error}") from error


def _cp_size(config: AttentionConfig, sequence_parallel_size: Any) -> int:
    world = collectives.world_size()
    if sequence_parallel_size is not None and not (
        isinstance(sequence_parallel_size, int) and sequence_parallel_size > 0
    ):
        raise LcabError(
            f"sequence_parallel_size {sequence_parallel_size!r} is not a positive number of ranks"
        )
    size = config.cp_size or sequence_parallel_size or world
    if sequence_parallel_size not in (None, size):
        raise LcabError(
            f"DeepSpeed's sequence_parallel_size is {sequence_parallel_size}, but strategy "
            f"{config.strategy!r} with the degrees given takes {size}; make them equal or leave one out"
        )
    if world % size:
        raise LcabError(
            f"{world} ranks do not divide into context-parallel groups of {size}; start a multiple of {size} "
            "ranks or change the degrees"
        )
    return size


def _decided(config: AttentionConfig, workload: Workload | None, cp_size: int) -> AttentionConfig:
    if not config.undecided:
        return config
    if workload is None:
        names = " and ".join(f"{name} 'auto'" for name in config.undecided)
        raise LcabError(
            f"{names} must be decided for a mask and heads: give initialize(..., workload=planner.Workload("
            "mask, heads, kv_heads, head_dim, dtype)) of a typical sequence, or write names"
        )
    return decide(config, workload, cp_size, get_accelerator().device_name())


def _check_batch(settings: dict[str, Any], data_parallel_size: int | None, cp_size: int) -> None:
    """DeepSpeed's batch sizes must hold for the data-parallel ranks, not the world."""
    dp = collectives.world_size() // cp_size
    if data_parallel_size not in (None, dp):
        raise LcabError(
            f"data_parallel_size is {data_parallel_size}, but {collectives.world_size()} ranks in groups of "
            f"{cp_size} make {dp}; leave it out"
        )
    batch, micro, steps = (settings.get(key) for key in _AGREED[:3])
    if cp_size > 1 and None not in (batch, micro, steps) and batch != micro * steps * dp:  # type: ignore[operator]
        raise LcabError(
            f"train_batch_size {batch} is not train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {steps} x {dp} data-parallel groups (the {cp_size} ranks of a "
            "group share their samples)"
        )
    together = (micro or 1) * (steps or 1) * dp
    if batch is not None and batch % together:
        parts = [f"{key} {settings[key]}" for key in _AGREED[1:3] if settings.get(key) is not None]
        parts.append(f"{dp} data-parallel groups")
        raise LcabError(
            f"train_batch_size {batch} does not divide into {' x '.join(parts)}; give a multiple of "
            f"{together}"
        )


def _without_compiled_optimizer(settings: dict[str, Any]) -> list[str]:
    """Keep the "optimizer" section from compiling C++ on a CPU; returns what was changed."""
    section = settings.get("optimizer") or {}
    name = str(section.get("type", ""))
    if name.lower() in _COMPILED:
        raise LcabError(
            f'optimizer "{name}" compiles a C++ operator on a CPU; use "AdamW" or one of torch.optim'
        )
    if name.lower() not in _ADAMS or section.setdefault("params", {}).get("torch_adam"):
        return []
    section["params"]["torch_adam"] = True
    return [
        f'optimizer {name}: "torch_adam" set to true; DeepSpeed\'s own Adam would be compiled on a CPU first'
    ]
