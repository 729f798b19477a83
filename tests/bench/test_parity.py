"""The comparison around a script whose records are made up: which cells run, verdicts, reasons, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lcab_plugin.bench import parity
from lcab_plugin.bench.parity import Cell
from lcab_plugin.errors import LcabError

# Writes the records of a run of the kernel, strategy and dtype on its command line, without training.
SCRIPT = """
import json, os, sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
kernel, strategy, rank = flags["--kernel"], flags["--strategy"], os.environ["RANK"]
if strategy == "ulysses":
    sys.exit("script.py: 3 heads cannot be dealt to 2 ranks; degrees that fit: 1, 3.")
if strategy == "ring_all_gather":
    raise OSError("out of memory")
if flags["--mask"] == "full" and kernel == "naive":
    raise OSError("out of memory")
if rank == "0":
    import torch
    off = {"naive": 0, "sdpa_flash": 1.5e-3}[kernel] + (1e-3 if strategy != "none" else 0)
    megatron = "--deepspeed_config" not in flags
    if flags["--dtype"] == "bf16":
        off += 3.5e-3 if megatron else 1e-3
    else:
        off = 1e-3 if megatron and flags["--mask"] == "sliding_window_causal" else off * 1e-4
    folder = Path(flags["--out"]) / flags["--name"]
    with open(folder / "metrics.jsonl", "w") as file:
        run = {"type": "run", "schema": 1, "lcab_plugin": "0", "torch": "2", "device": "a machine",
               "command": [], "dtype": flags["--dtype"]}
        print(json.dumps(run), file=file)
        for step in range(int(flags["--steps"])):
            record = {"type": "step", "step": step, "loss": 2 + 2 * off, "grad_norm": 1 + off,
                      "step_ms": 10.0 * step, "peak_memory_gib": 1.0 + step, "batch_digest": str(step),
                      "tokens_per_s": 1.0}
            if flags["--mask"] == "full_document" and step:
                del record["loss"]
            print(json.dumps(record), file=file)
        print(json.dumps({"type": "end", "step": step}), file=file)
    (folder / "flags.json").write_text(json.dumps(flags))
    torch.save({"weight": torch.ones(3) * (1 + off)}, flags["--save-gradients"])
elif flags["--mask"] == "causal_blockwise":
    os.abort()
