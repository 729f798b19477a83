"""``kernel: auto`` and ``strategy: auto``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lcab_plugin import kernels
from lcab_plugin.context_parallel.topology import PLACEMENTS
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask
from lcab_plugin.planner.hardware import Hardware
from lcab_plugin.planner.plan import REFERENCES, Choice, Prediction, rank, setting
from lcab_plugin.planner.shape import Cluster, Model
from lcab_plugin.planner.work import refusal

AUTO = "auto"


@dataclass(frozen=True)
class Chosen:
    """The ``settings`` to take in place of those asked for, a sentence about them to print, and a record."""

    settings: dict[str, Any]
    sentence: str
    record: dict[str, Any]


def choose(
    settings: dict[str, Any],
    mask: AttentionMask,
    model: Model,
    cp: int,
    hardware: Hardware,
    gpus_per_node: int = 8,
) -> Chosen:
    """What ``"auto"`` in ``settings`` stands for: the fastest by prediction of the kernels that run on this
    machine, and of the strategies, degrees and placements over ``cp`` ranks.

    Of ``kernel``, ``strategy`` and ``layout`` (of ``AttentionConfig``) those that are not ``"auto"`` stay,
    and so do the degrees and the placement of a strategy that is named. Equal arguments give equal answers:
    every rank chooses alike.

    Args:
        settings: ``AttentionConfig.to_dict()``.
        cp: context-parallel ranks, neighbours in the world.
        model: its shape; ``planner.Model(1, 0, 0, 0, heads, kv_heads, head_dim, dtype)`` where only attention
            is known.

    Raises:
        LcabError: nothing can run; the message gives the reason.
    """
    named = settings["kernel"], settings["strategy"], settings["layout"]
    names = (named[0],) if named[0] != AUTO else _runnable(mask, model, hardware)
    choice = Choice(
        kernels=names,
        strategies=() if named[1] == AUTO else (named[1],),
        layouts=() if named[2] == AUTO else (named[2],),
        cp=(cp,),
        trivial=named[1] != AUTO,
    )
    nodes, gpus = divmod(cp, gpus_per_node)
    cluster = Cluster(nodes, gpus_per_node, zero=0) if nodes and not gpus else Cluster(1, cp, zero=0)
    ranked = rank(setting(mask, model, cluster, hardware), choice)
    found = [p for p in ranked if p.reason is None and (named[1] == AUTO or _asked(p, settings))]
    if not found:
        why = next((p.reason for p in ranked if p.reason), "no candidate has the degrees given")
        raise LcabError(f"'auto' finds nothing that can run on {cp} ranks: {why}.")
    return _chosen(found[0], named, settings)


def _runnable(mask: AttentionMask, model: Model, hardware: Hardware) -> tuple[str, ...]:
    """Kernels made for such devices that this machine has; the references for tests are none of them."""
    here = [name for name, reason in kernels.availability().items() if reason is None]
    fast = [name for name in here if name not in REFERENCES]
    served = [n for n in fast if not refusal(n, mask, model.head_dim, model.dtype, hardware.device)]
    if not served:
        raise LcabError(
            f"no kernel of this machine serves this mask with head_dim {model.head_dim} in {model.dtype} on "
            f"{hardware.device}; `lcab kernels` lists them, kernel 'naive' serves every mask slowly."
        )
    return tuple(served)


def _asked(prediction: Prediction, settings: dict[str, Any]) -> bool:
    """Whether a candidate of a strategy that was named has the degrees and the placement given with it."""
    candidate = prediction.candidate
    degrees = dict(candidate.degrees)
    given = {name: settings.get(name) for name in ("ulysses", "ring", "inner_ring")}
    right = all(value is None or degrees.get(name, 1) == value for name, value in given.items())
    return right and candidate.placement == settings.get("placement", PLACEMENTS[0])


def _chosen(found: Prediction, named: tuple[str, str, str], settings: dict[str, Any]) -> Chosen:
    c = found.candidate
    made = {**settings, "kernel": c.kernel, "layout": c.layout}
    if named[1] == AUTO:
        made |= {
            "strategy": c.strategy,
            "ulysses": None,
            "ring": None,
            "inner_ring": None,
            "placement": c.placement,
            **dict(c.degrees),
        }
    asked = [
        name for name, value in zip(("kernel", "strategy", "layout"), named, strict=True) if value == AUTO
    ]
    degrees = " ".join(f"{name}={value}" for name, value in c.degrees)
    sentence = (
        f"auto ({', '.join(asked)}): kernel {c.kernel}, strategy {c.strategy}"
        f"{f' {degrees}' if degrees else ''}, {c.placement}, layout {c.layout}; predicted "
        f"{found.seconds * 1e3:.3g} ms, speed of the kernel {found.speed}"
    )
    return Chosen(made, sentence, {"auto": asked, **found.to_dict()})
