"""What the machine tells of its state, from files and a program like those it has, and from none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcab_plugin.training import machine


def test_this_machine_tells_what_is_json() -> None:
    found = json.loads(json.dumps(machine.state()))
    assert found.keys() == {"load", "cpu_mhz", "cpu_governor", "cpu_temperature_c", "gpu"}
    assert found["gpu"] is None


def test_clocks_and_temperatures_are_read(tmp_path: Path) -> None:
    for core, khz in enumerate((1_200_000, 3_000_000, 2_000_000)):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(f"{khz}\n")
        (folder / "scaling_governor").write_text("powersave\n")
    for zone, heat in enumerate(("41000", "67500", "not a number")):
        folder = tmp_path / f"sys/class/thermal/thermal_zone{zone}"
        folder.mkdir(parents=True)
        (folder / "temp").write_text(heat)
    found = machine.state(root=tmp_path)
    assert found["cpu_mhz"] == [1200.0, 2000.0, 3000.0]
    assert (found["cpu_governor"], found["cpu_temperature_c"]) == ("powersave", 67.5)


def test_a_machine_without_these_files_tells_none(tmp_path: Path) -> None:
    found = machine.state(root=tmp_path)
    assert (found["cpu_mhz"], found["cpu_governor"], found["cpu_temperature_c"]) == (None, None, None)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("cpu MHz\t\t: 2500.5\ncpu MHz\t\t: 2600.5\n")
    assert machine.state(root=tmp_path)["cpu_mhz"] == [2500.5, 2550.5, 2600.5]


def test_a_gpu_is_asked_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def smi(command: list[str], **how: Any) -> Any:
        asked.append(command)
        return SimpleNamespace(stdout="41, 1980, 1980, 2619, 320.15, [N/A], 0x0000000000000004\n")

    monkeypatch.setattr(subprocess, "run", smi)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="aa-bb"))
    assert machine.state("cuda")["gpu"] == {
        "temperature_c": 41.0,
        "sm_mhz": 1980.0,
        "sm_max_mhz": 1980.0,
        "memory_mhz": 2619.0,
        "power_w": 320.15,
        "utilization_percent": None,
        "throttle_reasons": "0x0000000000000004",
    }
    assert asked[0][:2] == ["nvidia-smi", "--id=GPU-aa-bb"]

    def missing(command: list[str], **how: Any) -> Any:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", missing)
    assert machine.state("cuda")["gpu"] is None
