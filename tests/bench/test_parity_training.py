"""Parity on real training runs: the comparison passes, and it fails where a strategy has a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcab_plugin.bench import parity

ROOT = Path(__file__).parents[2]
STRATEGIES = ["ring_p2p", "ulysses", "ring_all_gather"]
SMALL = ("--layers", "2", "--hidden", "32", "--heads", "4", "--kv-heads", "2", "--ffn", "64")


def compare(script: Path, out: Path, kernels: list[str], strategies: list[str]) -> dict[str, parity.Result]:
    settings = parity.Settings(
        scripts={"deepspeed": script},
        config=ROOT / "examples" / "configs" / "zero1.json",
        out=out,
        steps=3,
        timeout=240,
        extra=SMALL,
    )
    cells = parity.plan(kernels, strategies, ["causal_document"], ["zigzag"], "fp32")
    results = parity.run(cells, settings)
    assert [r.reason for r in results] == [None] * len(results)
    return {r.cell.strategy if r.cell.role is None else "baseline": r for r in results}


def test_equal_training_passes(tmp_path: Path) -> None:
    results = compare(ROOT / "examples" / "train_gpt.py", tmp_path, ["sdpa_flash"], ["none", "ring_p2p"])
    assert parity.passed(list(results.values()), strict=True), parity.notes(list(results.values()))
    ring = results["ring_p2p"]
    assert ring.run is not None
    assert ring.run["attention"]["kernel"] == "sdpa_flash"
    assert ring.run["degrees"] == {"ring": 2}
    assert ring.deviations is not None
    assert 0 < ring.deviations.gradient < 1e-5  # another order of sums: not the baseline compared with itself
    assert (tmp_path / "parity.md").read_text().count("| pass |") == 2


def test_mistakes_in_a_strategy_fail(tmp_path: Path) -> None:
    results = compare(Path(__file__).with_name("faulty_train_gpt.py"), tmp_path, ["sdpa_flash"], STRATEGIES)
    assert {name: r.status for name, r in results.items()} == {
        "baseline": "pass",
        **dict.fromkeys(STRATEGIES, "fail"),
    }
    assert not parity.passed(list(results.values()))

    # The forward pass is right everywhere, so the loss of the first step cannot show any of these.
    dropped, doubled = results["ring_p2p"].deviations, results["ring_all_gather"].deviations
    assert dropped is not None
    assert doubled is not None
    assert dropped.parameter.endswith("key.weight")
    assert 0.9 < doubled.gradient < 1.1
    assert 0.9 < doubled.grad_norm < 1.1
    for strategy in STRATEGIES:
        assert any("at step 0 deviates" in problem for problem in results[strategy].problems)


def test_both_frameworks_train_alike(tmp_path: Path) -> None:
    """The same weights on the same text: Megatron, alone and under a ring, against DeepSpeed's baseline."""
    pytest.importorskip("megatron.core")
    settings = parity.Settings(
        scripts={
            "deepspeed": ROOT / "examples/train_gpt.py",
            "megatron": ROOT / "examples/train_gpt_megatron.py",
        },
        config=ROOT / "examples" / "configs" / "zero1.json",
        out=tmp_path / "out",
        steps=3,
        timeout=240,
        extra=SMALL,
    )
    cells = parity.plan(
        ["naive"], ["none", "ring_p2p"], ["causal_document"], ["zigzag"], "fp32", parity.FRAMEWORKS
    )
    cells = [cell for cell in cells if cell.role or cell.framework == "megatron"]
    results = parity.run(cells, settings)
    assert parity.passed(results, strict=True), parity.notes(results)
    for result in results[1:]:
        assert result.run is not None
        assert result.run["framework"] == "megatron"
        assert result.deviations is not None
        assert result.deviations.loss < 1e-6
