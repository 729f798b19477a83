"""Charts as inline SVG whose colours are the page's variables, so that they follow its light or dark theme.

A series has a colour, a marker and a dash of its own: it is told apart without colour, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

COLOURS = 8  # the page's variables --c0 to --c7
_SHAPES = 6  # of markers; with the dashes 24 looks that need no colour
_DASHES = ("", "7 3", "2 3", "8 3 2 3")
_WIDTH, _HEIGHT, _BAR_ROOM = 340, 230, 160
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 40
_MARKS = 40  # points of a series that get a marker


@dataclass(frozen=True)
class Series:
    """One line. ``low`` and ``high``, where given, are the edges of a band around ``y``; ``style`` numbers
    the colour, marker and dash."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def by_x(self) -> Series:
        """The same points, ascending in x."""
        order = sorted(range(len(self.x)), key=lambda i: self.x[i])
        columns = (self.x, self.y, self.low, self.high)
        x, y, low, high = ([column[i] for i in order] if column else [] for column in columns)
        return replace(self, x=x, y=y, low=low, high=high)


@dataclass(frozen=True)
class Axis:
    """``log``: of base 2 or 10 for even ticks, 0 for a linear axis. ``span``: shared by several charts; what
    the data covers if left out. ``marks``: the only places of ticks, as of a few sequence lengths."""

    label: str
    log: int = 0
    span: tuple[float, float] | None = None
    marks: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over two axes. ``limits``: (name, y) of dashed level lines, such as a budget."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    limits: Sequence[tuple[str, float]] = field(default=())


def span(values: Iterable[float], log: int) -> tuple[float, float]:
    """What an axis covers: zero and all values, or on a logarithmic axis all that are above zero."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        if high < 10 * low:  # one decade at least: a factor of 1.1 is not to look like a cliff
            return log ** (math.log(low, log) // 1), log ** (math.log(high, log) // 1 + 1)
        room = max((high / low) ** 0.06, 1.15)
        return low / room, high * room
    low, high = min(low, 0.0), max(high, 0.0)
    return (low, high * 1.06) if high > low else (low, low + 1.0)


def number(value: float) -> str:
    """Three digits at most that count, for an axis or a tooltip."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"


def tokens(value: float) -> str:
    """A sequence length: 16K, 1M, 12345."""
    n = round(value)
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{letter}"
    return str(n)


def ticks(low: float, high: float, log: int, count: int = 5) -> list[float]:
    """Round places between two limits."""
    if log:
        first, last = math.ceil(math.log(low, log) - 1e-9), math.floor(math.log(high, log) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / count))
        found = [float(log) ** p for p in range(first, last + 1, step)]
        return found if len(found) > 1 else [low * (high / low) ** (i / 3) for i in range(1, 3)]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step_size = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step_size - 1e-9)
    return [i * step_size for i in range(first, math.floor(high / step_size + 1e-9) + 1)]


def labels(places: Sequence[float]) -> list[str]:
    """Texts of ticks, with as many digits as tell them apart."""
    texts = [number(place) for place in places]
    for digits in range(2, 8):
        if len(set(texts)) == len(texts):
            break
        texts = [f"{place:.{digits}f}" for place in places]
    return texts


