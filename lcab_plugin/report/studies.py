"""The part of `lcab study`: how every cell of its plan ended."""

from __future__ import annotations

from collections.abc import Iterable

from lcab_plugin.bench.cells import mask_label
from lcab_plugin.report.section import Section
from lcab_plugin.report.sources import Source
from lcab_plugin.report.tables import Notes, Table, Value, value
from lcab_plugin.training.schema import Record

_CHOSEN = ("kernel", "strategy", "layout")
_COLUMNS = ("kind", "framework", "kernel", "strategy", "layout", "mask", "seqlen", "world")
_TITLES = ["cell", "kind", "framework", "kernel", "strategy", "layout", "mask", ">tokens", ">ranks"]
_VERDICTS = {"ok": "pass", "error": "fail", "timeout": "fail"}


def shown(cell: Record) -> Record:
    """A cell as tables show it: its mask by all that is named, and what the planner chose for `auto`."""
    chosen = dict(cell.get("chosen") or {})
    made = {**cell, "mask": mask_label(cell["mask"], cell.get("parameters") or {})}
    made |= {name: f"auto: {chosen.pop(name)}" for name in _CHOSEN if name in chosen}
    return {**made, "degrees": chosen or cell.get("degrees") or {}}


def section(sources: Iterable[Source]) -> Section:
    """A table for each study."""
    made = Section("studies", "Studies")
    for number, source in enumerate(sources, start=1):
        cells = [r for r in source.records if r["type"] == "study_cell"]
        notes, rows = Notes(), []
        counts: dict[str, int] = {}
        for cell in cells:
            status = cell["status"] or "not yet"
            counts[status] = counts.get(status, 0) + 1
            note = notes(cell["reason"]) if cell.get("reason") else None
            ended = Value(status, status, note=note, verdict=_VERDICTS.get(status, "warn"))
            rows.append(
                [
                    value(cell["id"]),
                    *(value(shown(cell).get(k)) for k in _COLUMNS),
                    value(cell.get("tries")),
                    ended,
                ]
            )
        states = ", ".join(f"{n} {status}" for status, n in counts.items())
        caption = f"{source.name}: {len(cells)} cells; {states}"
        table = Table(f"study-{number}", caption, [*_TITLES, ">tries", "ended"], rows, notes.texts)
        table.folded = len(rows) > 60
        made.blocks.append(table)
    return made
