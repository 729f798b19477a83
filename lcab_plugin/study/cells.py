"""The cells of a study: one combination each, with the reason if it cannot run, known before any launch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise, product
from typing import Any

from lcab_plugin import kernels, layout
from lcab_plugin.bench import contenders, cp
from lcab_plugin.config import AttentionConfig
from lcab_plugin.context_parallel.topology import AXES
from lcab_plugin.context_parallel.ulysses import require_heads
from lcab_plugin.errors import LcabError
from lcab_plugin.planner import AUTO
from lcab_plugin.study.settings import CpSweep, Degrees, KernelsSweep, Study, Sweep, TrainingSweep

_AXES = {"kind", "kernels", "masks", "seqlens", "seqlens_per_rank", "strategies", "degrees", "layouts"}
_AXES |= {"worlds", "frameworks", "blocks", "keeps"}


@dataclass(frozen=True)
class Cell:
    """One combination. ``settings``: the sweep's, which all its cells have in common. ``parameters``: of the
    mask, where they are axes. ``reason``: why it cannot run. What a kind does not have is None, or 1 rank."""

    kind: str
    kernel: str
    mask: str
    seqlen: int  # global
    settings: dict[str, Any] = field(hash=False)
    strategy: str | None = None
    degrees: dict[str, Any] = field(default_factory=dict, hash=False)
    layout: str | None = None
    world: int = 1
    framework: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict, hash=False)
    reason: str | None = field(default=None, compare=False)

    @property
    def facts(self) -> dict[str, Any]:
        """What makes it this cell."""
        return {name: value for name, value in asdict(self).items() if name != "reason"}

    @property
    def id(self) -> str:
        """Readable, and different for any two cells: names folders, and finds what ran before."""
        split = "".join(f"{name[0]}{n}" for name, n in self.degrees.items() if isinstance(n, int))
        asked = (self.kind, self.framework, self._mask, self.seqlen, f"w{self.world}", self.kernel)
        parts = (*asked, self.strategy, split, self.layout, _digest(self.facts))
        return "-".join(str(part) for part in parts if part)

    @property
    def turn(self) -> str:
        """Equal for cells that one process group measures in turn: kernels of one mask and length, strategies
        on the same ranks with the same kernel and layout. A training run is alone."""
        shared = self.facts
        if self.kind != "training":
            shared.pop("kernel" if self.kind == "kernels" else "strategy")
        label = f"{self.kind}-{self._mask}-{self.seqlen}-w{self.world}"
        return f"{label}-{_digest(shared)}"

    @property
    def _mask(self) -> str:
        """Of its folder's name."""
        return "-".join([self.mask, *(f"{name[0]}{value:g}" for name, value in self.parameters.items())])


def expand(study: Study, placed: Callable[[int], Any]) -> list[Cell]:
    """All cells, each once, in the file's order. ``placed`` finds nodes for so many ranks.

    A cell that cannot run (LcabError of ``placed``, of its degrees, heads, layout, batch or framework, or a
    kernel that this machine has not, where it is this machine that runs it) carries the reason.
    """
    found: dict[str, Cell] = {}
    here = study.launcher.kind == "local"
    for sweep in study.sweeps:
        for cell in _product(sweep):
            try:
                placed(cell.world)
                _require(cell, sweep, here)
            except LcabError as error:
                cell = Cell(**{**cell.facts, "reason": str(error)})
            found.setdefault(cell.id, cell)
    return list(found.values())


def _product(sweep: Sweep) -> Iterator[Cell]:
    settings = {name: value for name, value in sweep.model_dump().items() if name not in _AXES}
    if isinstance(sweep, KernelsSweep):
        for seqlen, mask in product(sorted(set(sweep.seqlens)), sweep.masks):
            for parameters, kernel in product(_parameters(sweep, mask), sweep.kernels):
                yield Cell("kernels", kernel, mask, seqlen, settings, parameters=parameters)
        return
    frameworks = sweep.frameworks if isinstance(sweep, TrainingSweep) else [None]
    for world in sweep.worlds:
        axes = (sweep.lengths(world), sweep.masks, frameworks, sweep.kernels, sweep.layouts)
        for seqlen, mask, framework, kernel, lay in product(*axes):
            for degrees, strategy in product(sweep.degrees, sweep.strategies):
                own = None if strategy == "none" else lay
                taken = _taken(degrees, strategy)
                yield Cell(sweep.kind, kernel, mask, seqlen, settings, strategy, taken, own, world, framework)


