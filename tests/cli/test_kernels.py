"""`lcab kernels` as a user types it."""

from __future__ import annotations

import json
import sys

import pytest
from rich.console import Console

from lcab_plugin import kernels
from lcab_plugin.cli import main, output


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["lcab", "kernels", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    return capsys.readouterr().out


def test_a_row_says_everything(monkeypatch, capsys):
    rows = {row["name"]: row for row in json.loads(run(monkeypatch, capsys, "--json"))}
    assert tuple(rows) == kernels.names()
    for name, row in rows.items():
        features = kernels.get(name).features
        assert (row["version"] is None) == (row["reason"] is not None)
        assert row["lse"] is True
        assert (row["native"], row["lowering"], row["head_dims"]) == (
            features.native,
            features.lowering,
            features.head_dims,
        )
        assert row["verified"] == kernels.verified(name)
        assert row["about"]


@pytest.mark.parametrize("width", [120, 200])
def test_the_tables_fit(width, monkeypatch, capsys):
    """No kernel's name is folded, no reason is lost, no line is longer than the terminal."""
    monkeypatch.setattr(output, "show", lambda what: Console(width=width).print(what))
    out = run(monkeypatch, capsys)
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    for name, reason in kernels.availability().items():
        assert sum(line.startswith(f" {name} ") for line in lines) == 2
        assert reason is None or "".join(reason.split())[:20] in "".join(out.split())
