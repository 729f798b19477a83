"""The state of the machine, as far as it says: a slow clock or a busy neighbour explains a time."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

# of nvidia-smi: names that all drivers since 2016 know; ours, theirs
_GPU = {
    "temperature_c": "temperature.gpu",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "utilization_percent": "utilization.gpu",
    "throttle_reasons": "clocks_throttle_reasons.active",
}


def state(device: torch.device | str = "cpu", root: Path = Path("/")) -> dict[str, Any]:
    """Load, clocks and temperatures; None where the machine does not tell.

    ``load``: mean number of running processes in the last 1, 5 and 15 minutes. ``cpu_mhz``: lowest, median
    and highest of all cores. ``cpu_governor``: cpufreq's, of the first core. ``cpu_temperature_c``: of the
    hottest zone. ``gpu``: this device's, by nvidia-smi; ``throttle_reasons`` is its bit mask.
    """
    cores = root / "sys/devices/system/cpu"
    mhz = [khz / 1000 for khz in _numbers(cores.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))] or _cpuinfo(root)
    hot = [c / 1000 for c in _numbers((root / "sys/class/thermal").glob("thermal_zone*/temp"))]
    governor = None
    with suppress(OSError):
        governor = (cores / "cpu0/cpufreq/scaling_governor").read_text().strip()
    return {
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "cpu_mhz": [min(mhz), statistics.median(mhz), max(mhz)] if mhz else None,
        "cpu_governor": governor,
        "cpu_temperature_c": max(hot, default=None),
        "gpu": _gpu(device) if torch.device(device).type == "cuda" else None,
    }


def _numbers(files: Iterable[Path]) -> list[float]:
    found = []
    for file in files:
        with suppress(OSError, ValueError):
            found.append(float(file.read_text()))
    return found


def _cpuinfo(root: Path) -> list[float]:
    """MHz of every core, where cpufreq is not to be had (in a virtual machine)."""
    with suppress(OSError, ValueError):
        lines = (root / "proc/cpuinfo").read_text().splitlines()
        return [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return []


def _gpu(device: torch.device | str) -> dict[str, float | str | None] | None:
    """What nvidia-smi says; None where there is none."""
    with suppress(OSError, subprocess.SubprocessError, AttributeError):
        uuid = torch.cuda.get_device_properties(device).uuid
        query = ["--query-gpu=" + ",".join(_GPU.values()), "--format=csv,noheader,nounits"]
        asked = subprocess.run(
            ["nvidia-smi", f"--id=GPU-{uuid}", *query], capture_output=True, text=True, timeout=10, check=True
        )
        return dict(zip(_GPU, map(_value, asked.stdout.strip().split(",")), strict=False))
    return None


def _value(text: str) -> float | str | None:
    """A number, another word (a bit mask), or None for what this GPU does not support."""
    text = text.strip()
    with suppress(ValueError):
        return float(text)
    return None if text.startswith("[") else text
