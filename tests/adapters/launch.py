"""Starts ``deepspeed_worker.py`` with each launcher that people use."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _port() -> int:
    """A free port below the range from which connections take theirs: it must still be free seconds later."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


class Answers(NamedTuple):
    """What every rank saved, and everything they printed."""

    ranks: list[Any]
    output: str


def launch(how: str, world: int, function: str, given: Any, folder: Path, timeout: float = 400) -> Answers:
    """Run ``function`` of the worker with launcher ``how`` ("torchrun", "deepspeed" or "python").

    No rank may build a C++ operator: the folder that DeepSpeed builds in must stay absent.
    """
    worker = [str(ROOT / "tests/adapters/deepspeed_worker.py"), function]
    worker += [str(folder / "input.json"), str(folder / "answer")]
    (folder / "input.json").write_text(json.dumps(given))
    command = {
        "torchrun": ["-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_port"],
        "deepspeed": ["-m", "deepspeed.launcher.runner", f"--num_gpus={world}", "--master_port"],
        "python": [],
    }[how]
    if command:
        command = [*command, str(_port())]
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "DS_CONFIG": str(folder / "ds_config.json"),
    }
    process = subprocess.Popen(
        [sys.executable, *command, *worker],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"hung for {timeout} s:\n{output[-6000:]}") from None
    assert process.returncode == 0, output[max(0, output.find("Traceback") - 500) :][:6000]
    assert not (folder / "extensions").exists()
    answers = [torch.load(folder / f"answer.{rank}", weights_only=False) for rank in range(world)]
    return Answers(answers, output)
