"""How commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_json(value: Any) -> None:
    """One indented JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2))


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[RenderableType]]) -> Table:
    """A table whose columns fold rather than lose text; a column name that starts with ``>`` aligns right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(
            column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        made.add_row(*row)
    return made


def show(what: RenderableType) -> None:
    """Print to stdout, in the terminal's width (200 columns where there is no terminal)."""
    console = Console()
    Console(width=None if console.is_terminal else 200, highlight=False).print(what)


def bar(console: Console, *, ticks: bool = True) -> Progress:
    """What is done of how many, the time so far and the time left; nothing where there is no terminal.

    What a cell takes differs, some end at once: all of them tell the time left, not the latest. ``ticks``:
    a thread draws it, which takes time of what this process measures; without, an update with ``refresh``.
    """
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    return Progress(
        *columns,
        console=console,
        auto_refresh=ticks,
        speed_estimate_period=7 * 86400,
        disable=not console.is_terminal,
    )
