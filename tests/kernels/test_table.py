"""Kernels by name: the table, what third parties add, and the reason where one cannot run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gaps
import pytest
import torch
from cases import families

import lcab_plugin as lcab
from lcab_plugin import kernels, masks, operation
from lcab_plugin.cli.kernels import kernel_rows

MODULE = """
import lcab_plugin.kernels.naive as naive

class Theirs(naive.Naive):
    name = "theirs"

    def unsupported(self, q, k, v, mask, options, needs_backward):
        return "it has no backward" if needs_backward else None

KERNEL = Theirs()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a real distribution with one kernel module of its own, named theirs."""

    def forget():
        for cached in (kernels._third_party, kernels.get):
            cached.cache_clear()
        operation._available.discard("theirs")

    def write(source):
        (tmp_path / "their_kernels.py").write_text(source)
        info = tmp_path / "their_kernels-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-kernels\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[lcab_plugin.kernels]\ntheirs = their_kernels:KERNEL\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "their_kernels", raising=False)
        forget()

    yield write
    forget()


@pytest.fixture
def theirs(install):
    install(MODULE)
    return kernels.get("theirs")


def test_a_third_party_adds_a_kernel(theirs):
    assert kernels.names()[-1] == "theirs"
    assert kernels.availability()["theirs"] is None
    x = torch.randn(1, 8, 2, 4)
    mask = masks.causal(8)
    torch.testing.assert_close(lcab.attention(x, x, x, mask, kernel="theirs"), lcab.attention(x, x, x, mask))


def test_the_reason_reaches_the_user(theirs):
    x, mask = torch.randn(1, 8, 2, 4), masks.causal(8)
    with pytest.raises(
        lcab.UnsupportedError, match="kernel 'theirs' cannot run this attention: it has no back"
    ):
        lcab.attention(x.requires_grad_(), x, x, mask, kernel="theirs")
    with torch.no_grad():
        lcab.attention(x, x, x, mask, kernel="theirs")


def test_a_missing_library_reaches_the_user(theirs, monkeypatch):
    x, mask = torch.randn(1, 8, 2, 4), masks.causal(8)
    monkeypatch.setattr(type(theirs), "unavailable", lambda self: "libtheirs is not installed")
    assert kernels.availability()["theirs"] == "libtheirs is not installed"
    with pytest.raises(lcab.UnsupportedError, match="libtheirs is not installed"):
        lcab.attention(x, x, x, mask, kernel="theirs")


def test_a_broken_module_is_its_kernel_s_reason(install):
    install("import a_library_nobody_has")
    assert "No module named 'a_library_nobody_has'" in kernels.availability()["theirs"]
    row = next(row for row in kernel_rows() if row["name"] == "theirs")
    assert row["reason"].startswith("its module cannot be imported")
    assert row["verified"] == "nothing yet"


@pytest.mark.parametrize("name", kernels._TABLE)
def test_every_kernel_says_what_it_is(name):
    kernel = kernels.get(name)
    assert kernel.name == name
    reason = kernels.availability()[name]
    if reason is None:
        assert re.search(r" \d+\.\d+", kernel.version()), "a library and its version"
    else:
        assert reason[0] != " "
        assert not reason.endswith(".")
        assert "\n" not in reason


@pytest.mark.parametrize("name", kernels._TABLE)
def test_features_are_what_unsupported_says(name):
    """What `lcab kernels` shows is served somewhere, and what is served is shown."""
    features = kernels.get(name).features
    devices = {device.split()[0] for device in features.devices}
    cells = [cell for device in devices for cell in gaps.supported(kernels.get(name), device)]
    dtypes = {cell.dtype for cell in cells}
    assert dtypes == {str(dtype).removeprefix("torch.") for dtype in features.dtypes}
    calls = {cell.call for cell in cells}
    assert ("backward" in calls) == features.backward
    assert ("deterministic backward" in calls) == features.deterministic
    assert ("soft cap" in calls) == features.softcap
    assert ("half the value head_dim" in calls) == features.value_dim


@pytest.mark.parametrize("name", kernels._TABLE)
def test_an_explanation_covers_the_mask(name):
    for mask in families().values():
        calls = kernels.get(name).explain(mask, 64)
        assert sum(call.area for call in calls) == mask.area
        assert all(call.what and call.count > 0 and call.computed >= call.area for call in calls)


def test_the_records_name_kernels_of_the_table():
    records = kernels._records()
    assert set(records) <= set(kernels._TABLE)
    for entries in records.values():
        assert all(entry["cells"] > 0 and entry["dtypes"] and entry["head_dims"] for entry in entries)
        assert len({entry["device"] for entry in entries}) == len(entries)


def test_verified_reads_the_records(monkeypatch):
    entry = {
        "device": "CPU",
        "version": "torch 2.13.0+cpu",
        "torch": "2.13.0",
        "cells": 240,
        "backward": True,
    }
    gpu = {"device": "NVIDIA H100", "version": "flash-attn 2.8.3", "torch": "2.13.0", "cells": 9}
    monkeypatch.setattr(
        kernels, "_records", lambda: {"naive": [entry, gpu | {"backward": False, "changed": "GQA"}]}
    )
    assert kernels.verified("naive") == (
        "CPU (torch 2.13.0: 240 cells), H100 (flash-attn 2.8.3, torch 2.13.0: 9 cells, forward only; "
        "not since GQA changed)"
    )
    assert kernels.verified("fa2") == "nothing yet"


MATRIX = """import pytest, torch
from verified import CELL, Recorder

