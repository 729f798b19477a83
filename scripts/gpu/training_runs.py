"""Which training runs each step of `training.sh` does, the most telling first: their time may end.

Without a GPU the same runs train preset tiny on short sequences for three steps, with kernels that a CPU has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

CUDA = torch.cuda.is_available()
BASELINE = "sdpa_flash"
EXACT = "sdpa_efficient" if CUDA else "sdpa_flash"  # PyTorch's fused kernel that takes float32
SHORTER = 64  # a rehearsal's sequences are so many times shorter
SCRIPTS = {"deepspeed": "examples/train_gpt.py", "megatron": "examples/train_gpt_megatron.py"}
RECOMPUTE = {"deepspeed": ("--activation-checkpointing",), "megatron": ("--recompute", "full")}
MASKS = ("causal", "causal_document")


@dataclass(frozen=True)
class Run:
    """One training run, of ``framework``, on ``gpus``. A failure ends its ``series``: ascending lengths."""

    name: str
    framework: str
    arguments: tuple[str, ...]
    gpus: tuple[int, ...]
    series: str | None = None
    seqlen: int = 0


def training(
    name: str,
    gpus: Sequence[int],
    framework: str = "deepspeed",
    *,
    zero: int = 1,
    series: str | None = None,
    recompute: bool = False,
    **flags: Any,
) -> Run:
    """A run by the flags of its script. ``zero``: DeepSpeed's stage; under Megatron 1 is its distributed
    optimizer."""
    given = {"eval_batches": 0, "micro_batch": 1, "global_batch": 1, "dtype": "bf16", **flags}
    if not CUDA:
        given |= {"preset": "tiny", "seqlen": given["seqlen"] // SHORTER, "dtype": "fp32"}
        given["steps"] = min(given["steps"], 3)
    strategy, more = given["strategy"], list(RECOMPUTE[framework] if recompute else ())
    if framework == "deepspeed":
        more += ["--deepspeed_config", f"examples/configs/zero{zero}.json"]
        if strategy != "none":
            more += ["--layout", "balanced" if strategy == "group_cast" else "zigzag"]
    elif zero:
        more += ["--distributed-optimizer"]
    pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in given.items())
    arguments = (*(part for pair in pairs for part in pair), *more)
    return Run(name, framework, arguments, tuple(gpus), series, given["seqlen"])


def smoke(world: int, kernels: Sequence[str]) -> Iterator[Run]:
    """Five steps of each framework, so that what cannot run says so first."""
    shape: dict[str, Any] = {"preset": "125m", "seqlen": 8192, "steps": 5, "mask": "causal_document"}
    cells = [*zip(kernels[:2], ("ring_p2p", "ulysses"), strict=False)]
    for framework in SCRIPTS:
        for kernel, strategy in cells:
            name = f"smoke-{framework}-{kernel}-{strategy}"
            yield training(name, range(world), framework, kernel=kernel, strategy=strategy, **shape)
        name, last = f"smoke-{framework}-zero3-recompute", {"kernel": kernels[0], "strategy": "ring_p2p"}
        yield training(name, range(world), framework, zero=3, recompute=True, **last, **shape)


def parity(world: int, kernels: Sequence[str]) -> Iterator[Run]:
    """Fifty steps over the same data, compared by `training_table.py`: first on one GPU each, side by side,
    the baseline and its float32 twin on the first."""
    shape: dict[str, Any] = {
        **{"preset": "125m", "seqlen": 8192, "steps": 50},
        **{"mask": "causal_document", "loss_mask": "uneven", "doc_lengths": "pile"},
    }
    ours = kernels[0]
    yield training("parity-baseline", [0], kernel=BASELINE, strategy="none", **shape)
    exact: dict[str, Any] = {**shape, "dtype": "fp32"}
    yield training("parity-baseline-fp32", [0], kernel=EXACT, strategy="none", **exact)
    alone: dict[str, Any] = {"kernel": ours, "strategy": "none"}
    yield training(f"parity-deepspeed-{ours}-none", [1], **alone, **shape)
    yield training(f"parity-megatron-{ours}-none", [1], "megatron", zero=0, **alone, **shape)
    cells = [("deepspeed", ours, s, 1) for s in ("ulysses", "ring_p2p", "group_cast", "ring_all_gather")]
    cells += [("deepspeed", ours, "ring_p2p", 3)]
    cells += [("deepspeed", kernel, s, 1) for kernel in kernels[1:] for s in ("ulysses", "ring_p2p")]
    cells += [("deepspeed", ours, s, 1) for s in ("usp", "loongtrain") if world > 2]
    cells += [("megatron", ours, "ring_p2p", 0), ("megatron", ours, "ulysses", 1)]
    for framework, kernel, strategy, zero in cells:
        degrees = {"usp": {"ulysses": 2}, "loongtrain": {"ulysses": 2, "inner_ring": 2}}.get(strategy, {})
        name = f"parity-{framework}-{kernel}-{strategy}-zero{zero}"
        flags = {**shape, **degrees, "kernel": kernel, "strategy": strategy}
        yield training(name, range(world), framework, zero=zero, **flags)


def speed(world: int, kernels: Sequence[str]) -> Iterator[Run]:
    """Step times by length, mask, kernel and strategy; one sequence a step."""
    ours = [(kernels[0], s) for s in ("ulysses", "ring_p2p", "group_cast", "ring_all_gather")]
    cells = ours[:3] + [(kernel, s) for kernel in kernels[1:] for s in ("ulysses", "ring_p2p")]
    groups: list[tuple[str, str, int, Sequence[tuple[str, str]], Sequence[str], bool]] = [
        ("deepspeed", "1b", 32768, [*cells, ours[3]], MASKS, False),
        ("deepspeed", "1b", 8192, [*cells, (kernels[0], "none")], MASKS, False),
        ("deepspeed", "1b", 131072, ours[:3], MASKS[1:], True),
        ("deepspeed", "125m", 131072, cells, MASKS, False),
        ("deepspeed", "1b", 131072, ours[:3], MASKS[:1], True),
        ("megatron", "1b", 32768, ours[:2], MASKS, False),
        ("megatron", "1b", 8192, ours[:2], MASKS[:1], False),
        ("deepspeed", "125m", 32768, cells, MASKS, False),
        ("deepspeed", "125m", 8192, cells, MASKS[:1], False),
        ("megatron", "1b", 131072, ours[:2], MASKS[1:], True),
    ]
    for framework, preset, seqlen, combinations, masks, recompute in groups:
        for mask, (kernel, strategy) in product(masks, combinations):
            tail = "-recompute" if recompute else ""
            name = f"speed-{framework}-{preset}-{seqlen}-{mask}-{kernel}-{strategy}{tail}"
            shape: dict[str, Any] = {
                **{"preset": preset, "seqlen": seqlen, "steps": 8 if seqlen < 131072 else 4},
                **{"kernel": kernel, "strategy": strategy, "mask": mask, "doc_lengths": "pile"},
                "global_batch": world if strategy == "none" else 1,
            }
            yield training(name, range(world), framework, recompute=recompute, **shape)


def longest(world: int, kernels: Sequence[str]) -> Iterator[Run]:
    """Each series doubles from a length that should fit. Two steps: the optimizer has its state in the
    second. Documents keep steps short; what has to be held hardly depends on the mask."""
    for strategy, recompute in product(("ring_p2p", "ulysses", "group_cast"), (True, False)):
        series = f"longest-1b-{kernels[0]}-{strategy}{'-recompute' if recompute else ''}"
        shape: dict[str, Any] = {
            **{"preset": "1b", "seqlen": (2**17 if recompute else 2**14) * world, "steps": 2},
            **{"kernel": kernels[0], "strategy": strategy, "mask": "causal_document"},
        }
        first = training(series, range(world), series=series, recompute=recompute, **shape)
        for doubling in range(4):
            yield of_length(first, first.seqlen * 2**doubling)


def of_length(run: Run, seqlen: int) -> Run:
    """Another of its series."""
    arguments = list(run.arguments)
    arguments[arguments.index("--seqlen") + 1] = str(seqlen)
    return replace(run, name=f"{run.series}-{seqlen}", arguments=tuple(arguments), seqlen=seqlen)


STEPS = {"smoke": smoke, "parity": parity, "speed": speed, "longest": longest}
