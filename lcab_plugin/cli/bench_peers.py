"""`lcab bench peers`."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lcab_plugin.cli import bench_options as options
from lcab_plugin.cli import output
from lcab_plugin.cli.bench_cp import measured
from lcab_plugin.cli.bench_progress import ended
from lcab_plugin.cli.parse import integers, names, shape

if TYPE_CHECKING:
    from lcab_plugin.bench.cells import Record
    from lcab_plugin.bench.peers import Settings

_COLUMNS = [
    "who",
    "layout",
    ">ms",
    ">p10-p90",
    ">CPU ms",
    ">repeats",
    ">ms / ideal",
    ">CPU / ideal",
    ">p10-p90",
    ">least",
    ">fastest peer / this",
    "goal",
    ">error",
    ">peak GiB",
]


def bench_peers(
    peers: Annotated[str | None, typer.Option(help="Their names; all if left out. See --list.")] = None,
    strategies: options.Strategies = None,
    layouts: options.Layouts = None,
    masks: Annotated[
        str | None,
        typer.Option(help="causal if left out (on GPUs causal_document and sliding_window_causal too)."),
    ] = None,
    seqlens: Annotated[
        str | None, typer.Option(help="Global lengths; 8192 a GPU (4096,8192 on a CPU) if left out.")
    ] = None,
    passes: Annotated[str | None, typer.Option(help="Of fwd, bwd, fwd+bwd; the last if left out.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Earlier keys that sliding_window_causal sees; 512 if left out.")
    ] = None,
    world: options.World = None,
    ulysses: options.Ulysses = None,
    inner_ring: options.InnerRing = None,
    placement: options.Placement = None,
    kernel: options.RankKernel = None,
    heads: Annotated[
        str | None, typer.Option(help="Query and key/value heads; 64:8 (8:8 on a CPU) if left out.")
    ] = None,
    head_dim: options.HeadDim = None,
    dtype: options.Dtype = None,
    batch: options.Batch = 1,
    documents: options.Documents = "pile",
    seed: options.Seed = 0,
    device: options.RankDevice = "auto",
    cell_seconds: Annotated[
        float | None, typer.Option(help="Running time of one cell at most; 5 (60 on a CPU) if left out.")
    ] = None,
    timeout: options.Timeout = 600.0,
    out: options.Out = None,
    resume: options.Resume = False,
    as_json: output.AsJson = False,
    list_peers: Annotated[bool, typer.Option("--list", help="Only print the peers and versions.")] = False,
) -> None:
    """Time our context parallelism and other packages' in turn, on the same ranks and tensors.

    The ideal is PyTorch's own attention of the whole sequence on one process (our kernel's, where PyTorch has
    no kernel for the mask), measured in the same turns, over the ranks. Ratios are of the slowest rank's time
    and processor time. Everything is compared with float64 first; what is wrong, not installed or not able is
    a row that says so. Least is the ratio of the least processor times, which a busy machine disturbs less.

    Packages: pip install -c scripts/requirements-ci.txt -r scripts/requirements-peers.txt

    What is demanded of causal attention (all goals are of fwd+bwd):

    OMP_NUM_THREADS=1 lcab bench peers --device cpu --out peers.jsonl

    Windows and documents:

    OMP_NUM_THREADS=1 lcab bench peers --device cpu --masks sliding_window_causal,causal_document
    --seqlens 16384 --cell-seconds 120 --out peers.jsonl --resume

    USP and LoongTrain:

    OMP_NUM_THREADS=1 lcab bench peers --device cpu --world 4 --out peers.jsonl --resume
    """
    from lcab_plugin.bench import cells, cp_launch
    from lcab_plugin.bench import peers as bench

    if list_peers:
        _list(as_json)
        return
    chosen_device, ranks = cp_launch.device_and_world(device, world)
    start = bench.Settings(**bench.defaults(chosen_device, ranks))
    path = options.records_path(out, "peers")
    recorded = cells.read(path, bench.IDENTITY) if resume else []
    changes: dict[str, Any] = {
        "peers": names("--peers", peers),
        "strategies": names("--strategies", strategies),
        "layouts": names("--layouts", layouts),
        "masks": names("--masks", masks),
        "seqlens": integers("--seqlens", seqlens, ","),
        "passes": names("--passes", passes),
        "window": window,
        "ulysses": ulysses,
        "inner_ring": inner_ring,
        "placement": placement,
        "kernel": kernel,
        "cell_seconds": cell_seconds,
        "documents": documents,
        "seed": seed,
        "timeout": timeout,
        "shape": shape(start.shape, heads, head_dim, dtype, batch),
        "done": tuple(cells.key(r, bench.IDENTITY) for r in recorded if r["status"] == "ok"),
    }
    settings = options.changed(start, changes)
    before = sum(r["status"] == "ok" and settings.asks(r) for r in recorded)
    new, stopped = measured(settings, path, before)
    if new is None:
        return
    latest = {cells.key(r, bench.IDENTITY): r for r in [*recorded, *new]}
    records = [r for r in latest.values() if settings.asks(r)]
    if as_json:
        output.print_json(records)
    else:
        if records:
            _print(records, settings)
        ended(path, stopped)
    raise typer.Exit(130 if stopped else 0)


def _list(as_json: bool) -> None:
    from lcab_plugin.bench.peers_table import PEERS

    found = [(peer.name, peer.layout, peer.version()) for peer in PEERS.values()]
    if as_json:
        names = "name", "layout", "installed"
        output.print_json([dict(zip(names, row, strict=True)) for row in found])
        return
    lines = [(name, layout, version or "not installed") for name, layout, version in found]
    output.show(output.table(None, ["peer", "layout", "package"], lines))


def _print(records: list[Record], settings: Settings) -> None:
    """A table for every mask, length and pass, the packages, and the reasons of what is missing."""
    from lcab_plugin.bench import peers as bench

    first = records[0]
    typer.echo(
        f"{settings.world} ranks, {first['backend']}, threads of each: {first['threads']}, kernel "
        f"{settings.kernel}, {settings.shape.heads}:{settings.shape.kv_heads} heads, head_dim "
        f"{settings.shape.head_dim}, {settings.shape.dtype}; goals are of "
        f"{'ms' if first['backend'] == 'nccl' else 'CPU'} / ideal\n"
    )
    for mask, seqlen in settings.groups:
        for step in dict.fromkeys(settings.passes):
            here = [r for r in records if (r["mask"], r["seqlen"], r["pass"]) == (mask, seqlen, step)]
            if not here:  # stopped before it
                continue
            order = {row: i for i, row in enumerate(settings.rows(mask))}
            here.sort(key=lambda r: order[r["strategy"], r["layout"]])
            fastest = bench.fastest_peer(here)
            title = f"{mask}, {seqlen} tokens, {step}"
            ran = [_row(r, fastest) for r in here if r["status"] == "ok"]
            output.show(output.table(title, _COLUMNS, ran))
            reasons = {(r["strategy"], r["status"], r["reason"]): None for r in here if r["status"] != "ok"}
            for strategy, status, reason in reasons:
                typer.echo(f"  {strategy} {status}: {shorten(reason, 250, placeholder=' ...')}")
    packages = sorted({r["package"] for r in records if r["package"]})
    typer.echo(f"\nPackages: {', '.join(packages)}")


def _row(record: Record, fastest: Record | None) -> list[Text]:
    from lcab_plugin.bench import peers as bench
    from lcab_plugin.bench.cp import STRATEGIES

    errors = [record[f"error_{name}"] for name in ("out", "dq", "dk", "dv")]
    worst = max((e for e in errors if e is not None), default=None)
    by = bench.metric(record)
    gain = None
    if fastest is not None and record["strategy"] in STRATEGIES and record[by]:
        gain = fastest[by] / record[by]
    found = bench.verdict(record, fastest)
    goal = Text("-")
    if found is not None:
        text, met = found
        goal = Text(f"{text}: {'met' if met else 'missed'}", style="green" if met else "bold red")
    return [
        Text(record["strategy"], style="bold"),
        Text(record["layout"] or "-"),
        _number(record["median_ms"], ".4g"),
        _spread(record["p10_ms"], record["p90_ms"], ".4g"),
        _number(record["cpu_ms"], ".4g"),
        _number(record["repeats"], "d"),
        _number(record["over_ideal"], ".3f"),
        _number(record["cpu_over_ideal"], ".3f"),
        _spread(record["cpu_over_ideal_p10"], record["cpu_over_ideal_p90"], ".3f"),
        _number(record["least_cpu_over_ideal"], ".3f"),
        _number(gain, ".2f"),
        goal,
        _number(worst, ".1e"),
        _number(record["peak_memory_gib"], ".3g"),
    ]


def _number(value: float | None, how: str) -> Text:
    return Text("-" if value is None else format(value, how))


def _spread(low: float | None, high: float | None, how: str) -> Text:
    return Text("-" if low is None or high is None else f"{low:{how}}-{high:{how}}")
