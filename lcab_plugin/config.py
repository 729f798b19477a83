"""The plug-in's settings: one spelling in configuration files, Python and flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from lcab_plugin import kernels, masks, planner
from lcab_plugin.context_parallel.topology import (
    AXES,
    PLACEMENTS,
    ranks_of,
    require_placement,
    resolve_degrees,
    strategy_name,
)
from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.layout import LAYOUTS
from lcab_plugin.planner import AUTO


class AttentionConfig(BaseModel):
    """Which kernel, context-parallel strategy, layout and mask family attention uses. Immutable.

    A batch's own mask travels as an argument of the forward call; ``mask`` here names its family. Kernel,
    strategy and layout may be ``"auto"``: the planner chooses when ranks and shapes are known (``decided``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kernel: str = Field("sdpa_flash", description="a name of `lcab kernels`, or auto")
    strategy: str = Field("none", description=", ".join((*AXES, AUTO)))
    ulysses: int | None = Field(None, ge=1, description="Ulysses degree; follows from the world if left out")
    ring: int | None = Field(None, ge=1, description="ring degree; follows from the world if left out")
    inner_ring: int | None = Field(None, ge=1, description="LoongTrain's inner ring; divides ring")
    placement: str = Field(
        PLACEMENTS[0],
        description="what neighbouring ranks share in usp and loongtrain: head_first, a sequence's heads "
        "(Ulysses inside the node); context_first, its rings",
    )
    layout: str = Field("zigzag", description=", ".join((*LAYOUTS, AUTO)))
    mask: str = Field("causal", description="the mask family of the batches, a name of `lcab masks list`")
    scale: float | None = Field(None, gt=0, description="softmax scale; head_dim ** -0.5 if left out")
    softcap: float | None = Field(None, gt=0, description="logit soft cap")
    deterministic: bool = Field(False, description="bitwise repeatable backward")
    _chosen: planner.Chosen | None = PrivateAttr(None)

    @field_validator("kernel")
    @classmethod
    def _known_kernel(cls, name: str) -> str:
        return _known("kernel", name, (*kernels.names(), AUTO))

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, name: str) -> str:
        return name if name == AUTO else strategy_name(name)

    @field_validator("placement")
    @classmethod
    def _known_placement(cls, name: str) -> str:
        require_placement(name)
        return name

    @field_validator("layout")
    @classmethod
    def _known_layout(cls, name: str) -> str:
        return _known("layout", name, (*LAYOUTS, AUTO))

    @field_validator("mask")
    @classmethod
    def _known_mask(cls, name: str) -> str:
        return _known("mask", name, masks.names())

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> AttentionConfig:
        """Settings from a dictionary, such as the ``"lcab"`` section of ``ds_config.json``.

        Raises:
            LcabError: an unknown key or value; the message names it, and the nearest that exists.
        """
        for key in settings:
            if key not in cls.model_fields:
                raise unknown("setting", key, cls.model_fields)
        try:
            return cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ")
            raise LcabError(f"setting {key!r} = {first['input']!r}: {reason}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> AttentionConfig:
        """Settings from a JSON file.

        Raises:
            LcabError: the file cannot be read, is not JSON, or holds an unknown key or value.
        """
        try:
            settings = json.loads(Path(path).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise LcabError(f"cannot read the settings in {str(path)!r}: {error}") from None
        if not isinstance(settings, dict):
            raise LcabError(f"{str(path)!r} must hold one JSON object of settings")
        return cls.from_dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dictionary, defaults included."""
        return self.model_dump()

    def degrees(self, size: int) -> dict[str, int]:
        """The degrees of the strategy over ``size`` ranks, by the names ``context_parallel()`` takes.

        Raises:
            LcabError: the degrees given do not make ``size``, or a setting is still ``"auto"``.
        """
        if self.undecided:
            auto = " and ".join(f"{name} 'auto'" for name in self.undecided)
            raise LcabError(
                f"{auto} {'is' if len(self.undecided) == 1 else 'are'} not decided yet; call "
                "decided(planner.Workload(mask, heads, kv_heads, head_dim, dtype), ...), or give names"
            )
        return resolve_degrees(self.strategy, size, self._given())

    @property
    def cp_size(self) -> int | None:
        """Context-parallel ranks by the degrees given; None where one is left out, or for ``"auto"``."""
        return None if self.strategy == AUTO else ranks_of(self.strategy, self._given())

    @property
    def undecided(self) -> tuple[str, ...]:
        """The settings that are left to the planner."""
        return tuple(name for name in planner.SETTINGS if getattr(self, name) == AUTO)

    @property
    def chosen(self) -> planner.Chosen | None:
        """What ``decided`` put for ``"auto"``, to print and to record; None where nothing was left to it."""
        return self._chosen

    def decided(
        self, workload: planner.Workload, cp: int, hardware: planner.Hardware, gpus_per_node: int = 8
    ) -> AttentionConfig:
        """These settings with what the planner puts for ``"auto"`` on ``cp`` ranks, neighbours in the world.
        Equal arguments give equal answers; no collective.

        Raises:
            LcabError: nothing can run; the message gives the reason.
        """
        if not self.undecided:
            return self
        chosen = planner.choose(self.to_dict(), workload, cp, hardware, gpus_per_node)
        made = AttentionConfig.from_dict(chosen.settings)
        made._chosen = chosen
        return made

    def _given(self) -> dict[str, int | None]:
        return {"ulysses": self.ulysses, "ring": self.ring, "inner_ring": self.inner_ring}


def _known(kind: str, name: str, choices: Any) -> str:
    if name not in choices:
        raise unknown(kind, name, choices)
    return name
