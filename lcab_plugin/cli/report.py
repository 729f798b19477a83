"""`lcab report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lcab_plugin.cli import output
from lcab_plugin.errors import LcabError


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of records, searched to its depths, or one file.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; report/ in the records' folder if left out.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page; the folder's name if left out.")] = None,
    as_json: output.AsJson = False,
) -> None:
    """Make one page of all records in a folder: report.html, with report.md and CSV files beside it.

    Reads what lcab bench kernels, cp and peers, lcab parity and the training examples wrote (*.jsonl and
    parity.json). The page needs no network. A file that cannot be read is named in the page and here.
    """
    from lcab_plugin import report as made

    sources = made.load(folder)
    beside = folder.parent if folder.is_file() else folder
    if all(source.problem is not None for source in sources):
        raise LcabError(f"none of {len(sources)} files can be read: {sources[0].problem}")
    where = out or beside / "report"
    try:
        written = made.write(sources, where, title or f"Records of {folder.resolve().name}")
    except OSError as error:
        raise LcabError(f"cannot write {where}: {error.strerror}; give another --out.") from None
    if as_json:
        output.print_json(
            {
                "page": str(written.page),
                "markdown": str(written.markdown),
                "csv": [str(path) for path in written.csv],
                "files": len(sources),
                "unreadable": [{"file": name, "why": why} for name, why in written.unreadable],
            }
        )
        return
    console = Console(stderr=True, soft_wrap=True)
    for name, why in written.unreadable:
        console.print(f"not in the report: {name}: {why}", style="yellow", markup=False, highlight=False)
    count = len(sources) - len(written.unreadable)
    typer.echo(f"{written.page}: {count} of {len(sources)} files; report.md and {len(written.csv)} CSV files")
