"""What a record must hold: one sentence where it does not; and docs/records.md names every field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lcab_plugin.bench import cells, cp, peers
from lcab_plugin.errors import LcabError
from lcab_plugin.report import schema, sources
from tests.report.made_records import RUN, cp_cell, kernel_cell, training_run, write

ROOT = Path(__file__).parents[2]


def test_each_kind_is_told_by_its_fields():
    assert schema.check(kernel_cell("naive", 64, 1.0)) == "kernels"
    assert schema.check(cp_cell("ring_p2p", 2, 1.0)) == "cp"
    assert schema.check(cp_cell("ring_p2p", 2, 1.0, over_ideal=None)) == "peers"
    assert [schema.check(r) for r in training_run("naive", [1.0])] == ["run", "step", "eval", "end"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mask": None}, "has no mask"),
        ({"seqlen": "1K"}, "seqlen '1K', which is not a whole number"),
        ({"seqlen": True}, "seqlen True"),
        ({"median_ms": "fast"}, "median_ms 'fast', which is not a number"),
        ({"median_ms": 0.0}, "median_ms 0.0, which is not above 0"),
        ({"median_ms": float("nan")}, "median_ms nan, which is not above 0"),
        ({"status": "fine"}, "status 'fine', which is none of ok, unsupported, capped, oom, error"),
        ({"status": "oom"}, "status oom and no reason"),
    ],
)
def test_what_is_wrong_with_a_cell_is_one_sentence(tmp_path, changes, why):
    path = write(tmp_path / "k.jsonl", [RUN, {**kernel_cell("naive", 64, 1.0), **changes}])
    with pytest.raises(LcabError, match=r"record 2 of .*k.jsonl: ") as error:
        sources.valid(path)
    assert why in str(error.value)
    assert "docs/records.md" in str(error.value)


def test_a_later_schema_is_refused(tmp_path):
    path = write(tmp_path / "k.jsonl", [{**RUN, "schema": 99}])
    with pytest.raises(LcabError, match="schema 99, this version reads up to"):
        sources.valid(path)


def test_benchmarks_of_two_kinds_in_one_file_are_refused(tmp_path):
    path = write(tmp_path / "k.jsonl", [RUN, kernel_cell("naive", 64, 1.0), cp_cell("ring_p2p", 2, 1.0)])
    with pytest.raises(LcabError, match="mixes records of cp and kernels"):
        sources.valid(path)


def test_fields_that_this_version_does_not_know_are_no_error():
    assert schema.check({**kernel_cell("naive", 64, 1.0), "of_tomorrow": 1}) == "kernels"


def test_every_recorded_field_of_the_repository_is_read(tmp_path):
    for path in (ROOT / "docs" / "results").rglob("*.jsonl"):
        if path.name != "configurations.jsonl":  # what `lcab tune` tried: no records of a benchmark
            assert sources.valid(path).what in ("kernels", "cp", "peers"), path


def test_the_page_about_records_names_every_field_of_a_cell():
    named = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "records.md").read_text()))
    required = {name for names in schema.REQUIRED.values() for name in names}
    assert {*cells.FIELDS, *cp.FIELDS, *peers.FIELDS, *required} - named == set()
