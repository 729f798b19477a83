"""`lcab report` and `lcab masks draw` as a user types them."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from lcab_plugin.cli.app import app
from lcab_plugin.errors import LcabError
from lcab_plugin.training.schema import DESCRIBED
from tests.report.made_records import RUN, kernel_cell, write


def run(*words: str):
    return CliRunner().invoke(app, words)


def test_a_report_lies_beside_its_records(tmp_path):
    write(tmp_path / "k.jsonl", [RUN, kernel_cell("naive", 64, 1.0)])
    result = run("report", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "1 of 1 files" in result.stdout
    assert {"report.html", "report.md", "kernels-cells.csv"} <= {
        p.name for p in (tmp_path / "report").iterdir()
    }


def test_a_second_report_does_not_read_the_first(tmp_path):
    write(tmp_path / "k.jsonl", [RUN, kernel_cell("naive", 64, 1.0)])
    run("report", str(tmp_path))
    assert "1 of 1 files" in run("report", str(tmp_path)).stdout


def test_an_unreadable_file_is_said_and_not_fatal(tmp_path):
    write(tmp_path / "k.jsonl", [RUN, kernel_cell("naive", 64, 1.0)])
    (tmp_path / "x.jsonl").write_text("{}\n{}\n")
    result = run("report", str(tmp_path), "--out", str(tmp_path / "o"), "--json")
    assert result.exit_code == 0
    (unreadable,) = json.loads(result.stdout)["unreadable"]
    assert unreadable == {"file": "x.jsonl", "why": f"x.jsonl, line 1 is not a record; {DESCRIBED}."}
    assert "not in the report: x.jsonl" in run("report", str(tmp_path)).stderr


def test_a_folder_without_records_is_an_error(tmp_path):
    assert isinstance(run("report", str(tmp_path)).exception, LcabError)


def test_a_file_that_is_no_record_is_an_error_and_no_report(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n{}\n")
    error = run("report", str(path)).exception
    assert isinstance(error, LcabError)
    assert str(error) == f"none of 1 files can be read: x.jsonl, line 1 is not a record; {DESCRIBED}."
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path):
    path = write(tmp_path / "k.jsonl", [RUN, kernel_cell("naive", 64, 1.0)])
    error = run("report", str(path), "--out", str(path)).exception
    assert isinstance(error, LcabError)
    assert str(error) == f"cannot write {path}: File exists; give another --out."


def test_a_mask_is_drawn_at_any_length(tmp_path):
    path = tmp_path / "m.svg"
    result = run(
        "masks", "draw", "sliding_window_causal", "--seqlen", "16777216", "--left", "4096", "--out", str(path)
    )
    assert result.exit_code == 0, result.output
    drawn = ElementTree.parse(path).getroot()
    assert drawn.attrib["aria-label"].startswith("sliding_window_causal, 16777216 tokens")
    assert len(drawn.findall("{http://www.w3.org/2000/svg}path")) == 1


@pytest.mark.parametrize("where", ["none/m.svg", "."])
def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path, where):
    result = run("masks", "draw", "causal", "--out", str(tmp_path / where))
    assert isinstance(result.exception, LcabError)
    assert "give another --out" in str(result.exception)
