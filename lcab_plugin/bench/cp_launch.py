"""Starts the ranks of `lcab bench cp` and `peers` on this machine, or takes part as one of torchrun's."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lcab_plugin.bench import cells, cp, cp_measure, cp_ranks, peers, peers_measure
from lcab_plugin.bench.cells import Record
from lcab_plugin.bench.cp import Settings
from lcab_plugin.bench.launch import launch
from lcab_plugin.errors import LcabError
from lcab_plugin.training import records
from lcab_plugin.training.records import RunLog

# The ranks' whole script: a module that is run by its path would put its folder first on sys.path.
_SCRIPT = """import sys
sys.path.insert(0, {root!r})
sys.argv = {command!r}
from lcab_plugin.bench import cp_launch
cp_launch.rank_main({job!r}, {settings!r}, {out!r})
"""
# What a rank is asked, and what it does.
_JOBS: dict[str, tuple[type[Settings], Callable[..., list[Record]]]] = {
    cp.Settings.job: (cp.Settings, cp_measure.run),
    peers.Settings.job: (peers.Settings, peers_measure.run),
}
_BEREAVED = 30.0  # seconds that a rank whose peer is gone waits to be ended


def launched_world(environment: Mapping[str, str]) -> int | None:
    """Ranks of the job this process is one of, by torchrun's variables; None for a process of its own."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    return int(environment["WORLD_SIZE"])


def measure(
    settings: Settings,
    out: Path,
    watch: Callable[[str], None] = lambda text: None,
    done: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Run ``settings`` on ranks of this machine; records are appended to ``out`` as they come.

    ``watch`` is told what comes next, ``done`` of every cell once it is on disk. The CSV beside ``out`` is
    written whatever happens.

    Raises:
        LcabError: a rank refused its input, died or stalled; cells of its mask and length that were not
            measured are in ``out`` as errors.
    """
    with RunLog(out, append=True):
        pass  # it can be written, and ends with a whole line
    news = _News(out)

    def tell() -> None:
        for record in news.read():
            if record["type"] == "next":
                watch(record["at"])
            elif record["type"] == "cell":
                done(record)

    try:
        with tempfile.TemporaryDirectory(prefix=f"lcab-bench-{settings.job}-") as folder:
            asked, script = Path(folder) / "settings.json", Path(folder) / "rank.py"
            asked.write_text(settings.to_json())
            root = str(Path(cp.__file__).resolve().parents[2])
            words: dict[str, Any] = {"job": settings.job, "settings": str(asked), "out": str(out.resolve())}
            words["command"] = records.command()  # of this process: the ranks' record says how to repeat it
            script.write_text(_SCRIPT.format(root=root, **words))
            outcome = launch(
                script,
                [],
                world=settings.world,
                device=settings.device,
                logs=Path(folder) / "logs",
                timeout=float("inf"),  # a collective that does not end takes its rank down, and that all
                watch=tell,
            )
        if outcome.reason is not None:
            _mourn(out, news, settings, outcome.reason)
            at = f" ({news.at})" if news.at else ""
            raise LcabError(f"{outcome.reason}{at}; what was measured is in {out}.")
        return news.cells
    except KeyboardInterrupt:
        tell()  # what came since the last look
        raise
    finally:
        if news.cells:
            _write_csv(settings, out)


def take_part(settings: Settings, out: Path) -> list[Record] | None:
    """One of the ranks that torchrun started; the records on rank 0, None on the others."""
    found = _on_rank(settings, out)
    if int(os.environ["RANK"]):
        return None
    _write_csv(settings, out)
    return found


def _write_csv(settings: Settings, out: Path) -> None:
    cells.write_csv(cp.cells_of(out), out.with_suffix(".csv"), settings.fields)


def _on_rank(settings: Settings, out: Path) -> list[Record]:
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    with (
        cp_ranks.process_group(settings, local) as device,
        RunLog(out, append=True, enabled=rank == 0) as log,
    ):
        return _JOBS[settings.job][1](settings, device, log)


def rank_main(job: str, settings: str, out: str) -> None:
    """A rank that `measure` started. One that fails says so in its last line; one that only lost a peer waits
    to be ended, so that the launcher sees who it was that died."""
    try:
        _on_rank(_JOBS[job][0].from_json(Path(settings).read_text()), Path(out))
    except (Exception, cp_ranks.RankLostError) as error:
        traceback.print_exc()
        if _peer_gone(error):
            time.sleep(_BEREAVED)
        plain = isinstance(error, (LcabError, cp_ranks.RankLostError))
        first = ((str(error) if plain else repr(error)).strip().splitlines() or [""])[0]
        where = "" if isinstance(error, LcabError) else f"rank {os.environ['RANK']}: "
        print(f"rank.py: {where}{first}", flush=True)
        sys.stderr.flush()
        os._exit(1)  # without the process group's farewell, which waits for the others


def _peer_gone(error: BaseException) -> bool:
    """Whether it was raised in a collective, where it is another rank's doing."""
    root = error.__cause__ or error
    frames = traceback.extract_tb(root.__traceback__)
    inside = frames[-1].filename.replace(os.sep, "/") if frames else ""
    return "torch/distributed/" in inside or inside.endswith("context_parallel/collectives.py")


class _News:
    """What rank 0 has written since the last look. ``at``: what was under way."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, path.stat().st_size
        self._rest = b""
        self.cells: list[Record] = []
        self.facts: Record | None = None
        self.at = ""

    def read(self) -> list[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = self._rest + file.read()
            self._offset = file.tell()
        *lines, self._rest = text.split(b"\n")
        found = [json.loads(line) for line in lines]
        for record in found:
            if record["type"] == "cell":
                self.cells.append(record)
            elif record["type"] == "group":
                self.facts = {name: x for name, x in record.items() if name not in ("type", "time")}
            elif record["type"] == "next":
                self.at = record["at"]
        return found


def _mourn(out: Path, news: _News, settings: Settings, reason: str) -> None:
    """Cells of the mask and length under way that have no record get one."""
    news.read()
    if news.facts is None:
        return
    same = "mask", "seqlen"
    known = {
        (r["strategy"], r["layout"], r["pass"])
        for r in news.cells
        if all(r[name] == news.facts[name] for name in same)
    }
    with RunLog(out, append=True) as log:
        for strategy, layout in settings.rows(news.facts["mask"]):
            for step in settings.passes:
                if (strategy, layout, step) not in known:
                    asked = {"strategy": strategy, "layout": layout, "pass": step}
                    log.write("cell", **{**news.facts, **asked, "status": "error", "reason": reason})
    news.read()


def device_and_world(device: str, world: int | None) -> tuple[str, int]:
    """The device and the number of ranks, from what was asked for and what there is.

    Raises:
        LcabError: there are fewer GPUs than ranks, or torchrun started another number of ranks.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise LcabError(f"device {device!r} is none of auto, cpu, cuda.")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise LcabError("device 'cuda' needs a GPU, this machine has none; leave --device out.")
    here = launched_world(os.environ)
    if here is not None:
        if world not in (None, here):
            raise LcabError(f"--world {world}, but torchrun started {here} ranks; leave --world out.")
        return ("cuda" if gpus else "cpu"), here
    if world is None:
        world = max(2, gpus)
    if world < 1:
        raise LcabError(f"--world {world} must be at least 1.")
    if device == "cuda" and gpus < world:
        raise LcabError(
            f"--world {world} needs a GPU a rank, this machine has {gpus}; ask for --world {gpus}."
        )
    return ("cuda" if gpus >= world else "cpu"), world
