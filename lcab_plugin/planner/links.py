"""Links inside and between nodes, fitted to what records of `lcab bench cp` say of their transfers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcab_plugin.planner.hardware import Hardware, Link
from lcab_plugin.planner.predict import packed
from lcab_plugin.planner.shape import Model
from lcab_plugin.planner.speeds import Floats, least_squares
from lcab_plugin.planner.traffic import Span

NAMES = ("inside", "between")  # of nodes: the attributes of Hardware, in the order in which they are fitted
LEAST = 4  # records that are worth fitting
# Transfers are the difference of two timings. They count where they take this share of the call, and so many
# times half the confidence interval of its median: less can be noise.
SHARE, INTERVALS = 0.05, 3
# A transfer over several nodes that takes so many times what its bytes inside them would was waiting for the
# link between them.
LONGER = 1.5


@dataclass(frozen=True)
class Transfer:
    """What one record says of links: ``collectives`` one after another over ``span``, each sending ``sent``
    bytes (inside a node, between nodes), and ``beside`` them seconds of packing, took ``exposed`` seconds.
    ``held`` back from the fit; ``where``: the record's cell."""

    span: Span
    sent: tuple[float, float]
    collectives: int
    beside: float
    exposed: float
    held: bool
    where: str

    @property
    def link(self) -> str:
        """The one of ``NAMES`` that the record can tell of."""
        return "inside" if self.span.near == self.span.size else "between"

    def seconds(self, hardware: Hardware) -> float:
        """As predicted."""
        return self.beside + self.collectives * self.span.seconds(self.sent, hardware)

    @property
    def amounts(self) -> tuple[float, float]:
        """Messages one after another, and bytes over the link."""
        each = self.sent[NAMES.index(self.link)]
        return float(self.collectives * self.span.messages), self.collectives * each


@dataclass(frozen=True)
class Fitted:
    """A link, the number of ``records`` it was fitted to, and without one (``link`` None) the reason."""

    link: Link | None
    records: int = 0
    reason: str = ""


def transfer(record: dict[str, Any], hardware: Hardware, held: bool) -> Transfer | str:
    """What a cell says of links; or why nothing, to follow a number of such cells."""
    strategy, world, step = record["strategy"], record["world"], record["pass"]
    if "sent_bytes" not in record:
        return "no time of the transfers alone (`lcab bench peers`)"
    if not record["sent_bytes"]:
        return "nothing is sent"
    if strategy not in ("ulysses", "ring_all_gather"):
        return "a strategy that hides transfers behind its kernels"
    nodes = record.get("nodes")
    if not nodes or world % nodes:
        return "how their ranks lie on nodes is not recorded (`nodes`)"
    span = Span(world, 1, world // nodes)
    if strategy == "ulysses":
        shape = {name: record[name] for name in ("heads", "kv_heads", "head_dim", "dtype")}
        model = Model(layers=1, hidden=0, ffn=0, vocab=0, **shape)
        moved = packed(model, -(-record["seqlen"] // world)) * record["batch"] * model.head_dim
        sent, collectives = span.exchanged(record["sent_bytes"]), 1
    else:
        collectives, moved = (2 if step == "bwd" else 1), 0.0
        sent = span.gathered(record["sent_bytes"] / collectives / (world - 1))
    exposed, beside = (record["exposed_ms"] or 0.0) / 1e3, moved / hardware.stream
    noise = max(SHARE, INTERVALS * (record.get("relative_ci") or 0.0)) * record["median_ms"] / 1e3
    if exposed <= max(beside, noise):
        return "transfers too short a part of the call to be told from noise"
    where = f"{strategy} {record['mask']} {record['seqlen']} {step}"
    return Transfer(span, sent, collectives, beside, exposed, held, where)


def fit(name: str, transfers: Sequence[Transfer], hardware: Hardware) -> Fitted:
    """The link of that name, from the ``transfers`` that tell of it and are not held back.

    Between nodes only those count that the links inside do not explain: at first what took ``LONGER`` than
    they need, then what the fitted link makes wait.
    """
    known = [t for t in transfers if not t.held]
    if not known:
        return Fitted(None, reason=f"no records of {'one node' if name == 'inside' else 'several nodes'}")
    amounts = np.array([t.amounts for t in known])
    seconds = np.array([t.exposed - t.beside for t in known])
    inside = np.array([t.collectives * t.sent[0] for t in known]) / hardware.inside.bandwidth
    waits = np.full(len(known), True) if name == "inside" else seconds >= LONGER * inside
    costs = _costs(amounts, seconds, waits)
    while name == "between" and costs is not None:
        still = waits & (costs[1] * amounts[:, 1] >= inside)
        if (still == waits).all():
            break
        waits = still
        costs = _costs(amounts, seconds, waits)
    used = int(waits.sum())
    if costs is None:
        of = "" if name == "inside" else " that wait for it"
        return Fitted(None, reason=f"{used} records{of} of the {LEAST} needed")
    latency, byte = costs.tolist()
    if byte <= 0:
        return Fitted(None, reason=f"the times of {used} records do not grow with their bytes")
    return Fitted(Link(1 / byte, latency), used)


def _costs(amounts: Floats, seconds: Floats, chosen: NDArray[np.bool_]) -> Floats | None:
    """Seconds of a message and of a byte; None of too few."""
    return least_squares(amounts[chosen], seconds[chosen]) if chosen.sum() >= LEAST else None
