"""A bar in a terminal, plain lines in a file, nothing on other ranks."""

from __future__ import annotations

import io
import re
import threading

from lcab_plugin.training.display import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO, steps: int = 3, **options: float) -> str:
    with Progress(steps, stream=stream, **options) as progress:  # type: ignore[arg-type]
        progress.message("a [line] of its own")
        for step in range(int(options.get("start", 0)), steps):
            progress.update(2.0 + step, 12345.6, 78.9, 1.5)
    return stream.getvalue()


def test_plain_lines() -> None:
    lines = show(io.StringIO(), interval=0.0).splitlines()
    assert lines[0] == "a [line] of its own"
    assert lines[1].startswith("step 1/3  loss 2.0000  12,346 tokens/s  79 ms/step  1.50 GiB  0:00:00 left")
    assert [line.split()[1] for line in lines[1:]] == ["1/3", "2/3", "3/3"]


def test_plain_lines_are_few_but_show_the_first_and_the_last() -> None:
    lines = show(io.StringIO(), steps=500, start=100, interval=60.0).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["101/500", "500/500"]


def test_a_bar_in_a_terminal(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", show(Terminal()))
    assert "a [line] of its own" in text
    assert "3/3" in text
    assert "loss 4.0000" in text
    assert "12,346 tokens/s" in text


def test_a_bar_is_drawn_between_steps_alone(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    running, stream = threading.active_count(), Terminal()
    with Progress(500, stream=stream) as progress:
        assert threading.active_count() == running, "a thread would draw while a step is timed"
        for _ in range(500):
            progress.update(2.0, 1.0, 1.0, 1.0)
    assert 2 <= stream.getvalue().count("/500") < 50


def test_other_ranks_are_silent() -> None:
    assert show(io.StringIO(), enabled=False) == show(Terminal(), enabled=False) == ""
