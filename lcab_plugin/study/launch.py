"""What is typed to run cells: the program of their kind, and the agents that start its ranks."""

from __future__ import annotations

import os
import random
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcab_plugin.bench.launch import SCRIPTS, example
from lcab_plugin.study import guard
from lcab_plugin.study.cells import Cell
from lcab_plugin.study.nodes import LOOPBACK, Node
from lcab_plugin.study.settings import SSH_NONE, Launcher, Study

RECORDS = "records.jsonl"  # of the benchmarks, in the launch's folder
HOSTFILE = "hostfile"  # of the cell's nodes alone, there too
_MODULE = ("-m", "lcab_plugin.cli")
_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Launch:
    """Cells that run together: one program on one set of ranks. ``alone``: a cell that failed before."""

    cells: tuple[Cell, ...]
    alone: bool = False

    @property
    def first(self) -> Cell:
        """What they share can be read off any of them."""
        return self.cells[0]

    @property
    def name(self) -> str:
        """Of its folder, without the number of the attempt."""
        return self.first.id if self.alone or self.first.kind == "training" else self.first.turn

    @property
    def seconds(self) -> float:
        """It may take."""
        return self.first.settings["timeout"] * len(self.cells)


def records_of(cell: Cell, folder: Path) -> Path:
    """Where a cell's records are, in the folder of its launch."""
    return folder / cell.id / "metrics.jsonl" if cell.kind == "training" else folder / RECORDS


def program(launch: Launch, folder: Path, device: str) -> list[str]:
    """The arguments of Python that run these cells on a rank; records go below ``folder``."""
    cell, settings = launch.first, launch.first.settings
    if cell.kind == "training":
        return _training(cell, folder)
    flags: dict[str, Any] = {
        "masks": cell.mask,
        "seqlens": cell.seqlen,
        "passes": ",".join(settings["passes"]),
        "heads": f"{settings['heads']}:{settings['kv_heads']}",
        **{name: settings[name] for name in ("head_dim", "dtype", "batch", "documents", "seed")},
        "cell_seconds": settings["cell_seconds"],
        "out": folder / RECORDS,
    }
    if cell.kind == "kernels":
        flags |= {"kernels": ",".join(c.kernel for c in launch.cells), "device": device}
        flags |= {f"{name}s": value for name, value in cell.parameters.items()}
        return [*_MODULE, "bench", "kernels", *_words(flags)]
    flags |= {
        "strategies": ",".join(str(c.strategy) for c in launch.cells),
        "layouts": cell.layout,
        "kernel": cell.kernel,
        "baseline": settings["baseline"],
        "timeout": settings["timeout"],
        "device": device,
        **cell.degrees,
    }
    return [*_MODULE, "bench", "cp", *_words(flags)]


def _training(cell: Cell, folder: Path) -> list[str]:
    settings, framework = cell.settings, str(cell.framework)
    flags: dict[str, Any] = {
        **{name: settings[name] for name in ("preset", "dtype", "steps", "micro_batch", "seed")},
        "seqlen": cell.seqlen,
        "global_batch": settings["global_batch"] or cell.world,
        "doc_lengths": settings["documents"],
        "kernel": cell.kernel,
        "strategy": cell.strategy,
        "mask": cell.mask,
        **cell.degrees,
        "name": cell.id,
        "out": folder,
    }
    if cell.layout is not None:
        flags["layout"] = cell.layout
    words = _words(flags)
    if framework == "deepspeed":
        words += ["--deepspeed_config", str(example(f"configs/zero{settings['zero_stage']}.json"))]
    return [str(example(SCRIPTS[framework])), *words, *settings["arguments"].get(framework, ())]


def _words(flags: dict[str, Any]) -> list[str]:
    return [str(w) for name, value in flags.items() for w in (f"--{name.replace('_', '-')}", value)]


def agents(launch: Launch, nodes: Sequence[Node], study: Study, folder: Path) -> list[list[str]]:
    """The command of every node's agent, each under a guard, which ssh starts where that is another node."""
    target = program(launch, folder, study.device)
    launcher, python = study.launcher, sys.executable
    environment = (_CPU if study.device == "cpu" else {}) | launcher.env
    environment |= {n: os.environ[n] for n in ("PYTHONPATH", "OMP_NUM_THREADS") if n in os.environ}
    settings = [f"{name}={value}" for name, value in environment.items()]
    meeting = _meeting(nodes, launcher), _free_port()
    commands = []
    for rank, node in enumerate(nodes[:1] if launcher.kind == "slurm" else nodes):
        if launch.first.kind == "kernels":
            command = [python, *target]
        elif launcher.kind == "deepspeed":
            by_name = ["--module", *target[1:]] if target[0] == "-m" else target
            command = [python, *_deepspeed(folder, rank, meeting), *by_name]
        else:
            command = [python, *_torchrun(nodes, rank, meeting, folder), *target]
        if launcher.kind == "slurm":
            command = [*_srun(nodes), *command]
        command = ["env", *settings, python, guard.__file__, str(launch.seconds), *command]
        commands.append(command if node.is_here(launcher) else _over_ssh(launcher, node, command))
    return commands


def _meeting(nodes: Sequence[Node], launcher: Launcher) -> str:
    """The address of the first node, by which the others find it."""
    if launcher.kind != "slurm" and all(node.is_here(launcher) for node in nodes):
        return LOOPBACK
    return socket.gethostname() if nodes[0].host in ("localhost", LOOPBACK) else nodes[0].host


def _torchrun(nodes: Sequence[Node], rank: int, meeting: tuple[str, int], folder: Path) -> list[str]:
    host, port = meeting
    address = ["--local-addr", LOOPBACK] if host == LOOPBACK else []
    return [
        *("-m", "torch.distributed.run", "--nnodes", str(len(nodes))),
        *("--nproc-per-node", str(nodes[rank].slots), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", folder.name, *address),
    ]


def _deepspeed(folder: Path, rank: int, meeting: tuple[str, int]) -> list[str]:
    """One node's own launcher. The hostfile in the launch's folder has this cell's nodes alone."""
    host, port = meeting
    return [
        *("-m", "deepspeed.launcher.runner", "--hostfile", str(folder / HOSTFILE), "--no_ssh"),
        *("--node_rank", str(rank), "--master_addr", host, "--master_port", str(port), "--no_local_rank"),
    ]


def _srun(nodes: Sequence[Node]) -> list[str]:
    """An agent on each of the first nodes of this process's job, with all processors of its node."""
    cpus = os.environ.get("SLURM_CPUS_ON_NODE")
    return [
        *("srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--relative=0"),
        *((f"--cpus-per-task={cpus}",) if cpus else ()),
        "--kill-on-bad-exit=1",
    ]


def _over_ssh(launcher: Launcher, node: Node, command: list[str]) -> list[str]:
    assert launcher.ssh != SSH_NONE
    return [*shlex.split(launcher.ssh), node.host, f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}"]


def _free_port() -> int:
    """One below the range from which connections take theirs: it must still be free seconds later."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port
