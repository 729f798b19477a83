"""A run's progress on the screen: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress:
    """Shows steps of a run with loss, tokens per second, step time, memory and the time left.

    Args:
        total: steps of the whole run.
        start: steps done before (a resumed run).
        enabled: False prints nothing (all ranks but one).
        stream: where to print; a bar appears if it is a terminal and ``rich`` is installed.
        interval: seconds between plain lines; the first and the last step always print. A bar is drawn anew
            ten times a second at most, and by no thread: that would take time of the steps.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        interval: float = 1.0,
    ) -> None:
        self._total, self._done, self._first = total, start, start
        self._enabled, self._interval = enabled, interval
        self._stream = stream or sys.stdout
        self._began = self._printed = time.monotonic()
        self._bar: Bar | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if self._enabled and self._stream.isatty():
            self._bar = _bar(self._stream)
        if self._bar is not None:
            self._exit.enter_context(self._bar)
            self._bar.add_task("", total=self._total, completed=self._done, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def update(self, loss: float, tokens_per_s: float, step_ms: float, memory_gib: float) -> None:
        """One more step is done."""
        self._done += 1
        text = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {step_ms:.0f} ms/step  {memory_gib:.2f} GiB"
        now, interval = time.monotonic(), self._interval if self._bar is None else 0.1
        due = self._done in (self._first + 1, self._total) or now - self._printed >= interval
        if due:
            self._printed = now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, text=text, refresh=due)
        elif due:
            left = (now - self._began) / (self._done - self._first) * (self._total - self._done)
            self.message(f"step {self._done}/{self._total}  {text}  {clock(left)} left")

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)


def _bar(stream: TextIO) -> Bar | None:
    """The bar; None where ``rich`` is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=Console(file=stream),
        auto_refresh=False,
    )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
