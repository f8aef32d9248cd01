"""Host memory for what clients send: one budget for all requests, taken as bodies arrive and before media are decoded.

A request that finds too little left is told to try again later (429); one that alone needs more than all of it can
never be answered (413). Nothing waits for memory, so nothing that waits holds any.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from kimi_jax.serve.protocol import ApiError
from kimi_jax.serve.worker import Overloaded


class MemoryBudget:
    """total: bytes for the bodies and media of all requests together. used: bytes that are taken. Thread-safe."""

    def __init__(self, total: int):
        self.total, self.used = total, 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def reservation(self) -> Iterator[Reservation]:
        """A request's share, empty at first, given back at the end of the context."""
        share = Reservation(self)
        try:
            yield share
        finally:
            share.close()

    def take(self, count: int, held: int) -> None:
        """Takes `count` bytes for one who holds `held`. Raises ApiError(413), and Overloaded if others hold them."""
        if held + count > self.total:
            raise ApiError(
                413,
                f"this request needs more memory than the {self.total} bytes that requests may take",
                code="too_large",
            )
        with self._lock:
            if count > 0 and self.used + count > self.total:
                raise Overloaded("the memory for requests is taken; try again later")
            self.used += count


class Reservation:
    """What one request holds of a budget."""

    def __init__(self, budget: MemoryBudget):
        self._budget, self._held, self._closed = budget, 0, False

    def change(self, count: int) -> None:
        """Takes bytes, or gives them back if negative. Raises ApiError(413) and Overloaded, and then takes none.

        After `close` nothing is taken: the helper thread of a client that went away may still ask.
        """
        if self._closed:
            raise Overloaded("this request is over")
        self._budget.take(count, self._held)
        self._held += count

    def close(self) -> None:
        """Gives everything back."""
        self._closed = True
        self._budget.take(-self._held, self._held)
        self._held = 0
