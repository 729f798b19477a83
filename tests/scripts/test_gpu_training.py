"""What scripts/gpu/training.sh does around the training runs: starting anew, searching, comparing."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lcab_plugin.bench.launch import launch
from lcab_plugin.training import records

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
        raise MemoryError(f"Error: {length} tokens do not fit")
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


def ranks(tmp_path: Path, most: int, slow: int = -1) -> None:
    (tmp_path / "ranks.py").write_text(RANKS.replace("MOST", str(most)).replace("SLOW", str(slow)))


def step(cells: ModuleType, tmp_path: Path, patience: float = 30.0, seconds: float = 30.0):
    return cells.Step("speed", tmp_path, time.monotonic() + seconds, patience)


def run(cells: ModuleType, name: str, seqlen: int, series: str | None = None):
    arguments = ("--seqlen", str(seqlen))
    return cells.Run(name, "deepspeed", arguments, (0,), series, seqlen)


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


def test_the_longest_is_found_by_doubling_and_then_half_way(cells, tmp_path, capsys):
    ranks(tmp_path, most=13)
    runs = [run(cells, f"s-{n}", n, "s") for n in (4, 8, 16, 32)]
    mine = step(cells, tmp_path)
    cells.search(mine, runs)
    assert [mine.done(r) for r in runs] == [True, True, False, False]
    assert (tmp_path / "s-12" / "metrics.jsonl").exists()
    assert not (tmp_path / "s-32").exists()
    assert "s: longest 12" in capsys.readouterr().out


def test_every_run_names_flags_that_its_script_has(cells):
    from lcab_plugin.config import AttentionConfig
    from lcab_plugin.training import arguments
    from lcab_plugin.training.settings import DEGREES

    parser = arguments.parser(None)
    arguments.add_training(parser.add_argument_group("training"))
    arguments.add_attention(parser.add_argument_group("attention"))
    arguments.add_run(parser)
    for world in (2, 4):
        for plan in cells.STEPS.values():
            runs = list(plan(world, ["sdpa_flash", "naive"]))
            assert len({r.name for r in runs}) == len(runs)
            for r in runs:
                given, rest = parser.parse_known_args(list(r.arguments))
                known = {"--deepspeed_config", "--activation-checkpointing", "--distributed-optimizer"}
                assert {flag for flag in rest if flag.startswith("--")} <= known | {"--recompute"}
                degrees = {key: getattr(given, key) for key in DEGREES if getattr(given, key)}
                config = AttentionConfig.from_dict({"strategy": given.strategy, **degrees})
                assert given.strategy == "none" or config.degrees(len(r.gpus))


def record(folder: Path, losses: list[float], dtype: str) -> None:
    folder.mkdir()
    attention = {"kernel": "naive", "strategy": "none", "mask": "causal", "layout": "zigzag"}
    lines: list[dict] = [
        {"type": "run", "schema": 1, "attention": attention, "dtype": dtype, "cp": 1, "steps": len(losses)}
    ]
    for i, loss in enumerate(losses):
        lines.append(
            {
                **{"type": "step", "step": i, "loss": loss, "grad_norm": 1.0, "batch_digest": f"{i}"},
                **{"step_ms": 10.0, "mfu": 0.5, "tokens": 100, "peak_memory_gib": 1.0},
            }
        )
    lines.append({"type": "end"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save({"w": torch.full((2,), losses[0])}, folder / "gradients.pt")


def test_the_table_judges_by_the_rules_of_lcab_parity(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    table = importlib.import_module("training_table")
    whole = lambda path: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731
    monkeypatch.setattr(table.records, "read", whole)  # these records have only what the table reads
    record(tmp_path / "parity-baseline", [4.0, 3.0, 2.0], "bf16")
    record(tmp_path / "parity-baseline-fp32", [4.004, 3.0, 2.0], "fp32")
    record(tmp_path / "parity-near", [4.006, 3.0, 2.0], "bf16")  # within twice 1e-3
    record(tmp_path / "parity-far", [4.01, 3.0, 2.0], "bf16")
    record(tmp_path / "speed-x", [4.0, 3.0, 2.0], "bf16")
    (tmp_path / "speed-y").mkdir()
    (tmp_path / "speed-y" / "failed.txt").write_text("crashed: out of memory\n")
    monkeypatch.setattr(sys, "argv", ["training_table.py", str(tmp_path)])
    table.main()
    rows = {row["run"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    verdicts = {name: row.get("verdict") for name, row in rows.items()}
    assert verdicts == {
        "parity-baseline": "baseline",
        "parity-baseline-fp32": "baseline-fp32",
        "parity-near": "pass",
        "parity-far": "fail",
        "speed-x": None,
        "speed-y": "did not end",
    }
    assert rows["speed-x"]["tokens_per_s"] == pytest.approx(10_000)
    assert "speed-y: crashed: out of memory" in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.parametrize("framework", ["deepspeed", "megatron"])
def test_a_second_run_in_the_same_process_is_the_same(monkeypatch, tmp_path, framework):
    pytest.importorskip(framework)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    runs_module = importlib.import_module("training_runs")
    script = str(SCRIPTS.parents[1] / runs_module.SCRIPTS[framework])
    flags = ["--seqlen", "64", "--steps", "3", "--global-batch", "2", "--eval-batches", "0"]
    runs = []
    for name, strategy in (("first", "ulysses"), ("between", "ring_p2p"), ("second", "ulysses")):
        arguments = [*flags, "--strategy", strategy, "--name", name, "--out", str(tmp_path)]
        runs.append({"name": name, "script": script, "arguments": arguments})
    plan = tmp_path / "runs.json"
    plan.write_text(json.dumps(runs))
    outcome = launch(
        SCRIPTS / "training_ranks.py",
        [str(plan), "0,1"],
        world=2,
        device="cpu",
        logs=tmp_path / "logs",
        timeout=120,
    )
    assert outcome.status == "done", outcome.reason
    losses = {
        name: [
            (s["loss"], s["grad_norm"])
            for s in records.steps(records.read(tmp_path / name / "metrics.jsonl"))
        ]
        for name in ("first", "between", "second")
    }
    assert losses["first"] == losses["second"]
    assert losses["between"] == [pytest.approx(step, rel=1e-5) for step in losses["first"]]
