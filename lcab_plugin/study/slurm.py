"""Jobs of a study: a script for every number of nodes, which runs its part in the job's allocation."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcab_plugin.errors import LcabError
from lcab_plugin.study.nodes import Cluster
from lcab_plugin.study.settings import Study

_SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --time={time}
#SBATCH --signal=B:TERM@120
#SBATCH --output={log}
{further}set -euo pipefail
cd {folder}
# exec: the signal before the time limit reaches the study, which ends its cell and keeps what is measured.
exec {command}
"""


@dataclass(frozen=True)
class Job:
    """``worlds``: of the cells it runs; ``submitted``: what sbatch said, None where there is no sbatch."""

    script: Path
    nodes: int
    worlds: tuple[int, ...]
    submitted: str | None = None


def inside_job() -> bool:
    """Whether this process is in a job's allocation."""
    return "SLURM_JOB_ID" in os.environ


def write_jobs(
    study: Study, cluster: Cluster, worlds: Sequence[int], out: Path, words: list[str]
) -> list[Job]:
    """A job script for every number of nodes that these ``worlds`` need, the small ones first.

    ``words``: of the command line that runs the study, to which each job adds its worlds.
    """
    by_nodes: dict[int, list[int]] = {}
    for world in sorted(set(worlds)):
        by_nodes.setdefault(len(cluster.place(world)), []).append(world)
    launcher, jobs = study.launcher, []
    for nodes, held in sorted(by_nodes.items()):
        script = out / "slurm" / f"nodes{nodes}.sbatch"
        script.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lcab_plugin.cli", *words]
        text = _SCRIPT.format(
            name=f"{study.name}-{nodes}",
            nodes=nodes,
            gpus=launcher.gpus_per_node,
            time=launcher.time,
            log=out / "slurm" / "%x-%j.log",
            further="".join(f"#SBATCH {option}\n" for option in launcher.sbatch),
            folder=shlex.quote(os.getcwd()),
            command=shlex.join([*command, *(w for n in held for w in ("--world", str(n)))]),
        )
        script.write_text(text)
        jobs.append(Job(script, nodes, tuple(held)))
    return jobs


def submit(job: Job) -> Job:
    """Hand a job to sbatch, if there is one.

    Raises:
        LcabError: sbatch refused it.
    """
    if shutil.which("sbatch") is None:
        return job
    done = subprocess.run(["sbatch", str(job.script)], capture_output=True, text=True)
    if done.returncode:
        raise LcabError(f"sbatch refused {job.script}: {done.stderr.strip() or done.stdout.strip()}")
    return Job(job.script, job.nodes, job.worlds, done.stdout.strip())
