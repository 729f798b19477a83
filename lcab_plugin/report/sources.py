"""The records of a folder, file by file: what each is, or why it cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lcab_plugin.errors import LcabError
from lcab_plugin.training import records, schema
from lcab_plugin.training.schema import Record

PARITY = "parity.json"


@dataclass(frozen=True)
class Source:
    """One file. ``what``: training, kernels, cp, peers, parity, study_cell, ``nothing`` (a run that was cut
    off before it measured), or None with a ``problem``. ``name``: its path in the folder."""

    name: str
    what: str | None
    records: list[Record] = field(default_factory=list)
    parity: Record | None = None
    problem: str | None = None

    @property
    def runs(self) -> list[Record]:
        """What each command that wrote to the file says of itself."""
        if self.parity is not None:
            return [{**self.parity["environment"], "world": self.parity["settings"]["world"]}]
        return [r for r in self.records if r["type"] == "run"]


def load(folder: Path) -> list[Source]:
    """Every ``*.jsonl`` and ``parity.json`` below a folder, or the one file that is given.

    Raises:
        LcabError: there is no such folder, or no such file in it.
    """
    if not folder.exists():
        raise LcabError(f"{folder} does not exist; give a folder of records, such as runs.")
    if folder.is_file():
        return [read(folder, folder.name)]
    paths = sorted([*folder.rglob("*.jsonl"), *folder.rglob(PARITY)])
    if not paths:
        raise LcabError(f"{folder} holds no records: there is no .jsonl file and no {PARITY} in it.")
    return [read(path, path.relative_to(folder).as_posix()) for path in paths]


def read(path: Path, name: str) -> Source:
    """One file; what is wrong with it is said in its ``problem``."""
    try:
        if path.name == PARITY:
            return Source(name, "parity", parity=_parity(path))
        found = records.read(path)
        return Source(name, _what(path, found), found)
    except (LcabError, OSError, ValueError) as error:
        return Source(name, None, problem=str(error).replace(str(path), name))


def valid(path: Path) -> Source:
    """One file.

    Raises:
        LcabError: it cannot be read.
    """
    source = read(path, str(path))
    if source.problem is not None:
        raise LcabError(source.problem)
    return source


def _what(path: Path, found: Sequence[Record]) -> str:
    if not found and path.stat().st_size:
        raise LcabError(f"{path} holds no whole record; {schema.DESCRIBED}.")
    kinds = {schema.kind(record) for record in found} & {"kernels", "cp", "peers", "study_cell"}
    if any(record["type"] == "run" and "attention" in record for record in found):
        kinds.add("training")
    if len(kinds) > 1:
        raise LcabError(f"{path} mixes records of {' and '.join(sorted(kinds))}; {schema.DESCRIBED}.")
    return next(iter(kinds), "nothing")


def _parity(path: Path) -> Record:
    found: Record = json.loads(path.read_text())
    try:
        schema.check_parity(found)
    except LcabError as error:
        raise LcabError(f"{path}: {error}; {schema.DESCRIBED}.") from None
    return found


def latest(found: Iterable[Record], identity: Iterable[str]) -> list[Record]:
    """The cells, of those that measure the same the last one, in the order of their times."""
    names = tuple(identity)
    cells = sorted((r for r in found if r["type"] == "cell"), key=lambda r: r.get("time", 0.0))
    kept = {json.dumps([r.get(name) for name in names], sort_keys=True): r for r in cells}
    return list(kept.values())
