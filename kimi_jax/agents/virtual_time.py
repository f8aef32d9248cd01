"""An event loop whose clock jumps: waiting costs no time, so timeouts and stragglers are exact and quick to test.

    anyio.run(main, backend_options={"loop_factory": VirtualTimeLoop})

The clock moves only when nothing can run, and then to the next timer. Waiting with no timer and nothing to run is a
deadlock, and raises. It does not suit code that waits for sockets, processes or threads.
"""

import asyncio
import selectors
from typing import Any


class Deadlock(RuntimeError):
    """Everything waits, and no timer will ever wake it."""


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[valid-type, misc]
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Deadlock("nothing can run and no timer is set")
            self.now += max(timeout, 0)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop that starts at second 0."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now
