"""`lcab masks`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from lcab_plugin.cli import output

if TYPE_CHECKING:
    from lcab_plugin.masks import AttentionMask

app = typer.Typer(help="The masks: their cells, slices and area.", no_args_is_help=True)

_PICTURE = 32  # rows and columns of the drawing, at most
_SLICES = 12  # slices listed before the rest is counted


@app.command("list")
def list_masks(as_json: output.AsJson = False) -> None:
    """The mask families, their parameters and which key each query sees."""
    from lcab_plugin import masks

    rows: list[dict[str, Any]] = []
    for name in masks.names():
        builder = getattr(masks, name)
        parameters = [p for p in inspect.signature(builder).parameters if p != "n"]
        cells = " ".join((inspect.getdoc(builder) or "").split("\n\n")[0].split())
        rows.append({"name": name, "parameters": parameters, "cells": cells})
    if as_json:
        output.print_json(rows)
        return
    columns = ["mask", "parameters", "query i sees key j where"]
    lines = [(f"[bold]{r['name']}", ", ".join(r["parameters"]) or "-", escape(r["cells"])) for r in rows]
    output.show(output.table(None, columns, lines))


@app.command("show")
def show_mask(
    name: Annotated[str, typer.Argument(help="A mask family of `lcab masks list`.")],
    seqlen: Annotated[int, typer.Option(help="Tokens.")] = 4096,
    lengths: Annotated[str | None, typer.Option(help="Document lengths, comma separated.")] = None,
    documents: Annotated[
        str, typer.Option(help="Corpus to sample document lengths from, without --lengths.")
    ] = "pile",
    seed: Annotated[int, typer.Option(help="Seed of the sampled lengths.")] = 0,
    left: Annotated[int | None, typer.Option(help="Earlier keys in the window.")] = None,
    right: Annotated[int | None, typer.Option(help="Later keys in the window.")] = None,
    window: Annotated[int | None, typer.Option(help="Window to both sides.")] = None,
    prefix: Annotated[int | None, typer.Option(help="Tokens of the prefix.")] = None,
    prefixes: Annotated[str | None, typer.Option(help="Prefix of every document, or one for all.")] = None,
    global_tokens: Annotated[int | None, typer.Option(help="Tokens that see and are seen by all.")] = None,
    block: Annotated[int | None, typer.Option(help="Tokens of a block.")] = None,
    as_json: output.AsJson = False,
) -> None:
    """Slices, area and a small picture of one mask."""
    from lcab_plugin import masks

    params: dict[str, Any] = {
        "left": left,
        "right": right,
        "window": window,
        "prefix": prefix,
        "prefixes": _integers("--prefixes", prefixes),
        "global_tokens": global_tokens,
        "block": block,
        "lengths": _integers("--lengths", lengths),
    }
    params = {key: value for key, value in params.items() if value is not None}
    if "lengths" not in params and masks.needs_lengths(name):
        params["lengths"] = masks.sample_lengths(seqlen, documents, seed)
    mask = masks.from_name(name, seqlen, **params)
    summary = {
        "name": name,
        "seqlen": seqlen,
        "documents": len(params["lengths"]) if "lengths" in params else None,
        "area": mask.area,
        "fraction": mask.area / (mask.q_len * mask.k_len) if mask.area else 0.0,
        "digest": mask.digest,
        "slices": [list(s) for s in mask.slices],
    }
    if as_json:
        output.print_json(summary)
        return
    typer.echo(
        f"{name}, {seqlen} tokens"
        + (f" in {summary['documents']} documents" if summary["documents"] else "")
        + f": {mask.area} visible pairs, {summary['fraction']:.2%} of all, in {len(mask.array)} slices"
    )
    columns = [">q_start", ">q_end", ">k_start", ">k_end", ">lo", ">hi"]
    lines = [["-" if x is None else str(x) for x in s] for s in mask.slices[:_SLICES]]
    output.show(output.table(None, columns, lines))
    if len(mask.array) > _SLICES:
        typer.echo(f"... and {len(mask.array) - _SLICES} more slices (--json prints all)\n")
    typer.echo(picture(mask))


def picture(mask: AttentionMask) -> str:
    """The mask in characters: rows are queries, columns keys; full, partly visible and empty blocks."""
    block = max(1, -(-max(mask.q_len, mask.k_len) // _PICTURE))
    rows = mask.block_map(block, block).to_dense().tolist()
    drawing = "\n".join("".join((" .", "░░", "██")[kind] for kind in row) for row in rows)
    return f"{drawing}\n(queries down, keys across, {block} tokens a block: ██ all visible, ░░ some, . none)"


def _integers(option: str, text: str | None) -> list[int] | int | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} takes integers such as 1000,3096, not {text!r}") from None
    return numbers[0] if option == "--prefixes" and len(numbers) == 1 else numbers
