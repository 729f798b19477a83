"""What `lcab bench peers` is asked to measure, what it is measured against, and the records it leaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from lcab_plugin.bench import cp
from lcab_plugin.bench.cells import Record
from lcab_plugin.bench.cp import SINGLE
from lcab_plugin.bench.peers_table import PEERS
from lcab_plugin.bench.settings import Shape
from lcab_plugin.errors import LcabError, unknown

# Time over the ideal, at most, of causal attention forward and backward from GOAL_TOKENS on.
GOALS = {"ulysses": 1.03, "ring_p2p": 1.08, "ring_all_gather": 1.10, "group_cast": 1.15}
GOAL_TOKENS = 4096
GOAL_REPEATS = 6  # fewer have no confidence interval
# The fastest peer's time over ours, at least, under other masks that hide something, from this length on.
FASTER, FASTER_TOKENS = 3.0, 16384

IDENTITY = (
    "strategy",
    "layout",
    "mask",
    "digest",
    "seqlen",
    "world",
    "kernel",
    "batch",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
    "pass",
    "backend",
    "threads",
    "hardware",
    "torch",
)
FIELDS = (
    "schema",
    "package",
    *IDENTITY[:3],
    "parameters",
    "digest",
    "area",
    "fraction",
    *IDENTITY[4:13],
    "status",
    "reason",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "min_ms",
    "repeats",
    "relative_ci",
    "cpu_ms",
    "cpu_p10_ms",
    "cpu_p90_ms",
    "cpu_min_ms",
    "ideal_ms",
    "ideal_cpu_ms",
    "over_ideal",
    "over_ideal_p10",
    "over_ideal_p90",
    "cpu_over_ideal",
    "cpu_over_ideal_p10",
    "cpu_over_ideal_p90",
    "least_cpu_over_ideal",
    "peak_memory_gib",
    "peak_memory_note",
    "error_out",
    "error_dq",
    "error_dk",
    "error_dv",
    "error_samples",
    *IDENTITY[13:],
    "lcab_plugin",
    "git",
    "load",
    "date",
)


@dataclass(frozen=True)
class Settings(cp.Settings):
    """`cp.Settings`, and ``peers``: names of `peers_table.PEERS`.

    ``window``: keys before its own that a query of ``sliding_window_causal`` sees. ``done``: cells, by
    `IDENTITY`, that are not measured again.

    Raises:
        LcabError: a name is unknown or a number makes no sense; the message says which.
    """

    job: ClassVar[str] = "peers"
    fields: ClassVar[tuple[str, ...]] = FIELDS

    peers: tuple[str, ...] = tuple(PEERS)
    window: int = 512
    done: tuple[Sequence[Any], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.peers:
            if name not in PEERS:
                raise unknown("peer", name, PEERS)
        if self.window < 0:
            raise LcabError(f"window={self.window} must be at least 0.")
        for n in self.seqlens:
            if n % (2 * self.world):
                fits = -(-n // (2 * self.world)) * 2 * self.world
                raise LcabError(
                    f"sequence length {n} is no multiple of {2 * self.world}, twice the ranks, as the peers "
                    f"need; take {fits}."
                )

    def rows(self, mask: str) -> list[tuple[str, str | None]]:
        """(name, layout) of what is measured in turn under a mask: the single process, ours, the peers."""
        return [*super().rows(mask), *((name, PEERS[name].layout) for name in self.peers)]

    def asks(self, record: Record) -> bool:
        """Whether a record is of one of these cells."""
        return (
            (record["mask"], record["seqlen"]) in self.groups
            and (record["strategy"], record["layout"]) in self.rows(record["mask"])
            and record["pass"] in self.passes
            and (record["world"], record["kernel"]) == (self.world, self.kernel)
            and all(record[name] == value for name, value in asdict(self.shape).items())
        )

    def parameters(self, mask: str, seqlen: int) -> dict[str, Any]:
        """Of a mask family at a length, for ``masks.from_name``."""
        own = {"left": self.window} if mask == "sliding_window_causal" else {}
        return {**super().parameters(mask, seqlen), **own}


def defaults(device: str, world: int) -> dict[str, Any]:
    """`Settings` of a run that names nothing: on a CPU what the goals are for, half an hour."""
    chosen = cp.defaults(device, world)
    if device == "cuda":
        return {**chosen, "passes": ("fwd+bwd",)}
    shape = Shape(heads=8, kv_heads=8, head_dim=64, dtype="fp32")
    lengths = {"masks": ("causal",), "seqlens": (4096, 8192)}
    return {**chosen, **lengths, "passes": ("fwd+bwd",), "shape": shape, "cell_seconds": 60.0}


def metric(record: Record) -> str:
    """What a ratio is of: processor time where ranks share processors, time by the device's clock on GPUs."""
    return "over_ideal" if record["backend"] == "nccl" else "cpu_over_ideal"


def fastest_peer(records: Iterable[Record]) -> Record | None:
    """Of the cells of one mask, length and pass, the measured peer with the smallest ratio."""
    ran = [r for r in records if r["strategy"] in PEERS and r["status"] == "ok" and r[metric(r)]]
    return min(ran, key=lambda r: r[metric(r)], default=None)


def verdict(record: Record, fastest: Record | None) -> tuple[str, bool] | None:
    """What is demanded of a cell, in words, and whether it holds; None where nothing is.

    ``fastest``: `fastest_peer` beside it.
    """
    ours = record["strategy"] not in (SINGLE, *PEERS)
    if record["status"] != "ok" or record["pass"] != "fwd+bwd" or not ours or not record[metric(record)]:
        return None
    ratio, tokens = record[metric(record)], record["seqlen"]
    enough = record["repeats"] >= GOAL_REPEATS
    if record["mask"] == "causal" and tokens >= GOAL_TOKENS and record["strategy"] in GOALS and enough:
        goal = GOALS[record["strategy"]]
        return f"<= {goal:.2f}", ratio <= goal
    if fastest is not None and record["fraction"] < 0.5 and tokens >= FASTER_TOKENS:
        return f">= {FASTER:g}x faster", fastest[metric(record)] >= FASTER * ratio
    return None
