"""The part that shows the masks of the records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from html import escape
from typing import Any

from lcab_plugin import masks
from lcab_plugin.bench.cells import mask_label
from lcab_plugin.bench.settings import default_parameters
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask
from lcab_plugin.report import draw, grids
from lcab_plugin.report.section import Section, Text
from lcab_plugin.report.svg import tokens
from lcab_plugin.report.tables import Table, Value, value
from lcab_plugin.training.schema import Record

_SIZE = 200  # pixels
# of more, a picture shows no detail: sparse blocks are an even grey, and take 10 s at 768K tokens
_TOKENS, _SLICES = 1 << 16, 1000
_SAMPLED = ("documents", "seed", "count", "prefixes")  # in a record, instead of the lengths themselves
_KEPT = 8  # masks; those of 1M tokens in sparse blocks are of 50 MB each


def rebuild(record: Record) -> AttentionMask | None:
    """The mask of a cell, by its family and parameters; None where that is not the one of its digest."""
    given = json.dumps(record.get("parameters") or {}, sort_keys=True)
    return _rebuilt(record["mask"], record["seqlen"], given, record["digest"])


@lru_cache(_KEPT)  # the cells of a mask follow one another
def _rebuilt(name: str, n: int, parameters_json: str, digest: str) -> AttentionMask | None:
    given: dict[str, Any] = json.loads(parameters_json)
    try:
        parameters = default_parameters(name, n, given.get("documents", "pile"), given.get("seed", 0))
        parameters |= {key: v for key, v in given.items() if key not in _SAMPLED}
        mask = masks.from_name(name, n, **parameters)
    except (LcabError, TypeError, ValueError):
        return None
    return mask if mask.digest == digest else None


def section(cells: Iterable[Record]) -> Section:
    """One picture of every mask, at the longest length it was measured at whose detail it shows."""
    labels: dict[str, dict[int, Record]] = {}
    distinct: set[str] = set()
    for cell in cells:
        distinct.add(cell["digest"])
        label = mask_label(cell["mask"], cell.get("parameters") or {})
        labels.setdefault(label, {})[cell["seqlen"]] = cell
    families = {label.partition(" ")[0] for label in labels}
    made = Section("masks", "Masks")
    made.blocks.append(
        Text(
            f"{len(distinct)} masks of {len(families)} families were measured; each at the longest "
            "length whose detail a picture shows. "
            "Queries downwards, keys to the right; what is visible is filled in. A mask is made again from "
            "the record's parameters and drawn if it has the record's digest."
        )
    )
    figures, rows = [], []
    for name, by_length in sorted(labels.items(), key=lambda item: grids.place(item[0])):
        cell, mask = _plainest(by_length)
        share = None if mask is None else mask.area / (mask.q_len * mask.k_len)
        if mask is not None:
            words = f"{name}, {tokens(cell['seqlen'])} tokens, {share:.1%} visible"
            block = draw.in_blocks(mask)
            told = f"; in blocks of {block} tokens, lighter where some of it is visible" if block else ""
            picture = draw.svg(mask, _SIZE, words=words)
            figures.append(f"<figure>{picture}<figcaption>{escape(words + told)}</figcaption></figure>")
        rows.append(
            [
                value(name),
                value(cell["seqlen"]),
                value(None if mask is None else len(mask.array)),
                value(cell.get("area")),
                Value(share, "-" if share is None else f"{share:.2%}"),
                Value(mask is not None, "drawn" if mask is not None else "parameters give another mask"),
            ]
        )
    made.figure(f'<div class="panels">{"".join(figures)}</div>' if figures else "")
    columns = ["mask", ">tokens", ">slices", ">visible pairs", ">visible", "picture"]
    made.blocks.append(Table("masks-drawn", "The masks drawn", columns, rows, folded=True))
    return made


def _plainest(cells: dict[int, Record]) -> tuple[Record, AttentionMask | None]:
    """Of a mask's lengths the longest whose detail a picture shows, or the shortest."""
    for n in sorted((n for n in cells if n <= _TOKENS), reverse=True):
        mask = rebuild(cells[n])
        if mask is not None and len(mask.array) <= _SLICES:
            return cells[n], mask
    shortest = cells[min(cells)]
    return shortest, rebuild(shortest)
