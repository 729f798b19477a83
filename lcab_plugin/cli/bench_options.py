"""Options that several `lcab bench` commands have, spelt once."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from lcab_plugin.errors import LcabError

Asked = TypeVar("Asked")

Strategies = Annotated[
    str | None, typer.Option(help="Strategies, or Megatron's words for them; all if left out.")
]
Layouts = Annotated[
    str | None, typer.Option(help="Of the strategies; what suits each and the mask if left out.")
]
Heads = Annotated[
    str | None, typer.Option(help="Query and key/value heads; 64:8 (8:2 on a CPU) if left out.")
]
HeadDim = Annotated[int | None, typer.Option(help="128 (64 on a CPU) if left out.")]
Dtype = Annotated[
    str | None, typer.Option(help="bf16, fp16, fp32 or fp64; bf16 (fp32 on a CPU) if left out.")
]
Batch = Annotated[int, typer.Option(help="Sequences, all under one mask.")]
Documents = Annotated[str, typer.Option(help="Corpus that document lengths are sampled like.")]
Seed = Annotated[int, typer.Option(help="Of the documents, the sparse blocks and the tensors.")]
World = Annotated[int | None, typer.Option(help="Processes on this machine; its GPUs, or 2, if left out.")]
Ulysses = Annotated[
    int | None, typer.Option(help="Its degree in usp and loongtrain; an even split if left out.")
]
InnerRing = Annotated[int | None, typer.Option(help="Its degree in loongtrain; an even split if left out.")]
Placement = Annotated[
    str | None, typer.Option(help="In usp and loongtrain: head_first if left out, or context_first.")
]
RankKernel = Annotated[str | None, typer.Option(help="Kernel of every rank; sdpa_flash if left out.")]
RankDevice = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where every process has a GPU.")]
Timeout = Annotated[float, typer.Option(help="Seconds a collective may take.")]
Resume = Annotated[bool, typer.Option("--resume", help="Skip what --out holds already.")]
CellSeconds = Annotated[
    float | None,
    typer.Option(help="Running time of one cell at most; 5 (0.5 on a CPU) if left out."),
]
Out = Annotated[
    Path | None, typer.Option(help="Records, JSON lines; runs/<command>-<time>.jsonl if left out.")
]


def changed(start: Asked, changes: dict[str, Any]) -> Asked:
    """The settings of a run that names nothing, with what was named (not None)."""
    named = {name: value for name, value in changes.items() if value is not None}
    return replace(start, **named)  # type: ignore[type-var]


def records_path(out: Path | None, command: str) -> Path:
    """Where the records go.

    Raises:
        LcabError: it would be overwritten by the CSV, whose place is beside it.
    """
    path = out or Path("runs") / time.strftime(f"{command}-%Y%m%d-%H%M%S.jsonl")
    if path.suffix == ".csv":
        raise LcabError(
            f"--out {path} is for JSON lines, give a name ending in .jsonl; the CSV goes beside it."
        )
    return path
