"""Ranks are started with torchrun's variables, and none of them is left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lcab_plugin.bench.launch import SCRIPTS, Outcome, example, launch, refusal
from lcab_plugin.errors import LcabError


def run(folder: Path, code: str, world: int = 2, timeout: float = 60.0) -> Outcome:
    script = folder / "train.py"
    script.write_text("import os, subprocess, sys, time\nrank = int(os.environ['RANK'])\n" + code)
    return launch(
        script, ["--flag", "value"], world=world, device="cpu", logs=folder / "logs", timeout=timeout
    )


def log(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"rank{rank}.log").read_text()


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    names = "WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR DS_ACCELERATOR"
    outcome = run(tmp_path, f"print(rank, *sys.argv[1:], *(os.environ[n] for n in '{names}'.split()))")
    assert (outcome.status, outcome.reason) == ("done", None)
    for rank in (0, 1):
        assert log(tmp_path, rank).split() == [
            str(rank),
            "--flag",
            "value",
            "2",
            str(rank),
            "2",
            "127.0.0.1",
            "cpu",
        ]


def test_the_port_is_open_before_a_rank_is(tmp_path: Path) -> None:
    code = (
        "import socket\n"
        "with socket.socket() as early:\n"  # before rank 0 has imported torch
        "    sys.exit(early.connect_ex(('127.0.0.1', int(os.environ['MASTER_PORT']))))"
    )
    assert run(tmp_path, code).status == "done"


def test_ranks_meet(tmp_path: Path) -> None:
    code = (
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "everyone = [None, None]\n"
        "dist.all_gather_object(everyone, rank)\n"
        "dist.destroy_process_group()\n"
        "print(everyone)"
    )
    assert run(tmp_path, code).status == "done"
    assert [log(tmp_path, rank).splitlines()[-1] for rank in (0, 1)] == ["[0, 1]"] * 2


@pytest.mark.parametrize(
    "code",
    [
        "sys.exit('train.py: heads 3 do not fit; give 4.')",
        "class LcabError(ValueError): pass\nraise LcabError('heads 3 do not fit; give 4.')",
        "if rank == 1: sys.exit('train.py: heads 3 do not fit; give 4.')\nraise OSError('peer is gone')",
        "print('train.py: error: heads 3 do not fit; give 4.\\n')\nsys.exit(2)",
    ],
)
def test_a_refusal_is_told_in_its_own_words(tmp_path: Path, code: str) -> None:
    outcome = run(tmp_path, code)
    assert (outcome.status, outcome.reason) == ("cannot run", "heads 3 do not fit; give 4.")


def test_a_compiler_s_error_is_a_crash_of_a_script_and_no_refusal() -> None:
    lines = ["train.py: heads 3 do not fit.", "rank1: lcab_plugin.errors.LcabError: no.", "error: gcc failed"]
    assert refusal(lines) == "no."
    assert refusal(lines[:1]) == "heads 3 do not fit."
    assert refusal(lines, lcab=True) == "gcc failed"
    assert refusal(lines[2:]) is None


def test_an_example_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert example(SCRIPTS["deepspeed"]).name == "train_gpt.py"
    own = tmp_path / "examples" / SCRIPTS["deepspeed"]
    own.parent.mkdir()
    own.touch()
    assert example(SCRIPTS["deepspeed"]) == own
    with pytest.raises(LcabError, match=r"no examples/none.py here; run in a checkout of lcab_plugin\.$"):
        example("none.py")
    with pytest.raises(LcabError, match=r"lcab_plugin, or give --script\.$"):
        example("none.py", "--script")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('disk full')", "rank 0, exit status 1: OSError: disk full"),
        ("sys.exit(3)", "rank 0, exit status 3: no output"),
        ("os.kill(os.getpid(), 11)", "rank 0, signal SIGSEGV: no output"),
    ],
)
def test_a_crash_is_told_by_its_last_line(tmp_path: Path, code: str, reason: str) -> None:
    outcome = run(tmp_path, code)
    assert (outcome.status, outcome.reason) == ("crashed", reason)


def test_a_rank_that_waits_for_a_dead_peer_is_stopped(tmp_path: Path) -> None:
    outcome = run(tmp_path, "if rank == 0: raise OSError('disk full')\ntime.sleep(600)")
    assert (outcome.status, outcome.reason) == ("crashed", "rank 0, exit status 1: OSError: disk full")
    assert outcome.seconds < 30


def test_a_hang_is_killed_with_its_children(tmp_path: Path) -> None:
    code = (
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(os.getpid(), child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    outcome = run(tmp_path, code, timeout=3.0)
    assert outcome.status == "timeout"
    assert outcome.reason is not None
    assert "still running after 3 s" in outcome.reason
    pids = [int(pid) for rank in (0, 1) for pid in log(tmp_path, rank).split()]
    assert len(pids) == 4
    until = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    """Whether the process runs; one that waits for its parent to read its exit status does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False if os.path.isdir("/proc/self") else _signals(pid)


def _signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
