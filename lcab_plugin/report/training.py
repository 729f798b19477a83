"""The parts of training runs and of `lcab parity`."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from lcab_plugin.report import evaluation, grids, svg
from lcab_plugin.report.grids import Quantity
from lcab_plugin.report.section import Heading, Section, Text
from lcab_plugin.report.sources import Source
from lcab_plugin.report.tables import Notes, Table, Value, listing, value
from lcab_plugin.training import records
from lcab_plugin.training.schema import Record

_WARM_UP = 2  # steps that no median counts
_LINES = 12  # runs of a chart drawn by themselves; of more, the band and the farthest ones
_POINTS = 300  # of a drawn line
_MIDDLE, _MIDDLE_STYLE = "median of the deviations, their band", svg.COLOURS * 2 + 7
# Runs that must agree: the same model on the same text in the same order.
_SAME = (
    "model",
    "global_batch",
    "data_digest",
    "seqlen",
    "doc_lengths",
    "loss_mask",
    "seed",
)
_SPEED = Quantity("tokens/s", lambda r: r["tokens_per_s"])
_MEMORY = Quantity("peak GiB of the fullest rank", lambda r: r["peak_memory_gib"], better=-1)


def section(sources: Sequence[Source]) -> Section:
    """Training runs: losses and how far they are apart, speed, memory."""
    rows = [row for source in sources if (row := summary(source)) is not None]
    made = Section("training", "Training runs")
    groups: dict[str, list[Record]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    style = grids.styles(sorted({row["label"] for row in rows}))
    made.blocks += [_table(rows), *evaluation.memory("training-memory", rows)]
    for quantity, what in ((_SPEED, "Throughput"), (_MEMORY, "Memory")):
        drawn: set[int] = set()
        for x, other, words in (("seqlen", "world", "length"), ("world", "seqlen", "ranks")):
            panel = partial(_panel, other)
            lines = grids.several(rows, partial(_line, other), x)
            made.figure(grids.panels(lines, panel, _label, x, quantity, style), f"{what} against {words}")
            drawn |= set(map(id, lines))
        alone = [row for row in rows if id(row) not in drawn]
        made.figure(grids.panels(alone, partial(_panel, "world"), _label, "seqlen", quantity, style), what)
    for number, inside in enumerate(groups.values(), start=1):
        _add_losses(made, number, inside, style)
    _add_accuracy(made, rows)
    made.blocks.append(listing("training-all", f"All {len(rows)} runs", _COLUMNS, rows))
    return made


def _panel(other: str, row: Record) -> str:
    of = f"{row['world']} ranks" if other == "world" else f"{svg.tokens(row['seqlen'])} tokens"
    return ", ".join(part for part in (row["mask"], row["model_words"], of) if part)


def _line(other: str, row: Record) -> str:
    return f"{_panel(other, row)}, {_label(row)}"


def _label(row: Record) -> str:
    return row["label"]


def summary(source: Source) -> Record | None:
    """One run: what resolved, and medians over its steps; None before its first step."""
    run = next(r for r in source.records if r["type"] == "run" and "attention" in r)
    steps = records.steps(source.records)
    if not steps:
        return None
    attention, framework, model = run["attention"], run.get("framework", "deepspeed"), run["model"]
    facts = evaluation.facts(source.records)
    counted = steps[min(_WARM_UP, len(steps) - 1) :]
    parts = [attention["kernel"], attention["strategy"]]
    parts += [attention.get("layout")] if attention["strategy"] != "none" else []
    shares = [f"{axis}{run[axis]}" for axis in ("tp", "pp") if (run.get(axis) or 1) > 1]
    task = {name: run.get(name) for name in _SAME} | {"lr": steps[0].get("lr")}
    return {
        "name": run.get("name") or PurePosixPath(source.name).parent.name,
        "file": source.name,
        "label": " ".join([*(p for p in parts if p), *shares, framework, run["dtype"]]),
        "mask": attention["mask"],
        "attention": (attention["kernel"], attention["strategy"]),
        "framework": framework,
        "dtype": run["dtype"],
        "world": run["world"],
        "seqlen": run["seqlen"],
        "model_words": f"{run['parameters'] / 1e6:.3g}M parameters" if run.get("parameters") else "",
        "task": json.dumps(task, sort_keys=True),
        "group": json.dumps({**task, "mask": attention["mask"]}, sort_keys=True),
        "device": run["device"],
        "steps": steps,
        "asked": run.get("steps"),
        "run": run,
        "loss": steps[-1]["loss"],
        "done": len(steps),
        "model": model,
        **facts,
        "validation": (facts["eval"] or {}).get("loss"),
        **{
            name: _median([s[name] for s in counted if s.get(name) is not None])
            for name in ("step_ms", "tokens_per_s", "mfu")
        },
        "peak_memory_gib": max(s["peak_memory_gib"] for s in steps),
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


_COLUMNS = {
    "name": "run",
    "mask": "mask",
    "label": "attention",
    "world": ">ranks",
    "seqlen": ">tokens",
    "done": ">steps",
    "loss": ">last loss",
    "validation": ">validation loss",
    "step_ms": ">median step ms",
    "tokens_per_s": ">tokens/s",
    "mfu": ">MFU",
    "peak_memory_gib": ">peak GiB",
    "device": "device",
    "file": "file",
}


def _table(rows: Sequence[Record]) -> Table:
    columns = {name: title for name, title in _COLUMNS.items() if name not in ("device", "file")}
    made = []
    for row in rows:
        done, asked = row["done"], row["asked"]
        short = asked is not None and done < asked
        own = {"done": Value(done, f"{done} of {asked}", verdict="warn") if short else value(done)}
        line = [own.get(name) or value(row.get(name)) for name in columns]
        made.append(line)
    caption = f"{len(rows)} runs; medians leave out the first {_WARM_UP} steps"
    return Table("training-runs", caption, list(columns.values()), made)


def _add_losses(made: Section, number: int, rows: Sequence[Record], style: dict[str, int]) -> None:
    """The runs of one model on one text: their losses, and their deviations from the baseline."""
    first = rows[0]
    baseline = _baseline(rows)
    made.blocks.append(
        Heading(
            f"{', '.join(filter(None, (first['mask'], first['model_words'])))}, {first['seqlen']} tokens: "
            f"{len(rows)} runs"
        )
    )
    others = [r for r in rows if r is not baseline]
    drawn = [baseline, *sorted(others, key=lambda r: -_farthest(r, baseline))[: _LINES - 1]]
    named = {r["file"]: f"{r['name']}" for r in drawn}
    number_of = {r["file"]: i for i, r in enumerate(drawn)}
    charts = [_loss_chart(baseline, rows, drawn, named, number_of)]
    words = f"Loss of {baseline['name']}"
    if others:
        charts.append(_deviation_chart(baseline, others, drawn, named, number_of))
        words += " and the other runs, the band from the lowest to the highest; and how far each is from it"
    left = len(rows) - len(drawn)
    if left > 0:
        words += f" ({left} more runs, nearer to it, are in the band only)"
    titles = "Loss", "Deviation from it"
    panels = "".join(
        f"<figure><figcaption>{title}</figcaption>{chart}</figure>"
        for title, chart in zip(titles, charts, strict=False)
    )
    looks = {named[r["file"]]: number_of[r["file"]] for r in drawn}
    shown = grids.legend(looks | ({_MIDDLE: _MIDDLE_STYLE} if len(others) > 1 else {}))
    made.figure(f'{shown}<div class="panels">{panels}</div>', f"{words}.")
    if others:
        made.blocks.append(_deviations(f"training-deviations-{number}", baseline, others))


def _baseline(rows: Sequence[Record]) -> Record:
    """What the others are held against: a run without context parallelism, in the precision of most, with the
    simplest kernel, ``naive`` before PyTorch's own before any other."""
    ((usual, _),) = Counter(row["dtype"] for row in rows).most_common(1)

    def rank(row: Record) -> tuple[bool, ...]:
        kernel, strategy = row["attention"]
        return strategy != "none", kernel != "naive", row["dtype"] != usual, not kernel.startswith("sdpa")

    return min(rows, key=rank)


