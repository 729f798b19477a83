"""`lcab plan` as a user types it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lcab_plugin.cli import main

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "2026-11-23-h100"

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """`lcab plan` in this process: words -> exit status, stdout, stderr."""

    def lcab(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lcab", "plan", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return lcab


def test_the_table_has_the_terms_and_their_sources(plan: Plan) -> None:
    status, out, err = plan("--mask", "causal", "--seqlen", "65536", "--top", "3")
    assert (status, err) == (0, "")
    for words in ("imbalance", "exposed", "activations", "measured on H100", "H100 SXM data sheet", "8 x 1"):
        assert words in out
    assert "candidates can run" in out


@pytest.mark.parametrize(("nodes", "unit"), [(1, "ms"), (2, "s")])
def test_the_columns_add_up(plan: Plan, nodes: int, unit: str) -> None:
    seqlen = str(65536 if nodes == 1 else 1 << 20)
    _, out, _ = plan("--mask", "causal", "--seqlen", seqlen, "--nodes", str(nodes), "--top", "4")
    assert f"Fastest by prediction, {unit} of a step" in out
    times, held = out.split("Memory of a rank, GiB")
    for table, terms in ((times, 6), (held, 5)):
        rows = [line.split()[-terms - 1 :] for line in table.splitlines() if " zigzag " in line]
        assert rows
        for whole, *parts in (map(float, row) for row in rows):
            assert whole == pytest.approx(sum(parts), rel=2e-3)
            assert len(parts) == terms


def test_the_tables_fit_an_ordinary_terminal(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    # With both numbers given, rich takes them; of a dumb terminal it would take 80 columns.
    terminal = {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120", "LINES": "40"}
    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    _, out, _ = plan("--mask", "causal", "--seqlen", "65536", "--nodes", "12", "--top", "20")
    assert max(len(line) for line in out.splitlines() if "optimizer" in line) <= 120
    for name in ("imbalance", "parameters", "optimizer", "activations", "communication", "loongtrain"):
        assert name in out  # no column is so narrow that it breaks words


def test_json_is_complete_and_ordered(plan: Plan) -> None:
    words = ("--mask", "causal_document", "--seqlen", "16384", "--nodes", "2", "--gpus", "4", "--json")
    status, out, _ = plan(*words)
    document = json.loads(out)
    assert status == 0
    assert document["cluster"]["nodes"] == 2
    plans = document["plans"]
    assert len(plans) == document["runnable"] <= document["candidates"]
    steps = [p["step_ms"] for p in plans if p["step_ms"] > 1.01 * plans[0]["step_ms"]]
    assert steps == sorted(steps)
    assert plans[0]["step_ms"] == pytest.approx(sum(plans[0]["terms_ms"].values()))
    _, every, _ = plan(*words, "--all", "--heads", "6:6")
    reasons = [p["reason"] for p in json.loads(every)["plans"]]
    assert any(reason and "cannot be dealt" in reason for reason in reasons)


def test_what_cannot_run_is_listed_when_asked_for(plan: Plan) -> None:
    words = ("--mask", "causal", "--seqlen", "8192", "--model", "llama3-405b", "--layouts", "zigzag")
    _, short, _ = plan(*words)
    assert "None fits" in short
    _, whole, _ = plan(*words, "--all")
    assert "Cannot run" in whole
    assert "most for states" in whole


def test_calibration_prints_its_error(plan: Plan) -> None:
    words = ("--mask", "causal", "--seqlen", "8192", "--kernels", "cudnn", "--calibrate")
    status, out, _ = plan(*words, str(RESULTS / "kernels.jsonl"))
    assert status == 0
    assert "fitted on H100" in out
    assert "cudnn bwd" in out
    assert "held out" in out
    assert "141 records left aside: 'torch_flex' is no kernel here" in out
    _, out, _ = plan(*words, str(RESULTS / "kernels.jsonl"), "--json")
    assert {e["what"] for e in json.loads(out)["calibration"]["errors"]} >= {"cudnn fwd", "triton bwd"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mask", "causl"), "unknown mask"),
        (("--mask", "causal", "--model", "gpt"), "unknown model"),
        (("--mask", "causal", "--heads", "8:3"), "multiple of the key/value heads"),
        (("--mask", "causal", "--heads", "x"), "--heads takes integers"),
        (("--mask", "causal", "--heads", "8:4:2"), "--heads takes query and key/value heads"),
        (("--mask", "causal", "--nodes", "0"), "nodes=0"),
        (("--mask", "causal", "--kernels", "fa9"), "unknown kernel"),
        (("--mask", "causal", "--cp", "3"), "give one of: 8"),
        (("--mask", "causal", "--between", "-1"), "moves nothing"),
        (("--mask", "causal", "--top", "0"), "--top 0"),
        (("--mask", "causal", "--calibrate", "/nowhere"), "does not exist"),
        (("--mask", "causal", "--strategies", "usp", "--gpus", "2"), "none of the strategies usp"),
    ],
)
def test_bad_input_is_one_sentence(plan: Plan, words: tuple[str, ...], message: str) -> None:
    status, out, err = plan(*words)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_record_that_is_wrong_is_named_with_file_and_line(plan: Plan, tmp_path: Path) -> None:
    lines = (RESULTS / "kernels.jsonl").read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([lines[0], lines[1].replace('"seqlen": 1024', '"seqlen": "1K"')]) + "\n")
    words = ("--mask", "causal", "--seqlen", "8192", "--kernels", "cudnn", "--calibrate")
    status, _, err = plan(*words, str(bad))
    assert status == 2
    assert "bad.jsonl, line 2: kernels has seqlen '1K', which is not a whole number" in err
    (tmp_path / "good.jsonl").write_text("\n".join(lines) + '\n{"torn')
    status, _, err = plan(*words, str(tmp_path))
    assert status == 0
    assert err.startswith("not calibrated to: bad.jsonl: bad.jsonl, line 2: ")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "none.jsonl").write_text("")
    assert "holds no measured cell" in plan(*words, str(empty))[2]


def test_records_of_other_hardware_cannot_calibrate(plan: Plan) -> None:
    status, _, err = plan(
        "--mask", "causal", "--hardware", "A100", "--calibrate", str(RESULTS / "kernels.jsonl")
    )
    assert status == 2
    assert "can be fitted for A100" in err
    assert "measured on NVIDIA H100" in err