"""


def run(folder: Path, cells: list[Cell], **changes: Any) -> list[parity.Result]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    config = folder / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_scatter": True}}))
    settings = parity.Settings(
        **{
            "scripts": dict.fromkeys(parity.FRAMEWORKS, script),
            "config": config,
            "out": folder / "out",
            "steps": 5,
            **changes,
        }
    )
    return parity.run(cells, settings)


def test_the_plan_is_the_product_with_its_baselines_first() -> None:
    cells = parity.plan(
        ["naive", "sdpa_flash"], ["none", "p2p"], ["causal"], ["zigzag", "contiguous"], "fp32"
    )
    assert cells == [
        Cell("causal", "naive", "none", role="baseline"),
        Cell("causal", "naive", "ring_p2p", "zigzag"),
        Cell("causal", "naive", "ring_p2p", "contiguous"),
        Cell("causal", "sdpa_flash", "none"),
        Cell("causal", "sdpa_flash", "ring_p2p", "zigzag"),
        Cell("causal", "sdpa_flash", "ring_p2p", "contiguous"),
    ]
    low = parity.plan(["naive", "sdpa_math"], ["none"], ["causal", "full"], ["zigzag"], "bf16")
    assert [(c.mask, c.role) for c in low] == [
        (mask, role) for mask in ("causal", "full") for role in ("baseline", "fp32 baseline", None)
    ]
    assert len({c.name for c in low}) == len(low)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((["sdpa_flsh"], ["none"], ["causal"], ["zigzag"]), "kernel 'sdpa_flsh'; did you mean 'sdpa_flash'"),
        ((["naive"], ["ulyses"], ["causal"], ["zigzag"]), "did you mean 'ulysses'"),
        ((["naive"], ["none"], ["casual"], ["zigzag"]), "did you mean 'causal'"),
        ((["naive"], ["none"], ["causal"], ["zigzack"]), "did you mean 'zigzag'"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(names: Any, words: str) -> None:
    with pytest.raises(LcabError, match=words):
        parity.plan(*names, "fp32")


STRATEGIES = ["none", "ulysses", "ring_p2p", "ring_all_gather"]


def test_verdicts_reasons_and_files(tmp_path: Path) -> None:
    cells = parity.plan(["naive", "sdpa_flash"], STRATEGIES, ["causal"], ["zigzag"], "fp32")
    results = run(tmp_path, cells, zero_stage=3)
    assert {r.cell.name: r.status for r in results} == {
        "causal-naive-none": "pass",
        "causal-naive-ulysses-zigzag": "cannot run",
        "causal-naive-ring_p2p-zigzag": "pass",
        "causal-naive-ring_all_gather-zigzag": "crashed",
        "causal-sdpa_flash-none": "pass",
        "causal-sdpa_flash-ulysses-zigzag": "cannot run",
        "causal-sdpa_flash-ring_p2p-zigzag": "pass",
        "causal-sdpa_flash-ring_all_gather-zigzag": "crashed",
    }
    assert not parity.passed(results)
    without_crashes = [r for r in results if r.status != "crashed"]
    assert parity.passed(without_crashes)
    assert not parity.passed(without_crashes, strict=True)
    assert not parity.passed([r for r in results if r.status == "cannot run" or r.cell.role])
    assert results[0].step_ms == {"median": 30.0, "min": 20.0, "max": 40.0}  # without the first two steps
    assert results[0].peak_memory_gib == 5.0

    out = tmp_path / "out"
    config = json.loads((out / "ds_config.json").read_text())
    assert config["zero_optimization"] == {"stage": 3, "reduce_scatter": True}
    record = json.loads((out / "parity.json").read_text())
    assert record["passed"] is False
    assert len(record["cells"]) == len(cells)
    text = (out / "parity.md").read_text()
    assert "cannot run: 3 heads cannot be dealt to 2 ranks; degrees that fit: 1, 3." in text
    assert "crashed: rank 0, exit status 1: OSError: out of memory" in text
    assert "loss 1.0e-05 in the first 10 steps" in text
    # Gradients stay for whoever looks at a baseline or a failure.
    assert [path.parent.name for path in out.rglob("gradients.pt")] == ["causal-naive-none"]

    with pytest.raises(LcabError, match="holds a comparison already; give another --out"):
        run(tmp_path, cells)


def test_in_bf16_the_baseline_sets_the_budget(tmp_path: Path) -> None:
    cells = parity.plan(["sdpa_flash"], ["none", "ring_p2p"], ["causal"], ["zigzag"], "bf16")
    baseline, exact, same, other = results = run(tmp_path, cells, dtype="bf16")
    assert [(r.run or {})["dtype"] for r in results] == ["bf16", "fp32", "bf16", "bf16"]
    # The baselines differ by 1e-3: 1.5e-3 is within twice that, 2.5e-3 is not.
    assert same.budget is not None
    assert same.budget.loss == pytest.approx(2e-3, rel=1e-2)
    assert (baseline.status, exact.status, same.status, other.status) == ("pass", "pass", "pass", "fail")
    assert any("loss in the first 10 steps deviates by 2.5e-03" in problem for problem in other.problems)
    assert not parity.passed(results)


def test_an_abort_after_the_end_is_a_crash(tmp_path: Path) -> None:
    results = run(tmp_path, parity.plan([], [], ["causal_blockwise"], [], "fp32"))
    assert results[0].status == "crashed"
    assert "causal_blockwise-naive-none: crashed: rank 1, signal SIGABRT: no output" in parity.notes(results)
    assert not parity.passed(results)


def test_a_mask_without_its_baseline_fails(tmp_path: Path) -> None:
    results = run(tmp_path, parity.plan(["sdpa_flash"], ["none"], ["full", "causal"], ["zigzag"], "fp32"))
    assert [r.status for r in results] == ["crashed", "fail", "pass", "pass"]
    assert "nothing to compare with" in results[1].problems[0]
    assert not parity.passed(results)


def test_a_cell_whose_records_cannot_be_read_fails_and_the_others_go_on(tmp_path: Path) -> None:
    cells = parity.plan(["sdpa_flash"], ["none"], ["full_document", "causal"], ["zigzag"], "fp32")
    results = run(tmp_path, cells)
    assert [r.status for r in results] == ["fail", "fail", "pass", "pass"]
    (problem,) = results[0].problems
    assert "metrics.jsonl, line 3: step has no loss" in problem


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LcabError, match="did you mean 'bf16'"):
        run(tmp_path, [], dtype="bf61")
    with pytest.raises(LcabError, match="does not exist; give the training script with --script"):
        run(tmp_path, [], scripts={"megatron": tmp_path / "none.py"})
    with pytest.raises(LcabError, match="cannot read the DeepSpeed config"):
        run(tmp_path, [], config=tmp_path / "none.json")
    with pytest.raises(LcabError, match="must be at least 1"):
        run(tmp_path, [], steps=0)
    with pytest.raises(LcabError, match="zero_stage = 1 is DeepSpeed's"):
        run(tmp_path, [], config=None, zero_stage=1)


def test_a_second_framework_is_held_to_the_baseline_of_the_first(tmp_path: Path) -> None:
    cells = parity.plan(["naive"], ["none", "ring_p2p"], ["causal"], ["zigzag"], "fp32", parity.FRAMEWORKS)
    assert cells == [
        Cell("causal", "naive", "none", role="baseline"),
        Cell("causal", "naive", "ring_p2p", "zigzag"),
        Cell("causal", "naive", "none", framework="megatron"),
        Cell("causal", "naive", "ring_p2p", "zigzag", framework="megatron"),
    ]
    assert len({cell.name for cell in cells}) == 4
    results = run(tmp_path, cells)
    assert [r.deviations.loss if r.deviations else None for r in results] == pytest.approx([0, 1e-7, 0, 1e-7])
    commands = [json.loads((tmp_path / "out" / c.name / "flags.json").read_text()) for c in cells]
    assert ["--deepspeed_config" in command for command in commands] == [True, True, False, False]
    assert ["--layout" in command for command in commands] == [False, True, False, True]
    with pytest.raises(LcabError, match="framework 'megatrn'; did you mean 'megatron'"):
        parity.plan(["naive"], ["none"], ["causal"], ["zigzag"], "fp32", ["megatrn"])


def test_in_bf16_every_framework_has_its_own_baseline_and_the_fp32_twins_are_compared(tmp_path: Path) -> None:
    asked = (["naive"], ["none", "ring_p2p"], ["causal", "sliding_window_causal"], ["zigzag"])
    cells = parity.plan(*asked, "bf16", parity.FRAMEWORKS)
    assert [(c.framework, c.role) for c in cells[:6]] == [
        *((f, role) for f in parity.FRAMEWORKS for role in ("baseline", "fp32 baseline")),
        *((f, None) for f in parity.FRAMEWORKS),
    ]
    assert len({c.name for c in cells}) == len(cells) == 12
    results = run(tmp_path, cells[:10], dtype="bf16", world=1)  # of the second mask the baselines
    # Megatron's bf16 is 2.5e-3 from DeepSpeed's, over twice what that differs by from float32.
    assert [r.status for r in results] == [*["pass"] * 9, "fail"]
    # Of DeepSpeed's twin from its own bf16, of Megatron's from DeepSpeed's twin.
    twins = [r.deviations.loss for r in (results[1], results[3], results[9]) if r.deviations]
    assert twins == pytest.approx([1e-3, 0.0, 1e-3], rel=1e-2)
    (problem, *_) = results[9].problems
    assert "beside the first framework in fp32: loss in the first 10 steps deviates by 1.0e-03" in problem
    assert not parity.passed(results)
    assert parity.passed(results[:9])
    budgets = [note.split(": ")[:2] for note in parity.notes(results) if note.startswith("Budget, ")]
    assert budgets == [
        ["Budget, causal in megatron, sliding_window_causal in megatron", "fp32"],
        ["Budget, causal in deepspeed", "bf16"],
        ["Budget, causal in megatron", "bf16"],
    ]