@pytest.fixture
def cell(request):
    request.node.user_properties.append((CELL, calls := []))
    return lambda dtype: calls.append({"dtype": dtype, "head_dim": 64, "backward": True})

@pytest.mark.parametrize("cell", ["naive", "sdpa_math", "sdpa_flash"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float64", "none"])
def test_cell(request, cell, dtype):
    if dtype == "none":
        pytest.skip("refused")
    cell(dtype)
    assert "sdpa_math" not in request.node.name or FINE

@pytest.mark.parametrize("number", range(2))
def test_other(number):
    pass
"""
CONFTEST = """from pathlib import Path
import torch
from verified import Recorder

torch.cuda.is_available = lambda: False

def pytest_configure(config):
    config.pluginmanager.register(Recorder(Path("verified.json")))
"""


def recorded(folder, *arguments, fine=False):
    """The records after a run of pytest over three kernels: sdpa_math fails unless ``fine``."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_matrix.py").write_text(f"FINE = {fine}\n{MATRIX}")
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if fine else 1), done.stdout + done.stderr
    return json.loads((folder / "verified.json").read_text())


@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["one process", "workers"])
def test_only_a_whole_run_is_recorded(tmp_path, processes):
    """One whose every cell passed or was refused; not one with a failed or a deselected cell."""
    records = recorded(tmp_path, *processes, "--deselect", "test_matrix.py::test_cell[float64-sdpa_flash]")
    assert list(records) == ["naive"]
    assert records["naive"][0] | {"date": ""} == {
        "device": "CPU",
        "version": f"torch {torch.__version__}",
        "torch": torch.__version__.split("+")[0],
        "dtypes": ["float32", "float64"],
        "head_dims": [64],
        "cells": 2,
        "backward": True,
        "date": "",
    }
    gpu = {"device": "NVIDIA H100", "cells": 3}
    (tmp_path / "verified.json").write_text(json.dumps({"sdpa_math": [records["naive"][0], gpu]}))
    assert recorded(tmp_path, *processes)["sdpa_math"] == [gpu]
    again = recorded(tmp_path, *processes, fine=True)
    assert list(again) == ["naive", "sdpa_math", "sdpa_flash"]
    assert again["sdpa_math"][0] == gpu
