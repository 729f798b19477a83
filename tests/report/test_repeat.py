"""From a record to the command that makes it again."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lcab_plugin.cli.app import app
from lcab_plugin.errors import LcabError
from lcab_plugin.report import repeat, sources
from tests.report.made_records import RUN, cp_cell, kernel_cell, parity, training_run, write


def test_a_benchmark_runs_the_same_arguments_into_another_file(tmp_path):
    path = write(tmp_path / "k.jsonl", [RUN, kernel_cell("naive", 64, 1.0)])
    plan = repeat.plan(path, tmp_path / "new.jsonl")
    assert plan.words == ["lcab", "bench", "kernels", "--out", str(tmp_path / "new.jsonl")]  # all cells anew


@pytest.mark.parametrize("program", ["lcab", "/somewhere/bin/lcab", "/checkout/lcab_plugin/cli/__main__.py"])
def test_ranks_that_torchrun_started_are_started_here(tmp_path, program):
    run = {**RUN, "command": [program, "bench", "cp", "--masks=causal", "--out=a.jsonl"]}
    path = write(tmp_path / "cp.jsonl", [run, cp_cell("ring_p2p", 4, 1.0)])
    words = repeat.plan(path, tmp_path / "new.jsonl").words
    assert words[:4] == ["lcab", "bench", "cp", "--masks=causal"]
    assert words[4:] == ["--world", "4", "--out", str(tmp_path / "new.jsonl")]


def test_options_stay_before_the_flags_for_a_script(tmp_path):
    found = parity()
    found["environment"]["command"] = ["lcab", "parity", "--out", "old", "--", "--layers", "2", "--out", "x"]
    (tmp_path / "parity.json").write_text(json.dumps(found))
    words = repeat.plan(tmp_path / "parity.json", tmp_path / "new").words
    assert words == ["lcab", "parity", "--out", str(tmp_path / "new"), "--", "--layers", "2", "--out", "x"]


def test_a_training_run_starts_its_ranks_and_writes_elsewhere(tmp_path):
    command = ["/old/examples/train_gpt.py", "--steps", "3", "--name", "a", "--save", "ckpt", "--out", "runs"]
    command += ["--deepspeed_config", "examples/configs/zero1.json", "--save-gradients=g.pt"]
    path = write(tmp_path / "metrics.jsonl", training_run("naive", [1.0], command=command))
    plan = repeat.plan(path, tmp_path / "again")
    assert (plan.script.name, plan.ranks) == ("train_gpt.py", 2)
    assert plan.arguments[:2] == ["--steps", "3"]
    assert plan.arguments[-4:] == ["--out", str(tmp_path), "--name", "again"]
    assert "ckpt" not in plan.arguments
    assert "--save-gradients=g.pt" not in plan.arguments
    assert plan.words[:4] == ["torchrun", "--standalone", "--nproc-per-node", "2"]


def test_what_differs_from_then_is_said(tmp_path):
    path = write(tmp_path / "k.jsonl", [{**RUN, "torch": "1.0"}, kernel_cell("naive", 64, 1.0)])
    differs = {name: then for name, then, _ in repeat.plan(path, tmp_path / "new.jsonl").differs}
    assert (differs["torch"], differs["device"]) == ("1.0", "a machine")


@pytest.mark.parametrize(
    ("lines", "number", "why"),
    [
        (
            [RUN, {**RUN, "command": ["lcab", "bench", "cp"]}],
            None,
            "2 runs, choose one with --run: 1: bench kern",
        ),
        ([RUN], 2, "--run 2 is not in"),
        ([{**RUN, "command": ["/tmp/x/rank.py"]}], None, "made by /tmp/x/rank.py, which is not here"),
        ([{**RUN, "command": []}], None, "does not say which command made it"),
        ([{"type": "step"}], None, "has no step"),
    ],
)
def test_what_cannot_be_repeated_is_one_sentence(tmp_path, lines, number, why):
    path = write(tmp_path / "k.jsonl", lines)
    with pytest.raises(LcabError, match=why):
        repeat.plan(path, tmp_path / "new.jsonl", number)


def test_the_second_of_two_runs_can_be_chosen(tmp_path):
    path = write(tmp_path / "k.jsonl", [RUN, {**RUN, "command": ["lcab", "bench", "cp"]}])
    assert repeat.plan(path, tmp_path / "new.jsonl", 2).words[:3] == ["lcab", "bench", "cp"]


SCRIPT = """
import json, os, sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flags.get("--steps") == "0":
    sys.exit("script.py: steps = 0 must be at least 1.")
if os.environ["RANK"] == "1":
    Path(flags["--out"], flags["--name"], "metrics.jsonl").write_text(json.dumps(flags))
"""


def test_the_ranks_of_a_script_really_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [str(script), "--steps", "3", "--out", "runs"]
    path = write(tmp_path / "metrics.jsonl", training_run("naive", [1.0], command=command))
    result = CliRunner().invoke(app, ["repeat", str(path), "--out", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "again" / "metrics.jsonl").read_text())["--steps"] == "3"


def test_a_script_that_refuses_says_why(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [str(script), "--steps", "0", "--out", "runs"]
    path = write(tmp_path / "metrics.jsonl", training_run("naive", [1.0], command=command))
    result = CliRunner().invoke(app, ["repeat", str(path), "--out", str(tmp_path / "again")])
    assert isinstance(result.exception, LcabError)
    assert "cannot run: steps = 0 must be at least 1." in str(result.exception)


def test_a_benchmark_really_runs_again(tmp_path):
    """What it measured is what the record had: the same cells."""
    words = ["bench", "kernels", "--kernels", "sdpa_math", "--masks", "causal", "--seqlens", "64", "--passes"]
    words += ["fwd", "--heads", "2:1", "--head-dim", "16", "--cell-seconds", "0.05", "--device", "cpu"]
    path = write(tmp_path / "k.jsonl", [{**RUN, "command": ["lcab", *words, "--out", "k.jsonl"]}])
    out = tmp_path / "again.jsonl"
    words = [sys.executable, "-m", "lcab_plugin.cli", "repeat", str(path), "--out", str(out), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # and nothing else: the benchmark's own table is on stderr
    assert (told["status"], told["out"]) == (0, str(out))
    assert "64 tokens, fwd" in done.stderr
    (cell,) = (r for r in sources.valid(out).records if r["type"] == "cell")
    assert (cell["kernel"], cell["seqlen"], cell["status"]) == ("sdpa_math", 64, "ok")


def test_a_dry_run_prints_and_runs_nothing(tmp_path):
    path = write(tmp_path / "k.jsonl", [RUN, kernel_cell("naive", 64, 1.0)])
    words = ["repeat", str(path), "--dry-run", "--json", "--out", str(tmp_path / "n.jsonl")]
    result = CliRunner().invoke(app, words)
    told = json.loads(result.stdout)
    assert told["command"][:3] == ["lcab", "bench", "kernels"]
    assert not (tmp_path / "n.jsonl").exists()
