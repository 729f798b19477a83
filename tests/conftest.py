"""The two tiers of the suite: `nightly` tests run with --nightly, and every run says which tier ran."""

from __future__ import annotations

import fcntl
import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from verified import Recorder

DESELECTED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the slow tier as well")
    parser.addoption(
        "--update-gaps",
        action="store_true",
        help="write tests/kernels/gaps.json instead of comparing with it",
    )
    parser.addoption(
        "--record-verified",
        metavar="FILE",
        type=Path,
        help="merge what the conformance run proves on this device into FILE (runs the slow tier as well)",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record-verified")
    if path is None:
        return
    config.option.nightly = True
    config.pluginmanager.register(Recorder(path))


def tier(config: pytest.Config) -> str:
    if config.getoption("--nightly"):
        return "tier: nightly (the default tier and the slow one)"
    count = config.stash.get(DESELECTED, None)
    left_out = "nightly tests deselected" if count is None else f"{count} nightly tests deselected"
    return f"tier: default ({left_out}; ./scripts/test.sh --nightly runs them)"


def pytest_report_header(config: pytest.Config) -> str:
    return tier(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--nightly"):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    config.stash[DESELECTED] = len(nightly)
    config.hook.pytest_deselected(items=nightly)
    items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Under xdist the workers collect: take the count from one of them."""
    output = getattr(node, "workeroutput", {})
    if "nightly_deselected" in output:
        node.config.stash[DESELECTED] = output["nightly_deselected"]  # type: ignore[attr-defined]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["nightly_deselected"] = session.config.stash.get(DESELECTED, 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(tier(config))


@pytest.fixture
def most_of_the_memory() -> Iterator[None]:
    """One test at a time, of however many processes test on a GPU."""
    with (Path(tempfile.gettempdir()) / "lcab_plugin_most_of_the_memory").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()
