"""The commands, one file each."""

from __future__ import annotations

from typing import Annotated

import typer

import lcab_plugin
from lcab_plugin.cli import bench, doctor, kernels, masks, parity, patch, plan, repeat, report, study, tune

app = typer.Typer(
    help="Attention and context parallelism for long-context training: what runs here, and does it agree.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(kernels.kernels)
app.add_typer(masks.app, name="masks")
app.add_typer(bench.app, name="bench")
app.command()(parity.parity)
app.command()(patch.patch)
app.command()(plan.plan)
app.command()(study.study)
app.command()(tune.tune)
app.command()(report.report)
app.command()(repeat.repeat)
app.command()(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lcab_plugin {lcab_plugin.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
