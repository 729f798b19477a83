"""Ranks what can be run by its predicted step time, and says of the rest why not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lcab_plugin import kernels as kernel_table
from lcab_plugin import layout as layouts_table
from lcab_plugin.context_parallel.topology import AXES, strategy_name
from lcab_plugin.context_parallel.ulysses import fits
from lcab_plugin.errors import LcabError, unknown
from lcab_plugin.masks import AttentionMask
from lcab_plugin.planner import candidates, split, traffic
from lcab_plugin.planner.candidates import Candidate
from lcab_plugin.planner.hardware import HOST_LEAST, HOST_MOST, Hardware
from lcab_plugin.planner.memory import RESERVED, USABLE
from lcab_plugin.planner.predict import Plan, Setting, footprint, terms
from lcab_plugin.planner.shape import Cluster, Model
from lcab_plugin.planner.speeds import Speed, assumed, table

REFERENCES = ("naive", "sdpa_math")  # for tests: chosen only by name
MOST_SLICES = 1 << 19  # 20 s of processor time at 350,000 and 96 ranks
ALIKE = 1.01  # times the fastest: steps between which the model, whose own errors are larger, does not decide


@dataclass(frozen=True)
class Choice:
    """What may be chosen from. Empty: everything; of kernels, those with a measured speed (or, where there is
    none, those for the hardware's devices but references), and every context-parallel size that fits."""

    kernels: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    cp: tuple[int, ...] = ()
    trivial: bool = False  # degrees of 1 in strategies of several axes

    def __post_init__(self) -> None:
        for kind, names, known in (
            ("kernel", self.kernels, kernel_table.names()),
            ("layout", self.layouts, layouts_table.LAYOUTS),
        ):
            for name in names:
                if name not in known:
                    raise unknown(kind, name, known)
        object.__setattr__(self, "strategies", tuple(dict.fromkeys(map(strategy_name, self.strategies))))


@dataclass(frozen=True)
class Prediction:
    """A candidate, why it cannot run (None: it can), its step in seconds by ``terms``, bytes of a rank by
    ``memory``, bytes it sends in one call (``sent``), the layout's ``imbalance`` and how the kernel's speed
    is known."""

    candidate: Candidate
    reason: str | None
    terms: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    imbalance: float = 1.0
    speed: str = ""

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.terms.values())

    @property
    def attention(self) -> float:
        """Seconds of the step for which attention keeps the slowest rank."""
        return sum(self.terms[name] for name in ("attention", "imbalance", "exposed"))

    @property
    def bytes(self) -> float:
        """Of a rank."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """For a record or JSON."""
        c = self.candidate
        return {
            **{**vars(c), "degrees": dict(c.degrees)},
            "reason": self.reason,
            "step_ms": self.seconds * 1e3 if self.terms else None,
            "terms_ms": {name: value * 1e3 for name, value in self.terms.items()},
            "memory_gib": {name: value / 2**30 for name, value in self.memory.items()},
            "sent_bytes": self.sent,
            "imbalance": self.imbalance,
            "kernel_speed": self.speed,
        }


def rank(setting: Setting, choice: Choice, fitted: dict[str, Speed] | None = None) -> list[Prediction]:
    """Every candidate: first what can run, the fastest first and among equals in the order of the tables;
    then the rest, each with its reason.

    Of those within ``ALIKE`` of the fastest the one whose attention takes least is first. Where a step waits
    for its parameters, the time of a slow kernel hides them, and costs nothing by the model.

    Raises:
        LcabError: nothing is left to choose from; the message says what to change.
    """
    speeds = _speeds(setting, choice, fitted)
    cps = _sizes(setting.cluster, choice)
    strategies = list(choice.strategies or AXES)
    layouts = list(choice.layouts or layouts_table.LAYOUTS)
    found = [
        _predicted(candidate, setting, speeds[candidate.kernel])
        for candidate in candidates.every(
            setting.cluster, cps, strategies, layouts, list(speeds), choice.trivial
        )
    ]
    if not found:
        raise LcabError(
            f"none of the strategies {', '.join(strategies)} has degrees for {cps} context-parallel ranks; "
            "allow another strategy or number of ranks."
        )
    found.sort(key=lambda p: (p.reason is not None, p.seconds))
    runs = [p for p in found if p.reason is None]
    alike = sum(p.seconds <= ALIKE * runs[0].seconds for p in runs)
    return sorted(found[:alike], key=lambda p: p.attention) + found[alike:]


def best(setting: Setting, choice: Choice, fitted: dict[str, Speed] | None = None) -> Prediction:
    """The first that can run.

    Raises:
        LcabError: none can; the message gives the reason of the one nearest to fitting.
    """
    ranked = rank(setting, choice, fitted)
    if ranked[0].reason is None:
        return ranked[0]
    nearest = min(ranked, key=lambda p: p.bytes or float("inf"))
    c = nearest.candidate
    raise LcabError(
        f"nothing fits: {c.kernel} under {c.strategy} on {c.cp} ranks, the nearest, {nearest.reason}; allow "
        "other kernels or strategies, or give more devices."
    )


def host_bound(prediction: Prediction, setting: Setting) -> str | None:
    """What to say of a step so short that GPUs may wait for the host, which is not modelled; else None."""
    model, cluster = setting.model, setting.cluster
    if setting.hardware.device != "cuda" or prediction.reason is not None or not model.hidden:
        return None  # a model without hidden units is attention alone, no step
    each = prediction.seconds * prediction.candidate.dp / (cluster.batch * model.layers)
    most = HOST_MOST[cluster.zero]
    if each >= most:
        return None
    return (
        f"The fastest takes {each * 1e3:.2g} ms a layer and sequence by this prediction, which has no term "
        f"for the host. Such steps took {HOST_LEAST * 1e3:.0f} to {most * 1e3:.0f} ms a layer on H100s, "
        "which waited for the host to launch their kernels (docs/planner.md)."
    )


def _speeds(setting: Setting, choice: Choice, fitted: dict[str, Speed] | None) -> dict[str, Speed]:
    known = table(setting.hardware, setting.model.dtype, fitted)
    names = choice.kernels or tuple(name for name in kernel_table.names() if name in known)
    if not names:
        device = setting.hardware.device
        made_for = (n for n in kernel_table.names() if device in kernel_table.get(n).features.devices)
        names = tuple(name for name in made_for if name not in REFERENCES)
    unmeasured = assumed(setting.hardware, setting.model.dtype)
    return {name: known.get(name, unmeasured) for name in names}


def _sizes(cluster: Cluster, choice: Choice) -> list[int]:
    sizes = candidates.sizes(cluster)
    wanted = [cp for cp in sizes if not choice.cp or cp in choice.cp]
    if not wanted:
        raise LcabError(
            f"{', '.join(map(str, choice.cp))} context-parallel ranks do not divide {cluster.world} devices "
            f"into groups that share {cluster.batch} sequences evenly; "
            f"give one of: {', '.join(map(str, sizes))}."
        )
    return wanted


def _predicted(candidate: Candidate, setting: Setting, speed: Speed) -> Prediction:
    model, mask = setting.model, setting.mask
    degrees = dict(candidate.degrees)
    ulysses = degrees.get("ulysses", 1)
    if not fits(model.heads, model.kv_heads, ulysses):
        heads = f"{model.heads} query and {model.kv_heads} key/value heads"
        return Prediction(candidate, f"{heads} cannot be dealt to {ulysses} Ulysses ranks")
    layout = layouts_table.make(candidate.layout, candidate.cp, mask.q_len, mask)
    block = split.block(layout, mask, ulysses, candidate.placement)
    axes = traffic.spans(degrees, candidate.placement, setting.cluster.gpus)
    plan = Plan(candidate.strategy, tuple(axes.items()), candidate.kernel, speed, block)
    at_once = candidate.strategy == "ring_all_gather" or len(block.ranks) == candidate.cp
    needs = model.head_dim, model.dtype, setting.hardware.device
    if reason := split.refused(candidate.kernel, block, at_once, *needs):
        return Prediction(candidate, f"{candidate.kernel}: {reason}")
    times, calls = terms(plan, setting, setting.cluster.batch // candidate.dp)
    held = footprint(plan, setting)
    room = USABLE * setting.hardware.memory - RESERVED
    short = sum(held.values()) - room
    reason = None
    if short > 0:
        most = max(held, key=held.__getitem__)
        reason = (
            f"needs {sum(held.values()) / 2**30:.1f} GiB of {room / 2**30:.1f} usable, most for {most} "
            f"({held[most] / 2**30:.1f})"
        )
    sent = {step: c.sent.total for step, c in calls.items()}
    return Prediction(candidate, reason, times, held, sent, block.imbalance, speed.origin)


def setting(mask: AttentionMask, model: Model, cluster: Cluster, hardware: Hardware) -> Setting:
    """What all candidates share.

    Raises:
        LcabError: the mask is not of one sequence, or has more slices than can be planned in seconds.
    """
    if mask.q_len != mask.k_len:
        raise LcabError(f"training has as many queries as keys, the mask {mask.q_len} and {mask.k_len}.")
    if len(mask.array) > MOST_SLICES:
        raise LcabError(
            f"the mask has {len(mask.array)} slices, and planning takes seconds up to {MOST_SLICES}; "
            "block_sparse of larger blocks shows as large a share of the pairs."
        )
    return Setting(mask, model, cluster, hardware)
