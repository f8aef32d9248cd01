"""The loop's side towards people and machines that watch it: progress lines, and signals that ask it to end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kimi_jax.hosts import RESTART
from kimi_jax.train.metrics import progress_line


class Reporter(contextlib.AbstractContextManager):
    """Prints lines; on a terminal with a progress bar below them, elsewhere with one line a log interval.

    quiet: says nothing, for all hosts but the first.
    """

    def __init__(self, steps: int, quiet: bool = False):
        self._steps, self._start, self._quiet = steps, time.monotonic(), quiet
        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(highlight=False))
        self._task = self._bar.add_task("", total=steps)
        self._live = self._bar.console.is_terminal and not quiet

    def __enter__(self) -> Reporter:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live:
            self._bar.stop()

    def __call__(self, *lines: str) -> None:
        for line in lines:
            if self._live:
                self._bar.console.print(line, markup=False, highlight=False)
            elif not self._quiet:
                print(line, flush=True)

    def advance(self, step: int) -> None:
        if self._live:
            self._bar.update(self._task, completed=step)

    def row(self, row: dict[str, Any]) -> None:
        line = progress_line(row)
        if self._live:
            self._bar.update(self._task, description=line)
        elif not self._quiet:
            print(f"{row['step']:>{len(str(self._steps))}}/{self._steps}  {line}", flush=True)


class Interrupted(BaseException):  # not an Exception: what tolerates any error must not swallow a signal
    """A signal came while something was waited for that need not be finished."""


def exit_status(number: int) -> int:
    """Of a run that a signal ended: SIGTERM comes from a machine that goes away, and means: start me again."""
    return RESTART if number == signal.SIGTERM else 128 + number


class Stop(contextlib.AbstractContextManager):
    """Turns the first SIGINT or SIGTERM into a request to stop after this step; the second one acts at once."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._patience: float | None = None  # while something runs that may be broken off: after so many seconds
        self.signal = 0

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def raising(self, patience: float | None) -> Iterator[None]:
        """Inside, a signal raises Interrupted after `patience` seconds (None: never), if that long is still waited."""
        self._patience = patience
        try:
            if self.signal:
                self._arm()
            yield
        finally:
            self._patience = None
            if patience is not None and self.signal:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _arm(self) -> None:
        if self._patience == 0.0:
            raise Interrupted
        if self._patience is not None:
            signal.signal(signal.SIGALRM, self._ring)
            signal.setitimer(signal.ITIMER_REAL, self._patience)

    def _ring(self, number: int, frame: Any) -> None:
        if self._patience is not None:
            raise Interrupted

    def _request(self, number: int, frame: Any) -> None:
        self.__exit__()
        self.signal = number
        # print() may be what was interrupted, and it must not be entered twice
        if self._patience == 0.0:
            os.write(2, b"\nstopping; the same command starts again from the last checkpoint\n")
        else:
            os.write(2, b"\nstopping: saving after this step; once more to stop at once without saving\n")
        self._arm()
