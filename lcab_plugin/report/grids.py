"""The two shapes that every benchmark's cells are shown in: a matrix with values or reasons, and small charts
side by side, one for each mask."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from lcab_plugin import masks
from lcab_plugin.report import svg
from lcab_plugin.report.tables import Notes, Table, Value
from lcab_plugin.training.schema import Record

Metric = Callable[[Record], float | None]
Name = Callable[[Record], str]
MOST_PANELS = 36  # of one group of charts
_UNITS = {"seqlen": "tokens", "world": "ranks"}


@dataclass(frozen=True)
class Quantity:
    """What is compared. ``better``: 1 more is better, -1 less is, 0 neither. ``log``: its axis. ``span``: of
    the axis of every chart, what the values cover if left out. ``band``: the value at a quantile of the
    time, for the edges of its band."""

    label: str
    of: Metric
    better: int = 1
    log: int = 0
    span: tuple[float, float] | None = None
    band: Callable[[Record, str], float | None] | None = None
    tick: Metric | None = None  # what a bar is compared with
    form: Callable[[float], str] = field(default=svg.number)


def per_time(of: Metric) -> Callable[[Record, str], float | None]:
    """The band of a rate: what it would be at a quantile of the time."""

    def at(record: Record, quantile: str) -> float | None:
        rate, time = of(record), record.get(f"{quantile}_ms")
        return rate * record["median_ms"] / time if rate is not None and time else None

    return at


@dataclass(frozen=True)
class Grid:
    """Rows and columns of a matrix. ``along``: ``row`` or ``column``, which of them holds what competes; its
    best is set apart. ``reference``: the name of what does not compete. ``aside``: what stands before a
    value."""

    row: Name
    column: Name
    along: str = "row"
    reference: str | None = None
    aside: Name | None = None


def matrix(name: str, caption: str, cells: Iterable[Record], grid: Grid, quantity: Quantity) -> Table:
    """A value, or the reason why there is none, for every row and column."""
    found = {(grid.row(c), grid.column(c)): c for c in cells}
    rows, columns = (_ordered({at[i] for at in found}, grid.reference) for i in (0, 1))
    known = {at: quantity.of(c) for at, c in found.items() if c.get("status", "ok") == "ok"}
    side = 1 if grid.along == "row" else 0  # the side of the names that compete
    entered = {at: v for at, v in known.items() if v is not None and at[side] != grid.reference}
    lines: dict[str, list[float]] = {}
    for at, v in entered.items():
        lines.setdefault(at[1 - side], []).append(v)
    pick = max if quantity.better > 0 else min
    best = {line: pick(vs) for line, vs in lines.items() if len(set(vs)) > 1 and quantity.better}
    most = max(entered.values(), default=0.0) if quantity.better > 0 else 0.0
    notes, made = Notes(), []
    for r in rows:
        line = [Value(r, r)]
        for at in ((r, c) for c in columns):
            cell, number = found.get(at), known.get(at)
            if cell is None:
                line.append(Value(None, "not measured"))
            elif cell.get("status", "ok") != "ok":
                line.append(Value(None, cell["status"], note=notes(f"{cell['status']}: {cell['reason']}")))
            elif number is None:
                line.append(Value(None, "-"))
            else:
                tint = number / most if most > 0 and at in entered else 0.0
                first = at in entered and number == best.get(at[1 - side])
                before = grid.aside(cell) if grid.aside else ""
                line.append(Value(number, quantity.form(number), max(tint, 0.0), first, aside=before))
        made.append(line)
    return Table(name, caption, ["", *(f">{c}" for c in columns)], made, notes.texts)


def _ordered(names: Iterable[str], first: str | None) -> list[str]:
    """Masks as they are listed everywhere, other names by the alphabet, but for the one that is first."""
    return sorted(names, key=lambda name: (name != first, place(name)))


def by_mask(cells: Iterable[Record], line: Name) -> list[Record]:
    """The cells in the order in which masks and lines are shown everywhere."""
    return sorted(cells, key=lambda c: (place(c["mask"], len(masks.names())), line(c)))


def place(label: str, otherwise: int = -1) -> tuple[int, list[float], str]:
    """Of a mask by its family, then by the numbers in its label; ``otherwise``: of names that are none."""
    families = masks.names()
    family = label.partition(" ")[0]
    if family not in families:
        return otherwise, [], label
    return families.index(family), [float(x) for x in re.findall(r"\d+(?:\.\d+)?", label)], label


def styles(names: Iterable[str]) -> dict[str, int]:
    """A colour, marker and dash for each name, the same in every chart of a section."""
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def several(cells: Sequence[Record], panel: Name, x: str) -> list[Record]:
    """The cells whose panel has more than one ``x``."""
    places: dict[str, set[int]] = {}
    for cell in cells:
        places.setdefault(panel(cell), set()).add(cell[x])
    return [c for c in cells if len(places[panel(c)]) > 1]


def panels(
    cells: Sequence[Record], panel: Name, line: Name, x: str, quantity: Quantity, style: dict[str, int]
) -> str:
    """A chart for each panel, against ``x`` (seqlen or world), or bars where each has one x only; the empty
    string where nothing was measured."""
    measured = [c for c in cells if c.get("status", "ok") == "ok" and _finite(quantity.of(c))]
    by_panel: dict[str, list[Record]] = {}
    for cell in measured:
        by_panel.setdefault(panel(cell), []).append(cell)
    if not by_panel:
        return ""
    names = list(dict.fromkeys(line(c) for c in measured))
    values = [v for c in measured if (v := quantity.of(c)) is not None]
    limits = quantity.span or svg.span(values, quantity.log)
    single = all(len({c[x] for c in inside}) == 1 for inside in by_panel.values())
    drawn = []
    for title, inside in list(by_panel.items())[:MOST_PANELS]:
        if single:
            title += f", {svg.tokens(inside[0][x])} {_UNITS[x]}"
            made = _bars(title, inside, line, quantity, style, limits[1])
        else:
            made = _lines(title, inside, line, x, quantity, style, limits)
        drawn.append(f"<figure><figcaption>{escape(title)}</figcaption>{made}</figure>")
    left = len(by_panel) - len(drawn)
    more = f"<p>{left} more charts are left out; their numbers are in the tables.</p>" if left > 0 else ""
    shown = "" if single else legend({name: style[name] for name in names})
    return f'{shown}<div class="panels">{"".join(drawn)}</div>{more}'


def legend(style: dict[str, int]) -> str:
    """Names beside pieces of their lines."""
    items = "".join(f"<li>{svg.swatch(number)} {escape(name)}</li>" for name, number in style.items())
    return f'<ul class="legend">{items}</ul>'


def _finite(number: float | None) -> bool:
    return number is not None and math.isfinite(number)


def _bars(
    title: str, cells: Sequence[Record], line: Name, quantity: Quantity, style: dict[str, int], high: float
) -> str:
    ticks = {line(c): quantity.tick(c) for c in cells} if quantity.tick else {}
    bars = [svg.Bar(line(c), quantity.of(c) or 0.0, style[line(c)], ticks.get(line(c))) for c in cells]
    return svg.bar_chart(title, quantity.label, bars, None if quantity.log else high)


def _lines(
    title: str,
    cells: Sequence[Record],
    line: Name,
    x: str,
    quantity: Quantity,
    style: dict[str, int],
    limits: tuple[float, float],
) -> str:
    series = []
    for name in dict.fromkeys(line(c) for c in cells):
        own = {c[x]: c for c in cells if line(c) == name}
        low, high = ([], []) if quantity.band is None else _band(list(own.values()), quantity.band)
        ys = [quantity.of(c) or 0.0 for c in own.values()]
        series.append(svg.Series(name, list(own), ys, style[name], low, high))
    marks = sorted({c[x] for c in cells})
    x_axis = svg.Axis(_UNITS[x], log=2, marks=marks if len(marks) <= 12 else ())
    y_axis = svg.Axis(quantity.label, log=quantity.log, span=limits)
    return svg.line_chart(svg.Chart(title, x_axis, y_axis, series))


def _band(
    cells: Sequence[Record], at: Callable[[Record, str], float | None]
) -> tuple[list[float], list[float]]:
    edges = [(at(c, "p90"), at(c, "p10")) for c in cells]
    low = [math.nan if a is None else a for a, _ in edges]
    high = [math.nan if b is None else b for _, b in edges]
    return low, high
