"""`lcab repeat`."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lcab_plugin.cli import output
from lcab_plugin.errors import LcabError

if TYPE_CHECKING:
    from lcab_plugin.report.repeat import Repeat


def repeat(
    record: Annotated[Path, typer.Argument(help="A .jsonl file of records, or a parity.json.")],
    run: Annotated[int | None, typer.Option(help="Which of a file's runs, from 1.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the new records go; runs/repeat-<time> if left out.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, and run nothing.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds a training run may take.")] = 86400.0,
    as_json: output.AsJson = False,
) -> None:
    """Run again what a record says, on as many processes of this machine as then.

    The same command line, except that records and checkpoints go elsewhere. What differs from then (commit,
    hardware, versions) is printed first; with --json all of it after the run, whose own output goes to
    stderr. Exit status: that of the repeated command.
    """
    from lcab_plugin.report import repeat as planned

    bench = record.suffix == ".jsonl" and record.name != "metrics.jsonl"
    name = time.strftime("repeat-%Y%m%d-%H%M%S") + (".jsonl" if bench else "")
    plan = planned.plan(record, out or Path("runs") / name, run)
    if not as_json:
        for what, then, now in plan.differs:
            typer.echo(f"differs: {what} was {then}, is {now}")
        typer.echo(shlex.join(plan.words))
    status = None if dry_run else _run(plan, timeout, quiet=as_json)
    if as_json:
        differs = [{"name": what, "then": then, "now": now} for what, then, now in plan.differs]
        found = {"command": plan.words, "out": str(plan.out), "differs": differs, "status": status}
        output.print_json(found)
    raise typer.Exit(status or 0)


def _run(plan: Repeat, timeout: float, quiet: bool) -> int:
    """Exit status. ``quiet``: on stdout."""
    if plan.script is None:
        words, stdout = plan.command, sys.stderr if quiet else None
        return subprocess.run(words, stdout=stdout, check=False).returncode
    from lcab_plugin.bench.launch import launch

    outcome = launch(
        plan.script, plan.arguments, world=plan.ranks, device=plan.device, logs=plan.out, timeout=timeout
    )
    if outcome.status != "done":
        raise LcabError(f"{plan.script.name}: {outcome.status}: {outcome.reason}")
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"records: {plan.out}/metrics.jsonl")
    return 0
