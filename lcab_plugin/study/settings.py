"""What a study file may say: sweeps, each a product of axes, and the launcher that runs their cells."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lcab_plugin import kernels, masks
from lcab_plugin.bench import contenders
from lcab_plugin.bench.cells import PASSES
from lcab_plugin.bench.parity import FRAMEWORKS
from lcab_plugin.bench.settings import DTYPES
from lcab_plugin.context_parallel.topology import PLACEMENTS, strategy_name
from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.layout import LAYOUTS
from lcab_plugin.planner import AUTO
from lcab_plugin.study import document
from lcab_plugin.study.document import Document, Place
from lcab_plugin.training.gpt import PRESETS

LAUNCHERS = ("local", "deepspeed", "torchrun", "slurm")
SSH_NONE = "none"
_NAMES_ONLY = "'auto' is for training sweeps, where the planner chooses: a benchmark measures what is named."

Count = Annotated[int, Field(ge=1)]
Counts = Annotated[list[Count], Field(min_length=1)]
Names = Annotated[list[str], Field(min_length=1)]
Shares = Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    """No other keys, and no other types: `"8"` is no number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Launcher(_Strict):
    """How cells are started. ``hostfile``: the nodes of `deepspeed` and `torchrun`, a line `name slots=8`
    each. ``ssh``: what starts a command on another node; `none` runs every node's agent on this machine.
    ``gpus_per_node``, ``time`` and ``sbatch`` (further options, as `--partition=gpu`): of slurm's jobs."""

    kind: Literal["local", "deepspeed", "torchrun", "slurm"] = "local"
    hostfile: str | None = None
    ssh: str = "ssh -o BatchMode=yes"
    gpus_per_node: Count = 8
    time: str = "04:00:00"
    sbatch: list[str] = []
    env: dict[str, str] = {}


class Degrees(_Strict):
    """Of a strategy's axes; what is left out follows from the world."""

    ulysses: Count | None = None
    ring: Count | None = None
    inner_ring: Count | None = None
    placement: Literal["head_first", "context_first"] = PLACEMENTS[0]  # type: ignore[assignment]


class _Sweep(_Strict):
    """What every kind of cell has: masks, document lengths drawn like a corpus's, seconds it may take."""

    kernels: Names
    masks: Names
    documents: str = "pile"
    seed: int = 0
    timeout: Seconds = 1800.0

    @field_validator("masks")
    @classmethod
    def _masks(cls, names: list[str]) -> list[str]:
        return _known("mask", names, masks.names())

    @field_validator("documents")
    @classmethod
    def _documents(cls, name: str) -> str:
        return _known("document length distribution", [name], masks.distributions())[0]


class _Timed(_Sweep):
    """Sweeps that time attention by itself; the shape is the Long-Context Attention Benchmark's."""

    passes: Names = ["fwd", "bwd"]
    heads: Count = 64
    kv_heads: Count = 8
    head_dim: Count = 128
    dtype: str = "bf16"
    batch: Count = 1
    cell_seconds: Seconds = 5.0

    @field_validator("passes")
    @classmethod
    def _passes(cls, names: list[str]) -> list[str]:
        return _known("pass", names, PASSES)

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, name: str) -> str:
        return _known("dtype", [name], DTYPES)[0]

    @field_validator("kv_heads")
    @classmethod
    def _kv_heads(cls, count: int, info: Any) -> int:
        if info.data.get("heads", count) % count:
            raise LcabError(f"{info.data['heads']} heads are no multiple of {count} key/value heads.")
        return count


class _Sharded(_Sweep):
    """Sweeps over ranks that share a sequence. Lengths are global, or of each rank. Of kernels, strategies
    and layouts one may be `auto`."""

    strategies: Names
    degrees: Annotated[list[Degrees], Field(min_length=1)] = [Degrees()]
    layouts: Names = ["zigzag"]
    worlds: Counts
    seqlens: Counts | None = None
    seqlens_per_rank: Counts | None = None

    @field_validator("kernels")
    @classmethod
    def _kernels(cls, names: list[str]) -> list[str]:
        return _known("kernel", names, (*kernels.names(), AUTO))

    @field_validator("strategies")
    @classmethod
    def _strategies(cls, names: list[str]) -> list[str]:
        return list(dict.fromkeys(name if name == AUTO else strategy_name(name) for name in names))

    @field_validator("layouts")
    @classmethod
    def _layouts(cls, names: list[str]) -> list[str]:
        return _known("layout", names, (*LAYOUTS, AUTO))

    @model_validator(mode="after")
    def _lengths(self) -> _Sharded:
        if (self.seqlens is None) == (self.seqlens_per_rank is None):
            raise LcabError("give one of seqlens and seqlens_per_rank.")
        return self

    def lengths(self, world: int) -> list[int]:
        """Global lengths on so many ranks."""
        return self.seqlens or [n * world for n in self.seqlens_per_rank or ()]


