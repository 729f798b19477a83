"""`lcab study`."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lcab_plugin.cli import output
from lcab_plugin.errors import LcabError, unknown

if TYPE_CHECKING:
    from lcab_plugin.study.run import Runner, Watch
    from lcab_plugin.study.settings import Study
    from lcab_plugin.study.state import Result

_COLUMNS = ("kind", "framework", "kernel", "strategy", "degrees", "layout", "mask", "seqlen", "world")
_STYLES = {"ok": "green", "cannot run": "yellow", "capped": "yellow", "oom": "yellow"}


def study(
    file: Annotated[Path, typer.Argument(help="YAML or JSON, as in examples/studies/.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the records; runs/<name>-study if left out."),
    ] = None,
    launcher: Annotated[
        str | None, typer.Option(help="local, deepspeed, torchrun or slurm, instead of the file's.")
    ] = None,
    hostfile: Annotated[
        str | None, typer.Option(help="Nodes, a line `name slots=8` each, instead of the file's.")
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(help="tiny: sizes for a CPU, 2 ranks on this machine."),
    ] = None,
    world: Annotated[
        list[int] | None, typer.Option(help="Only cells of so many ranks; repeat for more.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print cells and commands only.")] = False,
    as_json: output.AsJson = False,
) -> None:
    """Run all cells of a study: kernels x strategies x degrees x lengths x masks x world sizes x frameworks.

    Cells that cannot run are recorded with the reason before anything is launched; running out of memory and
    errors are results, too, and a cell that failed is run once more. The folder knows what is done: after an
    interrupt or a kill, the same command goes on. At its end the study makes a report of the folder.

    Exit status 0 if every cell has a result or says why it cannot run, 1 if one failed twice, 130 if
    interrupted, 2 for bad input.
    """
    from lcab_plugin.study import slurm
    from lcab_plugin.study.run import Runner

    asked = _asked(file, scale, launcher, hostfile)
    folder = out or Path("runs") / f"{asked.name}{'-tiny' if scale else ''}-study"
    base = Path.cwd() if hostfile else file.parent
    runner = Runner(asked, folder, base, tuple(world or ()))
    if dry_run:
        _show_plan(runner, as_json)
        return
    if asked.launcher.kind == "slurm" and not slurm.inside_job():
        words = ["study", str(file.resolve()), "--out", str(runner.out), "--launcher", "slurm"]
        _submit(runner, words + (["--scale", scale] if scale else []), as_json)
        return
    with _progress(runner) as watch:
        results, stopped = _run(runner, watch)
    page = _report(runner)
    if as_json:
        cells = [result.to_dict() for result in results]
        output.print_json({"out": str(runner.out), "report": page, "cells": cells})
    else:
        _show(results)
        typer.echo(f"\nRecords: {runner.out}/study.jsonl, and of every launch {runner.out}/runs/")
        typer.echo(f"Report: {page}")
    if stopped:
        typer.echo("Interrupted; the same command goes on where this one stopped.", err=True)
    failed = any(result.status in ("error", "timeout") for result in results)
    raise typer.Exit(130 if stopped else int(failed))


def _asked(file: Path, scale: str | None, launcher: str | None, hostfile: str | None) -> Study:
    """The file's study with what the options change."""
    from lcab_plugin.study import scale as scales
    from lcab_plugin.study import settings

    asked = settings.load(file)
    if scale not in (None, "tiny"):
        raise unknown("scale", scale, ["tiny"])
    if launcher is not None and launcher not in settings.LAUNCHERS:
        raise unknown("launcher", launcher, settings.LAUNCHERS)
    if scale:
        asked = scales.tiny(asked)
    changes = {"kind": launcher, "hostfile": hostfile}
    changed = asked.launcher.model_copy(update={name: x for name, x in changes.items() if x is not None})
    return asked.model_copy(update={"launcher": changed})


