"""Which nodes hold a cell's ranks."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from lcab_plugin.errors import LcabError
from lcab_plugin.study.settings import SSH_NONE, Launcher, Study

_LINE = re.compile(r"(\S+)\s+slots=(\d+)$")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Node:
    """``slots``: ranks on it, a GPU each."""

    host: str
    slots: int

    def is_here(self, launcher: Launcher) -> bool:
        """Whether its agent is started on this machine."""
        names = ("localhost", LOOPBACK, socket.gethostname(), socket.getfqdn())
        return launcher.kind in ("local", "slurm") or launcher.ssh == SSH_NONE or self.host in names


def read_hostfile(path: Path) -> list[Node]:
    """The nodes of a DeepSpeed hostfile: a line `name slots=8` each, `#` begins a comment.

    Raises:
        LcabError: it cannot be read, a line says something else, or a node is named twice.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise LcabError(f"cannot read the hostfile {path}: {error.strerror}; give --hostfile.") from None
    found: dict[str, Node] = {}
    for number, line in enumerate(lines, start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = _LINE.match(text)
        if match is None or match[1] in found or int(match[2]) < 1:
            raise LcabError(f"{path}, line {number}: {text!r} is no new node; write one as `node-1 slots=8`.")
        found[match[1]] = Node(match[1], int(match[2]))
    if not found:
        raise LcabError(f"{path} names no node; write one a line as `node-1 slots=8`.")
    return list(found.values())


class Cluster:
    """The nodes that a launcher has, in the order in which they are filled."""

    def __init__(self, study: Study, base: Path) -> None:
        self._study, self._launcher = study, study.launcher
        self._nodes: list[Node] = []
        self._first = socket.gethostname()
        if self._launcher.kind in ("deepspeed", "torchrun"):
            if self._launcher.hostfile is None:
                raise LcabError(
                    f"launcher {self._launcher.kind!r} needs the nodes: a hostfile in the study's launcher "
                    "section, or --hostfile."
                )
            self._nodes = read_hostfile(base / self._launcher.hostfile)
        if self._launcher.kind == "slurm" and (held := os.environ.get("SLURM_JOB_NODELIST")):
            self._first = _hosts(held)[0]

    def place(self, world: int) -> list[Node]:
        """The nodes of so many ranks: one with free slots to spare, or several that are filled.

        Raises:
            LcabError: they do not fit, or do not fill the last node.
        """
        kind = self._launcher.kind
        if kind == "local":
            gpus = torch.cuda.device_count() if self._study.device != "cpu" else 0
            if world > gpus > 0 or (self._study.device == "cuda" and world > gpus):
                raise LcabError(f"{world} ranks need a GPU each, this machine has {gpus}.")
            return [Node(LOOPBACK, world)]
        if kind == "slurm":
            return self._of_slurm(world)
        taken: list[Node] = []
        for node in self._nodes:
            if sum(n.slots for n in taken) >= world:
                break
            taken.append(node)
        if len(taken) == 1:
            taken = [Node(taken[0].host, min(world, taken[0].slots))]
        return _filled(world, taken, "the hostfile")

    def has_room(self, world: int) -> bool:
        """Whether the nodes are there now: a job may be smaller than the study's largest cells."""
        held = os.environ.get("SLURM_JOB_NUM_NODES") if self._launcher.kind == "slurm" else None
        return held is None or -(-world // self._launcher.gpus_per_node) <= int(held)

    def _of_slurm(self, world: int) -> list[Node]:
        per_node = self._launcher.gpus_per_node
        count = -(-world // per_node)
        nodes = [Node(self._first, min(world, per_node))] * count  # srun starts at the job's first
        return _filled(world, nodes, f"nodes of {per_node} GPUs")


def _hosts(nodelist: str) -> list[str]:
    """The names in slurm's short form of them, `node[01-12]`. The study itself may run on a login node, in an
    allocation of salloc's: agents that were to meet there would wait for ever."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        raise LcabError(f"scontrol does not name the job's nodes {nodelist}: {said}.") from None
    return done.stdout.split()


def _filled(world: int, nodes: list[Node], what: str) -> list[Node]:
    if (slots := sum(node.slots for node in nodes)) != world:
        raise LcabError(f"{world} ranks do not fill {what} node by node: the nearest is {slots}.")
    return nodes
