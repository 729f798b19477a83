"""`lcab plan`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lcab_plugin.cli import output
from lcab_plugin.cli.mask_options import Described, takes_mask
from lcab_plugin.cli.parse import integers, names
from lcab_plugin.errors import LcabError

if TYPE_CHECKING:
    from lcab_plugin.planner import Hardware, Model, Prediction, Setting
    from lcab_plugin.planner.calibrate import Calibration

_NAMES = ["kernel", "strategy", "layout", ">cp x dp"]
_TERMS = ["attention", "imbalance", "exposed", "linear", "parameters", "optimizer"]
_MEMORY = ["states", "activations", "attention", "communication", "logits"]
_LONG = 10.0  # seconds of a step, from where on its terms are shown in seconds


@takes_mask(typer.Option("--mask", help="A mask family of `lcab masks list`."))
def plan(
    described: Described,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    gpus: Annotated[int, typer.Option(help="Devices of a node.")] = 8,
    batch: Annotated[int, typer.Option(help="Sequences a step, over all devices.")] = 1,
    hardware: Annotated[str, typer.Option(help="A100, H100, H200, B200 or cpu: peaks and links.")] = "H100",
    inside: Annotated[float | None, typer.Option(help="GB/s a device and direction in a node.")] = None,
    between: Annotated[float | None, typer.Option(help="GB/s a device and direction between nodes.")] = None,
    model: Annotated[
        str, typer.Option(help="llama3-8b, llama3-70b, llama3-405b, or attention: one call a step.")
    ] = "llama3-8b",
    layers: Annotated[int | None, typer.Option(help="Instead of the model's.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Instead of the model's.")] = None,
    ffn: Annotated[int | None, typer.Option(help="Instead of the model's.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Instead of the model's.")] = None,
    heads: Annotated[str | None, typer.Option(help="Query and key/value heads, as in 32:8.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Instead of the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    zero: Annotated[int, typer.Option(help="Stage of ZeRO over all devices, 0 to 3.")] = 3,
    checkpointing: Annotated[
        str, typer.Option(help="Activations: none, block, or keep_attention (blocks, attention kept).")
    ] = "keep_attention",
    kernels: Annotated[
        str | None, typer.Option(help="Of `lcab kernels`; the measured ones if left out.")
    ] = None,
    strategies: Annotated[str | None, typer.Option(help="All if left out.")] = None,
    layouts: Annotated[str | None, typer.Option(help="All if left out.")] = None,
    cp: Annotated[
        str | None, typer.Option(help="Context-parallel sizes; all that share --batch evenly if left out.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Records of `lcab bench`, a file or a folder, that the speeds are fitted to."),
    ] = None,
    top: Annotated[int, typer.Option(help="Lines of the table.")] = 15,
    everything: Annotated[bool, typer.Option("--all", help="Also what cannot run or fit, and why.")] = False,
    as_json: output.AsJson = False,
) -> None:
    """Rank kernels x strategies x degrees x placements x layouts by predicted step time, and what fits.

    Those within 1% of the fastest come in the order of what attention takes of them.
    Areas, bytes and memory follow from the mask and the shapes; speeds are those measured on an H200 or an
    H100 (scaled to other GPUs), data sheets' for links, or fitted by --calibrate, which prints the error of
    its predictions on records held back. docs/planner.md has the formulas and where each number is from.

    lcab plan --mask causal_document --seqlen 1048576 --nodes 12 --model llama3-8b
    """
    from lcab_plugin import planner

    if top < 1:
        raise LcabError(f"--top {top} shows nothing; give 1 or more.")
    numbers = {"layers": layers, "hidden": hidden, "ffn": ffn, "vocab": vocab, "head_dim": head_dim}
    shape = _model(model, numbers, heads, dtype)
    cluster = planner.Cluster(nodes, gpus, batch, zero, checkpointing)
    machine = planner.find(hardware).with_links(inside, between)
    given = {name for name, value in (("inside", inside), ("between", between)) if value is not None}
    choice = planner.Choice(
        names("--kernels", kernels) or (),
        names("--strategies", strategies) or (),
        names("--layouts", layouts) or (),
        integers("--cp", cp, ",") or (),
    )
    fitted = _calibrated(calibrate, machine, dtype)
    machine = fitted.applied(machine, given) if fitted else machine
    setting = planner.setting(described.mask, shape, cluster, machine)
    begin = time.perf_counter()
    ranked = planner.rank(setting, choice, fitted.speeds if fitted else None)
    seconds = time.perf_counter() - begin
    host = planner.host_bound(ranked[0], setting)
    if as_json:
        document = _document(described, setting, ranked, fitted, everything, seconds)
        output.print_json({**document, "host": host})
        return
    _print(described, setting, ranked, top, everything)
    typer.echo(_sources(setting, ranked, seconds))
    if host:
        typer.echo(host)
    if fitted:
        _print_errors(fitted)
        for sentence in fitted.told(machine, given):
            typer.echo(sentence)


def _model(name: str, numbers: dict[str, int | None], heads: str | None, dtype: str) -> Model:
    """The named model with what was given instead."""
    from lcab_plugin import planner

    given: dict[str, Any] = {key: value for key, value in numbers.items() if value is not None}
    if heads is not None:
        dealt = integers("--heads", heads, ":") or ()
        if len(dealt) > 2:
            raise LcabError(f"--heads takes query and key/value heads such as 32:8, not {heads!r}.")
        given |= {"heads": dealt[0], "kv_heads": dealt[-1]}
    return replace(planner.model(name), dtype=dtype, **given)


def _measured(path: Path) -> list[dict[str, Any]]:
    """What was measured in a file, or in all below a folder, of which those that cannot be read are named."""
    from lcab_plugin.planner import calibrate
    from lcab_plugin.report import sources

    found = [sources.valid(path)] if path.is_file() else sources.load(path)
    for source in found:
        if source.problem is not None:
            typer.echo(f"not calibrated to: {source.name}: {source.problem}", err=True)
    cells = [record for source in found for record in calibrate.measured(source.records)]
    if not cells:
        raise LcabError(f"{path} holds no measured cell; run `lcab bench kernels --out FILE.jsonl` first.")
    return cells


def _calibrated(path: Path | None, machine: Hardware, dtype: str) -> Calibration | None:
    """What the records say."""
    from lcab_plugin.planner import calibrate

    if path is None:
        return None
    fitted = calibrate.fit(_measured(path), machine, dtype)
    if not fitted.errors:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in fitted.left_out.most_common(3))
        raise LcabError(f"no record of {path} can be fitted for {machine.name} in {dtype}: {reasons}.")
    return fitted


def _document(
    described: Described,
    setting: Setting,
    ranked: list[Prediction],
    fitted: Calibration | None,
    everything: bool,
    seconds: float,
) -> dict[str, Any]:
    """The answer for programs."""
    calibration = fitted and {
        "errors": [vars(error) for error in fitted.errors],
        "left_out": dict(fitted.left_out),
        "links": {name: {**vars(f), "link": f.link and vars(f.link)} for name, f in fitted.links.items()},
        "linear_share": fitted.linear_share,
    }
    machine = setting.hardware
    return {
        "mask": described.name,
        "seqlen": described.seqlen,
        "area": described.mask.area,
        "digest": described.mask.digest,
        "model": vars(setting.model),
        "cluster": vars(setting.cluster),
        "hardware": {**vars(machine), "inside": vars(machine.inside), "between": vars(machine.between)},
        "calibration": calibration,
        "planned_s": seconds,
        "candidates": len(ranked),
        "runnable": sum(p.reason is None for p in ranked),
        "plans": [p.to_dict() for p in ranked if everything or p.reason is None],
    }


def _print(
    described: Described, setting: Setting, ranked: list[Prediction], top: int, everything: bool
) -> None:
    """The fastest, and why the others cannot."""
    cluster, shape = setting.cluster, setting.model
    typer.echo(described)
    typer.echo(
        f"{cluster.nodes} x {cluster.gpus} {setting.hardware.name}, {cluster.batch} sequences a step, "
        f"{shape.parameters / 1e9:.2f} B parameters in {shape.dtype}, ZeRO {cluster.zero}, checkpointing "
        f"{cluster.checkpointing}\n"
    )
    runs = [p for p in ranked if p.reason is None]
    if runs:
        unit, scale = ("s", 1.0) if runs[0].seconds >= _LONG else ("ms", 1e3)
        times = [[p.seconds * scale, *(p.terms[name] * scale for name in _TERMS)] for p in runs[:top]]
        held = [[p.bytes / 2**30, *(p.memory[name] / 2**30 for name in _MEMORY)] for p in runs[:top]]
        _show(f"Fastest by prediction, {unit} of a step", runs, ["step", *_TERMS], times)
        _show("Memory of a rank, GiB", runs, ["all", *_MEMORY], held)
    typer.echo(f"{len(runs)} of {len(ranked)} candidates can run.")
    refused = [p for p in ranked if p.reason is not None]
    if refused and not runs and not everything:
        typer.echo(f"None fits; the first says: {refused[0].reason} (--all prints every reason)")
    if everything and refused:
        lines = [[*_names(p), Text(p.reason or "")] for p in refused]
        output.show(output.table("Cannot run", [*_NAMES, "reason"], lines))


def _names(p: Prediction) -> list[Text]:
    c, strategy = p.candidate, p.candidate.strategy
    if len(c.degrees) > 1:
        strategy += f" {'x'.join(str(n) for _, n in c.degrees)} {c.placement}"
    return [Text(word) for word in (c.kernel, strategy, c.layout, f"{c.cp} x {c.dp}")]


def _show(title: str, runs: list[Prediction], columns: list[str], numbers: list[list[float]]) -> None:
    """One line a plan, of its names and ``numbers``."""
    rows = [[*_names(p), *(Text(f"{x:.4g}") for x in row)] for p, row in zip(runs, numbers, strict=False)]
    output.show(output.table(title, [*_NAMES, *(f">{name}" for name in columns)], rows))


def _sources(setting: Setting, ranked: list[Prediction], seconds: float) -> str:
    """Where the numbers are from."""
    speeds: dict[str, list[str]] = {}
    for p in ranked:
        if p.speed and p.candidate.kernel not in speeds.setdefault(p.speed, []):
            speeds[p.speed].append(p.candidate.kernel)
    known = "; ".join(f"{', '.join(found)}: {origin}" for origin, found in speeds.items())
    return (
        f"Kernels {known or 'none'}. Machine: {setting.hardware.source}. "
        f"{len(ranked)} candidates in {seconds:.1f} s."
    )


def _print_errors(fitted: Calibration) -> None:
    """How far predictions were off on records that they were not fitted to."""
    columns = ["held out", ">fitted to", ">predicted", ">median error", ">p90", ">largest", "where"]
    lines = []
    for e in fitted.errors:
        shown = (f"{x:.1%}" if e.held else "-" for x in (e.median, e.p90, e.largest))
        lines.append([e.what, str(e.fitted), str(e.held), *shown, e.where])
    output.show(output.table("Calibration: error on a quarter of the records, held back", columns, lines))
    for reason, count in fitted.left_out.most_common():
        typer.echo(f"{count} records left aside: {reason}")