@contextmanager
def _progress(runner: Runner) -> Iterator[Watch]:
    """A bar of cells with the time left on stderr, or a line for every launch where that is no terminal."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    results = runner.state().results
    cannot, done = sum(bool(r.cell.reason) for r in results), sum(r.settled for r in results)
    open_ = sum(not r.settled and r.cell.world in runner.worlds for r in results)
    console.print(
        f"{len(results)} cells by launcher {runner.study.launcher.kind}: {cannot} cannot run, "
        f"{done - cannot} are done, {open_} to run; records in {runner.out}"
    )
    # What cells have taken so far, start-up and all, estimates the time left; what is done already does not.
    begin = time.monotonic()
    with output.bar(console) as bar:
        task = bar.add_task("", total=open_)
        seen = ""

        def watch(launch: Any, settled: int, records: int) -> None:
            nonlocal seen
            name = f"{launch.name}{', again' if launch.alone else ''}"
            if name != seen and not console.is_terminal:
                left = _left(begin, settled - done, open_)
                console.print(f"{settled + 1}/{len(results)} {name}: {len(launch.cells)} cells{left}")
            seen = name
            bar.update(task, completed=settled - done, description=f"{name}  {records} records")

        yield watch


def _left(begin: float, ended: int, cells: int) -> str:
    """Time since ``begin``, and what the rest of so many cells will take at that pace."""
    from lcab_plugin.training.display import clock

    took = time.monotonic() - begin
    return f", {clock(took)} so far, {clock(took / ended * (cells - ended))} left" if ended else ""


def _run(runner: Runner, watch: Watch) -> tuple[list[Result], bool]:
    """The results, and whether the user, or a job's time limit, stopped it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return runner.run(watch), False
    except KeyboardInterrupt:
        state = runner.state()
        state.save()
        return state.results, True


def _submit(runner: Runner, words: list[str], as_json: bool) -> None:
    """Write the job scripts of what is open and hand them to sbatch."""
    from lcab_plugin.study import slurm

    state = runner.state()
    state.save()
    worlds = {r.cell.world for r in state.results if not r.settled} & set(runner.worlds)
    if not worlds:
        typer.echo(f"every cell of {runner.out} has its result; nothing to submit")
        return
    jobs = slurm.write_jobs(runner.study, runner.cluster, sorted(worlds), runner.out, words)
    jobs = [slurm.submit(job) for job in jobs]
    if as_json:
        output.print_json([{**job.__dict__, "script": str(job.script)} for job in jobs])
        return
    for job in jobs:
        typer.echo(
            f"{job.nodes} nodes, worlds {', '.join(map(str, job.worlds))}: {job.submitted or job.script}"
        )
    if any(job.submitted is None for job in jobs):
        typer.echo("There is no sbatch on this machine: hand these scripts to sbatch on the cluster.")


def _report(runner: Runner) -> str:
    """Make the report of all records; where it is, or why there is none."""
    from lcab_plugin import report

    try:
        sources = report.load(runner.out)
        written = report.write(sources, runner.out / "report", f"Study {runner.study.name}")
    except LcabError as error:
        return f"no report: {error}"
    return str(written.page)


def _show_plan(runner: Runner, as_json: bool) -> None:
    """All cells, and the commands of what would be launched."""
    results, launches = runner.state().results, runner.launches()
    if as_json:
        planned = [
            {"launch": launch.name, "cells": [cell.id for cell in launch.cells], "commands": lines}
            for launch, lines in launches
        ]
        output.print_json(
            {"out": str(runner.out), "cells": [r.to_dict() for r in results], "launches": planned}
        )
        return
    _show(results)
    for launch, commands in launches:
        typer.echo(f"\n# {launch.name}: {len(launch.cells)} cells, at most {launch.seconds:.0f} s")
        for command in commands:
            typer.echo(shlex.join(command))


def _show(results: list[Result]) -> None:
    from lcab_plugin.report.studies import shown

    lines = []
    for result in results:
        status = result.status or "to run"
        cell = shown(result.to_dict())
        cell["degrees"] = " ".join(f"{name} {n}" for name, n in cell["degrees"].items())
        words = [Text(str(cell[name] or "-")) for name in _COLUMNS]
        lines.append(
            [*words, Text(status, style=_STYLES.get(status, "" if not result.status else "bold red"))]
        )
    columns = [*_COLUMNS[:-2], ">tokens", ">ranks", "status"]
    output.show(output.table(None, columns, lines))
    reasons: dict[tuple[str, str], int] = {}
    for result in results:
        if result.status not in (None, "ok"):
            key = str(result.status), str(result.reason)
            reasons[key] = reasons.get(key, 0) + 1
    for (status, reason), count in reasons.items():
        typer.echo(f"{status}, {count} cell{'s' if count > 1 else ''}: {reason}")
