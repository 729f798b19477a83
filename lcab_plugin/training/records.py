"""What a run did, one JSON object a line, on disk before the next step begins."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

import lcab_plugin
from lcab_plugin.errors import LcabError
from lcab_plugin.training import machine
from lcab_plugin.training.schema import DESCRIBED, SCHEMA, Record, check


class RunLog:
    """Appends records to ``path``: ``{"type": kind, ...fields, "time": seconds since the epoch}``.

    Each line reaches the disk before ``write`` returns, so a run that is killed loses nothing it wrote. The
    first record of a run is of kind ``run`` and carries ``"schema"``. A resumed run opens the file with
    ``append=True`` and writes another ``run`` record; nothing is ever removed, and ``steps`` sorts out steps
    that were run twice.

    With ``enabled=False`` nothing is opened or written: for every rank but one.

    Raises:
        LcabError: the file holds a run and ``append`` is False, or it cannot be written.
    """

    def __init__(self, path: str | Path, *, append: bool = False, enabled: bool = True) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None
        if not enabled:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        except OSError as error:
            raise LcabError(f"cannot write {self.path}: {error.strerror}; give another --out.") from error
        if self._file.tell() and not append:
            raise LcabError(f"{self.path} holds a run already; give another --name, or --resume that run.")
        if _ends_torn(self.path):
            self._file.write(b"\n")

    def write(self, kind: str, /, **fields: Any) -> None:
        """Append one record."""
        if self._file is None:
            return
        if kind == "run":
            fields = {"schema": SCHEMA, **fields}
        line = json.dumps({"type": kind, **fields, "time": time.time()}, default=str)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more records."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: str | Path) -> list[Record]:
    """All records of a file, checked. A line that a kill tore, last in the file or before a resumed run, is
    left out.

    Raises:
        LcabError: the file does not exist, another line is not a record, or a record is not what
            docs/records.md says; the message names file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise LcabError(f"{path} does not exist; give a file of records, such as a run's metrics.jsonl.")
    records: list[Record] = []
    torn: int | None = None
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        record = _parse(line)
        if torn is not None and (record is None or record["type"] != "run"):
            raise LcabError(f"{path}, line {torn} is not a record; {DESCRIBED}.")
        torn = number if record is None else None
        if record is None:
            continue
        try:
            check(record)
        except LcabError as error:
            raise LcabError(f"{path}, line {number}: {error}; {DESCRIBED}.") from None
        records.append(record)
    return records


def _parse(line: bytes) -> Record | None:
    """The record of a line; None for a torn one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("type"), str) else None


def steps(records: list[Record]) -> list[Record]:
    """The step records by ascending step; of a step that was run again after a resume, the last."""
    latest = {record["step"]: record for record in records if record["type"] == "step"}
    return [latest[step] for step in sorted(latest)]


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a record must say of where it was made: versions, hardware, commit, command line and state."""
    return {
        "lcab_plugin": lcab_plugin.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": _version("deepspeed"),
        "megatron_core": _version("megatron-core"),
        "numpy": _version("numpy"),
        "device": device_name(device),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "git": _git_commit(),
        "command": command(),
        "machine": machine.state(device),
    }


def command() -> list[str]:
    """What to type to do this again, without the places of this machine: ``lcab`` and its arguments, or a
    program by its path from here or from the checkout, else by its name. Paths below here are made relative.
    Launchers are not in it: a run's record has its ``world``."""
    program, here = Path(sys.argv[0]).absolute(), Path.cwd()
    arguments = [_from_here(argument, here) for argument in sys.argv[1:]]
    if program.name == "lcab" or program.parts[-3:] == ("lcab_plugin", "cli", "__main__.py"):
        return ["lcab", *arguments]
    for folder in (here, Path(__file__).absolute().parents[2]):
        if program.is_relative_to(folder):
            return [program.relative_to(folder).as_posix(), *arguments]
    return [program.name, *arguments]


def _from_here(argument: str, here: Path) -> str:
    """An argument, or ``--flag=PATH``, with the path relative if it is below here."""
    flag, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    if path.is_absolute() and path.is_relative_to(here):
        value = path.relative_to(here).as_posix()
    return f"{flag}{equals}{value}"


@lru_cache
def device_name(device: torch.device | str) -> str:
    """The accelerator's name, or the processor's for ``cpu``."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _ends_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout this package runs from, ``-dirty`` if files were changed; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