class KernelsSweep(_Timed):
    """kernels x masks x lengths on one device, by `lcab bench kernels`. ``blocks`` and ``keeps``: axes of
    block_sparse, the tokens of its blocks and the shares of them that a query sees."""

    kind: Literal["kernels"]
    seqlens: Counts
    blocks: Counts | None = None
    keeps: Shares | None = None

    @field_validator("kernels")
    @classmethod
    def _kernels(cls, names: list[str]) -> list[str]:
        if AUTO in names:
            raise LcabError(_NAMES_ONLY)
        return _known("kernel", names, (*kernels.names(), *contenders.BASELINES))

    @model_validator(mode="after")
    def _sparse(self) -> KernelsSweep:
        given = self.blocks is not None, self.keeps is not None
        if any(given) and "block_sparse" not in self.masks:
            raise LcabError("blocks and keeps are of block_sparse, which is not among the masks; name it.")
        if "block_sparse" in self.masks and not all(given):
            raise LcabError(
                "block_sparse needs blocks and keeps, such as blocks: [64] and keeps: [0.1, 0.5]."
            )
        return self


class CpSweep(_Timed, _Sharded):
    """kernels x strategies x degrees x layouts x masks x lengths x worlds, by `lcab bench cp`."""

    kind: Literal["cp"]
    baseline: Literal["single", "none"] = "none"

    @model_validator(mode="after")
    def _of_the_bench(self) -> CpSweep:
        if AUTO in (*self.kernels, *self.strategies, *self.layouts):
            raise LcabError(_NAMES_ONLY)
        if "none" in self.strategies:
            raise LcabError("strategy 'none' is measured by `baseline: single`; name strategies that share.")
        if any(d.ring for d in self.degrees):
            raise LcabError(
                "degrees of a cp sweep are ulysses, inner_ring and placement; its ring takes what is left."
            )
        return self


class TrainingSweep(_Sharded):
    """frameworks x kernels x strategies x degrees x layouts x masks x lengths x worlds, each a training run
    of examples/train_gpt.py or train_gpt_megatron.py. ``global_batch``: a sequence a rank if left out.
    ``arguments``: further ones of a framework's script."""

    kind: Literal["training"]
    frameworks: Names = [FRAMEWORKS[0]]
    preset: Literal["tiny", "125m", "1b", "7b"] = "tiny"
    dtype: Literal["fp32", "bf16"] = "bf16"
    steps: Count = 20
    global_batch: Count | None = None
    micro_batch: Count = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    arguments: dict[str, list[str]] = {}

    @field_validator("frameworks")
    @classmethod
    def _frameworks(cls, names: list[str]) -> list[str]:
        return _known("framework", names, FRAMEWORKS)

    @field_validator("arguments")
    @classmethod
    def _arguments(cls, given: dict[str, list[str]]) -> dict[str, list[str]]:
        _known("framework", given, FRAMEWORKS)
        return given

    @property
    def heads_of_preset(self) -> tuple[int, int]:
        """Query and key/value heads."""
        return PRESETS[self.preset][2:4]


Sweep = Annotated[KernelsSweep | CpSweep | TrainingSweep, Field(discriminator="kind")]


class Study(_Strict):
    """A whole file. ``device``: `auto` is cuda where there is a GPU."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    device: Literal["auto", "cpu", "cuda"] = "auto"
    launcher: Launcher = Launcher()
    sweeps: Annotated[list[Sweep], Field(min_length=1)]


def load(path: Path) -> Study:
    """The study of a YAML or JSON file.

    Raises:
        LcabError: one sentence with the file, the line, and what is wrong there.
    """
    found = document.read(path)
    if not isinstance(found.value, dict):
        raise LcabError(f"{path} must hold a mapping with the keys {', '.join(Study.model_fields)}.")
    try:
        return Study.model_validate(found.value)
    except ValidationError as error:
        # a misspelt key says more than the key that is therefore missing
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise LcabError(_sentence(found, first)) from None


def _sentence(found: Document, error: Any) -> str:
    """Of a complaint of pydantic's. Its place has the sweep's kind after the index; the file's has not."""
    place: Place = tuple(error["loc"])
    if place[:1] == ("sweeps",) and len(place) > 2:
        place = (*place[:2], *place[3:])
    where, key = found.at(place), next((part for part in reversed(place) if isinstance(part, str)), "")
    if error["type"] == "extra_forbidden":
        return f"{where}: {unknown('key', key, _keys(error['loc']))}"
    if error["type"] == "missing":
        return f"{where}: {key!r} is missing."
    if error["type"].startswith("union_tag"):
        return f"{where}: a sweep needs kind: kernels, cp or training."
    reason = error["msg"].removeprefix("Value error, ").rstrip(".")
    shown = "" if isinstance(error["input"], (dict, list)) else f" = {error['input']!r}"
    return f"{where}: {reason}." if key in ("", "sweeps") else f"{where}: {key!r}{shown}: {reason}."


def _keys(loc: tuple[str | int, ...]) -> Iterable[str]:
    """The keys that may stand where an unknown one was found."""
    kinds: dict[str, type[BaseModel]] = {"kernels": KernelsSweep, "cp": CpSweep, "training": TrainingSweep}
    if loc[0] == "sweeps":
        model: type[BaseModel] = Degrees if "degrees" in loc[3:-1] else kinds[str(loc[2])]
        return model.model_fields
    return Launcher.model_fields if loc[0] == "launcher" and len(loc) > 1 else Study.model_fields


def _known(kind: str, names: Iterable[str], table: Iterable[str]) -> list[str]:
    """The names, each once."""
    for name in names:
        if name not in table:
            raise unknown(kind, name, table)
    return list(dict.fromkeys(names))
