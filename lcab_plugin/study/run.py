"""Runs a study: launch after launch until every cell has its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lcab_plugin.errors import LcabError
from lcab_plugin.study import processes
from lcab_plugin.study.cells import Cell, expand
from lcab_plugin.study.launch import HOSTFILE, Launch, agents, records_of
from lcab_plugin.study.nodes import Cluster
from lcab_plugin.study.processes import Outcome
from lcab_plugin.study.settings import Study
from lcab_plugin.study.state import Result, State, locked

Watch = Callable[[Launch, int, int], None]  # launch, cells that are settled, records or steps it has so far


class Runner:
    """A study in its folder. ``base``: the folder that paths in the study start from; ``worlds``: run cells
    of these alone.

    Raises:
        LcabError: the hostfile cannot be read.
    """

    def __init__(self, study: Study, out: Path, base: Path, worlds: Sequence[int] = ()) -> None:
        self.study, self.out = study, out.resolve()
        self.cluster = Cluster(study, base)
        self.cells = expand(study, self.cluster.place)
        known = sorted({cell.world for cell in self.cells})
        if wrong := set(worlds) - set(known):
            raise LcabError(
                f"no cell has {min(wrong)} ranks; --world is one of {', '.join(map(str, known))}."
            )
        self.worlds = [world for world in worlds or known if self.cluster.has_room(world)]

    def state(self) -> State:
        """What has been done so far."""
        return State(self.study.name, self.out, self.cells)

    def launches(self) -> list[tuple[Launch, list[list[str]]]]:
        """What would run now, and the commands; nothing is started."""
        grouped: dict[str, list[Cell]] = {}
        for result in self.state().results:
            if not result.settled and result.cell.world in self.worlds:
                grouped.setdefault(result.cell.turn, []).append(result.cell)
        found = [Launch(tuple(cells)) for cells in grouped.values()]
        return [(launch, self._commands(launch, self.state().folder(launch))) for launch in found]

    def run(self, watch: Watch) -> list[Result]:
        """Run what is open; results of all cells. Interrupted, it keeps what is measured.

        Raises:
            LcabError: another study runs these cells.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out, self.worlds):
            state = self.state()
            state.save()  # what cannot run is on disk before anything is launched
            while launch := state.next(self.worlds):
                self._launch(launch, state, watch)
                state.save()
        state = self.state()  # other jobs may have run cells of other worlds meanwhile
        state.save()
        return state.results

    def _launch(self, launch: Launch, state: State, watch: Watch) -> None:
        folder = state.folder(launch)
        folder.mkdir(parents=True, exist_ok=True)
        commands = self._commands(launch, folder)
        nodes = self.cluster.place(launch.first.world)
        (folder / HOSTFILE).write_text("".join(f"{node.host} slots={node.slots}\n" for node in nodes))
        state.begin(launch, commands, folder)
        settled = sum(result.settled for result in state.results)
        path = records_of(launch.first, folder)

        def look() -> None:
            lines = path.read_bytes() if path.exists() else b""
            watch(launch, settled, lines.count(b'{"type": "cell"') + lines.count(b'{"type": "step"'))

        outcome: Outcome = processes.run(commands, folder, launch.seconds, look)
        state.end(folder, outcome)
        settled = sum(result.settled for result in state.results)
        look()

    def _commands(self, launch: Launch, folder: Path) -> list[list[str]]:
        return agents(launch, self.cluster.place(launch.first.world), self.study, folder)
