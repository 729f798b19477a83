"""Runs one command and leaves none of its processes behind, however it or its starter ends.

    python guard.py SECONDS COMMAND...

Standard input says that the starter lives: at its end, which a starter that is killed brings about and an ssh
connection that is cut, too, at SIGTERM, and after SECONDS, the command gets SIGTERM and then everything that
it started SIGKILL, processes in sessions of their own among them. Needs nothing but Python, for it runs on
every node. Exit status: the command's, or TIMED_OUT, or ABANDONED.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

TIMED_OUT, ABANDONED = 124, 125
GRACE = 10.0  # seconds from SIGTERM to SIGKILL
_PR_SET_CHILD_SUBREAPER = 36


def main(seconds: float, command: list[str]) -> int:
    """Run the command; returns the exit status."""
    with contextlib.suppress(OSError, AttributeError):  # Linux: orphans of the command become our children
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: told.append(ABANDONED))
    deadline = time.monotonic() + seconds
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while child.poll() is None and not told:
        readable, _, _ = select.select([0], [], [], 0.2)
        if readable and not os.read(0, 4096):
            told.append(ABANDONED)
        elif time.monotonic() > deadline:
            told.append(TIMED_OUT)
    _end(child)
    if told:
        return told[0]
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the command, and what is left of all it started."""
    until = time.monotonic() + GRACE
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        while child.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    while left := _descendants():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def _descendants() -> list[int]:
    """Processes below this one, by /proc; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, rest = path.read_text(errors="replace").rpartition(")")  # the name may hold anything
            children.setdefault(int(rest.split()[1]), []).append(int(path.parent.name))
    found, rest_of = [], [os.getpid()]
    while rest_of:
        below = children.get(rest_of.pop(), [])
        found += below
        rest_of += below
    return found


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
