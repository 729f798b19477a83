"""Records: whole lines at any moment, and a reader that copes with a kill and a resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcab_plugin.errors import LcabError
from lcab_plugin.training.records import SCHEMA, RunLog, command, environment, read, steps

WRITER = """
import json, sys
from lcab_plugin.training.records import RunLog
RUN, STEP = json.loads(sys.argv[2])
with RunLog(sys.argv[1]) as log:
    log.write("run", **RUN)
    for step in range(10**9):
        log.write("step", **{**STEP, "step": step, "loss": 1.0 / (step + 1)})
        print(step, flush=True)
"""
RUN = {"lcab_plugin": "0.1.0", "torch": "2.13.0", "device": "a machine", "command": ["lcab"]}
STEP = {"grad_norm": 1.0, "step_ms": 1.0, "tokens_per_s": 1.0, "peak_memory_gib": 0.1, "batch_digest": "d"}


def test_a_run_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one" / "metrics.jsonl"
    with RunLog(path) as log:
        log.write("run", **RUN, name="one", path=path)
        log.write("step", **STEP, step=0, loss=2.5)
        assert [r["type"] for r in read(path)] == ["run", "step"]  # on disk before the run ends
    run, step = read(path)
    assert (run["schema"], run["name"], run["path"]) == (SCHEMA, "one", str(path))
    assert (step["step"], step["loss"]) == (0, 2.5)
    assert run["time"] <= step["time"] <= time.time()


def test_kill_9_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    words = [sys.executable, "-c", WRITER, str(path), json.dumps([RUN, STEP])]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as victim:
        assert victim.stdout is not None
        for _ in range(20):
            acknowledged = int(victim.stdout.readline())
        victim.send_signal(signal.SIGKILL)
        acknowledged = int((victim.stdout.read().splitlines() or [acknowledged])[-1])
    written = [record["step"] for record in steps(read(path))]
    assert written == list(range(len(written)))
    assert written[-1] >= acknowledged >= 19


def test_a_resumed_run_appends_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(path) as log:
        log.write("run", **RUN)
        for step in range(4):
            log.write("step", **STEP, step=step, loss=float(step))
    path.write_bytes(path.read_bytes()[:-9])
    assert [r["step"] for r in steps(read(path))] == [0, 1, 2]
    with RunLog(path, append=True) as log:
        log.write("run", **RUN, first_step=2)
        log.write("step", **STEP, step=2, loss=20.0)
    records = read(path)
    assert [r["type"] for r in records] == ["run", "step", "step", "step", "run", "step"]
    assert [r["loss"] for r in steps(records)] == [0.0, 1.0, 20.0]


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    RunLog(path).close()
    with RunLog(path) as log:  # nothing was written yet
        log.write("run")
    with pytest.raises(LcabError, match="--name"):
        RunLog(path)
    with pytest.raises(LcabError, match="--out"):
        RunLog(path / "below" / "a file")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "metrics.jsonl"
    with RunLog(path, enabled=False) as log:
        log.write("run")
    assert not path.parent.exists()


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(LcabError, match="does not exist"):
        read(path)
    path.write_text('{"type": "other"}\nnot json\n{"type": "step", "step": 0}\n')
    with pytest.raises(LcabError, match=r"metrics.jsonl, line 2 is not a record"):
        read(path)
    path.write_text('{"type": "other"}\n{"type": 7}\n{"type": "other"}\n')
    with pytest.raises(LcabError, match="line 2 is not a record"):
        read(path)
    path.write_text('{"type": "run", "schema": 99}\n')
    with pytest.raises(LcabError, match="line 1: it has schema 99"):
        read(path)


def test_the_environment_is_json_and_says_what_ran() -> None:
    facts = json.loads(json.dumps(environment()))
    assert {"python", "torch", "deepspeed", "device", "git", "command"} <= facts.keys()
    assert facts["device"]
    assert facts["machine"].keys() >= {"load", "cpu_mhz", "gpu"}


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("{elsewhere}/bin/lcab", "lcab"),
        ("{elsewhere}/lcab_plugin/cli/__main__.py", "lcab"),
        ("{here}/examples/train_gpt.py", "examples/train_gpt.py"),
        ("mine/train.py", "mine/train.py"),
        ("{checkout}/examples/train_gpt.py", "examples/train_gpt.py"),
        ("{elsewhere}/bin/train.py", "train.py"),
    ],
)
def test_a_command_names_no_place_of_this_machine(
    program: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "here": tmp_path / "here",
        "elsewhere": tmp_path / "elsewhere",
        "checkout": Path(__file__).parents[2],
    }
    places["here"].mkdir()
    monkeypatch.chdir(places["here"])
    data = places["here"] / "texts"
    given = ["--data", str(data), f"--out={data}", "--lr", "1e-3", "/else/where"]
    monkeypatch.setattr(sys, "argv", [program.format(**places), *given])
    assert command() == [expected, "--data", "texts", "--out=texts", "--lr", "1e-3", "/else/where"]
