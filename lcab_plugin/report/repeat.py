"""From a record to the command that makes it again, here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcab_plugin.errors import LcabError
from lcab_plugin.report.sources import Source, valid
from lcab_plugin.training import records
from lcab_plugin.training.schema import Record

_ROOT = Path(__file__).parents[2]
_CLI = ("lcab", "__main__.py")
_FILES = ("--save", "--save-gradients")  # what a run writes besides its records: not over the first run's
_FACTS = ("lcab_plugin", "git", "device", "cpus", "python", "torch", "deepspeed", "megatron_core", "numpy")


@dataclass(frozen=True)
class Repeat:
    """What to run. ``arguments``: of ``lcab`` where ``script`` is None. ``ranks``: processes to start for the
    script (1 for ``lcab``, which starts its own). ``differs``: what is not as it was, (name, then, now)."""

    script: Path | None
    arguments: list[str]
    ranks: int
    device: str
    out: Path
    differs: list[tuple[str, str, str]]

    @property
    def words(self) -> list[str]:
        """For people: the command line."""
        if self.script is None:
            return ["lcab", *self.arguments]
        start = ["torchrun", "--standalone", "--nproc-per-node", str(self.ranks)]
        return [*start, str(self.script), *self.arguments]

    @property
    def command(self) -> list[str]:
        """Of ``lcab``, as this Python runs it."""
        return [sys.executable, "-m", "lcab_plugin.cli", *self.arguments]


def plan(path: Path, out: Path, number: int | None = None) -> Repeat:
    """The ``number``-th run of a file of records (from 1; the only one if left out), with its new records in
    ``out``, a file for a benchmark and a folder for training and parity.

    Raises:
        LcabError: the file is no record, has several runs or no command, or names a script that is not here.
    """
    source = valid(path)
    run = _chosen(source, path, number)
    command = [str(word) for word in run.get("command") or []]
    if not command:
        raise LcabError(f"{path} does not say which command made it; it cannot be repeated.")
    now = records.environment("cpu" if _on_cpu(run) else _device())
    differs = [
        (name, str(run[name]), str(now[name]))
        for name in _FACTS
        if run.get(name) is not None and run[name] != now[name]
    ]
    arguments = _here(command[1:])
    device = "cpu" if _on_cpu(run) else _device()
    if Path(command[0]).name in _CLI:
        return Repeat(None, _again(arguments, source, out), 1, device, out, differs)
    script = _script(command[0], path)
    arguments = _with(_without(arguments, "--name", *_FILES), "--out", str(out.parent))
    return Repeat(script, _with(arguments, "--name", out.name), int(run["world"]), device, out, differs)


def _chosen(source: Source, path: Path, number: int | None) -> Record:
    runs = source.runs
    if not runs:
        raise LcabError(f"{path} has no record of a run, so no command to repeat.")
    if number is None and len(runs) > 1:
        lines = "; ".join(f"{i}: {' '.join(map(str, r['command'][1:]))}" for i, r in enumerate(runs, start=1))
        raise LcabError(f"{path} was written by {len(runs)} runs, choose one with --run: {lines}")
    if number is not None and not 1 <= number <= len(runs):
        raise LcabError(f"--run {number} is not in {path}, which has runs 1 to {len(runs)}.")
    return runs[(number or 1) - 1]


def _again(arguments: Sequence[str], source: Source, out: Path) -> list[str]:
    """The arguments of `lcab`: all cells anew, on as many ranks as then, whoever had started those."""
    kept = [word for word in arguments if word != "--resume"]
    worlds = {r["world"] for r in source.records if r["type"] == "cell" and "world" in r}
    if len(worlds) == 1:
        kept = _with(kept, "--world", str(worlds.pop()))
    return _with(kept, "--out", str(out))


def _with(arguments: Sequence[str], option: str, value: str) -> list[str]:
    """The arguments with an option set, before a ``--`` that ends them."""
    kept = _without(arguments, option)
    end = kept.index("--") if "--" in kept else len(kept)
    return [*kept[:end], option, value, *kept[end:]]


def _without(arguments: Sequence[str], *options: str) -> list[str]:
    """The arguments without options and their values, up to a ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept: list[str] = []
    words = iter(arguments[:end])
    for word in words:
        if word in options:
            next(words, None)
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return [*kept, *arguments[end:]]


def _here(arguments: Sequence[str]) -> list[str]:
    """Paths in a checkout as they are in this one: what is not in the current folder but in the checkout."""
    return [
        str(_ROOT / word)
        if "/" in word
        and not Path(word).is_absolute()
        and not Path(word).exists()
        and (_ROOT / word).exists()
        else word
        for word in arguments
    ]


def _script(name: str, record: Path) -> Path:
    """A training script: the file itself, or that of the same name in this checkout's examples."""
    for path in (Path(name), _ROOT / name, _ROOT / "examples" / Path(name).name):
        if path.is_file() and path.suffix == ".py":
            return path
    raise LcabError(f"{record} was made by {name}, which is not here; repeat it in a checkout that has it.")


def _on_cpu(run: Record) -> bool:
    """Whether it runs on the processor: it did then, on this model of one, or there is no GPU here."""
    return run["device"] == records.device_name("cpu") or _device() == "cpu"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