def line_chart(chart: Chart) -> str:
    """One chart. Its numbers are in a table of the page: a screen reader gets the title and the ranges."""
    frame = _Frame(chart)
    parts = [*frame.grid()]
    for series in chart.series:
        line = series.by_x()
        parts += [frame.band(line), frame.line(line), *frame.points(line)]
    for name, level in chart.limits:
        if frame.shows(level):
            y = frame.y(level)
            parts.append(f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="end" x="{_WIDTH - _RIGHT}" y="{y - 4}">{escape(name)}</text>')
    names = ", ".join(s.name for s in chart.series[:COLOURS])
    return _svg(_WIDTH, _HEIGHT, f"{chart.title}: {chart.y.label} against {chart.x.label} of {names}", parts)


class _Frame:
    """Where values lie in the picture."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        xs = [x for s in chart.series for x in s.x]
        ys = [y for s in chart.series for y in (*s.y, *s.low, *s.high)]
        self.x_span = chart.x.span or _wide(xs, chart.x.log)
        self.y_span = chart.y.span or span((*ys, *(level for _, level in chart.limits)), chart.y.log)

    def x(self, value: float) -> float:
        """Pixels from the left."""
        inside = _WIDTH - _LEFT - _RIGHT
        return round(_LEFT + inside * _share(value, self.x_span, self.chart.x.log), 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        inside = _HEIGHT - _TOP - _BOTTOM
        return round(_TOP + inside * (1 - _share(value, self.y_span, self.chart.y.log)), 1)

    def shows(self, y: float) -> bool:
        """Whether a value has a place on the axis."""
        return math.isfinite(y) and (y > 0 or not self.chart.y.log)

    def grid(self) -> list[str]:
        parts, bottom = [], _HEIGHT - _BOTTOM
        levels = ticks(*self.y_span, self.chart.y.log)
        for tick, text in zip(levels, labels(levels), strict=True):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4}">{text}</text>')
        before = -math.inf
        axis = self.chart.x
        for tick in sorted(axis.marks) or ticks(*self.x_span, axis.log):
            x, label = self.x(tick), tokens(tick) if axis.log == 2 else number(tick)
            parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
            if x - before < 7 * len(label) + 6:
                continue
            before = x
            parts.append(f'<text class="mid" x="{x}" y="{bottom + 16}">{label}</text>')
        middle = (_TOP + bottom) / 2
        centre = (_LEFT + _WIDTH - _RIGHT) / 2
        return [
            *parts,
            f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>',
            f'<text class="mid label" x="{centre}" y="{_HEIGHT - 6}">{escape(axis.label)}</text>',
            f'<text class="mid label" transform="translate(12 {middle}) rotate(-90)">'
            f"{escape(self.chart.y.label)}</text>",
        ]

    def band(self, series: Series) -> str:
        """The area between the edges of a series."""
        edges = [
            (x, low, high)
            for x, low, high in zip(series.x, series.low, series.high, strict=False)
            if self.shows(low) and self.shows(high)
        ]
        if len(edges) < 2:
            return ""
        there = [f"{self.x(x)},{self.y(high)}" for x, _, high in edges]
        back = [f"{self.x(x)},{self.y(low)}" for x, low, _ in reversed(edges)]
        return f'<polygon class="band f{series.style % COLOURS}" points="{" ".join(there + back)}"/>'

    def line(self, series: Series) -> str:
        """The points, joined."""
        places = [(x, y) for x, y in zip(series.x, series.y, strict=True) if self.shows(y)]
        if len(places) < 2:
            return ""
        points = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in places)
        dash = _DASHES[series.style // _SHAPES % len(_DASHES)]
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        return f'<polyline class="line s{series.style % COLOURS}"{dashed} points="{points}"/>'

    def points(self, series: Series) -> list[str]:
        """Markers, with the numbers as tooltips; of a long line a few, evenly."""
        every = max(1, -(-len(series.x) // _MARKS))
        shown = [
            (x, y)
            for i, (x, y) in enumerate(zip(series.x, series.y, strict=True))
            if i % every == 0 and self.shows(y)
        ]
        what = tokens if self.chart.x.log == 2 else number
        return [
            marker(self.x(x), self.y(y), series.style, f"{series.name}, {what(x)}: {number(y)}")
            for x, y in shown
        ]


def marker(x: float, y: float, style: int, tooltip: str = "") -> str:
    """The shape of a style, centred."""
    inner = f"<title>{escape(tooltip)}</title>" if tooltip else ""
    css = f'class="f{style % COLOURS}"'
    kind = style % _SHAPES
    if kind == 0:
        return f'<circle {css} cx="{x}" cy="{y}" r="3.2">{inner}</circle>'
    shapes = {
        1: ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        2: ((0, -4), (4, 3), (-4, 3)),
        3: ((0, -4.2), (4.2, 0), (0, 4.2), (-4.2, 0)),
        4: ((0, 4), (4, -3), (-4, -3)),
        5: ((-4, -1.2), (-1.2, -1.2), (-1.2, -4), (1.2, -4), (1.2, -1.2), (4, -1.2), (4, 1.2), (1.2, 1.2),
            (1.2, 4), (-1.2, 4), (-1.2, 1.2), (-4, 1.2)),
    }  # fmt: skip
    points = " ".join(f"{round(x + dx, 1)},{round(y + dy, 1)}" for dx, dy in shapes[kind])
    return f'<polygon {css} points="{points}">{inner}</polygon>'


def swatch(style: int) -> str:
    """A style in a legend: a piece of its line with its marker."""
    dash = _DASHES[style // _SHAPES % len(_DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    line = f'<line class="line s{style % COLOURS}"{dashed} x1="0" x2="28" y1="7" y2="7"/>'
    return f'<svg class="swatch" width="28" height="14" aria-hidden="true">{line}{marker(14, 7, style)}</svg>'


@dataclass(frozen=True)
class Bar:
    """``tick``: another number to compare with, drawn as a line across; None without one."""

    name: str
    value: float
    style: int
    tick: float | None = None


def bar_chart(title: str, label: str, bars: Sequence[Bar], high: float | None = None) -> str:
    """Horizontal bars from zero, their numbers beside them. ``high``: end of a shared axis, as long in every
    chart."""
    name_px = min(300, 6.6 * max((len(bar.name) for bar in bars), default=1) + 10)
    room = _BAR_ROOM
    top = high or max((v for b in bars for v in (b.value, b.tick or 0.0)), default=1.0) or 1.0
    parts = []
    for i, bar in enumerate(bars):
        y, width = 4 + 20 * i, round(room * max(bar.value, 0.0) / top, 1)
        shown = bar.name if len(bar.name) <= 44 else bar.name[:43] + "…"
        parts += [
            f'<text class="end" x="{name_px - 6}" y="{y + 11}">{escape(shown)}'
            f"<title>{escape(bar.name)}</title></text>",
            f'<rect class="f{bar.style % COLOURS}" x="{name_px}" y="{y}" width="{width}" height="14"/>',
            f'<text x="{name_px + width + 6}" y="{y + 11}">{number(bar.value)}</text>',
        ]
        if bar.tick is not None:
            x = round(name_px + room * bar.tick / top, 1)
            parts.append(f'<line class="across" x1="{x}" x2="{x}" y1="{y - 2}" y2="{y + 16}"/>')
    height = 20 * len(bars) + 26
    parts.append(f'<text class="mid label" x="{name_px + room / 2}" y="{height - 6}">{escape(label)}</text>')
    values = ", ".join(f"{bar.name} {number(bar.value)}" for bar in bars)
    return _svg(round(name_px + room + 64), height, f"{title}: {label}: {values}", parts)


def _svg(width: int, height: int, words: str, parts: Iterable[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(words)}">{"".join(parts)}</svg>'
    )


def _wide(values: Sequence[float], log: int) -> tuple[float, float]:
    """An x axis: from the first to the last value, not from zero."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    if log:
        room = max((high / low) ** 0.04, 1.1)
        return low / room, high * room
    room = (high - low) * 0.03 or 0.5
    return low - room, high + room


def _share(value: float, limits: tuple[float, float], log: int) -> float:
    low, high = limits
    share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
    return min(max(share, 0.0), 1.0)
