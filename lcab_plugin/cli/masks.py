"""`lcab masks`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from lcab_plugin.cli import output
from lcab_plugin.cli.explain import explain
from lcab_plugin.cli.mask_options import Described, takes_mask, takes_masks
from lcab_plugin.errors import LcabError

if TYPE_CHECKING:
    from lcab_plugin.masks import AttentionMask

app = typer.Typer(help="The masks: their cells, slices, area and native calls.", no_args_is_help=True)
app.command("explain")(explain)

_PICTURE = 32  # rows and columns of the drawing, at most
_SLICES = 12  # slices listed before the rest is counted


@app.command("list")
def list_masks(as_json: output.AsJson = False) -> None:
    """The mask families, their parameters and which key each query sees."""
    from lcab_plugin import masks

    rows: list[dict[str, Any]] = []
    for name in masks.names():
        builder = getattr(masks, name)
        cells = " ".join((inspect.getdoc(builder) or "").split("\n\n")[0].split())
        rows.append({"name": name, "parameters": list(masks.parameters(name)), "cells": cells})
    if as_json:
        output.print_json(rows)
        return
    columns = ["mask", "parameters", "query i sees key j where"]
    lines = [(f"[bold]{r['name']}", ", ".join(r["parameters"]) or "-", escape(r["cells"])) for r in rows]
    output.show(output.table(None, columns, lines))


@app.command("show")
@takes_mask(typer.Argument(help="A mask family of `lcab masks list`."))
def show_mask(described: Described, as_json: output.AsJson = False) -> None:
    """Slices, area and a small picture of one mask."""
    mask = described.mask
    if as_json:
        output.print_json(
            {
                "name": described.name,
                "seqlen": described.seqlen,
                "documents": described.documents,
                "area": mask.area,
                "fraction": described.fraction,
                "digest": mask.digest,
                "slices": [list(s) for s in mask.slices],
            }
        )
        return
    typer.echo(f"{described}, in {len(mask.array)} slices")
    columns = [">q_start", ">q_end", ">k_start", ">k_end", ">lo", ">hi"]
    lines = [["-" if x is None else str(x) for x in s] for s in mask.slices[:_SLICES]]
    output.show(output.table(None, columns, lines))
    if len(mask.array) > _SLICES:
        typer.echo(f"... and {len(mask.array) - _SLICES} more slices (--json prints all)\n")
    typer.echo(picture(mask))


@app.command("draw")
@takes_masks(typer.Argument(help="Mask families of `lcab masks list`."))
def draw_masks(
    described: list[Described],
    out: Annotated[
        Path | None,
        typer.Option(help="SVG file, of several masks a folder; <mask>-<tokens>.svg here if left out."),
    ] = None,
    size: Annotated[int, typer.Option(min=16, max=4096, help="Pixels of the longer side.")] = 480,
    as_json: output.AsJson = False,
) -> None:
    """Draw masks as SVG pictures: their slices as polygons, for any length.

    Of several masks every option is for those that take it.
    """
    from lcab_plugin.report import draw

    rows: list[dict[str, Any]] = []
    for one in described:
        own = Path(f"{one.name}-{one.seqlen}.svg")
        path = own if out is None else out / own if len(described) > 1 else out
        try:
            if len(described) > 1:
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(draw.svg(one.mask, size, words=str(one), standalone=True) + "\n")
        except OSError as error:
            raise LcabError(f"cannot write {path}: {error.strerror}; give another --out.") from None
        block = draw.in_blocks(one.mask)
        row = {"name": one.name, "seqlen": one.seqlen, "area": one.mask.area, "fraction": one.fraction}
        rows.append({**row, "digest": one.mask.digest, "picture": str(path), "block": block})
        if not as_json:
            told = f", in blocks of {block} tokens: it has {len(one.mask.array)} slices" if block else ""
            typer.echo(f"{one}\n{path}{told}")
    if as_json:
        output.print_json(rows)


def picture(mask: AttentionMask) -> str:
    """The mask in characters: rows are queries, columns keys; full, partly visible and empty blocks."""
    block = max(1, -(-max(mask.q_len, mask.k_len) // _PICTURE))
    rows = mask.block_map(block, block).to_dense().tolist()
    drawing = "\n".join("".join((" .", "░░", "██")[kind] for kind in row) for row in rows)
    return f"{drawing}\n(queries down, keys across, {block} tokens a block: ██ all visible, ░░ some, . none)"
