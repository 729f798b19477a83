"""`lcab parity`."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from lcab_plugin.cli import output
from lcab_plugin.errors import LcabError

if TYPE_CHECKING:
    from lcab_plugin.bench.parity import Cell, Result, Settings

_STYLES = {"pass": "green", "baseline": "cyan", "fp32 baseline": "cyan", "cannot run": "yellow"}


def parity(
    framework: Annotated[
        str,
        typer.Option(help="deepspeed, megatron, or both, comma separated: the first is the others' measure."),
    ] = "deepspeed",
    kernels: Annotated[str, typer.Option(help="Kernels, comma separated.")] = "naive,sdpa_flash",
    strategies: Annotated[str, typer.Option(help="Strategies.")] = "none,ulysses,ring_p2p,ring_all_gather",
    masks: Annotated[str, typer.Option(help="Mask families.")] = "causal_document",
    layouts: Annotated[str, typer.Option(help="Layouts of the context-parallel cells.")] = "zigzag",
    world: Annotated[int, typer.Option(help="Processes on this machine.")] = 2,
    steps: Annotated[int, typer.Option(help="Optimizer steps of every cell.")] = 20,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    preset: Annotated[str, typer.Option(help="Model size, a preset of the script.")] = "tiny",
    seqlen: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    global_batch: Annotated[
        int | None, typer.Option(help="Sequences of a step; one a process if left out.")
    ] = None,
    micro_batch: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 1,
    loss_mask: Annotated[
        str, typer.Option(help="uneven (tokens that count differ by rank), or none.")
    ] = "uneven",
    doc_lengths: Annotated[str, typer.Option(help="Corpus that document lengths are sampled like.")] = "pile",
    zero_stage: Annotated[
        int | None, typer.Option(help="DeepSpeed's ZeRO stage; the config's if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: cuda where every process has a GPU.")
    ] = "auto",
    script: Annotated[
        Path | None, typer.Option(help="Training script of one framework; that of examples/ if left out.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="DeepSpeed config; examples/configs/zero1.json if left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the records; runs/parity-<time> if left out.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a cell is killed.")] = 600.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="A cell that cannot run is a failure, too.")
    ] = False,
    as_json: output.AsJson = False,
    extra: Annotated[list[str] | None, typer.Argument(help="After --: further flags for the script.")] = None,
) -> None:
    """Train the same model on the same data with every kernel, strategy and mask, and compare step by step.

    Baseline of a mask: kernel naive, strategy none (data parallel over the same processes, same global
    batch). In fp32 it is in the first framework and the bounds are fixed. In bf16 every framework has its
    own, since each rounds in its own places, and the bounds are twice what it differs by from the same run in
    fp32, after ten steps four times, in nine of ten steps; the fp32 runs of two frameworks are compared.

    Exit status 0 if every cell that ran passes; a cell that cannot run shows its reason and is no failure,
    unless --strict or none at all was compared. 1 if a cell deviates, crashes or hangs, or a baseline is
    missing. 2 for bad input.
    """
    from lcab_plugin.bench import parity as bench
    from lcab_plugin.bench.launch import example

    frameworks = _names(framework)
    cells = bench.plan(_names(kernels), _names(strategies), _names(masks), _names(layouts), dtype, frameworks)
    if config is None and "deepspeed" in frameworks:
        config = example("configs/zero1.json", "--config")
    settings = bench.Settings(
        scripts=_scripts(frameworks, script),
        config=config,
        out=out or Path("runs") / time.strftime("parity-%Y%m%d-%H%M%S"),
        world=world,
        steps=steps,
        dtype=dtype,
        preset=preset,
        seqlen=seqlen,
        global_batch=global_batch,
        micro_batch=micro_batch,
        loss_mask=loss_mask,
        doc_lengths=doc_lengths,
        zero_stage=zero_stage,
        seed=seed,
        device=_device(device, world),
        timeout=timeout,
        extra=tuple(extra or ()),
    )
    results, stopped = _run(cells, settings)
    passed = not stopped and bench.passed(results, strict)
    if as_json:
        output.print_json(
            {"passed": passed, "out": str(settings.out), "cells": [r.to_dict() for r in results]}
        )
    else:
        _print(
            results,
            settings,
            f"STOPPED, {len(results)} of {len(cells)} runs are kept"
            if stopped
            else "PASS"
            if passed
            else "FAIL",
        )
    raise typer.Exit(130 if stopped else 0 if passed else 1)


def _scripts(frameworks: list[str], script: Path | None) -> dict[str, Path]:
    """The script of each framework."""
    from lcab_plugin.bench.launch import SCRIPTS, example

    if script is not None and len(frameworks) > 1:
        raise LcabError(f"--script {script} is of one framework; give --framework one of them.")
    if script is not None:
        return {frameworks[0]: script}
    for framework in frameworks:
        if importlib.util.find_spec(framework) is None:
            raise LcabError(f"the example trains through {framework}: pip install 'lcab-plugin[{framework}]'")
    return {framework: example(SCRIPTS[framework], "--script") for framework in frameworks}


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise LcabError(f"{text!r} names nothing; give names separated by commas.")
    return list(dict.fromkeys(names))


def _device(device: str, world: int) -> str:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device not in ("auto", "cpu", "cuda"):
        raise LcabError(f"device {device!r} is none of auto, cpu, cuda.")
    if device == "cuda" and gpus < world:
        raise LcabError(
            f"device cuda needs a GPU for each of {world} processes, and this machine has {gpus}."
        )
    return ("cuda" if gpus >= world else "cpu") if device == "auto" else device


def _run(cells: list[Cell], settings: Settings) -> tuple[list[Result], bool]:
    """All cells, with a progress bar on stderr (a line a cell where that is no terminal), and whether the
    user stopped it."""
    from lcab_plugin.bench import parity as bench

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(
        f"{len(cells)} runs of {settings.steps} steps, {settings.world} processes, {settings.device}, "
        f"{settings.dtype}; records in {settings.out}"
    )
    with output.bar(console) as progress:
        task = progress.add_task("", total=len(cells))
        results: list[Result] = []
        running: Cell | None = None

        def watch(cell: Cell, steps: int) -> None:
            nonlocal running
            if cell != running and not console.is_terminal:
                console.print(f"{cells.index(cell) + 1}/{len(cells)} {cell.name}")
            running = cell
            text = f"{cell.name}  step {steps}/{settings.steps}"
            progress.update(task, completed=len(results), description=text)

        try:
            bench.run(cells, settings, watch, results.append)
        except KeyboardInterrupt:
            return results, True
        progress.update(task, completed=len(cells), description="done")
    return results, False


def _print(results: list[Result], settings: Settings, verdict: str) -> None:
    from lcab_plugin.bench import parity as bench

    right = {"step ms", "min to max", "peak GiB", "loss dev", "grad norm dev"}
    lines = []
    for result in results:
        *cells, ending = bench.row(result)
        lines.append([*map(Text, cells), Text(ending, style=_STYLES.get(ending, "bold red"))])
    title = "Largest relative deviations (dev) from the baseline of the mask"
    output.show(output.table(title, [(">" if name in right else "") + name for name in bench.COLUMNS], lines))
    for note in bench.notes(results):
        typer.echo(note)
    typer.echo(f"\nRecords: {settings.out}/parity.md, parity.json, <run>/metrics.jsonl and <run>/rank*.log")
    counts = {
        status: sum(r.status == status for r in results)
        for status in dict.fromkeys(r.status for r in results)
    }
    typer.echo(f"{verdict}: {', '.join(f'{n} {status}' for status, n in counts.items()) or 'none'}")
