"""A DeepSpeed config with the flags of a command line in it, and what an engine made of both."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcab_plugin import kernels
from lcab_plugin.adapters import slots
from lcab_plugin.errors import LcabError
from lcab_plugin.training.gpt import RATES

DTYPES = ("fp32", "bf16", "fp16")
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}
DEGREES = ("ulysses", "ring", "inner_ring")
ATTENTION = ("kernel", "strategy", *DEGREES, "placement", "layout", "mask")


class Settings:
    """A DeepSpeed config file, changed flag by flag.

    ``config`` is the resulting dict; ``overrides`` says in words which of the file's values a flag replaced.

    Raises:
        LcabError: the file cannot be read or is not a JSON object.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.overrides: list[str] = []
        try:
            self.config: dict[str, Any] = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise LcabError(f"cannot read --deepspeed_config {path}: {error}") from error
        if not isinstance(self.config, dict):
            raise LcabError(f"--deepspeed_config {path} must hold one JSON object.")

    def apply(self, flags: Mapping[str, Any]) -> None:
        """Put flags into the config; a flag that is None or absent was not given.

        Those named in ``ATTENTION`` go to the section ``"lcab"``;
        ``global_batch``, ``micro_batch``, ``dtype``, ``optimizer``, ``lr``, ``weight_decay`` and ``clip`` to
        DeepSpeed's own settings. A learning rate that is in neither is that of ``preset``. Other flags are
        not looked at.
        """
        self._attention(flags)
        if flags.get("global_batch") or flags.get("micro_batch"):
            self.config.pop("gradient_accumulation_steps", None)  # follows from the other two
        self._put(self.config, "train_batch_size", flags.get("global_batch"))
        self._put(self.config, "train_micro_batch_size_per_gpu", flags.get("micro_batch"))
        dtype = flags.get("dtype")
        if dtype is not None:
            for key in ("bf16", "fp16"):
                self._put(self._section(key), "enabled", dtype == key, f"{key}.enabled")
        self._optimizer(flags)
        self._put(self.config, "gradient_clipping", flags.get("clip"))
        if "steps_per_print" not in self.config:  # a run shows its own speed
            self.config["steps_per_print"] = sys.maxsize
            # to measure DeepSpeed's, the host would wait for the GPU twice a micro-batch
            self.config.setdefault("timers", {"throughput": {"enabled": False}})

    def resolved(self, engine: Any) -> dict[str, Any]:
        """For the first record of a run: what the engine that ``adapters.deepspeed.initialize`` made runs."""
        plugin = engine.lcab
        return {
            "framework": "deepspeed",
            "attention": plugin.config.to_dict(),
            "auto": plugin.config.chosen and plugin.config.chosen.record,
            "kernel_version": kernels.get(plugin.config.kernel).version(),
            "strategy": plugin.cp.describe(),
            "degrees": plugin.cp.degrees,
            "slots": slots.lines(plugin.slots),
            "world": plugin.dp_size * plugin.cp.size,
            "dp": plugin.dp_size,
            "cp": plugin.cp.size,
            "zero_stage": engine.zero_optimization_stage(),
            "dtype": self.dtype,
            "micro_batch": engine.train_micro_batch_size_per_gpu(),
            "accumulation_steps": engine.gradient_accumulation_steps(),
            "deepspeed_config": self.config,
            "overrides": self.overrides,
        }

    @property
    def dtype(self) -> str:
        """``"fp32"``, ``"bf16"`` or ``"fp16"``."""
        for key in ("bf16", "fp16"):
            if self.config.get(key, {}).get("enabled"):
                return key
        return "fp32"

    def _attention(self, flags: Mapping[str, Any]) -> None:
        section = self._section("lcab")
        if flags.get("strategy") not in (None, section.get("strategy")):
            for key in (*DEGREES, "placement"):
                section.pop(key, None)  # it belonged to the strategy that is replaced
        for key in ATTENTION:
            self._put(section, key, flags.get(key))

    def _optimizer(self, flags: Mapping[str, Any]) -> None:
        name = OPTIMIZERS.get(flags.get("optimizer") or "")
        section = self._section("optimizer")
        if name is not None and section.get("type") != name:
            self._put(section, "type", name, "optimizer")
            section.pop("params", None)  # of the optimizer that is replaced
        section.setdefault("type", "AdamW")
        params = section.setdefault("params", {})
        self._put(params, "lr", flags.get("lr"))
        self._put(params, "weight_decay", flags.get("weight_decay"))
        params.setdefault("lr", RATES[flags.get("preset", "tiny")])
        if section["type"] not in ("Adam", "AdamW"):
            self.config["zero_allow_untested_optimizer"] = True  # DeepSpeed tests ZeRO with Adam

    def _section(self, key: str) -> dict[str, Any]:
        return self.config.setdefault(key, {})

    def _put(self, section: dict[str, Any], key: str, value: Any, name: str | None = None) -> None:
        if value is None:
            return
        if section.get(key, value) != value:
            self.overrides.append(f"{name or key} {value} (a flag) replaces {section[key]} of {self.path}")
        section[key] = value
