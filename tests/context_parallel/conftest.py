"""``--cp-device``: what the conformance suite of context parallelism runs on."""

from __future__ import annotations

import pytest
import torch

DEVICES = ("cpu", "cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cp-device",
        choices=DEVICES,
        default=DEVICES[0],
        help="what test_conformance.py and test_kernels.py run on: gloo, or NCCL with a GPU a process",
    )


@pytest.fixture(scope="session")
def cp_device(request: pytest.FixtureRequest) -> str:
    """A run of all of tests/ reads this file too late to take the option, and has the default."""
    device = request.config.getoption("--cp-device", default=DEVICES[0])
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.fail(f"--cp-device cuda needs 2 GPUs or more, here are {torch.cuda.device_count()}")
    return device
