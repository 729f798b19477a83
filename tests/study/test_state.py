"""What is done is read from the launches' folders: a kill loses nothing and repeats nothing."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path

import pytest

from lcab_plugin.errors import LcabError
from lcab_plugin.report.studies import shown
from lcab_plugin.study.cells import Cell
from lcab_plugin.study.launch import Launch, records_of
from lcab_plugin.study.processes import Outcome
from lcab_plugin.study.state import Result, State, locked
from tests.report.made_records import kernel_cell, training_run, write

SETTINGS = {"passes": ["fwd", "bwd"], "timeout": 10.0}
KERNELS = [Cell("kernels", name, "causal", 64, SETTINGS) for name in ("naive", "flex", "varlen")]
TRAINING = Cell("training", "naive", "causal", 64, {"timeout": 10.0}, "none", world=2, framework="deepspeed")
CANNOT = Cell("kernels", "fa3", "causal", 64, SETTINGS, reason="not here")


class Study:
    """A folder, and launches that end as a test says."""

    def __init__(self, out: Path, *cells: Cell) -> None:
        self.out, self.cells = out, cells

    @property
    def state(self) -> State:
        """As a new process reads it."""
        return State("x", self.out, self.cells)

    def launch(self, records: list[tuple[str, str, str]], outcome: Outcome | None) -> Launch:
        """Run what is next; ``records``: (kernel, pass, status). None: the study is killed."""
        state = self.state
        launch = state.next([1, 2])
        assert launch is not None
        folder = state.folder(launch)
        state.begin(launch, [["true"]], folder)
        ended = [{"kernel": k, "pass": p, "status": s, "reason": s} for k, p, s in records]
        lines = [{**kernel_cell("naive", 64, 1.0), **how} for how in ended]
        if launch.first.kind == "training":
            trained = training_run("naive", [1.0])
            lines = [line for kind, _, _ in records for line in trained if line["type"] == kind]
        if lines:
            write(records_of(launch.first, folder), lines)
        if outcome:
            state.end(folder, outcome)
        assert self.statuses == [r.status for r in (state if outcome else self.state).results]
        return launch

    @property
    def statuses(self) -> list[str | None]:
        return [result.status for result in self.state.results]


DONE = Outcome("done", None, 1.0)


def both(kernel: str, status: str = "ok") -> list[tuple[str, str, str]]:
    return [(kernel, step, status) for step in SETTINGS["passes"]]


def test_cells_that_cannot_run_are_results_at_once(tmp_path: Path) -> None:
    study = Study(tmp_path, CANNOT, KERNELS[0])
    study.state.save()
    lines = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines] == ["run", "study_cell", "study_cell"]
    assert [(x["status"], x["reason"], x["settled"]) for x in lines[1:]] == [
        ("cannot run", "not here", True),
        (None, None, False),
    ]
    assert study.launch(both("naive"), DONE).cells == (KERNELS[0],)
    assert study.state.next([1, 2]) is None


def test_a_killed_launch_keeps_what_it_measured(tmp_path: Path) -> None:
    study = Study(tmp_path, *KERNELS)
    study.launch([*both("naive"), ("flex", "fwd", "ok")], None)
    assert study.statuses == ["ok", None, None]
    second = study.launch([*both("flex"), *both("varlen")], DONE)
    assert second.cells == (KERNELS[1], KERNELS[2])
    assert not second.alone
    assert study.statuses == ["ok", "ok", "ok"]
    assert len({result.records for result in study.state.results}) == 2


def test_a_failed_cell_is_run_once_more_alone(tmp_path: Path) -> None:
    study = Study(tmp_path, *KERNELS)
    crash = Outcome("error", "signal 11", 1.0)
    study.launch(both("naive"), crash)
    assert study.statuses == ["ok", "error", "error"]
    again = study.launch(both("flex"), DONE)
    assert (again.cells, again.alone) == ((KERNELS[1],), True)
    study.launch([], crash)
    assert study.statuses == ["ok", "ok", "error"]
    assert study.state.next([1, 2]) is None
    assert study.state.results[2].tries == 2


def test_memory_and_refusals_are_results(tmp_path: Path) -> None:
    study = Study(tmp_path, *KERNELS)
    records = [("naive", "fwd", "ok"), ("naive", "bwd", "oom"), *both("flex", "unsupported")]
    study.launch([*records, *both("varlen", "error")], DONE)
    assert study.statuses == ["oom", "cannot run", "error"]
    assert [result.reason for result in study.state.results] == ["bwd: oom", "unsupported", "error"]
    assert study.launch(both("varlen"), DONE).cells == (KERNELS[2],)
    assert study.statuses[2] == "ok"


def test_of_cells_that_end_together_the_next_try_tells_whose_doing_it_was(tmp_path: Path) -> None:
    study = Study(tmp_path, *KERNELS[:2])
    oom = Outcome("oom", "out of memory", 1.0)
    study.launch([], oom)
    assert study.statuses == ["error", "error"]
    study.launch([], oom)
    study.launch(both("flex"), DONE)
    assert study.statuses == ["oom", "ok"]
    assert study.state.next([1, 2]) is None


def test_a_training_run_counts_when_it_has_ended(tmp_path: Path) -> None:
    study = Study(tmp_path, TRAINING)
    study.launch([("run", "", ""), ("step", "", "")], None)
    assert study.statuses == [None]
    study.launch([("run", "", ""), ("step", "", "")], DONE)  # a launcher that hides its ranks' failure
    assert study.statuses == ["error"]
    study.launch([("run", "", ""), ("end", "", "")], DONE)
    assert study.statuses == ["ok"]


def test_what_was_chosen_for_auto_is_in_the_result(tmp_path: Path) -> None:
    cell = Cell("training", "auto", "causal", 64, {"timeout": 10.0}, "auto", layout="zigzag", world=2)
    state = State("x", tmp_path, [cell])
    launch = state.next([2])
    assert launch is not None
    folder = state.folder(launch)
    state.begin(launch, [["true"]], folder)
    chosen = {"kernel": "triton", "strategy": "usp", "layout": "zigzag", "ulysses": 2, "ring": None}
    write(records_of(cell, folder), training_run("x", [1.0], attention={**chosen, "mask": "causal"}))
    state.end(folder, DONE)
    (result,) = state.results
    assert result.chosen == {"kernel": "triton", "strategy": "usp", "ulysses": 2}
    row = shown(result.to_dict())
    assert (row["kernel"], row["strategy"], row["layout"]) == ("auto: triton", "auto: usp", "zigzag")
    assert row["degrees"] == {"ulysses": 2}


def test_cells_of_other_worlds_are_left_alone(tmp_path: Path) -> None:
    state = Study(tmp_path, KERNELS[0], TRAINING).state
    launch = state.next(worlds=[2])
    assert launch is not None
    assert launch.cells == (TRAINING,)


def test_one_study_at_a_time_runs_the_cells_of_a_world(tmp_path: Path) -> None:
    with locked(tmp_path, [2, 4]):
        with locked(tmp_path, [8]):
            pass
        with pytest.raises(LcabError, match="another `lcab study` runs 4-rank cells"), locked(tmp_path, [4]):
            pass
    with locked(tmp_path, [4]):
        pass


def test_a_file_system_without_locks_is_no_other_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(LcabError, match=r"cannot lock .*: Function not implemented"), locked(tmp_path, [2]):
        pass


def test_a_result_says_where_its_records_are() -> None:
    shown = Result(KERNELS[0], "ok", None, 1, "runs/x.1/records.jsonl").to_dict()
    assert (shown["kernel"], shown["records"], shown["settled"]) == ("naive", "runs/x.1/records.jsonl", True)
