"""The parts of `lcab bench cp` and `lcab bench peers`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from lcab_plugin.bench import peers
from lcab_plugin.bench.cells import PASSES
from lcab_plugin.bench.cp import SINGLE
from lcab_plugin.report import grids
from lcab_plugin.report.grids import Quantity
from lcab_plugin.report.kernels import ERROR, PASS_WORDS, shape_words, worst
from lcab_plugin.report.section import Heading, Section, Text
from lcab_plugin.report.sources import latest
from lcab_plugin.report.svg import tokens
from lcab_plugin.report.tables import Notes, Table, Value, listing, value
from lcab_plugin.training.schema import Record

IDENTITY = (*peers.IDENTITY, "degrees", "placement", "nodes")
MIB = 2**20
COLUMNS = {
    "strategy": "strategy",
    "layout": "layout",
    "degrees": "degrees",
    "mask": "mask",
    "seqlen": ">tokens",
    "world": ">ranks",
    "pass": "pass",
    "kernel": "kernel",
    "status": "status",
    "reason": "reason",
    "median_ms": ">median ms",
    "p10_ms": ">p10 ms",
    "p90_ms": ">p90 ms",
    "repeats": ">repeats",
    "tflops_per_rank": ">TFLOP/s/rank",
    "efficiency": ">efficiency",
    "kernels_ms": ">kernels ms",
    "exposed_ms": ">exposed ms",
    "sent_bytes": ">sent bytes",
    "closed_form_bytes": ">by formula",
    "imbalance": ">imbalance",
    "peak_memory_gib": ">peak GiB",
    "error_out": ">error out",
    "error_dq": ">error dq",
    "error_dk": ">error dk",
    "error_dv": ">error dv",
    "backend": "backend",
    "hardware": "hardware",
    "git": "commit",
}
PEER_COLUMNS = {
    "strategy": "name",
    "package": "package",
    **{name: COLUMNS[name] for name in ("layout", "mask", "seqlen", "world", "pass", "status", "reason")},
    "median_ms": ">median ms",
    "cpu_ms": ">processor ms",
    "over_ideal": ">over ideal",
    "cpu_over_ideal": ">processor time over ideal",
    "peak_memory_gib": ">peak GiB",
    "error_out": ">error out",
    "repeats": ">repeats",
    "backend": "backend",
    "hardware": "hardware",
}


def _mib(name: str, record: Record) -> float | None:
    return None if record.get(name) is None else record[name] / MIB


SPEED = Quantity(
    "TFLOP/s per rank",
    lambda r: r.get("tflops_per_rank"),
    band=grids.per_time(lambda r: r.get("tflops_per_rank")),
)
EFFICIENCY = Quantity(
    "efficiency",
    lambda r: r.get("efficiency"),
    form=lambda v: f"{v:.1%}",
    band=grids.per_time(lambda r: r.get("efficiency")),
)
SENT = Quantity(
    "MiB sent by a rank",
    lambda r: _mib("sent_bytes", r),
    better=-1,
    tick=lambda r: _mib("closed_form_bytes", r),
)
MEMORY = Quantity("peak GiB of the fullest rank", lambda r: r.get("peak_memory_gib"), better=-1)
_MATRICES = (
    ("speed", SPEED, "TFLOP/s per rank over the exact area of the mask"),
    ("efficiency", EFFICIENCY, "Scaling efficiency: time of one process over ranks times theirs"),
    ("sent", SENT, "MiB that the rank sends that sends most, counted"),
)
_CHARTS = (
    (SPEED, "throughput"),
    (EFFICIENCY, "scaling efficiency"),
    (SENT, "communication volume"),
    (MEMORY, "memory"),
)


def label(record: Record) -> str:
    """A strategy as composed: ``usp 2x4 zigzag``."""
    degrees = record.get("degrees") or {}
    split = "x".join(str(n) for n in degrees.values()) if len(degrees) > 1 else ""
    return " ".join(part for part in (record["strategy"], split, record.get("layout")) if part)


def _where(record: Record) -> str:
    return f"{shape_words(record)}, {record['backend']}, kernel {record['kernel']}"


def _order(record: Record) -> tuple[str, int, int, int]:
    step = list(PASSES).index(record["pass"]) if record["pass"] in PASSES else len(PASSES)
    return _where(record), step, record["world"], record["seqlen"]


def section(found: Iterable[Record]) -> Section:
    """Context parallelism."""
    cells = sorted(latest(found, IDENTITY), key=_order)
    made = Section("cp", "Context parallelism")
    made.blocks.append(
        Text(
            "A call takes what its slowest rank takes. Efficiency is the time of plain attention on one "
            "process over ranks times theirs, measured in turn; bytes are counted on the way and, apart from "
            "that, computed from the mask (the line across a bar)."
        )
    )
    style = grids.styles(sorted({label(c) for c in cells}))
    for i, (words, group) in enumerate(groupby(cells, _where), start=1):
        made.blocks.append(Heading(words))
        _add(made, f"cp-{i}", list(group), style)
    made.blocks.append(_volume("cp-volume", cells))
    made.blocks.append(listing("cp-cells", f"All {len(cells)} cells", COLUMNS, cells))
    return made


def _add(made: Section, name: str, cells: list[Record], style: dict[str, int]) -> None:
    """What was measured on one machine, with one kernel and shape."""
    groups = {key: list(g) for key, g in groupby(cells, lambda r: (r["pass"], r["world"], r["seqlen"]))}
    last = {key[0]: key for key in groups}
    for key, inside in groups.items():
        step, world, n = key
        shown = grids.by_mask(inside, label)
        for slug, quantity, words in _MATRICES:
            if slug != "speed" and all(quantity.of(c) is None for c in inside):
                continue
            where = f"{PASS_WORDS.get(step, step)}, {world} ranks, {n} tokens"
            at = f"{name}-{slug}-{step.replace('+', '-')}-{world}-{n}"
            table = grids.matrix(at, f"{words}; {where}", shown, _GRID, quantity)
            table.folded = key != last[step] or step != list(last)[-1]
            made.blocks.append(table)
    for step in last:
        _add_charts(made, step, [c for c in cells if c["pass"] == step], style)
    caption = "Largest relative error against float64 over all passes, lengths and ranks"
    wrong = grids.by_mask(worst(cells, label), label)
    made.blocks.append(grids.matrix(f"{name}-errors", caption, wrong, _GRID, ERROR))


def _mask(record: Record) -> str:
    return record["mask"]


_GRID = grids.Grid(label, _mask, along="column", reference=SINGLE)


def _add_charts(made: Section, step: str, cells: Sequence[Record], style: dict[str, int]) -> None:
    """Against length at each number of ranks, and against ranks at each length and each share of it."""
    words = PASS_WORDS.get(step, step).capitalize()
    for quantity, what in _CHARTS:
        ours = grids.by_mask((c for c in cells if quantity.of(c) is not None), label)
        lengths, worlds = ({c[n] for c in ours} for n in ("seqlen", "world"))
        if len(lengths) > 1 or len(worlds) < 2:
            made.figure(grids.panels(ours, _at_ranks, label, "seqlen", quantity, style), f"{words}: {what}")
        for panel, how in ((_strong, "the same sequence"), (_weak, "the same tokens a rank")):
            scaled = grids.several(ours, panel, "world")
            chart = grids.panels(scaled, panel, label, "world", quantity, style) if scaled else ""
            made.figure(chart, f"{words}: {what}, {how} on more ranks")


def _at_ranks(record: Record) -> str:
    return f"{record['mask']}, {record['world']} ranks"


def _strong(record: Record) -> str:
    return f"{record['mask']}, {tokens(record['seqlen'])} tokens"


def _weak(record: Record) -> str:
    return f"{record['mask']}, {tokens(record['seqlen'] / record['world'])} tokens a rank"


def _volume(name: str, cells: Iterable[Record]) -> Table:
    """What was counted beside what was computed."""
    rows = []
    for cell in cells:
        counted, computed = cell.get("sent_bytes"), cell.get("closed_form_bytes")
        if cell["status"] == "ok" and counted is not None and computed is not None:
            same = counted == computed
            rows.append(
                [
                    value(label(cell)),
                    *(value(cell[k]) for k in ("mask", "pass", "world", "seqlen")),
                    Value(counted, f"{counted / MIB:.4g}"),
                    Value(computed, f"{computed / MIB:.4g}"),
                    Value(same, "equal" if same else "differ", verdict="pass" if same else "warn"),
                ]
            )
    columns = ["strategy", "mask", "pass", ">ranks", ">tokens", ">MiB counted", ">MiB by formula", "equal"]
    differ = sum(not row[-1].raw for row in rows)
    caption = f"Communication volume of {len(rows)} cells: counted and by formula; {differ} differ"
    return Table(name, caption, columns, rows, folded=True)


def peers_section(found: Iterable[Record]) -> Section:
    """Public packages beside ours."""
    cells = sorted(latest(found, peers.IDENTITY), key=_order)
    made = Section("peers", "Beside other packages")
    made.blocks.append(
        Text(
            "Context parallelism of public packages, called as their users call it, in turn with ours. The "
            "ideal is plain attention on one process over the number of ranks; less is better. Where ranks "
            "share processors the ratio is of processor time."
        )
    )
    plain = len({_cell_of(c) for c in cells}) == len(cells)
    name = (lambda r: r["strategy"]) if plain else label
    style = grids.styles(sorted({name(c) for c in cells}))
    grid = grids.Grid(name, _mask, along="column", reference=SINGLE)
    over = Quantity("time over ideal", lambda r: r.get(peers.metric(r)), better=-1, form=_three)
    for i, (words, group) in enumerate(groupby(cells, _where), start=1):
        made.blocks.append(Heading(words))
        own = list(group)
        for (step, world, n), group in groupby(own, lambda r: (r["pass"], r["world"], r["seqlen"])):
            slug = f"peers-{i}-{step.replace('+', '-')}-{world}-{n}"
            caption = f"Time over ideal, {PASS_WORDS.get(step, step)}, {world} ranks, {n} tokens"
            inside = grids.by_mask(group, name)
            made.blocks.append(grids.matrix(slug, caption, inside, grid, over))
        for step in dict.fromkeys(c["pass"] for c in own):
            drawn = grids.by_mask((c for c in own if c["pass"] == step), name)
            chart = grids.panels(drawn, _at_ranks, name, "seqlen", over, style)
            made.figure(chart, f"{PASS_WORDS.get(step, step).capitalize()}: time over ideal")
    goals = _goals(cells)
    if goals.rows:
        made.blocks.append(goals)
    made.blocks.append(listing("peers-cells", f"All {len(cells)} cells", PEER_COLUMNS, cells))
    return made


_BESIDE = ("hardware", "kernel", "heads", "head_dim", "mask", "digest", "seqlen", "world", "pass", "dtype")


def _cell_of(record: Record) -> tuple[object, ...]:
    """What a cell is apart from its layout: ours take what suits the mask, the peers' is given."""
    return record["strategy"], *(record[k] for k in _BESIDE)


def _three(ratio: float) -> str:
    return f"{ratio:.3f}"


def _goals(cells: Iterable[Record]) -> Table:
    """What `lcab bench peers` demands of our cells."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for cell in cells:
        key = tuple(
            cell[k] for k in ("hardware", "kernel", "mask", "digest", "seqlen", "world", "pass", "dtype")
        )
        groups.setdefault(key, []).append(cell)
    notes, rows = Notes(), []
    for inside in groups.values():
        fastest = peers.fastest_peer(inside)
        for cell in inside:
            if (found := peers.verdict(cell, fastest)) is not None:
                goal, holds = found
                note = None if fastest is None else notes(f"fastest peer: {fastest['strategy']}")
                rows.append(
                    [
                        value(label(cell)),
                        *(value(cell[k]) for k in ("mask", "seqlen", "world")),
                        value(cell[peers.metric(cell)]),
                        Value(goal, goal, note=note),
                        Value(holds, "holds" if holds else "missed", verdict="pass" if holds else "fail"),
                    ]
                )
    columns = ["strategy", "mask", ">tokens", ">ranks", ">over ideal", "goal", "verdict"]
    return Table("peers-goals", f"{len(rows)} goals", columns, rows, notes.texts)
