"""Agents of several nodes end together, and their logs tell why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lcab_plugin.study import guard, processes
from lcab_plugin.study.processes import Outcome, explain


def run(logs: Path, *codes: str, seconds: float = 60.0) -> Outcome:
    """An agent a node that runs a line of Python, under a guard."""
    start = [sys.executable, guard.__file__, str(seconds), sys.executable, "-c"]
    return processes.run([[*start, code] for code in codes], logs, seconds, lambda: None)


def test_all_agents_end_well(tmp_path: Path) -> None:
    outcome = run(tmp_path, "print('one')", "print('two')")
    assert (outcome.status, outcome.reason) == ("done", None)
    assert (tmp_path / "node1.log").read_text() == "two\n"


def test_a_cell_has_its_time(tmp_path: Path) -> None:
    outcome = run(tmp_path, "import time; time.sleep(600)", seconds=1.0)
    assert outcome.status == "timeout"
    assert outcome.reason == f"still running after 1 s; see {tmp_path}"


def test_agents_do_not_wait_for_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE", 0.5)
    outcome = run(tmp_path, "import time; time.sleep(600)", "raise SystemExit('train_gpt.py: no.')")
    assert (outcome.status, outcome.reason) == ("cannot run", "no.")
    assert outcome.seconds < 60


@pytest.mark.parametrize(
    ("log", "status", "reason"),
    [
        (
            "noise\ntrain_gpt.py: heads 3 do not fit; give 4.\ntorch...ChildFailedError: x",
            "cannot run",
            "heads 3",
        ),
        ("[rank1]: lcab_plugin.errors.LcabError: heads 3 do not fit.", "cannot run", "heads 3 do not fit."),
        ("error: device 'cuda' needs a GPU", "cannot run", "device 'cuda' needs a GPU"),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried\nChildFailedError: x",
            "oom",
            "CUDA out of memory",
        ),
        (
            "ValueError: wrong\nerrors.ChildFailedError: \n====",
            "error",
            "node 0, exit status 7: ValueError: wrong",
        ),
        ("Segmentation fault", "error", "Segmentation fault"),
        ("", "error", "no output"),
    ],
)
def test_a_log_tells_why_a_launch_failed(tmp_path: Path, log: str, status: str, reason: str) -> None:
    (tmp_path / "node0.log").write_text(log)
    found = explain([7], tmp_path)
    assert found[0] == status
    assert reason in found[1]


def test_the_node_that_failed_is_named_not_those_that_were_ended(tmp_path: Path) -> None:
    (tmp_path / "node0.log").write_text("")
    (tmp_path / "node1.log").write_text("ssh: Could not resolve hostname b")
    status, reason = explain([guard.ABANDONED, 255], tmp_path)
    assert status == "error"
    assert reason.startswith("node 1, exit status 255: ssh: Could not resolve hostname b")
    assert explain([guard.ABANDONED, guard.ABANDONED], tmp_path)[1].startswith("node 0, exit status 125")