def _add_accuracy(made: Section, rows: Sequence[Record]) -> None:
    """Loss by position and recall of all runs of one model on one text, whatever their masks: what one that
    hides more loses is seen beside one that hides less."""
    tasks: dict[str, list[Record]] = {}
    for row in rows:
        if row["eval"] or row["recall"]:
            tasks.setdefault(row["task"], []).append(row)
    for number, inside in enumerate(tasks.values(), start=1):
        seen: Counter[str] = Counter()
        turns: list[tuple[int, int, Record]] = []  # a run of every mask, then a second
        for i, row in enumerate(inside):
            turns.append((seen[row["mask"]], i, row))
            seen[row["mask"]] += 1
        drawn = [row for *_, row in sorted(turns, key=lambda turn: turn[:2])[:_LINES]]
        named = {r["file"]: f"{r['mask']}, {r['name']}" if len(seen) > 1 else r["name"] for r in drawn}
        number_of = {r["file"]: i for i, r in enumerate(drawn)}
        found = evaluation.blocks(f"training-accuracy-{number}", inside, named, number_of)
        words = ", ".join(filter(None, (inside[0]["model_words"], f"{inside[0]['seqlen']} tokens")))
        made.blocks += [Heading(f"Accuracy by position and distance: {words}"), *found] if found else []


