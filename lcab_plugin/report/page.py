"""The whole report: which sections there are, and the files they become."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import lcab_plugin
from lcab_plugin.report import kernels, parallel, pictures, predictions, studies, training
from lcab_plugin.report.section import Section
from lcab_plugin.report.sources import Source
from lcab_plugin.report.style import CSS
from lcab_plugin.report.tables import Table, Value, value
from lcab_plugin.training.schema import Record


@dataclass(frozen=True)
class Written:
    """The files of a report, and what could not be read: (file, why)."""

    page: Path
    markdown: Path
    csv: list[Path]
    unreadable: list[tuple[str, str]]


def sections(sources: Sequence[Source]) -> list[Section]:
    """What there is something to say about, the overview first."""
    cells = {
        what: [r for s in sources if s.what == what for r in s.records if r["type"] == "cell"]
        for what in ("kernels", "cp", "peers")
    }
    runs = [s for s in sources if s.what == "training"]
    comparisons = [s for s in sources if s.what == "parity"]
    found = [_overview(sources)]
    planned = [s for s in sources if s.what == "study_cell"]
    found += [studies.section(planned)] if planned else []
    found += [training.parity_section(comparisons)] if comparisons else []
    for what, make in (
        ("kernels", kernels.section),
        ("cp", parallel.section),
        ("peers", parallel.peers_section),
    ):
        found += [make(cells[what])] if cells[what] else []
    found += [training.section(runs)] if runs else []
    predicted = predictions.section(cells, runs)
    found += [predicted] if predicted is not None else []
    measured: list[Record] = [r for own in cells.values() for r in own]
    found += [pictures.section(measured)] if measured else []
    found.append(_files(sources))
    return found


def _overview(sources: Sequence[Source]) -> Section:
    """How many records of what, from where."""
    made = Section("overview", "Overview")
    unreadable = [s for s in sources if s.problem is not None]
    if unreadable:
        rows = [[value(s.name), value(s.problem)] for s in unreadable]
        caption = f"{len(unreadable)} of {len(sources)} files cannot be read and are in nothing below"
        made.blocks.append(Table("overview-unreadable", caption, ["file", "why"], rows))
    rows = []
    for what, words in (
        ("study_cell", "studies"),
        ("parity", "parity comparisons"),
        ("kernels", "cells of lcab bench kernels"),
        ("cp", "cells of lcab bench cp"),
        ("peers", "cells of lcab bench peers"),
        ("training", "training runs"),
    ):
        own = [s for s in sources if s.what == what]
        if not own:
            continue
        cells = [r for s in own for r in s.records if r["type"] == "cell"]
        ended = Counter(r["status"] for r in cells)
        if what == "parity":
            ended = Counter(training.parity_ending(s.parity) for s in own if s.parity is not None)
        count = len(cells) if what in ("kernels", "cp", "peers") else len(own)
        states = ", ".join(f"{n} {k}" for k, n in ended.items() if n)
        devices = {r["hardware"] for r in cells} or {r["device"] for s in own for r in s.runs}
        rows.append(
            [
                value(words),
                value(len(own)),
                value(count),
                value(states or "-"),
                _loose(own),
                value("; ".join(sorted(devices))),
            ]
        )
    columns = ["what", ">files", ">records", "ended", ">medians not known as asked", "on"]
    made.blocks.append(Table("overview-records", "What was found", columns, rows))
    made.blocks += _noise(sources)
    return made


def _loose(sources: Sequence[Source]) -> Value:
    """Cells that ran out of time before the confidence interval of their median was what was asked for."""
    wide = 0
    asked: set[float] = set()
    for source in sources:
        limit: float | None = None
        for r in source.records:
            if r["type"] == "run":
                limit = (r.get("limits") or {}).get("relative_ci")
            elif r["type"] == "cell" and r["status"] == "ok" and limit is not None:
                asked.add(limit)
                known = r.get("relative_ci")
                wide += known is None or known > limit
    if not asked:
        return value(None)
    limits = ", ".join(f"{limit:.0%}" for limit in sorted(asked))
    return Value(wide, f"{wide} (to {limits})")


def _noise(sources: Sequence[Source]) -> list[Table]:
    """What the benchmarks' times cannot tell apart, the worst of every machine's runs."""
    names = "noise_empty_ms", "noise_same_relative"
    runs: dict[str, list[Record]] = {}
    for run in (r for s in sources for r in s.runs):
        if all(run.get(name) is not None for name in names):
            runs.setdefault(run["device"], []).append(run)
    rows = []
    for device, own in sorted(runs.items()):
        empty, same = (max(run[name] for run in own) for name in names)
        rows.append([value(device), value(len(own)), value(empty), Value(same, f"{same:.1%}")])
    columns = ["on", ">runs", ">empty call, ms", ">equal calls apart"]
    caption = "Noise floor: smaller differences say nothing; the largest of all runs"
    return [Table("overview-noise", caption, columns, rows)] if rows else []


def _files(sources: Sequence[Source]) -> Section:
    """Where every number comes from, and the command that makes it again."""
    columns = ["file", "what", ">records", "lcab_plugin", "torch", "device", "commit", "command"]
    rows: list[list[Value]] = []
    for source in sources:
        run = source.runs[0] if source.runs else {}
        facts = [run.get(name) for name in ("lcab_plugin", "torch", "device")]
        commit, dash, dirty = (run.get("git") or "").partition("-")
        command = " ".join(map(str, run.get("command") or [])) or None
        count = len(source.records) or (len(source.parity["cells"]) if source.parity else 0)
        rows.append(
            [
                value(source.name),
                value(source.what or "unreadable"),
                value(count),
                *map(value, facts),
                Value(run.get("git"), commit[:12] + dash + dirty or "-"),
                value(command),
            ]
        )
    made = Section("files", "Files")
    made.blocks.append(
        Table(
            "files-read",
            "The files; lcab repeat FILE runs a file's command again",
            columns,
            rows,
            folded=len(rows) > 20,
        )
    )
    return made


def html(title: str, made: Sequence[Section]) -> str:
    """One page that asks for nothing from elsewhere."""
    links = "".join(f'<li><a href="#{s.slug}">{escape(s.title)}</a></li>' for s in made)
    stamp = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>"
        '<a class="skip" href="#content">To the content</a>'
        f'<header><h1>{escape(title)}</h1><div class="soft">{stamp}, '
        f"lcab_plugin {lcab_plugin.__version__}</div>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="content">{"".join(s.html() for s in made)}</main>'
        "<footer>Every number is in report.md and in the CSV files beside this page.</footer></body></html>\n"
    )


def write(sources: Sequence[Source], out: Path, title: str) -> Written:
    """Make ``report.html``, ``report.md`` and a CSV for every table in ``out``."""
    made = sections(sources)
    out.mkdir(parents=True, exist_ok=True)
    page, markdown = out / "report.html", out / "report.md"
    page.write_text(html(title, made))
    markdown.write_text("\n\n".join([f"# {title}", *(s.markdown() for s in made)]) + "\n")
    csv: list[Path] = []
    for table in (table for section in made for table in section.tables):
        csv.append(out / f"{table.name}.csv")
        csv[-1].write_text(table.csv())
    return Written(page, markdown, csv, [(s.name, s.problem) for s in sources if s.problem is not None])
