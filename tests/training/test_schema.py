"""What a record must hold: one sentence where it does not; and docs/records.md names every field."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from lcab_plugin.bench import cells, cp, peers
from lcab_plugin.errors import LcabError
from lcab_plugin.report import sources
from lcab_plugin.study import cells as study_cells
from lcab_plugin.study import state
from lcab_plugin.training import records, schema
from tests.report.made_records import RUN, cp_cell, kernel_cell, parity, training_run, write

ROOT = Path(__file__).parents[2]


def test_each_kind_is_told_by_its_fields():
    assert schema.kind(kernel_cell("naive", 64, 1.0)) == "kernels"
    assert schema.kind(cp_cell("ring_p2p", 2, 1.0)) == "cp"
    assert schema.kind(cp_cell("ring_p2p", 2, 1.0, over_ideal=None)) == "peers"
    assert [schema.kind(r) for r in training_run("naive", [1.0])] == ["run", "step", "eval", "end"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mask": None}, "has no mask"),
        ({"seqlen": "1K"}, "seqlen '1K', which is not a whole number"),
        ({"seqlen": True}, "seqlen True"),
        ({"fatal": 1}, "fatal 1, which is not true or false"),
        ({"parameters": "none"}, "parameters 'none', which is not the mask's parameters"),
        ({"median_ms": "fast"}, "median_ms 'fast', which is not a number"),
        ({"median_ms": 0.0}, "median_ms 0.0, which is not above 0"),
        ({"median_ms": float("nan")}, "median_ms nan, which is not above 0"),
        ({"status": "fine"}, "status 'fine', which is none of ok, unsupported, capped, oom, error"),
        ({"status": "oom"}, "status oom and no reason"),
    ],
)
def test_what_is_wrong_with_a_cell_is_one_sentence(tmp_path, changes, why):
    path = write(tmp_path / "k.jsonl", [RUN, {**kernel_cell("naive", 64, 1.0), **changes}])
    with pytest.raises(LcabError, match=r"k.jsonl, line 2: ") as error:
        records.read(path)
    assert why in str(error.value)
    assert "docs/records.md" in str(error.value)


@pytest.mark.parametrize(
    "reader",
    [
        sources.valid,
        cells.read,
        cp.cells_of,
        lambda path: cells.read(path, peers.IDENTITY),
    ],
)
def test_every_reader_says_the_same(tmp_path, reader):
    path = write(tmp_path / "k.jsonl", [RUN, kernel_cell("naive", 64, 1.0, heads="8")])
    with pytest.raises(LcabError, match=r"k\.jsonl, line 2: kernels has heads '8', which is not a whole"):
        reader(path)


def test_a_study_says_so_too(tmp_path):
    cell = study_cells.Cell("kernels", "naive", "causal", 64, {"passes": ["fwd"], "timeout": 1.0})
    folder = tmp_path / "runs" / "turn.1"
    write(folder / "records.jsonl", [RUN, kernel_cell("naive", 64, 1.0, status="fine")])
    (folder / "launch.json").write_text(json.dumps({"cells": [cell.id], "commands": [], "started": 1.0}))
    with pytest.raises(LcabError, match=r"records\.jsonl, line 2: cell has status 'fine'"):
        state.State("s", tmp_path, [cell])


@pytest.mark.parametrize(("version", "why"), [(99, "schema 99, this version reads up"), ("1", "schema '1'")])
def test_another_schema_is_refused(tmp_path, version, why):
    path = write(tmp_path / "k.jsonl", [{**RUN, "schema": version}])
    with pytest.raises(LcabError, match=why):
        records.read(path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"passed": None}, "it has no passed as `lcab parity` writes it"),
        ({"asked": "two"}, "it has asked 'two', which is not a whole number"),
        ({"cells": [{"name": "a"}]}, "cell 1 lacks cell, status or name"),
        ({"environment": {"torch": "2"}}, "run has no lcab_plugin"),
    ],
)
def test_a_comparison_is_checked_too(tmp_path, changes, why):
    (tmp_path / "parity.json").write_text(json.dumps({**parity(), **changes}))
    with pytest.raises(LcabError, match=f"parity.json: {why}"):
        sources.valid(tmp_path / "parity.json")


def test_checks_cost_less_than_reading_the_line():
    """A file of 100,000 lines: about half a second for all of them beside two to three for their JSON."""
    lines = [json.dumps(kernel_cell("naive", 64, 1.0)) for _ in range(2000)]
    taken = {}
    for name, what in (("json", json.loads), ("check", schema.check)):
        given = lines if name == "json" else [json.loads(line) for line in lines]
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            for item in given:
                what(item)
            times.append(time.perf_counter() - begin)
        taken[name] = min(times)
    assert taken["check"] < 2 * taken["json"]


def test_benchmarks_of_two_kinds_in_one_file_are_refused(tmp_path):
    path = write(tmp_path / "k.jsonl", [RUN, kernel_cell("naive", 64, 1.0), cp_cell("ring_p2p", 2, 1.0)])
    with pytest.raises(LcabError, match="mixes records of cp and kernels"):
        sources.valid(path)


def test_a_field_that_came_later_may_be_absent_or_null():
    cell = cp_cell("ring_p2p", 2, 1.0)
    for same in ({}, {"nodes": None}, {"nodes": 2}):
        schema.check({**cell, **same})
    with pytest.raises(LcabError, match="cp has nodes '2', which is not a whole number"):
        schema.check({**cell, "nodes": "2"})


def test_fields_that_this_version_does_not_know_are_no_error():
    schema.check({**kernel_cell("naive", 64, 1.0), "of_tomorrow": 1})
    schema.check({"type": "of_tomorrow", "seqlen": "long"})


def test_every_recorded_field_of_the_repository_is_read(tmp_path):
    for path in (ROOT / "docs" / "results").rglob("*.jsonl"):
        assert sources.valid(path).what in ("kernels", "cp", "peers", "training"), path


def test_the_page_about_records_names_every_field_of_a_cell():
    named = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "records.md").read_text()))
    required = {name for names in schema.REQUIRED.values() for name in names}
    assert {*cells.FIELDS, *cp.FIELDS, *peers.FIELDS, *required} - named == set()
