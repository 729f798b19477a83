"""What stays on the screen when a benchmark has ended."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from lcab_plugin.bench.settings import Shape
from lcab_plugin.cli.bench_progress import ended, loose, progress
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


def test_cells_that_are_not_known_as_well_as_asked_are_counted(tmp_path, capsys):
    run = {**RUN, "noise_empty_ms": 0.5, "noise_same_relative": 0.1, "limits": {"relative_ci": 0.02}}
    known = [kernel_cell("naive", 64 * n, 1.0, relative_ci=ci) for n, ci in ((1, 0.01), (2, 0.031), (3, 0.5))]
    cells = [*known, kernel_cell("naive", 512, 1.0, relative_ci=None), kernel_cell("fa4", 64, None)]
    path = write(tmp_path / "k.jsonl", [run, *cells])
    ended(path, stopped=True)
    shown = capsys.readouterr().out
    assert (
        "Medians are known to 2% (95% confidence) but for 2 to 50.0% at worst and 1 by a single repeat, of 4 "
        "cells; --cell-seconds allows more"
    ) in shown
    assert "Stopped after 5 cells, which are kept." in shown
    assert loose([run, known[0]], 0.02) == ""


def test_lines_tell_how_many_cells_there_are_and_the_time_left(tmp_path, capsys, monkeypatch):
    times = iter([100.0, 100.0, 160.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times, 160.0))
    settings = SimpleNamespace(total=12, device="cpu", shape=Shape(), cell_seconds=0.5)
    with progress(settings, tmp_path / "k.jsonl", before=2) as (watch, done):
        watch("causal 64")
        for _ in range(4):
            done()
        watch("full 64")
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith("10 cells (2 more are done), cpu, ")
    assert first.endswith(f"records in {tmp_path / 'k.jsonl'}")
    assert lines[0] == "causal 64"
    assert lines[1].startswith("full 64  (4 of 10 cells, 0:01:")


def test_a_bar_is_drawn_between_cells_alone(tmp_path, capsys, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    settings = SimpleNamespace(total=3, device="cpu", shape=Shape(), cell_seconds=0.5)
    running = threading.active_count()
    with progress(settings, tmp_path / "k.jsonl") as (watch, done):
        assert threading.active_count() == running, "a thread would draw while a cell is timed"
        watch("causal 64")
        assert "causal 64" in (shown := capsys.readouterr().err)
        assert "0/3" in shown
        done()
        assert "1/3" in capsys.readouterr().err
