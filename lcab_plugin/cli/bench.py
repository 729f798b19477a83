"""`lcab bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lcab_plugin.cli import bench_cp, bench_peers, output
from lcab_plugin.cli import bench_options as options
from lcab_plugin.cli.bench_progress import ended, progress
from lcab_plugin.cli.parse import integers, names, numbers, shape
from lcab_plugin.errors import LcabError

if TYPE_CHECKING:
    from lcab_plugin.bench.cells import Record
    from lcab_plugin.bench.settings import Settings

app = typer.Typer(help="Measurements on this machine.", no_args_is_help=True)
app.command("cp")(bench_cp.bench_cp)
app.command("peers")(bench_peers.bench_peers)


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


@app.command("kernels")
def bench_kernels(
    kernels: Annotated[
        str | None,
        typer.Option(
            help="Kernels, torch_sdpa, torch_sdpa_dense_mask, torch_flex, torch_flex_autotuned; all kernels "
            "but naive if left out."
        ),
    ] = None,
    masks: Annotated[str | None, typer.Option(help="Mask families; all if left out.")] = None,
    seqlens: Annotated[
        str | None, typer.Option(help="Lengths; by doubling 1024 to 65536 (4096 on a CPU) if left out.")
    ] = None,
    passes: Annotated[
        str | None, typer.Option(help="Of fwd, bwd, fwd+bwd; the first two if left out.")
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Tokens of block_sparse's blocks, such as 64,128; 128 if left out.")
    ] = None,
    keeps: Annotated[
        str | None, typer.Option(help="Shares of block_sparse's blocks, such as 0.1,0.5; 0.2 if left out.")
    ] = None,
    heads: options.Heads = None,
    head_dim: options.HeadDim = None,
    dtype: options.Dtype = None,
    batch: options.Batch = 1,
    documents: options.Documents = "pile",
    seed: options.Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is a GPU.")] = "auto",
    cell_seconds: options.CellSeconds = None,
    dense_gib: Annotated[
        float | None, typer.Option(help="Largest [q, k] tensors; what memory is free if left out.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Also print times relative to this one.")] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Let causal take its turn with every other mask.")
    ] = False,
    out: options.Out = None,
    resume: options.Resume = False,
    as_json: output.AsJson = False,
) -> None:
    """Time kernels x masks x lengths x passes: ms, TFLOP/s over the exact mask area, memory, error to fp64.

    fwd is attention() under no_grad, bwd the gradients of q, k and v of a saved forward. The cells of one
    mask, length and pass are measured in turn (A B C A B C ...), until the median is known within 2% or its
    time is spent. What cannot run is a row with its reason. Records are appended to --out as they come; the
    CSV beside it holds the latest of every cell.

    Against PyTorch's own causal attention:

    lcab bench kernels --kernels sdpa_flash --masks causal --seqlens 4096 --heads 8:8 --head-dim 64
    --dtype fp32 --passes fwd,bwd,fwd+bwd --baseline torch_sdpa --cell-seconds 30

    A window against PyTorch's with a dense mask:

    lcab bench kernels --kernels sdpa_flash --masks sliding_window_causal --seqlens 16384 --heads 8:8
    --head-dim 64 --dtype fp32 --baseline torch_sdpa_dense_mask --cell-seconds 60

    Every mask's time per visible pair relative to causal's:

    lcab bench kernels --kernels sdpa_flash --seqlens 8192 --heads 8:8 --head-dim 64 --dtype fp32
    --passes fwd+bwd --control --cell-seconds 20

    Block-sparse masks, every block size with every share:

    lcab bench kernels --kernels triton,ffa --masks block_sparse --blocks 64,128 --keeps 0.1,0.5
    --seqlens 16384
    """
    from lcab_plugin.bench import settings as bench

    start = bench.Settings(**bench.defaults(_device(device)))
    changes: dict[str, Any] = {
        "kernels": names("--kernels", kernels),
        "masks": names("--masks", masks),
        "seqlens": integers("--seqlens", seqlens, ","),
        "passes": names("--passes", passes),
        "blocks": integers("--blocks", blocks, ","),
        "keeps": numbers("--keeps", keeps),
        "cell_seconds": cell_seconds,
        "dense_gib": dense_gib,
        "baseline": baseline,
        "control": control,
        "documents": documents,
        "seed": seed,
        "shape": shape(start.shape, heads, head_dim, dtype, batch),
    }
    settings = options.changed(start, changes)
    path = options.records_path(out, "kernels")
    records, stopped = _measure(settings, path, resume)
    if as_json:
        output.print_json(records)
    else:
        _print(records, settings)
        ended(path, stopped)
    raise typer.Exit(130 if stopped else 0)


def _measure(settings: Settings, path: Path, resume: bool) -> tuple[list[Record], bool]:
    """All cells of these settings, and whether the user stopped it; the CSV is written in any case."""
    from lcab_plugin.bench import cells, kernels
    from lcab_plugin.training.records import RunLog

    recorded = cells.read(path) if resume else []
    found = {cells.key(record): record for record in recorded if settings.asks(record)}
    stopped, before = False, sum(map(cells.settled, found.values()))
    try:
        with RunLog(path, append=True) as log, progress(settings, path, before) as (watch, done):
            for record in kernels.run(settings, log, recorded, watch):
                found[cells.key(record)] = record
                done()
    except KeyboardInterrupt:
        stopped = True
    finally:
        if path.is_file():
            cells.write_csv(cells.read(path), path.with_suffix(".csv"))
    return list(found.values()), stopped


def _print(records: list[Record], settings: Settings) -> None:
    """A table for every length and pass, and the reasons of what is missing."""
    from lcab_plugin.bench.settings import Group

    legend = "ms  TFLOP/s"
    if settings.baseline:
        legend += f"  (time / {settings.baseline}'s)"
    if settings.control or (len(settings.masks) > 1 and "causal" in settings.masks):
        legend += "  {time per visible pair / causal's, visible pairs / computed ones}"
    typer.echo(legend + "\n")
    ran = [name for name in settings.contenders if any(_ok(r) and r["kernel"] == name for r in records)]
    for seqlen in sorted({record["seqlen"] for record in records}):
        for step in settings.steps:
            here = {
                (Group.of(r), r["kernel"]): r for r in records if (r["seqlen"], r["pass"]) == (seqlen, step)
            }
            rows = [group for group in settings.groups if any(group == found for found, _ in here)]
            lines = [
                [Text(row.label, style="bold"), *(_cell(here.get((row, kernel))) for kernel in ran)]
                for row in rows
            ]
            if ran and lines:
                title = f"{seqlen} tokens, {step}"
                output.show(output.table(title, ["mask", *(">" + name for name in ran)], lines))
    for line in _missing(records):
        typer.echo(line)


def _cell(record: Record | None) -> Text:
    if record is None:
        return Text("-")
    if not _ok(record):
        return Text(record["status"], style="yellow" if record["status"] != "error" else "bold red")
    shown = f"{record['median_ms']:.4g}"
    if record["tflops"] is not None:
        shown += f"  {record['tflops']:.3g}"
    if record["ratio"] is not None:
        shown += f"  ({record['ratio']:.3f})"
    if record["relative_to_causal"] is not None and record["mask"] != "causal":
        useful = f", {record['area'] / record['computed']:.0%}" if record["computed"] else ""
        shown += f"  {{{record['relative_to_causal']:.2f}{useful}}}"
    return Text(shown)


def _missing(records: list[Record]) -> list[str]:
    """A line for every reason; cells that are too large or too slow, each by other numbers, share one."""
    from lcab_plugin.bench.cells import mask_label

    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if not _ok(record):
            kernel, status, reason = record["kernel"], record["status"], record["reason"]
            found.setdefault((kernel, status, "" if status in ("capped", "oom") else reason), []).append(
                record
            )
    return [
        f"{kernel} {status}, {len(cells)} cell{'s' if len(cells) > 1 else ''} from "
        f"{mask_label(cells[0]['mask'], cells[0]['parameters'])} {cells[0]['seqlen']} {cells[0]['pass']} on: "
        f"{cells[0]['reason']}"
        for (kernel, status, _), cells in found.items()
    ]


def _ok(record: Record) -> bool:
    return bool(record["status"] == "ok")


def _device(name: str) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise LcabError(f"device {name!r} is none of auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise LcabError("device 'cuda' needs a GPU, this machine has none; leave --device out.")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
