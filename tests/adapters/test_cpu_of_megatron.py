"""What stands in for CUDA where Megatron runs on a CPU: refused beside a GPU, and said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcab_plugin.errors import LcabError

pytest.importorskip("megatron.core")

PROGRAM = """
import torch
from lcab_plugin.adapters.megatron import cpu
before = torch.zeros(2).type()
cpu.install()
cpu.install()
x = torch.ones(3, device="cuda", pin_memory=True).cuda(non_blocking=True)
print(before, x.device, x.type(), x.bfloat16().type(), torch.device(torch.cuda.current_device()))
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
torch.manual_seed(5)
drawn = torch.rand(2)
tracker = get_cuda_rng_tracker()
tracker.add("a", 5)
with tracker.fork("a"):
    print(torch.equal(torch.rand(2), drawn))
torch.manual_seed(7)
with tracker.fork("a"):
    torch.rand(2)
after = torch.rand(2)
torch.manual_seed(7)
print(torch.equal(torch.rand(2), after), torch.empty(2, device="meta").device, torch.cuda.is_available())
"""


def test_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcab_plugin.adapters.megatron import cpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(LcabError, match="not for a machine with a GPU"):
        cpu.install()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is refused beside a GPU")
def test_cuda_means_the_cpu_and_random_states_are_kept() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "torch.FloatTensor cpu torch.cuda.FloatTensor torch.cuda.BFloat16Tensor cpu",
        "True",
        "True meta False",
    ]
    assert done.stderr.count("Megatron's CUDA calls mean the CPU") == 1
