"""What scripts/gpu/training.sh does around the training runs: starting anew, searching, comparing."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu"

# Ranks that train nothing: each run's length says how it ends.
RANKS = """
import json, pathlib, sys, time
for run in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    arguments = run["arguments"]
    length = int(arguments[arguments.index("--seqlen") + 1])
    folder = pathlib.Path(arguments[arguments.index("--out") + 1], run["name"])
    folder.mkdir(parents=True, exist_ok=True)
    if length > MOST:
        raise MemoryError(f"CUDA out of memory: {length} tokens do not fit")
    if length == BROKEN:
        raise RuntimeError("an illegal instruction")
    time.sleep(30 if length == SLOW else 0)
    (folder / "metrics.jsonl").write_text(json.dumps({"type": "end"}) + "\\n")
"""


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("training_cells")
    monkeypatch.setattr(module, "RANKS", tmp_path / "ranks.py")
    monkeypatch.setattr(module, "STARTING", 1.0)
    return module


def ranks(tmp_path: Path, most: int, slow: int = -1, broken: int = -1) -> None:
    text = RANKS.replace("MOST", str(most)).replace("SLOW", str(slow)).replace("BROKEN", str(broken))
    (tmp_path / "ranks.py").write_text(text)


def step(cells: ModuleType, tmp_path: Path, patience: float = 30.0, seconds: float = 30.0):
    return cells.Step("speed", tmp_path, time.monotonic() + seconds, patience)


def run(cells: ModuleType, name: str, seqlen: int, series: str | None = None, unit: int = 0):
    arguments = ("--seqlen", str(seqlen))
    return cells.Run(name, "deepspeed", arguments, (0,), series, seqlen, unit)


def test_a_run_that_fails_is_left_out_with_its_reason_and_the_rest_goes_on(cells, tmp_path):
    ranks(tmp_path, most=10)
    runs = [run(cells, "a", 1), run(cells, "b", 11), run(cells, "c", 2)]
    mine = step(cells, tmp_path)
    cells.do(mine, runs, "all")
    assert [mine.done(r) for r in runs] == [True, False, True]
    assert "11 tokens do not fit" in (tmp_path / "b" / "failed.txt").read_text()
    assert not (tmp_path / "c" / "failed.txt").exists()


def test_runs_that_are_there_are_not_done_again(cells, tmp_path):
    ranks(tmp_path, most=10)
    mine, runs = step(cells, tmp_path), [run(cells, "a", 1)]
    cells.do(mine, runs, "all")
    ranks(tmp_path, most=0)
    cells.do(mine, runs, "all")
    assert not (tmp_path / "a" / "failed.txt").exists()


def test_a_run_that_failed_is_not_tried_again_until_its_reason_is_removed(cells, tmp_path):
    ranks(tmp_path, most=0)
    mine, runs = step(cells, tmp_path), [run(cells, "a", 1)]
    cells.do(mine, runs, "all")
    ranks(tmp_path, most=10)
    cells.do(mine, runs, "all")
    assert not mine.done(runs[0])
    (tmp_path / "a" / "failed.txt").unlink()
    cells.do(mine, runs, "all")
    assert mine.done(runs[0])


def test_what_the_end_of_the_time_cut_is_done_when_the_step_goes_on(cells, tmp_path):
    ranks(tmp_path, most=10, slow=3)
    runs = [run(cells, "a", 1), run(cells, "b", 3)]
    mine = step(cells, tmp_path, seconds=1.5)
    cells.do(mine, runs, "all")
    assert [mine.done(r) for r in runs] == [True, False]
    assert not (tmp_path / "b" / "failed.txt").exists()
    ranks(tmp_path, most=10)
    again = step(cells, tmp_path)
    cells.do(again, runs, "all")
    assert again.done(runs[1])


def test_a_run_that_takes_too_long_is_stopped(cells, tmp_path):
    ranks(tmp_path, most=10, slow=3)
    runs = [run(cells, "a", 3), run(cells, "b", 1)]
    mine = step(cells, tmp_path, patience=0.2)
    cells.do(mine, runs, "all")
    assert [mine.done(r) for r in runs] == [False, True]
    assert "longer than" in (tmp_path / "a" / "failed.txt").read_text()


def test_nothing_starts_when_the_time_is_over(cells, tmp_path):
    ranks(tmp_path, most=10)
    mine = step(cells, tmp_path, seconds=0.0)
    cells.do(mine, [run(cells, "a", 1)], "all")
    assert not (tmp_path / "a").exists()


def lengths(tmp_path: Path, name: str) -> tuple[list[int], list[int]]:
    """Those that were trained, and those that were too long."""
    found: list[list[int]] = [[], []]
    for folder in tmp_path.glob(f"{name}-*"):
        found[(folder / "failed.txt").exists()].append(int(folder.name.rpartition("-")[2]))
    return sorted(found[0]), sorted(found[1])


@pytest.mark.parametrize(
    ("most", "trained", "too_long"),
    [
        (45, [40], [50]),  # the guess is right: one launch that ends at the next length
        (200, [40, 50, 60, 80], []),  # twice the guess is enough
        (72, [40, 50, 60, 70], [80]),  # upwards by doubled strides, then between
        (33, [30], [40]),  # downwards
        (14, [10], [20, 30, 40]),  # by doubled strides: 30, 10, then between
        (5, [], [10, 30, 40]),
    ],
)
def test_the_longest_is_found_by_doubled_strides_and_then_by_halves(
    cells, tmp_path, capsys, most, trained, too_long
):
    ranks(tmp_path, most=most)
    series = run(cells, "s", 40, "s", unit=10)
    assert cells.search(step(cells, tmp_path), [series]) == bool(trained)
    assert lengths(tmp_path, "s") == (trained, too_long)
    assert f"s: {max(trained, default=0)} fit" in capsys.readouterr().out


def test_the_next_series_is_guessed_to_end_where_the_last_one_did(cells, tmp_path):
    ranks(tmp_path, most=72)
    cells.search(step(cells, tmp_path), [run(cells, name, 40, name, unit=10) for name in ("s", "t")])
    assert lengths(tmp_path, "t") == ([70], [80])


def test_a_search_goes_on_where_its_records_end(cells, tmp_path):
    ranks(tmp_path, most=45)
    series = run(cells, "s", 40, "s", unit=10)
    cells.search(step(cells, tmp_path), [series])
    ranks(tmp_path, most=1000)
    cells.search(step(cells, tmp_path), [series])
    assert lengths(tmp_path, "s") == ([40], [50])


def test_only_lack_of_memory_is_too_long(cells, tmp_path, capsys):
    ranks(tmp_path, most=1000, broken=50)
    cells.search(step(cells, tmp_path), [run(cells, "s", 40, "s", unit=10)])
    assert lengths(tmp_path, "s") == ([40], [50])
    out = capsys.readouterr().out
    assert "s: 40 fit; stopped at 50" in out
    assert "an illegal instruction" in out


def test_a_search_whose_time_ended_says_so(cells, tmp_path, capsys):
    ranks(tmp_path, most=1000, slow=50)
    cells.search(step(cells, tmp_path, seconds=1.5), [run(cells, "s", 40, "s", unit=10)])
    assert "s: 40 fit; stopped at 50: its time ended" in capsys.readouterr().out


def test_the_reason_is_the_line_of_any_rank_that_speaks_of_memory(cells, tmp_path):
    (tmp_path / "rank0.log").write_text("RuntimeError: a peer is gone\n")
    (tmp_path / "rank1.log").write_text("torch.OutOfMemoryError: CUDA out of memory. 1 GiB\nwarned\n")
    reason = cells.explain(cells.Outcome("crashed", "rank 0, exit status 1", 1.0), tmp_path)
    assert reason == "torch.OutOfMemoryError: CUDA out of memory. 1 GiB"


def test_documents_are_not_trained_with_a_kernel_that_builds_plans_for_their_lengths(cells):
    kernels = ["triton", "sdpa_flash", "sdpa_cudnn", "flex"]
    for name in ("parity", "speed"):
        for r in cells.STEPS[name](2, kernels):
            flags = dict(zip(r.arguments[::2], r.arguments[1::2], strict=False))
            assert flags["--kernel"] != "sdpa_cudnn" or flags["--mask"] == "causal"
    baselines = {r.name for r in cells.STEPS["parity"](2, kernels) if "baseline" in r.name}
    trained = ("deepspeed", "causal"), ("deepspeed", "causal_document"), ("megatron", "causal_document")
    assert baselines == {
        f"parity-{preset}-{framework}-baseline-{mask}{dtype}"
        for preset, (framework, mask), dtype in product(("125m", "1b"), trained, ("", "-fp32"))
    }


def test_every_run_names_flags_that_its_script_has(cells):
    from lcab_plugin.config import AttentionConfig
    from lcab_plugin.training import arguments
    from lcab_plugin.training.settings import DEGREES

    parser = arguments.parser(None)
    arguments.add_training(parser.add_argument_group("training"))
    arguments.add_attention(parser.add_argument_group("attention"))
    arguments.add_run(parser)
    for world in (1, 2, 4):
        for plan in cells.STEPS.values():
            runs = list(plan(world, ["sdpa_flash", "naive"]))
            assert len({r.name for r in runs}) == len(runs)
            for r in runs:
                given, rest = parser.parse_known_args(list(r.arguments))
                known = {"--deepspeed_config", "--activation-checkpointing", "--distributed-optimizer"}
                known |= {"--recompute", "--keep-attention"}
                assert {flag for flag in rest if flag.startswith("--")} <= known
                degrees = {key: getattr(given, key) for key in DEGREES if getattr(given, key)}
                config = AttentionConfig.from_dict({"strategy": given.strategy, **degrees})
                assert given.strategy == "none" or config.degrees(len(r.gpus))
                assert set(r.gpus) <= set(range(world))


@pytest.mark.parametrize(
    ("world", "strategies"),
    [
        (1, {"none"}),
        (2, {"ulysses", "ring_p2p", "ring_all_gather", "group_cast"}),
        (4, {"ulysses", "ring_p2p", "ring_all_gather", "group_cast", "usp", "loongtrain"}),
    ],
)
def test_documents_of_every_length_go_through_every_kernel_strategy_and_framework(cells, world, strategies):
    kernels = ["triton", "sdpa_flash", "cudnn"]
    planned = [*cells.STEPS["speed"](world, kernels), *cells.STEPS["parity"](world, kernels)]
    names = {r.name for r in planned if len(r.gpus) == world}
    alone = {r.name for r in planned if len(r.gpus) == 1}
    for preset, tokens in product(("125m", "1b"), (8192, 32768, 131072)):
        recompute = "-recompute" if (preset, tokens) == ("1b", 131072) else ""
        shape = f"{preset}-{tokens}-causal_document"
        for framework, kernel in product(("deepspeed", "megatron"), kernels):
            assert f"speed-{framework}-{shape}-{kernel}-none{recompute}" in alone
            for strategy in strategies:
                assert f"speed-{framework}-{shape}-{kernel}-{strategy}{recompute}" in names
        for strategy in strategies:
            assert f"speed-deepspeed-{shape}-triton-{strategy}{recompute}-zero3" in names
    if world > 1:
        exact = importlib.import_module("training_runs").EXACT
        for preset, kernel, strategy in product(("125m", "1b"), kernels, strategies):
            for framework in ("deepspeed", "megatron"):
                assert f"parity-{preset}-{framework}-{kernel}-{strategy}-zero1" in names
            assert f"parity-{preset}-deepspeed-triton-{strategy}-zero3" in names
        for preset, framework, strategy in product(("125m", "1b"), ("deepspeed", "megatron"), strategies):
            assert f"parity-{preset}-{framework}-{exact}-{strategy}-zero1-fp32" in names


def test_one_gpu_trains_every_kernel_at_every_length_in_both_frameworks(cells):
    kernels = ["triton", "sdpa_flash", "cudnn"]
    planned = {name: list(plan(1, kernels)) for name, plan in cells.STEPS.items()}
    for r in (r for runs in planned.values() for r in runs):
        assert r.gpus == (0,)
        assert r.arguments[r.arguments.index("--strategy") + 1] == "none"
    speed = [r.name for r in planned["speed"]]
    assert speed[:2] == [f"speed-deepspeed-1b-32768-causal_document-{k}-none" for k in kernels[:2]]
    for kernel, mask, tokens in product(kernels, ("causal", "causal_document"), ("8192", "32768", "131072")):
        recompute = "-recompute" if tokens == "131072" else ""
        for framework, zero in (("deepspeed", ""), ("deepspeed", "-zero3"), ("megatron", "")):
            assert f"speed-{framework}-1b-{tokens}-{mask}-{kernel}-none{recompute}{zero}" in speed
    assert [r.series for r in planned["longest"]] == [
        f"longest-1b-triton-none{held}" for held in ("", "-recompute", "-recompute-keep-attention")
    ]
    assert len({r.unit for r in planned["longest"]}) == 3  # one series is no guess for another


def record(folder: Path, losses: list[float], dtype: str = "bf16", seqlen: int = 100, world: int = 1) -> None:
    folder.mkdir()
    attention = {"kernel": "naive", "strategy": "none", "mask": "causal", "layout": "zigzag"}
    first = {"type": "run", "schema": 1, "attention": attention, "dtype": dtype, "cp": 1, "world": world}
    first["framework"] = "megatron" if "megatron" in folder.name else "deepspeed"
    lines: list[dict] = [first | {"steps": len(losses), "seqlen": seqlen, "command": []}]
    for i, loss in enumerate(losses):
        lines.append(
            {
                **{"type": "step", "step": i, "loss": loss, "grad_norm": 1.0, "batch_digest": f"{i}"},
                **{"step_ms": 10.0, "mfu": 0.5, "tokens": seqlen, "peak_memory_gib": 1.0},
            }
        )
    lines.append({"type": "end"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save({"w": torch.full((2,), losses[0])}, folder / "gradients.pt")


def failed(folder: Path, reason: str) -> None:
    folder.mkdir()
    (folder / "failed.txt").write_text(f"{reason}\n")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("training_table")
    whole = lambda path: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731
    monkeypatch.setattr(module.records, "read", whole)  # these records have only what the table reads
    monkeypatch.setattr(sys, "argv", ["training_table.py", str(tmp_path)])
    return module


def test_the_table_judges_by_the_rules_of_lcab_parity(table, tmp_path, capsys):
    record(tmp_path / "parity-1b-deepspeed-baseline-causal", [4.0, 3.0, 2.0])
    record(tmp_path / "parity-1b-deepspeed-baseline-causal-fp32", [4.004, 3.0, 2.0], "fp32")
    record(tmp_path / "parity-1b-near", [4.006, 3.0, 2.0])  # within twice 1e-3
    record(tmp_path / "parity-1b-far", [4.01, 3.0, 2.0])
    # Another framework rounds to the other side of float32, which is the same in both.
    record(tmp_path / "parity-1b-megatron-baseline-causal", [4.01, 3.0, 2.0])
    record(tmp_path / "parity-1b-megatron-baseline-causal-fp32", [4.00401, 3.0, 2.0], "fp32")
    record(tmp_path / "parity-1b-megatron-near", [4.02, 3.0, 2.0])  # within twice 1.5e-3
    record(tmp_path / "parity-1b-megatron-far", [4.025, 3.0, 2.0])
    # In float32 over several GPUs: beside the twin of its framework.
    record(tmp_path / "parity-1b-megatron-near-fp32", [4.00403, 3.0, 2.0], "fp32")
    record(tmp_path / "parity-1b-deepspeed-far-fp32", [4.00406, 3.0, 2.0], "fp32")
    record(tmp_path / "parity-125m-near", [4.0, 3.0, 2.0])  # its preset has no baseline here
    record(tmp_path / "speed-x", [4.0, 3.0, 2.0])
    failed(tmp_path / "speed-y", "crashed: rank 0")
    record(tmp_path / "speed-z", [4.0, 3.0])
    cut = tmp_path / "speed-z" / "metrics.jsonl"
    cut.write_text("\n".join(cut.read_text().splitlines()[:-1]))
    table.main()
    rows = {row["run"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    verdicts = {name: row.get("verdict") for name, row in rows.items()}
    assert verdicts == {
        "parity-1b-deepspeed-baseline-causal": "baseline",
        "parity-1b-deepspeed-baseline-causal-fp32": "baseline in fp32",
        "parity-1b-near": "pass",
        "parity-1b-far": "fail",
        "parity-1b-megatron-baseline-causal": "baseline",
        "parity-1b-megatron-baseline-causal-fp32": "pass",
        "parity-1b-megatron-near": "pass",
        "parity-1b-megatron-far": "fail",
        "parity-1b-megatron-near-fp32": "pass",
        "parity-1b-deepspeed-far-fp32": "fail",
        "parity-125m-near": "no baseline",
        "speed-x": None,
        "speed-y": "did not end",
        "speed-z": "did not end",
    }
    kept = {path.parent.name for path in tmp_path.glob("parity-1b-*/gradients.pt")}
    own = {f"parity-1b-{framework}-baseline-causal" for framework in ("deepspeed", "megatron")}
    assert kept == own | {f"{name}-fp32" for name in own}
    assert rows["speed-x"]["tokens_per_s"] == pytest.approx(10_000)
    out = capsys.readouterr().out
    assert "- `speed-y`: crashed: rank 0" in out
    assert "- `speed-z`: its time ended after 2 steps" in out
    for path in tmp_path.glob("*/gradients.pt"):  # as in the archive
        path.unlink()
    table.main()
    assert capsys.readouterr().out == out
    again = tmp_path / "parity-1b-deepspeed-baseline-causal" / "metrics.jsonl"
    os.utime(again, (time.time() + 60,) * 2)  # the baseline is run again
    table.main()
    assert "- `parity-1b-near`: was compared with an earlier run of its baseline" in capsys.readouterr().out


def test_parity_is_judged_while_others_train_once_the_baselines_have_ended(cells, table, tmp_path, capsys):
    own = "parity-1b-deepspeed-baseline-causal"
    early, baseline, exact, late = (
        run(cells, name, 1) for name in ("parity-1b-early", own, f"{own}-fp32", "parity-1b-late")
    )
    mine = step(cells, tmp_path)
    judge = cells.Judge(mine, [baseline, exact, early, late])

    def end(one, losses: list[float], dtype: str = "bf16") -> list[str]:
        record(tmp_path / one.name, losses, dtype)
        judge.ended(one)
        judge.compared[-1].result()
        return [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]

    assert end(early, [4.006, 3.0]) == []
    assert end(baseline, [4.0, 3.0]) == []
    assert (tmp_path / early.name / "gradients.pt").exists()
    assert end(exact, [4.004, 3.0], "fp32") == [
        "parity-1b-early: pass",
        f"{own}: baseline",
        f"{own}-fp32: baseline in fp32",
    ]
    (line,) = end(late, [4.01, 3.0])
    assert line.startswith("parity-1b-late: fail; loss in the first 10 steps deviates by 2.5e-03")
    judge.close()
    kept = {path.parent.name for path in tmp_path.glob("*/gradients.pt")}
    assert kept == {baseline.name, exact.name}  # the others are compared, and large


def test_every_run_that_ended_is_judged_the_last_of_a_launch_as_well(cells, tmp_path):
    ranks(tmp_path, most=10)
    runs, mine, ended = [run(cells, name, 1) for name in "abc"], step(cells, tmp_path), []
    mine.judge = SimpleNamespace(ended=lambda one: ended.append(one.name))
    cells.do(mine, runs, "all")
    assert ended == ["a", "b", "c"]


def test_the_longest_of_a_series_is_one_row_beside_the_first_that_lacked_memory(table, tmp_path, capsys):
    for seqlen in (400, 500):
        record(tmp_path / f"longest-s-{seqlen}", [4.0, 3.0], seqlen=seqlen)
    failed(tmp_path / "longest-s-700", "CUDA out of memory")
    failed(tmp_path / "longest-s-600", "CUDA out of memory")
    failed(tmp_path / "longest-t-400", "it took longer than 60 s")
    table.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    assert [(row["longest"], row["too long"]) for row in rows] == [("500", "600"), ("-", "-")]


def test_one_gpu_needs_no_columns_of_several(table, tmp_path, capsys):
    record(tmp_path / "speed-one", [4.0, 3.0, 2.0])
    record(tmp_path / "speed-two", [4.0, 3.0, 2.0], seqlen=200, world=2)
    failed(tmp_path / "longest-s-600", "CUDA out of memory")  # no record says on how many GPUs
    table.main()
    lines = capsys.readouterr().out.splitlines()
    titles = {line: lines[i + 2] for i, line in enumerate(lines) if line.startswith("###")}
    assert {title: "| strategy | layout | GPUs |" in columns for title, columns in titles.items()} == {
        "### 100 tokens, one GPU": False,
        "### 200 tokens": True,
        "### Longest sequence": True,
    }
