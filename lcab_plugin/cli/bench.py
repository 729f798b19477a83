"""`lcab bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from lcab_plugin.cli import output

app = typer.Typer(help="Measurements on this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("masks")
def bench_masks(
    tokens: Annotated[int, typer.Option(help="Tokens of the sequence.")] = 1 << 20,
    documents: Annotated[int, typer.Option(help="Documents that fill it.")] = 10_000,
    ranks: Annotated[int, typer.Option(help="Context-parallel ranks to localise for.")] = 64,
    block: Annotated[int, typer.Option(help="Block size of the block map.")] = 128,
    repeats: Annotated[int, typer.Option(help="Timings of each row.")] = 5,
    as_json: output.AsJson = False,
) -> None:
    """What mask work costs on the host: build, localise, block-map."""
    from lcab_plugin.bench import masks

    rows = masks.run(tokens=tokens, documents=documents, ranks=ranks, block=block, repeats=repeats)
    if as_json:
        output.print_json(rows)
        return
    numbers = ["median_ms", "min_ms", "max_ms"]
    lines = [
        (f"[bold]{row['name']}", *(f"{row[n]:.1f}" for n in numbers), str(row["detail"])) for row in rows
    ]
    output.show(output.table(None, ["what", ">median ms", ">min ms", ">max ms", "detail"], lines))
