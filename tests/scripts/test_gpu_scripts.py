"""What scripts/gpu/*.sh start, by what the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lcab_plugin import kernels
from lcab_plugin.errors import LcabError

SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu"


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[list[str], str]]:
    """Start a script where there is one GPU; what it had Python do, and its errors."""
    python, calls = tmp_path / "bin" / "python", tmp_path / "calls"
    python.parent.mkdir()
    python.write_text(
        f"""#!/bin/sh
        echo "$@" >> {calls}
        case "$*" in *device_count*) echo 1 ;; *'unavailable()'*) echo triton,sdpa_flash,cudnn,fa4 ;; esac
        """
    )
    python.chmod(0o755)
    (python.parent / "nvidia-smi").symlink_to(python)
    monkeypatch.setenv("PYTHON", str(python))
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("WORLD", "KERNELS"):
        monkeypatch.delenv(name, raising=False)

    def start(script: str) -> tuple[list[str], str]:
        command = [SCRIPTS / script, tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return calls.read_text().splitlines(), done.stderr

    return start


def test_on_one_gpu_training_starts_one_process_and_speed_first(one_gpu):
    calls, _ = one_gpu("training.sh")
    steps = [call.split() for call in calls if call.startswith("scripts/gpu/training_cells.py")]
    assert [call[1] for call in steps] == ["speed", "parity", "longest"]
    for call in steps:
        assert call[call.index("--world") + 1] == "1"
        assert call[call.index("--kernels") + 1] == "triton,sdpa_flash,cudnn,fa4"


def test_on_one_gpu_context_parallelism_says_what_it_needs(one_gpu):
    calls, errors = one_gpu("context_parallel.sh")
    assert len(calls) == 1
    assert errors.splitlines() == [
        "context parallelism needs 2 GPUs or more, one for each of 2 processes; this machine has 1"
    ]


@pytest.mark.parametrize("name", ["fa4", "flsh"])
def test_a_kernel_that_cannot_run_is_named_before_anything_starts(tmp_path, name):
    try:
        expected = f"kernel 'fa4' cannot run here: {kernels.get(name).unavailable()}"
    except LcabError as error:
        expected = str(error)
    if expected.endswith(": None"):
        pytest.skip("it can run on this machine")
    environment = {**os.environ, "PYTHON": sys.executable, "KERNELS": f"naive,{name}", "WORLD": "1"}
    command = [SCRIPTS / "training.sh", tmp_path / "out", "parity"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "rehearsal" not in line] == [expected]
    assert list((tmp_path / "out").iterdir()) == []
