"""Which training runs each step of `training.sh` does, the most telling first: their time may end.

On one GPU (``world`` 1) they compare kernels, frameworks and ZeRO stages, with strategy none. Without a GPU
the same runs train preset tiny on short sequences for three steps, with kernels that a CPU has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from typing import Any

import torch

CUDA = torch.cuda.is_available()
BASELINE = "sdpa_flash"
EXACT = "sdpa_efficient" if CUDA else "sdpa_flash"  # PyTorch's fused kernel that takes float32
NO_DOCUMENTS = ("sdpa_cudnn",)  # builds a plan for every length of a document that it meets: minutes
BY_LENGTHS = ("cudnn",)  # builds a graph for every new bucket of them: in most of so few steps
NO_MEMORY = re.compile("out of memory|ALLOC_FAILED", re.IGNORECASE)  # of torch, Triton, NCCL; of cuBLAS
SHORTER = 64  # a rehearsal's sequences are so many times shorter
SCRIPTS = {"deepspeed": "examples/train_gpt.py", "megatron": "examples/train_gpt_megatron.py"}
RECOMPUTE = {"deepspeed": ("--activation-checkpointing",), "megatron": ("--recompute", "full")}
DOCUMENTS = "causal_document"
MASKS = (DOCUMENTS, "causal")
STRATEGIES = ("ulysses", "ring_p2p", "group_cast", "ring_all_gather")
DEGREES = {"usp": {"ulysses": 2}, "loongtrain": {"ulysses": 2, "inner_ring": 2}}  # of more than two GPUs
PRESETS = ("1b", "125m")
LENGTHS = (8192, 32768, 131072)


@dataclass(frozen=True)
class Run:
    """One training run, of ``framework``, on ``gpus``. Runs of one ``series`` differ by multiples of ``unit``
    tokens; what does not fit at one length is not tried at longer ones."""

    name: str
    framework: str
    arguments: tuple[str, ...]
    gpus: tuple[int, ...]
    series: str | None = None
    seqlen: int = 0
    unit: int = 0


def training(
    name: str,
    gpus: Sequence[int],
    framework: str = "deepspeed",
    *,
    zero: int = 1,
    recompute: bool = False,
    more: Sequence[str] = (),
    **flags: Any,
) -> Run:
    """A run by the flags of its script. ``zero``: DeepSpeed's stage; under Megatron 1 is its distributed
    optimizer."""
    given = {"eval_batches": 0, "micro_batch": 1, "global_batch": 1, "dtype": "bf16", **flags}
    if not CUDA:
        given |= {"preset": "tiny", "seqlen": given["seqlen"] // SHORTER, "dtype": "fp32"}
        given["steps"] = min(given["steps"], 3)
    strategy, last = given["strategy"], [*(RECOMPUTE[framework] if recompute else ()), *more]
    given |= DEGREES.get(strategy, {})
    if framework == "deepspeed":
        last += ["--deepspeed_config", f"examples/configs/zero{zero}.json"]
        if strategy != "none":
            last += ["--layout", "balanced" if strategy == "group_cast" else "zigzag"]
    elif zero:
        last += ["--distributed-optimizer"]
    pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in given.items())
    arguments = (*(part for pair in pairs for part in pair), *last)
    return Run(name, framework, arguments, tuple(gpus), seqlen=given["seqlen"])


def masks_of(kernel: str) -> Sequence[str]:
    """The masks that it is trained with."""
    return MASKS[1:] if kernel in NO_DOCUMENTS else MASKS


def smoke(world: int, kernels: Sequence[str]) -> Iterator[Run]:
    """Five steps of each framework, so that what cannot run says so first."""
    shape: dict[str, Any] = {"preset": "125m", "seqlen": 8192, "steps": 5, "mask": DOCUMENTS}
    strategies = ("ring_p2p", "ulysses") if world > 1 else ("none", "none")
    cells = [*zip(kernels[:2], strategies, strict=False)]
    for framework in SCRIPTS:
        for kernel, strategy in cells:
            name = f"smoke-{framework}-{kernel}-{strategy}"
            yield training(name, range(world), framework, kernel=kernel, strategy=strategy, **shape)
        name, last = f"smoke-{framework}-zero3-recompute", {"kernel": kernels[0], "strategy": strategies[0]}
        yield training(name, range(world), framework, zero=3, recompute=True, **last, **shape)


def parity(world: int, kernels: Sequence[str]) -> Iterator[Run]:
    """Fifty steps over the same data, compared by `training_table.py`, of preset 125m, then of 1b."""
    for preset in reversed(PRESETS):
        yield from parity_of(preset, world, kernels)


def strategies_over(world: int) -> Sequence[str]:
    """Of several GPUs."""
    return (*STRATEGIES, *(DEGREES if world > 2 else ()))


def parity_of(preset: str, world: int, kernels: Sequence[str]) -> Iterator[Run]:
    """First on one GPU each, side by side, the baselines of each framework with their float32 twins, and what
    else needs one GPU. One GPU has time for both masks. Of several those that tell most come before the rest
    of every kernel under every strategy, and last every strategy in float32: what is left there is no
    rounding."""
    shape: dict[str, Any] = {"preset": preset, "seqlen": 8192, "steps": 50, "strategy": "none"}
    shape |= {"mask": DOCUMENTS, "loss_mask": "uneven", "doc_lengths": "pile"}
    ours, trained = kernels[0], [kernel for kernel in kernels if kernel not in NO_DOCUMENTS]
    both = MASKS if world == 1 or len(trained) < len(kernels) else MASKS[:1]
    lanes = (0, "deepspeed", 1, both), (min(1, world - 1), "megatron", 0, MASKS[:1])
    for gpu, framework, zero, masks in lanes:
        alone = partial(training, gpus=[gpu], framework=framework, zero=zero)
        for mask in masks:
            name, same = f"parity-{preset}-{framework}-baseline-{mask}", {**shape, "mask": mask}
            yield alone(name, **same, kernel=BASELINE)
            yield alone(f"{name}-fp32", **{**same, "dtype": "fp32", "kernel": EXACT})
        others = kernels if framework == "deepspeed" else trained[: 1 if world == 1 else None]
        for kernel in (kernel for kernel in others if kernel != BASELINE):
            for mask in masks_of(kernel)[: len(masks) if world == 1 else 1]:
                name = f"parity-{preset}-{framework}-{kernel}-none{f'-{mask}' if mask != DOCUMENTS else ''}"
                yield alone(name, **{**shape, "kernel": kernel, "mask": mask})
    if world == 1:
        cells = [("deepspeed", ours, "none", 3)]
    else:
        cells = [("megatron", ours, "ulysses", 1), ("megatron", ours, "ring_p2p", 0)]
        cells += [("deepspeed", ours, strategy, 1) for strategy in STRATEGIES]
        cells += [("deepspeed", ours, "ring_p2p", 3)]
        cells += [("deepspeed", BASELINE, s, 1) for s in ("ulysses", "ring_p2p") if ours != BASELINE]
        every = strategies_over(world)
        cells += [("deepspeed", *cell, 1) for cell in product(trained, every)]
        cells += [("deepspeed", ours, s, 3) for s in every]
        cells += [("megatron", *cell, 1) for cell in product(trained, every)]
    for framework, kernel, strategy, zero in dict.fromkeys(cells):
        name = f"parity-{preset}-{framework}-{kernel}-{strategy}-zero{zero}"
        flags = {**shape, "kernel": kernel, "strategy": strategy}
        yield training(name, range(world), framework, zero=zero, **flags)
    for framework, strategy in product(SCRIPTS, strategies_over(world) if world > 1 else ()):
        name = f"parity-{preset}-{framework}-{EXACT}-{strategy}-zero1-fp32"
        flags = {**shape, "dtype": "fp32", "kernel": EXACT, "strategy": strategy}
        yield training(name, range(world), framework, **flags)


def step_times(
    gpus: Sequence[int],
    seqlen: int,
    masks: Sequence[str],
    cells: Sequence[tuple[str, str]],
    framework: str = "deepspeed",
    *,
    preset: str = "1b",
    zero: int = 1,
    more: Sequence[str] = (),
) -> Iterator[Run]:
    """One sequence a step, for fewer steps the longer they are; ``cells``: kernel and strategy. The
    activations that 1b has of 128K tokens fit only if they are recomputed."""
    recompute = preset == "1b" and seqlen > 32768
    for mask, (kernel, strategy) in product(masks, cells):
        if mask not in masks_of(kernel):
            continue
        parts = [framework, preset, seqlen, mask, kernel, strategy, *(["recompute"] if recompute else ())]
        parts += [*([f"zero{zero}"] if zero != 1 else ()), *(flag.strip("-") for flag in more)]
        shape: dict[str, Any] = {"preset": preset, "seqlen": seqlen, "kernel": kernel, "strategy": strategy}
        shape |= {"mask": mask, "doc_lengths": "pile"}
        shape["steps"] = {8192: 8, 32768: 6}.get(seqlen, 4 if mask == DOCUMENTS else 3)
        shape["steps"] *= 3 if kernel in BY_LENGTHS and mask == DOCUMENTS else 1
        same: dict[str, Any] = {"zero": zero, "recompute": recompute, "more": more}
        yield training("-".join(map(str, ["speed", *parts])), gpus, framework, **same, **shape)


def speed(world: int, kernels: Sequence[str]) -> Iterator[Run]:
    """Step times by length, mask, kernel and strategy: first those that tell most, of preset 1b, then all."""
    told = speed_alone(kernels) if world == 1 else speed_together(world, kernels)
    yield from {run.name: run for run in chain(told, every_speed(world, kernels))}.values()


def every_speed(world: int, kernels: Sequence[str]) -> Iterator[Run]:
    """Packed documents, of every length and preset, with every kernel on one GPU and under every strategy
    through both frameworks, then ZeRO 3 under every strategy."""
    strategies = ("none",) if world == 1 else strategies_over(world)
    shapes = [*product(PRESETS, LENGTHS)]
    documents = partial(step_times, masks=MASKS[:1])
    for framework, (preset, seqlen) in product(SCRIPTS, shapes):
        same: dict[str, Any] = {"seqlen": seqlen, "framework": framework, "preset": preset}
        for i, kernel in enumerate(kernels):
            yield from documents([i % world], cells=[(kernel, "none")], **same)
        if world > 1:
            yield from documents(range(world), cells=[*product(kernels, strategies)], **same)
    for preset, seqlen in shapes:
        cells = [(kernels[0], s) for s in strategies]
        yield from documents(range(world), seqlen, cells=cells, preset=preset, zero=3)


def speed_together(world: int, kernels: Sequence[str]) -> Iterator[Run]:
    """Beside one GPU alone: first what is sure to run, then the kernels that may fail or compile for long,
    then Megatron."""
    ours, others, group = kernels[0], kernels[1:], range(world)
    every, both = [(ours, s) for s in STRATEGIES], [(ours, s) for s in STRATEGIES[:2]]
    ulysses = [(kernel, "ulysses") for kernel in others]
    compiled = [(kernel, strategy) for kernel, strategy in ulysses if kernel in ("flex", "fa4")]
    quick = [cell for cell in ulysses if cell not in compiled]
    for gpu, kernel in enumerate(kernels[:2]):
        for seqlen in (32768, 8192):
            yield from step_times([gpu], seqlen, MASKS, [(kernel, "none")])
    yield from step_times(group, 131072, MASKS[:1], every)
    yield from step_times(group, 32768, MASKS, every)
    yield from step_times(group, 8192, MASKS, every)
    yield from step_times(group, 32768, MASKS[:1], [(ours, "ring_p2p")], zero=3)
    yield from step_times(group, 131072, MASKS[1:], both)
    yield from step_times(group, 32768, MASKS, [*quick, *((kernel, "ring_p2p") for kernel in others[:1])])
    yield from step_times(group, 8192, MASKS, quick)
    yield from step_times(group, 32768, MASKS, compiled)
    yield from step_times(group, 131072, MASKS[1:], every[2:])
    megatron = partial(step_times, group, framework="megatron")
    yield from megatron(32768, MASKS, every)
    yield from megatron(8192, MASKS[:1], every)
    yield from megatron(131072, MASKS[:1], every)
    yield from megatron(131072, MASKS[1:], both)
    yield from megatron(8192, MASKS[1:], every)
    yield from step_times(group, 131072, MASKS[1:], both[1:], more=["--keep-attention"])
    yield from step_times(group, 131072, MASKS[1:], quick)
    yield from step_times(group, 8192, MASKS, compiled)
    yield from step_times(group, 131072, MASKS[1:], compiled)


def speed_alone(kernels: Sequence[str]) -> Iterator[Run]:
    """The same on one GPU, with every kernel: first what takes seconds a step, through each framework, then
    128K tokens that all see each other; last ZeRO 3, which changes little there."""
    deepspeed = partial(step_times, [0], cells=[(kernel, "none") for kernel in kernels])
    megatron = partial(deepspeed, framework="megatron")
    yield from deepspeed(32768, MASKS)
    yield from deepspeed(131072, MASKS[:1])
    yield from deepspeed(8192, MASKS)
    yield from megatron(32768, MASKS)
    yield from megatron(131072, MASKS[:1])
    yield from megatron(8192, MASKS)
    yield from deepspeed(131072, MASKS[1:])
    yield from step_times([0], 131072, MASKS, [(kernels[0], "none")], more=["--keep-attention"])
    yield from megatron(131072, MASKS[1:])
    yield from deepspeed(32768, MASKS, zero=3)
    yield from deepspeed(8192, MASKS, zero=3)
    yield from deepspeed(131072, MASKS, zero=3)


def longest(world: int, kernels: Sequence[str]) -> Iterator[Run]:
    """The first guess of each series, of preset 1b with ZeRO 1. Two steps: the optimizer has its state in the
    second. Documents keep steps short; what has to be held hardly depends on the mask.

    The guess is from a GPU's memory. States, gradients, CUDA and NCCL take 15 GiB of one GPU, 13 of each of
    two; a token of a rank then takes 1.52 MB where nothing is recomputed and 0.19 MB where blocks are, of
    them 4 KiB for the input of each of 16 blocks and the rest for one block's backward pass (measured at up
    to 86,016 and 688,128 tokens a rank). Attention that is kept adds 4 KiB a block.
    """
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if CUDA else 80.0
    plain, recompute = ("", 2**12, 1.52e6), ("-recompute", 2**15, 0.19e6)
    cells = [*product(("ring_p2p", "ulysses"), (recompute, plain))]
    cells += [*product(STRATEGIES[2:], (plain,)), *product(STRATEGIES[2:], (recompute,))]
    if world == 1:
        kept = ("-recompute-keep-attention", 2**14, recompute[2] + 16 * 2**12)
        cells = [*product(("none",), (plain, recompute, kept))]
    for strategy, (held, tokens, token_bytes) in cells:
        units = max(1, int((gib - (15 if world == 1 else 13)) * 2**30 / (token_bytes * tokens)))
        unit = tokens * world // (1 if CUDA else 4)
        series = f"longest-1b-{kernels[0]}-{strategy}{held}"
        shape: dict[str, Any] = {"preset": "1b", "seqlen": units * unit, "steps": 2, "mask": DOCUMENTS}
        shape |= {"kernel": kernels[0], "strategy": strategy, "doc_lengths": "prolong64k"}
        shape |= {"recompute": bool(held), "more": ["--keep-attention"] if "keep" in held else ()}
        run = training(series, range(world), **shape)
        yield replace(run, series=series, unit=run.seqlen // units)


def of_length(run: Run, units: int) -> Run:
    """Another of its series."""
    seqlen, arguments = units * run.unit, list(run.arguments)
    arguments[arguments.index("--seqlen") + 1] = str(seqlen)
    return replace(run, name=f"{run.series}-{seqlen}", arguments=tuple(arguments), seqlen=seqlen)


STEPS = {"smoke": smoke, "parity": parity, "speed": speed, "longest": longest}