def _parameters(sweep: KernelsSweep, mask: str) -> list[dict[str, Any]]:
    """Of a mask, each combination of those that are axes."""
    if mask != "block_sparse":
        return [{}]
    return [{"block": b, "keep": k} for b, k in product(sweep.blocks or (), sweep.keeps or ())]


def _taken(degrees: Degrees, strategy: str) -> dict[str, Any]:
    """The degrees that mean something to a strategy: those of axes it has, of several. `auto` chooses its."""
    if strategy == AUTO:
        return {}
    axes = AXES[strategy]
    known = {n: d for n, d in degrees.model_dump(exclude_defaults=True).items() if n in (*axes, "placement")}
    if len(axes) < 2:
        known.pop("placement", None)
    return known


def _require(cell: Cell, sweep: Sweep, here: bool) -> None:
    """Raise the LcabError of what will not run."""
    if here and (reason := _missing(cell.kernel)):
        raise LcabError(f"kernel {cell.kernel!r}: {reason}")
    if isinstance(sweep, CpSweep):
        _require_shared(cell, cell.world, _cp_ulysses(cell), (sweep.heads, sweep.kv_heads))
    elif isinstance(sweep, TrainingSweep):
        _require_training(cell, sweep, here)


@cache
def _missing(kernel: str) -> str | None:
    """Why this machine has not this kernel; None where it has."""
    if kernel in (*contenders.BASELINES, AUTO):
        return None
    try:
        return kernels.get(kernel).unavailable()
    except ImportError as error:
        return f"its module cannot be imported: {error}"


def _cp_ulysses(cell: Cell) -> int:
    """Its Ulysses degree as `lcab bench cp` resolves it."""
    strategy = cell.strategy or "none"
    if strategy == "ulysses":
        return cell.world
    given = (cell.degrees.get(name) for name in ("ulysses", "inner_ring"))
    return cp.degrees(strategy, cell.world, *given).get("ulysses", 1)


def _require_shared(cell: Cell, ranks: int, ulysses: int, heads: tuple[int, int]) -> None:
    """Heads and tokens can be dealt to the ranks that share a sequence."""
    require_heads(*heads, ulysses, ranks)
    if cell.layout not in (None, "balanced", AUTO):  # balanced follows the mask, whatever it is
        layout.make(cell.layout, ranks, cell.seqlen)


def _require_training(cell: Cell, sweep: TrainingSweep, here: bool) -> None:
    if here and cell.framework and importlib.util.find_spec(cell.framework) is None:
        raise LcabError(f"it trains through {cell.framework}: pip install 'lcab-plugin[{cell.framework}]'.")
    if cell.framework == "megatron" and cell.layout not in (None, "zigzag"):
        raise LcabError(f"layout {cell.layout!r}: Megatron's RoPE slices sequences by zigzag; ask for that.")
    config = AttentionConfig.from_dict({"strategy": cell.strategy, **cell.degrees})
    model = _model_ranks(sweep.arguments.get(cell.framework or "", []))
    ranks = 1 if cell.strategy == "none" else config.cp_size or max(1, cell.world // model)
    if cell.world % (ranks * model):
        shared = f"{model} model- x " if model > 1 else ""
        raise LcabError(f"{shared}{ranks} context-parallel ranks do not divide {cell.world} ranks.")
    ulysses = 1 if cell.strategy == AUTO else config.degrees(ranks).get("ulysses", 1)
    _require_shared(cell, ranks, ulysses, sweep.heads_of_preset)
    replicas, batch = cell.world // (ranks * model), sweep.global_batch or cell.world
    if batch % (share := sweep.micro_batch * replicas):
        raise LcabError(
            f"a global batch of {batch} does not divide into {replicas} data-parallel shares of "
            f"micro-batches of {sweep.micro_batch}; give a multiple of {share}."
        )


def _model_ranks(arguments: list[str]) -> int:
    """Tensor-parallel x pipeline-parallel ranks that a script is asked for."""
    flags = "--tensor-parallel", "--pipeline-parallel"
    return math.prod(int(n) for flag, n in pairwise(arguments) if flag in flags and n.isdecimal())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