def _aligned(row: Record, baseline: Record, key: str) -> list[tuple[int, float]]:
    """(step, relative deviation) of the steps that both did on the same tokens."""
    reference = {s["step"]: s for s in baseline["steps"]}
    found = []
    for s in row["steps"]:
        other = reference.get(s["step"])
        if other is not None and other["batch_digest"] == s["batch_digest"] and other[key]:
            found.append((s["step"], abs(s[key] - other[key]) / abs(other[key])))
    return found


def _farthest(row: Record, baseline: Record) -> float:
    return max((d for _, d in _aligned(row, baseline, "loss") if math.isfinite(d)), default=0.0)


def _thin(points: Sequence[Any]) -> list[Any]:
    """A few hundred points, evenly, with the last."""
    every = max(1, -(-len(points) // _POINTS))
    return [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]


def _loss_chart(
    baseline: Record,
    rows: Sequence[Record],
    drawn: Sequence[Record],
    named: dict[str, str],
    at: dict[str, int],
) -> str:
    by_step: dict[int, list[float]] = {}
    for row in rows:
        for s in row["steps"]:
            by_step.setdefault(s["step"], []).append(s["loss"])
    series = []
    for row in drawn:
        steps = _thin(row["steps"])
        xs, band = [s["step"] for s in steps], row is baseline and len(rows) > 1
        low = [min(by_step[x]) for x in xs] if band else []
        high = [max(by_step[x]) for x in xs] if band else []
        series.append(
            svg.Series(named[row["file"]], xs, [s["loss"] for s in steps], at[row["file"]], low, high)
        )
    losses = [s["loss"] for row in drawn for s in row["steps"] if math.isfinite(s["loss"])]
    room = (max(losses, default=1.0) - min(losses, default=0.0)) * 0.05 or 0.01
    axis = svg.Axis("loss", span=(min(losses, default=0.0) - room, max(losses, default=1.0) + room))
    return svg.line_chart(svg.Chart("Loss", svg.Axis("step"), axis, series))


def _deviation_chart(
    baseline: Record,
    others: Sequence[Record],
    drawn: Sequence[Record],
    named: dict[str, str],
    at: dict[str, int],
) -> str:
    """Relative deviations of the loss, with the band of all runs around their median where there are many."""
    series = []
    for row in drawn:
        points = _thin(_aligned(row, baseline, "loss")) if row is not baseline else []
        if points:
            xs, ys = zip(*points, strict=True)
            series.append(svg.Series(named[row["file"]], xs, ys, at[row["file"]]))
    by_step: dict[int, list[float]] = {}
    for row in others:
        for step, d in _aligned(row, baseline, "loss"):
            by_step.setdefault(step, []).append(d)
    if len(others) > 1 and by_step:
        kept = _thin(sorted(by_step))
        floor = min((d for ds in by_step.values() for d in ds if d > 0), default=1e-12)
        low, middle, high = ([max(f(by_step[x]), floor) for x in kept] for f in (min, statistics.median, max))
        series.insert(0, svg.Series(_MIDDLE, kept, middle, _MIDDLE_STYLE, low, high))
    y = svg.Axis("relative deviation of the loss", log=10)
    return svg.line_chart(svg.Chart("Deviation", svg.Axis("step"), y, series))


def _deviations(name: str, baseline: Record, others: Iterable[Record]) -> Table:
    notes, rows = Notes(), []
    for row in others:
        found = {key: [d for _, d in _aligned(row, baseline, key)] for key in ("loss", "grad_norm")}
        compared = len(found["loss"])
        note = None
        if compared < len(row["steps"]):
            note = notes("the other steps saw other tokens than the baseline, or it did not do them")
        rows.append(
            [
                value(row["name"]),
                value(row["label"]),
                Value(compared, str(compared), note=note),
                *(value(max(found[key], default=None)) for key in ("loss", "grad_norm")),
            ]
        )
    columns = ["run", "attention", ">steps compared", ">loss, largest", ">gradient norm, largest"]
    return Table(name, f"Relative deviations from {baseline['name']}", columns, rows, notes.texts)


_VERDICTS = {"pass": "pass", "fail": "fail", "crashed": "fail", "timeout": "fail", "cannot run": "warn"}


def parity_section(sources: Iterable[Source]) -> Section:
    """Verdicts of `lcab parity`."""
    made = Section("parity", "Parity")
    made.blocks.append(
        Text(
            "Every cell trains the same model on the same data as the baseline of its mask, kernel naive "
            "without context parallelism; deviations are relative, the largest of the steps."
        )
    )
    for number, source in enumerate(sources, start=1):
        assert source.parity is not None
        made.blocks.append(_verdicts(f"parity-{number}", source.name, source.parity))
        sources_of = {(cell.get("budget") or {}).get("source") for cell in source.parity["cells"]} - {None}
        made.blocks += [Text(f"Budget: {text}.") for text in sorted(map(str, sources_of))]
    return made


def parity_ending(found: Record) -> str:
    """Of a comparison: ``passed``, ``failed``, or ``stopped`` before the last of its runs."""
    if len(found["cells"]) < found.get("asked", 0):
        return "stopped"
    return "passed" if found["passed"] else "failed"


def _verdicts(name: str, file: str, found: Record) -> Table:
    notes, rows = Notes(), []
    for result in found["cells"]:
        cell, dev = result["cell"], result.get("deviations") or {}
        status, role = result["status"], cell.get("role")
        why = "; ".join(result.get("problems") or []) or result.get("reason")
        both = [
            max(dev[key], dev[f"{key}_later"]) if key in dev and role != "baseline" else None
            for key in ("loss", "grad_norm")
        ]
        gradient = dev.get("gradient") if role != "baseline" else None
        shown = role if role and status == "pass" else status
        note = notes(why) if status != "pass" and why else None
        rows.append(
            [
                value(cell["mask"]),
                *(value(cell.get(key)) for key in ("framework", "kernel", "strategy", "layout")),
                *(value(x) for x in (*both, gradient)),
                value((result.get("step_ms") or {}).get("median")),
                value(result.get("peak_memory_gib")),
                Value(status, shown, note=note, verdict=_VERDICTS.get(status, "fail")),
            ]
        )
    settings = found["settings"]
    counts: dict[str, int] = {}
    for result in found["cells"]:
        counts[result["status"]] = counts.get(result["status"], 0) + 1
    caption = (
        f"{file}: {parity_ending(found)}, "
        f"{', '.join(f'{n} {status}' for status, n in counts.items())}; {settings.get('world')} processes, "
        f"{settings.get('steps')} steps, {settings.get('dtype')}"
    )
    columns = [
        "mask", "framework", "kernel", "strategy", "layout", ">loss", ">gradient norm", ">step-0 gradient",
        ">step ms", ">peak GiB", "verdict",
    ]  # fmt: skip
    return Table(name, caption, columns, rows, notes.texts)
