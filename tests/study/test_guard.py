"""A guard leaves no process behind, whatever ends first."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcab_plugin.study import guard

# Starts a process in a session of its own, as launchers do, that ignores SIGTERM; says its number.
CHILD = """
import subprocess, sys, time
deaf = "from signal import *; signal(SIGTERM, SIG_IGN); print(1, flush=True); import time; time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""


def start(code: str, seconds: float = 60.0) -> subprocess.Popen[str]:
    command = [sys.executable, guard.__file__, str(seconds), sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def gone(pid: int) -> bool:
    """Ended, and waited for by its parent."""
    return not Path(f"/proc/{pid}").exists()


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds descendants by /proc")


def test_the_exit_status_is_the_commands() -> None:
    assert start("raise SystemExit(3)").wait(60) == 3
    assert start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").wait(60) == 128 + 9
    assert start("").wait(60) == 0


@needs_proc
@pytest.mark.parametrize("how", ["it ends", "its starter ends", "it takes too long"])
def test_nothing_is_left(how: str) -> None:
    code = CHILD if how == "it ends" else CHILD + "time.sleep(600)"
    process = start(code, seconds=4.0 if how == "it takes too long" else 60.0)
    assert process.stdout
    assert process.stdin
    pid = int(process.stdout.readline())
    if how == "its starter ends":
        process.stdin.close()  # what the kernel does where the starter is killed
    status = {"it ends": 0, "its starter ends": guard.ABANDONED, "it takes too long": guard.TIMED_OUT}
    assert process.wait(60) == status[how]
    assert gone(pid)


@needs_proc
def test_its_starter_may_be_killed() -> None:
    code = f"""
import subprocess, sys
command = [sys.executable, {guard.__file__!r}, "60", sys.executable, "-c", {CHILD + "time.sleep(600)"!r}]
subprocess.Popen(command, stdin=subprocess.PIPE).wait()
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout
    pid = int(starter.stdout.readline())
    os.kill(starter.pid, 9)
    starter.wait()
    until = time.monotonic() + 60
    while not gone(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert gone(pid)
