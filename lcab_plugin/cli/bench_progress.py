"""What `lcab bench` shows while it measures, when it is stopped, and at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer
from rich.console import Console

from lcab_plugin.cli import output

if TYPE_CHECKING:
    from lcab_plugin.bench.cells import Record
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
def progress(
    settings: Measured, path: Path, before: int = 0
) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """What comes next, and one cell more: a bar on stderr, or a line for what comes next to no terminal, both
    with the time left. ``before``: cells of an earlier run."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    total = settings.total - before
    console.print(
        f"{total} cells{f' ({before} more are done)' if before else ''}, {settings.device}, "
        f"{settings.shape.dtype}, at most {settings.cell_seconds:g} s each; records in {path}"
    )
    began, count = time.monotonic(), 0
    with output.bar(console, ticks=False) as bar:
        task = bar.add_task("", total=total)

        def watch(text: str) -> None:
            bar.update(task, description=text, refresh=True)
            if not console.is_terminal:
                console.print(text + left(count, total, time.monotonic() - began))

        def done() -> None:
            nonlocal count
            count += 1
            bar.update(task, advance=1, refresh=True)

        yield watch, done


def left(count: int, total: int, seconds: float, what: str = "cells") -> str:
    """How many of how many, and at their pace the time left."""
    from lcab_plugin.training.display import clock

    return f"  ({count} of {total} {what}, {clock(seconds / count * (total - count))} left)" if count else ""


def ended(path: Path, stopped: bool = False) -> None:
    """What stays on the screen below the tables: what these times cannot tell apart, how well they are known,
    and where they are; ``stopped``: by the user."""
    from lcab_plugin.bench.timing import NoiseFloor
    from lcab_plugin.training import records

    names = "noise_empty_ms", "noise_same_relative"
    found = records.read(path)
    runs = [i for i, r in enumerate(found) if r["type"] == "run" and r.keys() >= {*names}]
    typer.echo("")
    if runs:  # unless it was interrupted before that
        run = found[runs[-1]]
        typer.echo(str(NoiseFloor(*(run[name] for name in names))).capitalize())
        asked = run.get("limits", {}).get("relative_ci")
        if asked is not None and (text := loose(found[runs[-1] :], asked)):
            typer.echo(text)
    if stopped:
        cells = sum(r["type"] == "cell" for r in found[runs[-1] if runs else 0 :])
        typer.echo(f"Stopped after {cells} cells, which are kept.")
    typer.echo(f"Records: {path} and {path.with_suffix('.csv')}")


def loose(found: list[Record], asked: float) -> str:
    """Of cells whose time was spent before their medians were known as well as asked for; nothing if all
    were."""
    ok = [r for r in found if r["type"] == "cell" and r["status"] == "ok"]
    known = [r["relative_ci"] for r in ok if r.get("relative_ci") is not None]
    wide = [ci for ci in known if ci > asked]
    once = len(ok) - len(known)
    if not wide and not once:
        return ""
    parts = [f"{len(wide)} to {max(wide):.1%} at worst"] if wide else []
    parts += [f"{once} by a single repeat"] if once else []
    return (
        f"Medians are known to {asked:.0%} (95% confidence) but for {' and '.join(parts)}, of {len(ok)} "
        "cells; --cell-seconds allows more"
    )
