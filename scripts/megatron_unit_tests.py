"""Megatron-LM's own test of a core attention, against the plug-in's, on a CPU.

    python scripts/megatron_unit_tests.py /path/to/Megatron-LM

It is `_test_parallel_attention_correctness` of tests/unit_tests/transformer/test_attention.py (core_v0.17 and
later): the attention layer of a GPT in one process is saved in a distributed checkpoint, loaded with tensor
and context parallelism, and must give the same output and gradient. Megatron's run needs TransformerEngine
and GPUs; here specs are the local ones (whose norms refuse sequence parallelism, and are told that there is
none), and the one process has Megatron's own DotProductAttention where theirs has the attention under test as
well. Fused RoPE, which is TransformerEngine's, is left out. Prints a line for each case.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import os
import socket
import sys
import tempfile
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typing_extensions

from lcab_plugin.adapters import megatron as lcab_megatron
from lcab_plugin.adapters.megatron import cpu
from lcab_plugin.config import AttentionConfig

# (tensor parallel, sequence parallel, context parallel), as Megatron parametrizes it
DEGREES = ((4, False, 1), (4, True, 1), (1, False, 4), (2, False, 2), (2, True, 2))
WORLD = 4
STRATEGIES = ("ring_p2p", "ring_all_gather", "ulysses", "group_cast")
Case = tuple[dict[str, Any], str]


def pretend() -> None:
    """What ``megatron.training`` and the test ask of CUDA and of Python 3.12, answered for one CPU."""
    cpu.install()
    typing.override = getattr(typing, "override", typing_extensions.override)  # type: ignore[attr-defined]
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: int(dist.get_world_size() if dist.is_initialized() else 1)
    torch.cuda.set_device = lambda device: None
    torch.cuda.memory.empty_cache = torch.cuda.empty_cache = lambda: None
    torch.cuda.Stream = lambda *args, **kwargs: torch.cuda.current_stream()  # type: ignore[misc,assignment]
    torch.cuda.get_device_properties = lambda *args: types.SimpleNamespace(major=8, minor=0)


def accept_sequence_parallel() -> None:
    """Megatron's norms without TransformerEngine work on any part of a sequence, but refuse to be built; what
    they would have to tell is how to sum their gradients, which the test does not look at."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    new = WrappedTorchNorm.__new__

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        config = copy.copy(config)
        config.sequence_parallel = False
        return new(cls, config, *args, **kwargs)

    WrappedTorchNorm.__new__ = build


def plugged(strategy: str) -> Any:
    """GPTModel for the test: of local specs, with the plug-in where there is any parallelism."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    def build(config: Any, transformer_layer_spec: Any, **others: Any) -> Any:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        cp = parallel_state.get_context_parallel_world_size()
        parallel = cp * parallel_state.get_tensor_model_parallel_world_size() > 1
        if parallel:
            own = AttentionConfig(kernel="sdpa_math", strategy=strategy if cp > 1 else "none")
            spec = lcab_megatron.swap_core_attention(spec, own)
        model = GPTModel(config=config, transformer_layer_spec=spec, **others)
        assert bool(lcab_megatron.describe(model)) == parallel
        return model

    return build


def cases() -> Iterator[Case]:
    """Megatron's parameters, each with every strategy that takes them."""
    for (tp, sp, cp), packed, norm, gate in itertools.product(DEGREES, *[(False, True)] * 3):
        given = {"tp": tp, "sp": sp, "cp": cp, "packed": packed, "qk_layernorm": norm, "output_gate": gate}
        for strategy in STRATEGIES if cp > 1 else ("none",):
            yield given, strategy


def attempt(module: Any, given: dict[str, Any], strategy: str, folder: Path) -> str | None:
    """Run one case; why it failed."""
    from megatron.core.transformer import TransformerConfig

    module.GPTModel = plugged(strategy)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=128,
        num_attention_heads=4,
        normalization="RMSNorm",
        bf16=True,
        qk_layernorm=given["qk_layernorm"],
        attention_output_gate=given["output_gate"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
    )
    degrees = (given["tp"], given["sp"], given["cp"])
    try:
        module._test_parallel_attention_correctness(
            config, None, folder, 1e-2, 1e-2, *degrees, sequence_packing=given["packed"]
        )
    except Exception as error:
        module.Utils.destroy_model_parallel()
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def work(rank: int, checkout: str, port: int, folder: str, todo: list[Case]) -> None:
    """One of the four ranks; rank 0 prints, and leaves the number of failures in a file of ``folder``."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHDYNAMO_DISABLE": "1"}
    torch.set_num_threads(1)
    sys.path.insert(0, checkout)
    dist.init_process_group("gloo")
    pretend()
    module = importlib.import_module("tests.unit_tests.transformer.test_attention")
    accept_sequence_parallel()
    failed = 0
    for given, strategy in todo:
        problem = attempt(module, given, strategy, Path(folder))
        failed += problem is not None
        if rank == 0:
            words = " ".join(f"{name}={value}" for name, value in given.items())
            print(f"{words} {strategy}: {problem or 'passed'}", flush=True)
            Path(folder, "failed").write_text(str(failed))
    dist.barrier()
    dist.destroy_process_group()


def main(checkout: str) -> int:
    """Every case, a few to a launch, as gloo's groups leave threads behind; the number that failed."""
    failed = 0
    for _, group in itertools.groupby(cases(), key=lambda case: tuple(case[0].values())[:5]):
        with tempfile.TemporaryDirectory() as folder, socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
            s.close()
            mp.spawn(work, (checkout, port, folder, list(group)), WORLD)
            failed += int(Path(folder, "failed").read_text())
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) > 0)
