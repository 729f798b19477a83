"""The parts of `lcab bench cp` and `lcab bench peers`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from lcab_plugin.bench import peers
from lcab_plugin.bench.cells import PASSES, mask_label
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
    "relative_ci": ">relative ci",
    "tflops_per_rank": ">TFLOP/s/rank",
    "efficiency": ">efficiency",
    "kernels_ms": ">kernels ms",
    "exposed_ms": ">exposed ms",
    "sent_bytes": ">sent bytes",
    "closed_form_bytes": ">by formula",
    "imbalance": ">imbalance",
    "peak_memory_gib": ">peak GiB",
    "peak_reserved_gib": ">reserved GiB",
    "peak_rss_gib": ">resident GiB",
    "kernels_memory_gib": ">kernels GiB",
    "communication_memory_gib": ">communication GiB",
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
RESIDENT = Quantity("peak GiB of the fullest rank", lambda r: r.get("peak_rss_gib"), better=-1)
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
    (RESIDENT, "memory resident on the host, all of a process"),
)


def _degrees(record: Record) -> str:
    degrees = record.get("degrees") or {}
    return "x".join(str(n) for n in degrees.values()) if len(degrees) > 1 else ""


def _layout(record: Record) -> str:
    return record.get("layout") or ""


def _placement(record: Record) -> str:
    return record.get("placement") or ""


def _nodes(record: Record) -> str:
    return f"{record['nodes']} nodes" if record.get("nodes") else ""


def label(record: Record) -> str:
    """A strategy as composed: ``usp 2x4 zigzag``."""
    return " ".join(part for part in (record["strategy"], _degrees(record), _layout(record)) if part)


@dataclass(frozen=True)
class _Names:
    """A strategy by as much of how it was composed as tells it from itself under the same mask, length and
    ranks: its degrees follow the ranks and its layout the mask, and still it is one row and one line."""

    parts: tuple[grids.Name, ...]

    @classmethod
    def of(cls, cells: Iterable[Record]) -> _Names:
        """The shortest that tell these apart."""
        groups: dict[tuple[object, ...], list[Record]] = {}
        for c in cells:
            cell = c["strategy"], c["mask"], c["digest"], c["seqlen"], c["world"], c["pass"], _where(c)
            groups.setdefault(cell, []).append(c)
        return cls(
            tuple(
                part
                for part in (_degrees, _layout, _placement, _nodes)
                if any(len({part(c) for c in inside} - {""}) > 1 for inside in groups.values())
            )
        )

    def name(self, record: Record) -> str:
        return " ".join(word for word in (record["strategy"], *(p(record) for p in self.parts)) if word)

    def aside(self, record: Record) -> str:
        """What was composed how, where the name does not say."""
        left = (part(record) for part in (_degrees, _layout) if part not in self.parts)
        return " ".join(word for word in left if word)

    def grid(self, aside: bool = False) -> grids.Grid:
        """Strategies x masks."""
        told = self.aside if aside else None
        return grids.Grid(self.name, _mask, along="column", reference=SINGLE, aside=told)


def _where(record: Record) -> str:
    return f"{shape_words(record)}, {record['backend']}, kernel {record['kernel']}"


def _order(record: Record) -> tuple[str, int, int, int]:
    step = list(PASSES).index(record["pass"]) if record["pass"] in PASSES else len(PASSES)
    return _where(record), step, record["world"], record["seqlen"]


def section(found: Iterable[Record]) -> Section:
    """Context parallelism."""
    cells = sorted(map(_labelled, latest(found, IDENTITY)), key=_order)
    made = Section("cp", "Context parallelism")
    made.blocks.append(
        Text(
            "A call takes what its slowest rank takes. Efficiency is the time of plain attention on one "
            "process over ranks times theirs, measured in turn; bytes are counted on the way and, apart from "
            "that, computed from the mask (the line across a bar). Before a value of TFLOP/s stand degrees "
            "and layout, where they are not in the strategy's name."
        )
    )
    names = _Names.of(cells)
    style = grids.styles(sorted({names.name(c) for c in cells}))
    for i, (words, group) in enumerate(groupby(cells, _where), start=1):
        made.blocks.append(Heading(words))
        _add(made, f"cp-{i}", list(group), names, style)
    made.blocks.append(_volume("cp-volume", cells))
    made.blocks.append(listing("cp-cells", f"All {len(cells)} cells", COLUMNS, cells))
    return made


def _labelled(record: Record) -> Record:
    return {**record, "mask": mask_label(record["mask"], record.get("parameters") or {})}


def _add(made: Section, name: str, cells: list[Record], names: _Names, style: dict[str, int]) -> None:
    """What was measured on one machine, with one kernel and shape."""
    groups = {key: list(g) for key, g in groupby(cells, lambda r: (r["pass"], r["world"], r["seqlen"]))}
    last = {key[0]: key for key in groups}
    for key, inside in groups.items():
        step, world, n = key
        shown = grids.by_mask(inside, names.name)
        for slug, quantity, words in _MATRICES:
            if slug != "speed" and all(quantity.of(c) is None for c in inside):
                continue
            where = f"{PASS_WORDS.get(step, step)}, {world} ranks, {n} tokens"
            at = f"{name}-{slug}-{step.replace('+', '-')}-{world}-{n}"
            table = grids.matrix(at, f"{words}; {where}", shown, names.grid(slug == "speed"), quantity)
            table.folded = key != last[step] or step != list(last)[-1]
            made.blocks.append(table)
    for step in last:
        _add_charts(made, step, [c for c in cells if c["pass"] == step], names.name, style)
    caption = "Largest relative error against float64 over all passes, lengths and ranks"
    wrong = grids.by_mask(worst(cells, names.name), names.name)
    made.blocks.append(grids.matrix(f"{name}-errors", caption, wrong, names.grid(), ERROR))


def _mask(record: Record) -> str:
    return record["mask"]


_AGAINST: tuple[tuple[str, grids.Name, str], ...] = (
    ("seqlen", lambda r: f"{r['mask']}, {r['world']} ranks", ""),
    ("world", lambda r: f"{r['mask']}, {tokens(r['seqlen'])} tokens", ", the same sequence on more ranks"),
    (
        "world",
        lambda r: f"{r['mask']}, {tokens(r['seqlen'] / r['world'])} tokens a rank",
        ", the same tokens a rank on more ranks",
    ),
)


def _add_charts(
    made: Section, step: str, cells: Sequence[Record], name: grids.Name, style: dict[str, int]
) -> None:
    """Against length at each number of ranks, and against ranks at each length and each share of it; bars of
    what was measured at one length on one number of ranks."""
    words = PASS_WORDS.get(step, step).capitalize()
    known = any(MEMORY.of(c) is not None for c in cells)
    for quantity, what in _CHARTS:
        if quantity is RESIDENT and known:
            continue
        ours = grids.by_mask((c for c in cells if quantity.of(c) is not None), name)
        drawn: set[int] = set()
        for x, panel, how in _AGAINST:
            scaled = grids.several(ours, panel, x)
            made.figure(grids.panels(scaled, panel, name, x, quantity, style), f"{words}: {what}{how}")
            drawn |= set(map(id, scaled))
        x, panel, _ = _AGAINST[0]
        alone = [c for c in ours if id(c) not in drawn]
        made.figure(grids.panels(alone, panel, name, x, quantity, style), f"{words}: {what}")


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
    cells = sorted(map(_labelled, latest(found, peers.IDENTITY)), key=_order)
    made = Section("peers", "Beside other packages")
    made.blocks.append(
        Text(
            "Context parallelism of public packages, called as their users call it, in turn with ours. The "
            "ideal is plain attention on one process over the number of ranks; less is better. Where ranks "
            "share processors the ratio is of processor time."
        )
    )
    names = _Names.of(cells)
    name, grid = names.name, names.grid()
    style = grids.styles(sorted({name(c) for c in cells}))
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
            x, panel, _ = _AGAINST[0]
            chart = grids.panels(drawn, panel, name, x, over, style)
            made.figure(chart, f"{PASS_WORDS.get(step, step).capitalize()}: time over ideal")
    goals = _goals(cells)
    if goals.rows:
        made.blocks.append(goals)
    made.blocks.append(listing("peers-cells", f"All {len(cells)} cells", PEER_COLUMNS, cells))
    return made


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
