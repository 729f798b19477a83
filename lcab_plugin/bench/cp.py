"""What `lcab bench cp` is asked to measure, and the records it leaves: one a cell (strategy, layout, mask,
length, pass), the same fields in each. `cp_measure` measures, `cp_launch` starts the ranks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lcab_plugin import layout as layouts
from lcab_plugin import masks
from lcab_plugin.bench import contenders
from lcab_plugin.bench.cells import PASSES, Record
from lcab_plugin.bench.settings import Shape, default_parameters
from lcab_plugin.context_parallel.topology import ALIASES, AXES, PLACEMENTS, axis_sizes, strategy_name
from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.training import records

if TYPE_CHECKING:
    from typing_extensions import Self

SINGLE = "single"  # plain attention on one rank, in the column of the strategies
STRATEGIES = tuple(name for name in AXES if name != "none")
_CPU_SECONDS, _GPU_SECONDS = 0.5, 5.0

# What a cell was asked to be, how it ended, what was measured, and where.
FIELDS = (
    "schema",
    "strategy",
    "degrees",
    "placement",
    "layout",
    "mask",
    "parameters",
    "digest",
    "area",
    "fraction",
    "seqlen",
    "world",
    "nodes",
    "kernel",
    "batch",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
    "pass",
    "status",
    "reason",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "min_ms",
    "repeats",
    "relative_ci",
    "tflops_per_rank",
    "kernels_ms",
    "exposed_ms",
    "single_ms",
    "efficiency",
    "sent_bytes",
    "closed_form_bytes",
    "imbalance",
    "peak_memory_gib",
    "peak_reserved_gib",
    "peak_rss_gib",
    "kernels_memory_gib",
    "communication_memory_gib",
    "peak_memory_note",
    "error_out",
    "error_dq",
    "error_dk",
    "error_dv",
    "error_samples",
    "backend",
    "threads",
    "hardware",
    "torch",
    "lcab_plugin",
    "git",
    "date",
)


@dataclass(frozen=True)
class Settings:
    """What to measure on ``world`` ranks.

    ``layouts``: empty for the one that suits each strategy and mask. ``ulysses``, ``inner_ring``: degrees in
    the strategies that have other axes too (None: as even a split as there is); ``placement``: which of their
    axes has neighbouring ranks.
    ``cell_seconds``: running time of one callable of a cell. ``baseline``: ``single`` or ``none``.
    ``timeout``: seconds after which a collective that does not end takes the run down.

    Raises:
        LcabError: a name is unknown or a number makes no sense; the message says which.
    """

    job: ClassVar[str] = "cp"  # of `cp_launch`
    fields: ClassVar[tuple[str, ...]] = FIELDS

    masks: tuple[str, ...]
    seqlens: tuple[int, ...]
    strategies: tuple[str, ...] = STRATEGIES
    layouts: tuple[str, ...] = ()
    passes: tuple[str, ...] = tuple(PASSES)
    shape: Shape = field(default_factory=Shape)
    world: int = 2
    device: str = "cpu"
    kernel: str = "sdpa_flash"
    ulysses: int | None = None
    inner_ring: int | None = None
    placement: str = PLACEMENTS[0]
    documents: str = "pile"
    seed: int = 0
    cell_seconds: float = _CPU_SECONDS
    baseline: str = SINGLE
    timeout: float = 600.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategies", tuple(dict.fromkeys(map(_strategy, self.strategies))))
        contenders.find(self.kernel)
        if self.kernel in contenders.BASELINES:
            raise LcabError(f"{self.kernel!r} is no kernel of `lcab kernels`; ranks run one of those.")
        for kind, chosen, table in (
            ("layout", self.layouts, layouts.LAYOUTS),
            ("mask", self.masks, masks.names()),
            ("pass", self.passes, PASSES),
            ("document length distribution", (self.documents,), masks.distributions()),
            ("baseline", (self.baseline,), (SINGLE, "none")),
            ("placement", (self.placement,), PLACEMENTS),
        ):
            for name in chosen:
                if name not in table:
                    raise unknown(kind, name, table)
        for name, value in (
            ("world", self.world),
            ("ulysses", 1 if self.ulysses is None else self.ulysses),
            ("inner_ring", 1 if self.inner_ring is None else self.inner_ring),
            *self._lengths(),
        ):
            if value < 1:
                raise LcabError(f"{name}={value} must be at least 1.")
        for name in ("cell_seconds", "timeout"):
            if not getattr(self, name) > 0:
                raise LcabError(f"{name} {getattr(self, name)} must be above 0.")

    def _lengths(self) -> list[tuple[str, int]]:
        if not self.seqlens:
            raise LcabError("no sequence lengths are given; name one, as in 8192.")
        return [("sequence length", n) for n in self.seqlens]

    def rows(self, mask: str) -> list[tuple[str, str | None]]:
        """(strategy, layout) of what is measured in turn under a mask, the single process first."""
        pairs: list[tuple[str, str | None]] = [
            (s, layout) for s in self.strategies for layout in self.layouts or (suited(s, mask),)
        ]
        return [(SINGLE, None), *pairs] if self.baseline == SINGLE else pairs

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(mask, length), short before long."""
        return [(mask, n) for n in sorted(set(self.seqlens)) for mask in dict.fromkeys(self.masks)]

    @property
    def total(self) -> int:
        """Cells."""
        return sum(len(self.rows(mask)) for mask, _ in self.groups) * len(self.passes)

    def parameters(self, mask: str, seqlen: int) -> dict[str, Any]:
        """Of a mask family at a length, for ``masks.from_name``."""
        return default_parameters(mask, seqlen, self.documents, self.seed)

    def to_json(self) -> str:
        """For the ranks."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        given: dict[str, Any] = json.loads(text)
        lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        return cls(**{**given, **lists, "shape": Shape(**given["shape"])})


def _strategy(name: str) -> str:
    """The strategy by its own name."""
    if name in ("none", SINGLE):
        raise LcabError(f"strategy {name!r} is what --baseline single measures; name strategies that share.")
    if name not in (*AXES, *ALIASES):
        raise unknown("strategy", name, (*STRATEGIES, *ALIASES))
    return strategy_name(name)


def defaults(device: str, world: int) -> dict[str, Any]:
    """`Settings` of a run that names nothing: about a minute on a CPU, the paper's shape and 8K tokens a rank
    (arXiv 2510.17896) on GPUs."""
    chosen = ("causal", "causal_document", "sliding_window_causal")
    common = {"masks": chosen, "device": device, "world": world}
    if device == "cuda":
        return {**common, "seqlens": (8192 * world,), "shape": Shape(), "cell_seconds": _GPU_SECONDS}
    return {**common, "seqlens": (2048,), "shape": Shape(heads=8, kv_heads=2, head_dim=64, dtype="fp32")}


def suited(strategy: str, mask: str) -> str:
    """The layout that docs/context_parallel.md has for a mask. Ulysses shares heads: any will do."""
    if strategy == "ulysses" or mask in ("full", "sliding_window", "sliding_window_causal"):
        return "contiguous"
    return "zigzag" if mask == "causal" else "balanced"


def degrees(
    strategy: str, world: int, ulysses: int | None = None, inner_ring: int | None = None
) -> dict[str, int]:
    """Degrees for a strategy of several axes: those given, and the prime factors of what is left dealt to the
    other axes in turn, innermost first. Empty for one axis, whose degree is the world's.

    Raises:
        LcabError: one that is given does not divide the ranks.
    """
    if len(AXES[strategy]) == 1:
        return {}
    sizes = axis_sizes(dict.fromkeys(AXES[strategy], 1), PLACEMENTS[0])
    open_axes = list(sizes)
    for name, degree in (("ulysses", ulysses), ("inner_ring", inner_ring)):
        if degree is None or name not in sizes:
            continue
        if world % degree:
            raise LcabError(f"{name}={degree} does not divide {world} ranks; give a divisor.")
        sizes[name], world = degree, world // degree
        open_axes.remove(name)
    for i, factor in enumerate(_primes(world)):
        sizes[open_axes[i % len(open_axes)]] *= factor
    if "outer_ring" in sizes:
        sizes["ring"] = sizes["inner_ring"] * sizes.pop("outer_ring")
    return sizes


def _primes(n: int) -> list[int]:
    """Prime factors, descending."""
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found[::-1]


def cells_of(path: Path) -> list[Record]:
    """The cells of a file, in the order they were measured; none where there is no file."""
    return [r for r in records.read(path) if r["type"] == "cell"] if path.exists() else []
