"""Training through the DeepSpeed adapter equals plain training in one process: losses, gradient norms and
SGD-updated parameters (Adam and clipping would hide a wrong gradient scale)."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.launch import launch
from tests.adapters.tiny_gpt import Case, deviations, train_reference

BOUNDS = {
    # Measured 2e-7, 2e-7, 6e-6: sums in another order.
    "fp32": {"loss": 2e-6, "norm": 2e-6, "parameters": 5e-5},
    # Against the reference in float32. Measured 3e-4, 7e-4, 7e-3; a wrong scale is off by 0.3 at least.
    "bf16": {"loss": 2e-3, "norm": 5e-3, "parameters": 3e-2},
}
ULYSSES = {"strategy": "ulysses", "ulysses": 2, "mask": "causal_document"}
RING = {"strategy": "ring_p2p"}
GATHER = {"strategy": "ring_all_gather"}
NO_SCATTER: dict[str, Any] = {"zero_optimization": {"reduce_scatter": False}}
NO_CONTIGUOUS = {"zero_optimization": {"reduce_scatter": False, "contiguous_gradients": False}}
AUTO = {"kernel": "auto", "strategy": "auto", "layout": "auto", "mask": "causal_document"}
FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


def four_ranks() -> list[Case]:
    """Every ZeRO stage on both meshes, and each setting that changes how DeepSpeed reduces."""
    accumulated = {"gas": 2, "clip": 0.05, "documents": True}
    cases = [Case(f"zero{z}", 2, ULYSSES, z, **accumulated) for z in range(4)]
    cases += [Case(f"zero{z} ring", 1, RING, z) for z in range(4)]
    cases += [Case(f"zero{z} bf16", 2, ULYSSES, z, **accumulated, dtype="bf16") for z in range(4)]
    cases += [Case(f"zero{z} no reduce_scatter", 2, ULYSSES, z, 2, 0.0, NO_SCATTER) for z in (1, 2, 3)]
    return [
        *cases,
        Case("zero1 bf16 float32 sums", 2, ULYSSES, 1, 2, 0.05, FLOAT32_SUMS, dtype="bf16"),
        Case("zero3 no contiguous", 1, GATHER, 3, 2, 0.0, NO_CONTIGUOUS),
        Case("zero2 gather", 2, {**GATHER, "ring": 2, "kernel": "sdpa_math"}, 2),
        Case("zero1 ulysses 4", 1, {"strategy": "ulysses", "layout": "contiguous"}, 1),
        Case("zero0 usp", 1, {"strategy": "usp", "ulysses": 2, "ring": 2}),
        Case("zero2 uneven shards", 1, RING, 2, seqlen=30),
        Case("zero0 data parallel", 4, {"strategy": "none"}, 0, 2, 0.05),
        Case("zero3 data parallel", 4, {"strategy": "none"}, 3, 2, 0.05),
        Case("zero0 prescale", 2, ULYSSES, 0, 2, 0.0, {"prescale_gradients": True}),
        Case("zero1 sum", 2, ULYSSES, 1, 2, 0.0, {"gradient_allreduce_op": "sum"}),
        Case(
            "zero3 sequence_parallel_size",
            2,
            {"strategy": "ulysses"},
            3,
            deepspeed={"sequence_parallel_size": 2},
        ),
        Case("zero1 auto", 2, AUTO, 1, 2, deepspeed={"sequence_parallel_size": 2}, documents=True),
        Case("zero2 twice the gradient", 2, ULYSSES, 2, tamper=2.0),
        Case("zero3 without its factor", 2, ULYSSES, 3, tamper=0.5),
    ]


def two_ranks() -> list[Case]:
    """Both meshes of two ranks, and an existing Ulysses model."""
    cases = [
        Case(f"zero{z} {s['strategy']}", 1, s, z, 2)
        for z, s in zip(range(4), (RING, GATHER, RING, GATHER), strict=True)
    ]
    cases += [Case(f"zero{z} data parallel", 2, {"strategy": "none"}, z) for z in (1, 2)]
    existing = {"strategy": "ulysses", "layout": "contiguous"}
    return [
        *cases,
        Case("DistributedAttention", 1, existing, 1, distributed_attention=True),
        Case("DistributedAttention ring", 1, {**RING, "layout": "contiguous"}, 3, distributed_attention=True),
        Case(
            "offload",
            1,
            RING,
            2,
            2,
            0.0,
            {
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
            },
        ),
    ]


def whole_product(meshes: list[tuple[int, dict[str, Any]]]) -> list[Case]:
    """Mesh and strategy x ZeRO stage x reduce_scatter x accumulation x clipping."""
    cases = []
    for (dp, lcab), z, scatter, gas, clip in itertools.product(
        meshes, range(4), (True, False), (1, 2), (0.0, 0.05)
    ):
        name = f"dp {dp} {lcab} zero {z} reduce_scatter {scatter} gas {gas} clip {clip}"
        zero = {"zero_optimization": {"reduce_scatter": scatter}}
        cases.append(Case(name, dp, lcab, z, gas, clip, zero, documents=gas == 2))
    return cases


def failures(cases: list[Case], ranks: list[dict[str, Any]]) -> dict[str, str]:
    """Why each case that deviates does."""
    found = {}
    for case in cases:
        result = ranks[0][case.name]
        measured = deviations(case, result, train_reference(case))
        for what, bound in BOUNDS[case.dtype].items():
            if not measured[what] <= bound:
                found[case.name] = f"{what} deviates by {measured[what]:.1e}"
        for rank, other in enumerate(ranks):
            for name, p in other[case.name].parameters.items():
                if not torch.equal(p, result.parameters[name]):
                    found[case.name] = f"{name} of rank {rank} is not rank 0's"
    return found


def check(how: str, world: int, cases: list[Case], folder: Path, timeout: float = 400) -> str:
    """Run the cases in one launch; exactly the tampered ones may deviate. Returns what was printed."""
    answers = launch(how, world, "train_all", [asdict(case) for case in cases], folder, timeout)
    found = failures(cases, answers.ranks)
    assert set(found) == {case.name for case in cases if case.tamper != 1}, found
    return answers.output


def test_four_ranks_equal_one_process(tmp_path: Path) -> None:
    output = check("torchrun", 4, four_ranks(), tmp_path)
    assert "layers.0-1.attn  Attention: kernel sdpa_flash (" in output
    assert output.count("lcab_plugin: auto (kernel, strategy, layout): kernel sdpa_flash, strategy ") == 1
    assert "data parallel 2 x accumulation 2 x context parallel 2, over which ZeRO 3 averages" in output


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    output = check("deepspeed", 2, two_ranks(), tmp_path)
    assert "layers.0-1.attn.distributed  UlyssesAttention: kernel sdpa_flash (" in output


@pytest.mark.nightly
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_whole_product_on_four_ranks(dp: int, tmp_path: Path) -> None:
    if dp == 4:
        meshes: list[tuple[int, dict[str, Any]]] = [(dp, {"strategy": "none"})]
    else:
        degrees = {"ulysses": "ulysses", "ring_p2p": "ring", "ring_all_gather": "ring"}
        meshes = [(dp, {"strategy": name, degree: 4 // dp}) for name, degree in degrees.items()]
    check("torchrun", 4, whole_product(meshes), tmp_path, timeout=1800)


def test_one_process_without_launcher(tmp_path: Path) -> None:
    adam = {"type": "AdamW", "params": {"lr": 1e-3}}
    case = Case("alone", 1, {}, 1, 2, deepspeed={"optimizer": adam})
    answer, output = launch("python", 1, "train_from_file", asdict(case), tmp_path)
    assert answer[0]["world"] == 1
    assert [name for name, _ in answer[0]["slots"]] == ["layers.0.attn", "layers.1.attn"]
    assert answer[0]["optimizer"].startswith("torch.optim.")
    assert 'optimizer AdamW: "torch_adam" set to true' in output
    reference = train_reference(case)
    assert answer[0]["result"].losses[0] == pytest.approx(reference.losses[0], rel=2e-6)
    assert answer[0]["result"].norms[0] == pytest.approx(reference.norms[0], rel=2e-6)
