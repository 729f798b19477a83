"""``--record-verified FILE``: what a conformance run proved, merged into the records `lcab kernels` shows."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lcab_plugin import kernels

# User properties of a test of the matrix: the calls that it made, and the kernel that it is of.
CELL, KERNEL = "conformance cell", "conformance kernel"


class Recorder:
    """Counts a run's cells by kernel and writes the kernels that passed every one of them.

    A kernel with a failed cell loses its record of this device; one whose cells were not all run (deselected,
    stopped early) keeps what it had. Under xdist (``-n``) the workers collect, and this process counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.collected: Counter[str] = Counter()  # cells by kernel
        self.ran: Counter[str] = Counter()
        self.failed: set[str] = set()
        self.passed: dict[str, list[list[dict[str, Any]]]] = {}

    @pytest.hookimpl(tryfirst=True)  # before anything is deselected
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            callspec = getattr(item, "callspec", None)
            if callspec is not None and "cell" in callspec.params:
                item.user_properties.append((KERNEL, callspec.params["cell"]))
                self.collected[callspec.params["cell"]] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[KERNEL] = dict(self.collected)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.collected = Counter(getattr(node, "workeroutput", {}).get(KERNEL, self.collected))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = dict(report.user_properties).get(KERNEL)
        if not isinstance(name, str):
            return
        if report.failed:
            self.failed.add(name)
        if report.skipped or report.when == "call":
            self.ran[name] += 1
        calls = dict(report.user_properties).get(CELL)
        if report.when == "call" and report.passed and calls:
            self.passed.setdefault(name, []).append(calls)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        records = json.loads(self.path.read_text()) if self.path.exists() else {}
        for name in sorted(self.collected):
            others = [entry for entry in records.get(name, []) if entry["device"] != device]
            if name in self.failed:
                records[name] = others
                terminalreporter.write_line(f"{name}: a cell failed, so it is not verified on {device}")
            elif left := self.collected[name] - self.ran[name]:
                terminalreporter.write_line(f"{name}: {left} cells did not run, its record stays")
            elif name in self.passed:
                records[name] = [*others, self._entry(name, device)]
                terminalreporter.write_line(f"{name}: verified on {device}")
        self.path.write_text(one_line_each({n: records[n] for n in kernels.names() if records.get(n)}))

    def _entry(self, name: str, device: str) -> dict[str, Any]:
        calls = [call for cell in self.passed[name] for call in cell]
        return {
            "device": device,
            "version": kernels.get(name).version(),
            "torch": torch.__version__.split("+")[0],
            "dtypes": sorted({call["dtype"] for call in calls}),
            "head_dims": sorted({call["head_dim"] for call in calls}),
            "cells": len(self.passed[name]),
            "backward": any(call["backward"] for call in calls),
            "date": datetime.date.today().isoformat(),
        }


def one_line_each(records: dict[str, list[dict[str, Any]]]) -> str:
    """As JSON, an entry a line."""
    lines = (
        f" {json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, entries)) + "\n ]"
        for name, entries in records.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"
