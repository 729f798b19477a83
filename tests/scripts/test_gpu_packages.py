"""scripts/gpu/packages.sh: what a GPU machine without a package index needs."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu" / "packages.sh"


@pytest.mark.nightly  # downloads
def test_the_frameworks_are_packed_for_another_python(tmp_path):
    subprocess.run([SCRIPT, tmp_path, "frameworks"], check=True, timeout=300, capture_output=True)
    with tarfile.open(tmp_path / "frameworks.tar.xz") as packed:
        names = {name.removeprefix("./") for name in packed.getnames()}
    assert {"deepspeed/__init__.py", "megatron/core/__init__.py", "pydantic/__init__.py"} <= names
    compiled = {name for name in names if name.startswith("pydantic_core/") and name.endswith(".so")}
    assert [name for name in compiled if "cpython-312" in name or "abi3" in name]


def test_a_part_that_it_does_not_know_is_named(tmp_path):
    command = [SCRIPT, tmp_path, "cudnn", "te"]  # before anything is downloaded
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "no part is called te\n")
    assert list(tmp_path.iterdir()) == []
