"""What `lcab bench` shows while it measures, and at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from lcab_plugin.bench.settings import Shape


class Measured(Protocol):
    """The part of a benchmark's settings that is shown."""

    @property
    def total(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def cell_seconds(self) -> float: ...


@contextmanager
def progress(settings: Measured, path: Path) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """What comes next, and one cell more: a bar on stderr, or a line for what comes next to no terminal."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(
        f"{settings.total} cells, {settings.device}, {settings.shape.dtype}, at most "
        f"{settings.cell_seconds:g} s each; records in {path}"
    )
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=settings.total)

        def watch(text: str) -> None:
            bar.update(task, description=text)
            if not console.is_terminal:
                console.print(text)

        yield watch, lambda: bar.advance(task)


def ended(path: Path) -> None:
    """What stays on the screen below the tables: what these times cannot tell apart, and where they are."""
    from lcab_plugin.bench.timing import NoiseFloor
    from lcab_plugin.training import records

    names = "noise_empty_ms", "noise_same_relative"
    runs = [r for r in records.read(path) if r["type"] == "run" and r.keys() >= {*names}]
    typer.echo("")
    if runs:  # unless it was interrupted before that
        typer.echo(str(NoiseFloor(*(runs[-1][name] for name in names))).capitalize())
    typer.echo(f"Records: {path} and {path.with_suffix('.csv')}")
