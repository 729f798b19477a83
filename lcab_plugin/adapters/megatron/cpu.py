"""What Megatron needs to run on a CPU: its sources name CUDA where any device would do.

``install`` changes this process until it ends, and only where there is no CUDA. Attention is not touched.
"""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError


def install() -> None:
    """Let Megatron's CUDA calls mean the CPU, and say so on standard error; a second call does nothing.

    Raises:
        LcabError: this process has a GPU.
    """
    if torch.cuda.is_available():
        raise LcabError(
            "Megatron's CPU support is not for a machine with a GPU; leave cpu.install() out there."
        )
    _install()


@cache
def _install() -> None:
    _replace_cuda_functions()
    _use_cpu_random_state()
    _CudaMeansCpu().__enter__()  # for good, in this thread, which is where autograd runs on a CPU
    if collectives.rank() == 0:
        print(
            "lcab: no CUDA here, so Megatron's CUDA calls mean the CPU (adapters.megatron.cpu).",
            file=sys.stderr,
        )


class _CudaMeansCpu(TorchFunctionMode):
    """``device="cuda"``, ``.cuda()`` and ``pin_memory=True`` mean the CPU, and CPU tensors say the type name
    of CUDA's, which Megatron's optimizers compare with."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


class _Stream:
    """A stream on which all work is done already."""

    def wait_stream(self, stream: object) -> None:
        """Nothing is under way."""

    def wait_event(self, event: object) -> None:
        """Nothing is under way."""

    def synchronize(self) -> None:
        """Nothing is under way."""


def _replace_cuda_functions() -> None:
    """The functions of ``torch.cuda`` that Megatron calls in training."""
    replaced: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": nullcontext,
        "get_rng_state": lambda device="cpu": torch.get_rng_state(),
        "manual_seed": torch.manual_seed,
    }
    for name, function in replaced.items():
        setattr(torch.cuda, name, function)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state


def _use_cpu_random_state() -> None:
    """Megatron's trackers of random states keep the CPU's generator, which they warn of as a mistake."""
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    quiet = "CPU RNG state changed"
    logging.getLogger(random.__name__).addFilter(lambda record: quiet not in record.getMessage())
