"""Goodput: the share of the wall time of a run that went into training steps, and what the rest went into.

Source: none in the paper; the word is Google's for the same share. Every second of a run belongs to one name:
  start        of a process: hosts, devices, a fresh state, the yardstick of MFU
  restore      a checkpoint is read
  compile      the training step is compiled, or taken from the cache
  steps        the devices train, or the host prepares what they do next
  data         the devices have nothing to do until the next batch is there
  checkpoint   arrays are copied off the devices, or an earlier save is waited for
  evaluation
  away         between the checkpoint that a start goes on from and that start: work that was lost, or nobody at work

The sums travel with the checkpoint, so the share holds over restarts.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

NAMES = ("steps", "start", "restore", "compile", "data", "checkpoint", "evaluation", "away")
PATIENCE = 10.0  # seconds that the end of a run waits for a step under way


class Goodput:
    """Sums of seconds by name; the clock is in exactly one of them at a time, at first in `start`."""

    def __init__(self) -> None:
        self._name, self._since = "start", time.monotonic()
        self._began = time.time()  # what two processes can compare
        self._now = dict.fromkeys(NAMES, 0.0)  # of this process
        self._before = dict.fromkeys(NAMES, 0.0)  # of those whose work it goes on with

    def restore(self, state: dict[str, Any] | None) -> None:
        """Goes on from what `state` returned when the checkpoint was made that this process starts from, if it did."""
        if state is not None:
            self._before |= state["seconds"]
            self._before["away"] += max(0.0, self._began - state["at"])

    def state(self) -> dict[str, Any]:
        """JSON: seconds by name of the run so far, and when that was (seconds of the epoch)."""
        return {"seconds": self.seconds(), "at": time.time()}

    @contextlib.contextmanager
    def spend(self, name: str) -> Iterator[None]:
        """Inside, time goes to `name`; a second one inside takes over for as long as it lasts."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def move(self, seconds: float, name: str) -> None:
        """Books seconds that were just counted under the current name under another one."""
        self._now[self._name] -= seconds
        self._now[name] += seconds

    def _switch(self, name: str) -> str:
        now, outer = time.monotonic(), self._name
        self._now[outer] += now - self._since
        self._name, self._since = name, now
        return outer

    def seconds(self) -> dict[str, float]:
        """By name, over restarts."""
        self._switch(self._name)
        return {name: self._before[name] + self._now[name] for name in NAMES}

    def row(self) -> dict[str, Any]:
        """For the log: goodput (since this start), goodput_run and seconds (since the first one)."""
        whole = self.seconds()
        return {
            "goodput": self._now["steps"] / max(sum(self._now.values()), 1e-9),
            "goodput_run": whole["steps"] / max(sum(whole.values()), 1e-9),
            "seconds": {name: round(value, 3) for name, value in whole.items()},
        }

    def line(self) -> str:
        """The same for people."""
        row = self.row()
        total = max(sum(row["seconds"].values()), 1e-9)
        parts = [f"{name} {value / total:.1%}" for name, value in row["seconds"].items() if value >= 0.0005 * total]
        return f"goodput {row['goodput_run']:.1%} of {total / 60:.1f} min, restarts included: {', '.join(parts)}"


class Idle:
    """Tells when the devices have finished the step that was dispatched last, from a thread that waits for it."""

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._watched, self._finished = 0, (0, 0.0)
        self._thread = threading.Thread(target=self._follow, daemon=True, name="step-watch")
        self._thread.start()

    def _follow(self) -> None:
        while (item := self._steps.get()) is not None:
            number, results = item
            with contextlib.suppress(Exception):  # what a step raises, it raises where its metrics are fetched
                jax.block_until_ready(results)
            self._finished = number, time.monotonic()
            del item, results

    def watch(self, results: Any) -> None:
        """`results`: arrays of the step just dispatched that nobody gives away."""
        self._watched += 1
        self._steps.put((self._watched, results))

    def since(self, start: float) -> float:
        """Seconds of `time.monotonic` from `start` to now in which the devices had nothing to do."""
        number, finished = self._finished
        return 0.0 if number < self._watched else max(0.0, time.monotonic() - max(start, finished))

    def close(self) -> None:
        """Ends the thread; a step that waits for a host that is gone is not waited for."""
        self._steps.put(None)
        self._thread.join(PATIENCE)
