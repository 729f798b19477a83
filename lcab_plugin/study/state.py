"""What a study has done so far, read from the folders of its launches alone.

`runs/<launch>.<attempt>/` holds `launch.json` (its cells and commands, written before it starts), the
records as they come, and `outcome.json` once it has ended. A study that was killed finds in the records what
its last launch measured, and runs the rest. `study.jsonl` is a summary for readers, written anew each time.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcab_plugin.errors import LcabError
from lcab_plugin.planner import AUTO, SETTINGS
from lcab_plugin.study.cells import Cell
from lcab_plugin.study.launch import Launch, records_of
from lcab_plugin.study.processes import Outcome
from lcab_plugin.training import records

_AGAIN = ("error", "timeout")  # a cell that ended so is run once more
_TRIES = 2
_WORST = ("error", "oom", "capped", "unsupported", "ok")  # of a cell's passes


@dataclass(frozen=True)
class Result:
    """How a cell ended, as far as it did: ``status`` is ok, cannot run, capped, oom, error, timeout or None
    (not yet). ``tries``: launches that it has ended in; ``records``: where, from the study's folder;
    ``chosen``: what its last run put for `auto`."""

    cell: Cell
    status: str | None = None
    reason: str | None = None
    tries: int = 0
    records: str | None = None
    chosen: dict[str, Any] | None = None

    @property
    def settled(self) -> bool:
        """Whether it is not run again."""
        return self.status is not None and (self.status not in _AGAIN or self.tries >= _TRIES)

    def to_dict(self) -> dict[str, Any]:
        """For `study.jsonl` and --json."""
        shown = {name: value for name, value in asdict(self).items() if name != "cell"}
        return {"id": self.cell.id, **self.cell.facts, **shown, "settled": self.settled}


class State:
    """The results of a study's cells in its folder."""

    def __init__(self, name: str, out: Path, cells: Sequence[Cell]) -> None:
        self.name, self.out = name, out
        self._results = {
            cell.id: Result(cell, "cannot run" if cell.reason else None, cell.reason) for cell in cells
        }
        self._attempts: dict[str, int] = {}
        for path in sorted((out / "runs").glob("*/launch.json"), key=_started):
            stem, _, attempt = path.parent.name.rpartition(".")
            self._attempts[stem] = max(self._attempts.get(stem, 0), int(attempt))
            self._harvest(path.parent)

    @property
    def results(self) -> list[Result]:
        """Of every cell, in the study's order."""
        return list(self._results.values())

    def next(self, worlds: Sequence[int]) -> Launch | None:
        """What to run now, of these worlds: what is new, a turn together; then what failed, each alone."""
        open_ = [r for r in self.results if not r.settled and r.cell.world in worlds]
        fresh = [r.cell for r in open_ if not r.tries]
        if fresh:
            return Launch(tuple(cell for cell in fresh if cell.turn == fresh[0].turn))
        return Launch((open_[0].cell,), alone=True) if open_ else None

    def begin(self, launch: Launch, commands: Sequence[list[str]], folder: Path) -> None:
        """Note a launch before it starts."""
        self._attempts[launch.name] = int(folder.name.rpartition(".")[2])
        noted = {"cells": [cell.id for cell in launch.cells], "commands": commands, "started": time.time()}
        _write(folder / "launch.json", json.dumps(noted, indent=2))

    def folder(self, launch: Launch) -> Path:
        """Of its next attempt."""
        return self.out / "runs" / f"{launch.name}.{self._attempts.get(launch.name, 0) + 1}"

    def end(self, folder: Path, outcome: Outcome) -> None:
        """Note how it ended; its cells have results now."""
        _write(folder / "outcome.json", json.dumps(asdict(outcome), indent=2))
        self._harvest(folder)

    def save(self) -> None:
        """Write `study.jsonl`."""
        head = {"type": "run", "schema": records.SCHEMA, "name": self.name, "study": str(self.out)}
        head |= {**records.environment(), "time": time.time()}
        lines = [head, *({"type": "study_cell", **result.to_dict()} for result in self.results)]
        _write(self.out / "study.jsonl", "".join(json.dumps(line, default=str) + "\n" for line in lines))

    def _harvest(self, folder: Path) -> None:
        """The results of a launch's cells; those that a killed launch had not reached stay open."""
        outcome = _read(folder / "outcome.json")
        names = (_read(folder / "launch.json") or {}).get("cells", ())
        for name in names:
            before = self._results.get(name)
            if before is None or before.cell.reason:  # of another version of the study
                continue
            path = records_of(before.cell, folder)
            lines = records.read(path) if path.exists() else []
            ended = _trained(lines) if before.cell.kind == "training" else _measured(before.cell, lines)
            if ended is None and outcome:
                done = outcome["status"] == "done"
                missing = "error", f"it ended without a record; see {folder}"
                ended = missing if done else (outcome["status"], outcome["reason"])
                if len(names) > 1 and ended[0] not in _AGAIN:  # whose doing it was, the next try tells
                    ended = "error", ended[1]
            if ended is not None:
                where = str(path.relative_to(self.out)) if lines else None
                chosen = _chosen(before.cell, lines)
                self._results[name] = Result(before.cell, *ended, before.tries + 1, where, chosen)


def _measured(cell: Cell, lines: list[dict[str, Any]]) -> tuple[str, str | None] | None:
    """How a benchmark's cell ended, by the worst of its passes; None while one is missing."""
    own = {"kernel": cell.kernel} if cell.kind == "kernels" else {"strategy": cell.strategy}
    latest = {r["pass"]: r for r in lines if r["type"] == "cell" and own.items() <= r.items()}
    if not set(cell.settings["passes"]) <= latest.keys():
        return None
    worst = min(latest.values(), key=lambda record: _WORST.index(record["status"]))
    status = "cannot run" if worst["status"] == "unsupported" else worst["status"]
    alike = {record["status"] for record in latest.values()} == {worst["status"]}
    return status, worst["reason"] if alike else f"{worst['pass']}: {worst['reason']}"


def _trained(lines: list[dict[str, Any]]) -> tuple[str, None] | None:
    return ("ok", None) if any(line["type"] == "end" for line in lines) else None


def _chosen(cell: Cell, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Kernel, strategy with its degrees, and layout, as far as they were `auto`; None if none was."""
    asked = [name for name in SETTINGS if getattr(cell, name) == AUTO]
    run = next((line["attention"] for line in reversed(lines) if asked and line["type"] == "run"), None)
    if run is None:
        return None
    degrees = [axis for axis in ("ulysses", "ring", "inner_ring") if "strategy" in asked and run.get(axis)]
    return {name: run[name] for name in (*asked, *degrees)}


@contextmanager
def locked(out: Path, worlds: Sequence[int]) -> Iterator[None]:
    """Be the only study that runs cells of these worlds in this folder. A lock ends with its process.

    Raises:
        LcabError: another one runs.
    """
    with ExitStack() as files:
        for world in sorted(set(worlds)):
            path = out / f".world{world}.lock"
            file = files.enter_context(path.open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LcabError(
                    f"another `lcab study` runs {world}-rank cells in {out}; wait for it."
                ) from None
            except OSError as error:  # Lustre mounted without flock, for one
                raise LcabError(
                    f"cannot lock {path}: {error.strerror}; give an --out on a file system with locks."
                ) from None
        yield


def _started(path: Path) -> float:
    return float((_read(path) or {}).get("started", 0.0))


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none. `_write` leaves no halves."""
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)
