"""What stays on the screen when a benchmark has ended."""

from __future__ import annotations

from lcab_plugin.cli.bench_progress import ended
from tests.report.made_records import RUN, kernel_cell, write


def test_the_last_run_s_noise_floor_stays_readable(tmp_path, capsys):
    runs = [{**RUN, "noise_empty_ms": ms, "noise_same_relative": ms / 10} for ms in (0.5, 0.02)]
    path = write(tmp_path / "k.jsonl", [runs[0], kernel_cell("naive", 64, 1.0), runs[1]])
    ended(path)
    shown = capsys.readouterr().out
    assert shown.splitlines()[1] == "Noise floor: 0.02 ms, and 0.2% between equal calls"
    assert f"Records: {path} and {tmp_path / 'k.csv'}" in shown


def test_without_a_noise_floor_only_the_records_are_named(tmp_path, capsys):
    ended(write(tmp_path / "k.jsonl", []))  # interrupted before it was measured
    assert "floor:" not in capsys.readouterr().out
