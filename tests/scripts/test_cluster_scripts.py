"""The scripts for clusters, on this machine as two nodes, with stand-ins for a cluster's commands."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("scripts/slurm/*.sbatch"), *ROOT.glob("scripts/hostfile/*.sh")])
SMALL = [
    "--preset",
    "tiny",
    "--dtype",
    "fp32",
    "--seqlen",
    "256",
    "--steps",
    "2",
    "--ulysses",
    "2",
    "--ring",
    "1",
]

SSH = '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done\n' + (
    'echo "$1: $2" >> "$(dirname "$0")/reached"\ncd / && exec sh -c "$2"\n'
)
SRUN = '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\n"$@" & "$@" && wait\n'
SCONTROL = "#!/bin/sh\necho localhost && echo node-2\n"


def test_they_are_shell() -> None:
    assert len(SCRIPTS) == 6
    for path in SCRIPTS:
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        assert os.access(path, os.X_OK) or path.suffix == ".sbatch"


@pytest.mark.nightly
@pytest.mark.parametrize(
    "script", ["hostfile/train_torchrun.sh", "slurm/train_deepspeed.sbatch", "slurm/train_megatron.sbatch"]
)
def test_two_nodes_train(tmp_path: Path, script: str) -> None:
    for name, text in (("ssh", SSH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("# two\nlocalhost slots=1\nnode-2 slots=1\n")
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]"}
    job |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "1", "SLURM_GPUS_ON_NODE": "1"}
    cpu = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "NCCL_DEBUG": "WARN"}
    path = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOSTFILE": str(tmp_path / "hosts"),
    }
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *SMALL, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | job | cpu | path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (metrics,) = tmp_path.glob("out/*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["type"] for line in lines if line["type"] in ("run", "step", "end")] == [
        "run",
        "step",
        "step",
        "end",
    ]
    assert (lines[0]["world"], lines[0]["cp"]) == (2, 2)
    if "hostfile" in script:
        reached = (tmp_path / "reached").read_text()
        assert [line.split(":")[0] for line in sorted(reached.splitlines())] == ["localhost", "node-2"]
        assert reached.count("NCCL_DEBUG=WARN") == 2
