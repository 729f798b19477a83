"""Tables that a page, a Markdown file and a CSV file show alike."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from lcab_plugin.report.svg import number

MOST_ROWS = 1500  # of a table in the page and in Markdown; the CSV holds all
_SIGNS = {"pass": "✓ ", "fail": "✗ ", "warn": "! "}


@dataclass(frozen=True)
class Value:
    """One field. ``raw`` goes to the CSV, ``text`` is shown. ``tint``: 0 to 1, how dark its ground is.
    ``best``: of its row. ``note``: number of the table's note that explains it. ``verdict``: pass, fail or
    warn, shown by a sign and a colour. ``aside``: stands before the text, softer."""

    raw: Any
    text: str
    tint: float = 0.0
    best: bool = False
    note: int | None = None
    verdict: str | None = None
    aside: str = ""


def value(raw: Any, **how: Any) -> Value:
    """A field as it is: numbers short, None as a dash."""
    if raw is None:
        return Value(None, "-", **how)
    if isinstance(raw, bool):
        return Value(raw, "yes" if raw else "no", **how)
    return Value(raw, number(raw) if isinstance(raw, float) else str(raw), **how)


@dataclass
class Table:
    """``name``: of its CSV file and its place in the page, unique. ``columns``: those that begin with ``>``
    hold numbers. ``notes``: explain fields. ``folded``: closed until the reader opens it. ``wide``: text does
    not break to fit the page."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: list[list[Value]]
    notes: list[str] = field(default_factory=list)
    folded: bool = False
    wide: bool = False

    @property
    def titles(self) -> list[str]:
        return [column.lstrip(">") for column in self.columns]

    def cut(self) -> str | None:
        """What the page leaves out."""
        left = len(self.rows) - MOST_ROWS
        return f"{left} more rows are in {self.name}.csv." if left > 0 else None

    def html(self) -> str:
        """A table with a caption, headers and a box that scrolls by keyboard."""
        body = "".join(self._row(row) for row in self.rows[:MOST_ROWS])
        head = "".join(
            f'<th scope="col"{self._numeric(i)}>{_broken(title)}</th>' for i, title in enumerate(self.titles)
        )
        inner = (
            f'<div class="scroll{" wide" if self.wide else ""}" role="region" tabindex="0" '
            f'aria-labelledby="{self.name}">'
            f'<table><caption id="{self.name}">{escape(self.caption)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
        if self.notes:
            items = "".join(
                f'<li id="{self.name}-{i}">{escape(note)}</li>' for i, note in enumerate(self.notes, start=1)
            )
            inner += f'<ol class="notes">{items}</ol>'
        if (cut := self.cut()) is not None:
            inner += f"<p>{escape(cut)}</p>"
        if not self.folded:
            return inner
        return f"<details><summary>{escape(self.caption)}</summary>{inner}</details>"

    def markdown(self) -> str:
        """A table as GitHub shows it."""
        rule = ["---:" if column.startswith(">") else "---" for column in self.columns]
        lines = [self.titles, rule, *([_plain(v) for v in row] for row in self.rows[:MOST_ROWS])]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        notes = "".join(f"\n{i}. {_cell(note)}" for i, note in enumerate(self.notes, start=1))
        cut = self.cut()
        parts = [f"**{_cell(self.caption)}**", text, notes.strip(), cut or ""]
        return "\n\n".join(part for part in parts if part)

    def csv(self) -> str:
        """All rows. What is explained by a note, and not a number, is the note."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.titles)
        for row in self.rows:
            writer.writerow(self.notes[v.note - 1] if v.raw is None and v.note else v.raw for v in row)
        return out.getvalue()

    def _numeric(self, i: int) -> str:
        return ' class="n"' if self.columns[i].startswith(">") else ""

    def _row(self, row: Sequence[Value]) -> str:
        cells = [f'<th scope="row">{_broken(row[0].text)}</th>'] if row else []
        cells += [self._field(i, v) for i, v in enumerate(row[1:], start=1)]
        return f"<tr>{''.join(cells)}</tr>"

    def _field(self, i: int, v: Value) -> str:
        names = ["n"] if self.columns[i].startswith(">") else []
        names += [v.verdict] if v.verdict else []
        names += ["best"] if v.best else []
        css = f' class="{" ".join(names)}"' if names else ""
        tint = f' style="--t:{v.tint * 45:.0f}%"' if v.tint else ""
        text = _broken(_SIGNS.get(v.verdict or "", "") + v.text)
        if v.aside:
            text = f'<span class="aside">{_broken(v.aside)}</span> {text}'
        if v.best:
            text += '<span class="hidden"> best</span>'
        if v.note is not None:
            why = escape(self.notes[v.note - 1])
            text += f' <a href="#{self.name}-{v.note}" title="{why}">[{v.note}]</a>'
        return f"<td{css}{tint}>{text}</td>"


def _broken(text: str) -> str:
    """Text whose lines may break after an underscore or a slash, but not in tokens/s."""
    return re.sub(r"_|/(?=[^/]{3})", r"\g<0><wbr>", escape(text))


def _plain(v: Value) -> str:
    text = _cell(_SIGNS.get(v.verdict or "", "") + v.text)
    if v.best:
        text = f"**{text}**"
    if v.aside:
        text = f"{_cell(v.aside)} {text}"
    return f"{text} [{v.note}]" if v.note is not None else text


def _cell(text: str) -> str:
    """Text that ends neither a Markdown field nor its row."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


class Notes:
    """Explanations, each once, by number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> int:
        """The number of an explanation."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def listing(name: str, caption: str, columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> Table:
    """A folded table of records. ``columns``: title (``>`` for numbers) by field."""
    made = [[value(row.get(field_name)) for field_name in columns] for row in rows]
    return Table(name, caption, list(columns.values()), made, folded=True, wide=True)
