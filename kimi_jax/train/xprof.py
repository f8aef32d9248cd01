"""A trace of some steps for xprof: `--config.profile.steps=3` writes steps 10, 11 and 12 into `WORKDIR/xprof`.

Every host traces its own devices. To look at it: `pip install xprof && xprof --logdir WORKDIR/xprof`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from kimi_jax.config import ProfileConfig


class Trace(contextlib.AbstractContextManager):
    """The trace of one run; `begin` before and `end` after every step. What goes wrong is said and ends the trace only.

    console: takes a line.
    """

    def __init__(self, config: ProfileConfig, workdir: str, console: Callable[[str], Any]):
        self._steps = range(config.start_step, config.start_step + config.steps)
        self._folder = epath.Path(workdir) / "xprof"
        self._console, self._on = console, False

    def begin(self, step: int) -> None:
        """Starts the trace if `step`, about to be dispatched, is in the window and none is being made."""
        if step in self._steps and not self._on:
            self._on = self._try(lambda: jax.profiler.start_trace(str(self._folder)))

    def end(self, step: int, results: Any) -> None:
        """Writes the trace if `step`, just dispatched, is its last one; waits for its `results` first."""
        if self._on and step + 1 not in self._steps:
            jax.block_until_ready(results)
            self._stop()

    def __exit__(self, *_: Any) -> None:
        if self._on:  # the run ended inside the window
            self._stop()

    def _stop(self) -> None:
        self._on = False
        if self._try(jax.profiler.stop_trace):
            self._console(f"trace of steps {self._steps[0]} to {self._steps[-1]} in {self._folder}")

    def _try(self, action: Callable[[], Any]) -> bool:
        try:
            action()
        except Exception as error:  # a full disk, or a folder that the profiler cannot write to
            self._console(f"WARNING: no trace in {self._folder} ({type(error).__name__}: {str(error)[:200]})")
            return False
        return True
