"""The parts of training runs that only their ends tell: accuracy by position and distance, and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcab_plugin.report import grids, svg
from lcab_plugin.report.section import Block, Figure
from lcab_plugin.report.tables import Table, value
from lcab_plugin.training.schema import Record


@dataclass(frozen=True)
class _Kind:
    """What is shown of an evaluation: ``y`` at the places ``x`` of its table. ``log``: base of the axis, as
    buckets of documents double in size while parts of a sequence are equal."""

    slug: str
    title: str
    label: str
    x: str
    y: str
    log: int
    span: tuple[float, float] | None = None


_KINDS = (
    _Kind(
        "by_document_position",
        "Loss by position in its document",
        "position in its document",
        "from",
        "loss",
        2,
    ),
    _Kind(
        "by_sequence_position",
        "Loss by position in the sequence",
        "position in the sequence",
        "from",
        "loss",
        0,
    ),
    _Kind("recall", "Recall of a hidden value", "tokens back", "distance", "accuracy", 2, (0.0, 1.05)),
)
_MEMORY = {
    "peak_allocated_gib": ">allocated",
    "peak_reserved_gib": ">reserved",
    "peak_rss_gib": ">resident on the host",
    "model_states_gib": ">model states",
    "activations_gib": ">activations",
    "attention_buffers_gib": ">attention buffers",
    "communication_buffers_gib": ">communication buffers",
}


def facts(lines: Sequence[Record]) -> Record:
    """Of a run: its last evaluation, its recall and the fullest rank's memory; None for what it has not."""
    evals = [r for r in lines if r["type"] == "eval"]
    end = next((r for r in reversed(lines) if r["type"] == "end"), {})
    memory = end.get("memory")
    return {
        "eval": evals[-1] if evals else None,
        "recall": end.get("recall"),
        "memory": None if memory is None else {name: _most(taken) for name, taken in memory.items()},
    }


def _most(values: Any) -> float | None:
    known = [v for v in values if v is not None] if isinstance(values, list) else []
    return max(known, default=None)


def blocks(name: str, rows: Sequence[Record], named: Mapping[str, str], at: Mapping[str, int]) -> list[Block]:
    """Charts of the runs in ``named`` and tables of all ``rows``; only what some run has."""
    charts, tables = [], []
    for kind in _KINDS:
        found = {row["file"]: table for row in rows if (table := _table_of(row, kind)) is not None}
        series = []
        for file, table in found.items():
            points = dict(_points(table, kind))
            if file in named and points:
                series.append(svg.Series(named[file], list(points), list(points.values()), at[file]))
        if series:
            charts.append(f"<figcaption>{kind.title}</figcaption>{_chart(kind, series)}")
            tables.append(_table(f"{name}-{kind.slug.replace('_', '-')}", kind, found, rows))
    if not charts:
        return []
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts)
    caption = "Does more context help, and is what lies far back found? Position 0 is drawn at 1."
    shown = grids.legend({named[file]: at[file] for file in named})
    return [Figure(f'{shown}<div class="panels">{figures}</div>', caption), *tables]


def _table_of(row: Record, kind: _Kind) -> Record | None:
    return row["recall"] if kind.slug == "recall" else (row["eval"] or {}).get(kind.slug)


def _points(table: Record, kind: _Kind) -> list[tuple[float, float]]:
    """What was measured; a logarithmic axis begins at 1."""
    first = 1 if kind.log else 0
    return [(max(a, first), b) for a, b in zip(table[kind.x], table[kind.y], strict=False) if b is not None]


def _chart(kind: _Kind, series: Sequence[svg.Series]) -> str:
    values = [v for s in series for v in s.y]
    room = (max(values) - min(values)) * 0.05 or 0.01
    y = svg.Axis(kind.y, span=kind.span or (min(values) - room, max(values) + room))
    return svg.line_chart(svg.Chart(kind.title, svg.Axis(kind.label, log=kind.log), y, series))


def _table(name: str, kind: _Kind, found: Mapping[str, Record], rows: Sequence[Record]) -> Table:
    places = sorted({place for table in found.values() for place in table[kind.x]})
    lines = []
    for row in rows:
        if (table := found.get(row["file"])) is not None:
            own = dict(zip(table[kind.x], table[kind.y], strict=False))
            known = (value(own.get(place)) for place in places)
            lines.append([value(row["name"]), value(row["mask"]), *known])
    columns = ["run", "mask", *(f">{svg.tokens(p)}" for p in places)]
    return Table(name, kind.title, columns, lines, folded=True)


def memory(name: str, rows: Sequence[Record]) -> list[Block]:
    """What the fullest rank held, by what held it."""
    known = [row for row in rows if row["memory"]]
    if not known:
        return []
    lines = [[value(r["name"]), *(value(r["memory"].get(key)) for key in _MEMORY)] for r in known]
    caption = "GiB of the fullest rank, the largest of all steps; a dash is what could not be told"
    return [Table(name, caption, ["run", *_MEMORY.values()], lines)]
