"""``kernel: auto`` and ``strategy: auto``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lcab_plugin import kernels
from lcab_plugin.context_parallel.topology import PLACEMENTS
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask
from lcab_plugin.planner.hardware import Hardware
from lcab_plugin.planner.plan import REFERENCES, Choice, Prediction, rank, setting
from lcab_plugin.planner.shape import Cluster, Model
from lcab_plugin.planner.speeds import table
from lcab_plugin.planner.work import refusal

AUTO = "auto"
SETTINGS = ("kernel", "strategy", "layout")  # that may be left to the planner


@dataclass(frozen=True)
class Workload:
    """Attention of the training to come: the ``mask`` of a typical sequence, whole, and the heads and dtype
    ("bf16", "fp16" or "fp32") of the q, k and v that one context-parallel group shares. ``name``: how the
    sequence is called in what is printed.

    Raises:
        LcabError: a number makes no sense.
    """

    mask: AttentionMask
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    name: str = "the sequence given"

    def __post_init__(self) -> None:
        _ = self.model

    @property
    def model(self) -> Model:
        """One layer of attention alone: what stands around it costs every choice the same."""
        return Model(1, 0, 0, 0, self.heads, self.kv_heads, self.head_dim, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """For a record."""
        shape = {name: getattr(self, name) for name in ("name", "heads", "kv_heads", "head_dim", "dtype")}
        return {"tokens": self.mask.q_len, "area": self.mask.area, "mask_digest": self.mask.digest, **shape}


@dataclass(frozen=True)
class Chosen:
    """The ``settings`` to take in place of those asked for, a sentence about them to print, and a record."""

    settings: dict[str, Any]
    sentence: str
    record: dict[str, Any]


def choose(
    settings: dict[str, Any],
    workload: Workload,
    cp: int,
    hardware: Hardware,
    gpus_per_node: int = 8,
) -> Chosen:
    """What ``"auto"`` in ``settings`` stands for: the fastest by prediction of the kernels that run on this
    machine (of those with a measured speed, where there are any), and of the strategies, degrees and
    placements over ``cp`` ranks.

    Of ``kernel``, ``strategy`` and ``layout`` (of ``AttentionConfig``) those that are not ``"auto"`` stay,
    and so do degrees and a placement other than the default; a kernel must do the softcap and the
    deterministic backward that are asked for. Equal arguments give equal answers: every rank chooses alike.

    Args:
        settings: ``AttentionConfig.to_dict()``.
        workload: what is to be fast.
        cp: context-parallel ranks, neighbours in the world.
        gpus_per_node: how many neighbours of them a node holds, at most.

    Raises:
        LcabError: nothing can run; the message gives the reason.
    """
    named = settings["kernel"], settings["strategy"], settings["layout"]
    names = (named[0],) if named[0] != AUTO else _runnable(settings, workload, hardware)
    choice = Choice(
        kernels=names,
        strategies=() if named[1] == AUTO else (named[1],),
        layouts=() if named[2] == AUTO else (named[2],),
        cp=(cp,),
        trivial=named[1] != AUTO,
    )
    inside = math.gcd(cp, gpus_per_node)  # of 12 ranks on nodes of 8, at least 4 are always in one
    cluster = Cluster(cp // inside, inside, zero=0)
    ranked = rank(setting(workload.mask, workload.model, cluster, hardware), choice)
    asked = [p for p in ranked if _asked(p, settings)]
    if not asked or asked[0].reason is not None:
        why = asked[0].reason if asked else "no candidate has the degrees given"
        raise LcabError(f"'auto' finds nothing that can run on {cp} ranks: {why}.")
    return _chosen(asked[0], settings, workload, hardware)


def _runnable(settings: dict[str, Any], workload: Workload, hardware: Hardware) -> tuple[str, ...]:
    """Kernels of this machine that serve the workload, the references for tests left out. An assumed speed
    must not win over a measured one: kernels without are taken where none is measured."""
    wanted = {name for name in ("softcap", "deterministic") if settings.get(name)}
    here = [name for name, reason in kernels.availability().items() if reason is None]
    fast = [name for name in here if name not in REFERENCES]
    able = [n for n in fast if all(getattr(kernels.get(n).features, want) for want in wanted)]
    call = workload.mask, workload.head_dim, workload.dtype, hardware.device
    served = [n for n in able if not refusal(n, *call)]
    if not served:
        raise LcabError(
            f"no kernel of this machine serves this mask with head_dim {workload.head_dim} in "
            f"{workload.dtype} on {hardware.device}{''.join(f' and {want}' for want in sorted(wanted))}; "
            "`lcab kernels` lists them, kernel 'naive' serves every mask slowly."
        )
    measured = table(hardware, workload.dtype)
    return tuple(n for n in served if n in measured) or tuple(served)


def _asked(prediction: Prediction, settings: dict[str, Any]) -> bool:
    """Whether a candidate has the degrees and the placement that were given; beside strategy "auto" the
    default placement is none that was given."""
    candidate = prediction.candidate
    degrees = dict(candidate.degrees)
    given = {name: settings.get(name) for name in ("ulysses", "ring", "inner_ring")}
    right = all(value is None or degrees.get(name, 1) == value for name, value in given.items())
    placement = settings.get("placement", PLACEMENTS[0])
    free = settings["strategy"] == AUTO and placement == PLACEMENTS[0]
    return right and (free or candidate.placement == placement)


def _chosen(found: Prediction, settings: dict[str, Any], workload: Workload, hardware: Hardware) -> Chosen:
    c = found.candidate
    asked = [name for name in SETTINGS if settings[name] == AUTO]
    made = {**settings, "kernel": c.kernel, "layout": c.layout}
    if "strategy" in asked:
        none_given = {"ulysses": None, "ring": None, "inner_ring": None}
        made |= {**none_given, "strategy": c.strategy, "placement": c.placement, **dict(c.degrees)}
    degrees = "".join(f" {name}={value}" for name, value in c.degrees)
    placed = f" {c.placement}" if len(c.degrees) > 1 else ""
    mask = workload.mask
    share = mask.area / (mask.q_len * mask.k_len)
    sentence = (
        f"auto ({', '.join(asked)}): kernel {c.kernel}, strategy {c.strategy}{degrees}{placed}, layout "
        f"{c.layout}; predicted {found.seconds * 1e3:,.2f} ms a layer for {workload.name} "
        f"({mask.q_len} tokens, {share:.2%} of all pairs visible) on {hardware.name}, speed of the kernel "
        f"{found.speed}"
    )
    record = {"auto": asked, "workload": workload.to_dict(), "hardware": hardware.name, **found.to_dict()}
    return Chosen(made, sentence, record)
