"""Exact vision tokens: how many each pack is to deliver, and which of the waiting examples deliver them.

R, S   rows of a pack, tokens of a row
r_g    vision share of tokens asked for in pack g (`data.vision_ratio` at its fraction of training)
b      the budget: sum over packs so far of r_g * R * S, less the vision tokens delivered

Comparisons of schedules need the same number of vision tokens in every run (Kimi K2.5 report, arXiv 2602.02276, section
2.1: "keeping the total vision and text token budgets fixed"). A share of what is *drawn* is not enough: what waits to
be packed at the end differs from one schedule to another. Here each pack is given examples whose vision tokens come
nearest to b from below, and what is left of b, less than the smallest example waiting, goes to the next. So the total
of a run is off by less than one example, whatever the schedule; positions are counted whether or not a text fills
them, so that it does not depend on how full rows are.
"""

from __future__ import annotations

from collections.abc import Callable

from kimi_jax.data import DataError
from kimi_jax.data.packing import BufferedExample, best_subset

MOST_EMPTY_DRAWS = 256  # vision examples in a row without any vision token (bad records) before the stream gives up
MOST_BEHIND = 4  # packs' worth of vision tokens that may be missing before the ratio counts as unreachable


def vision_tokens(waiting: BufferedExample) -> int:
    """Tokens of a waiting example that stand for vision features."""
    return sum(item.grid[1] * item.grid[2] // 4 for item in waiting.example.media)


class VisionBudget:
    """b and the examples with media that wait. `state` is JSON-able without them; their owner refers to them.

    positions: R * S. buffer_size: examples with media that may wait, at least; so many more as a pack needs.
    """

    def __init__(self, positions: int, buffer_size: int):
        self.buffer: list[BufferedExample] = []
        self.left = 0.0
        self._positions, self._buffer_size = positions, buffer_size

    def choose(self, ratio: float, draw: Callable[[], list[BufferedExample]]) -> list[BufferedExample]:
        """Takes the examples of the next pack out of the buffer, drawing new ones while too few wait.

        Raises DataError if the packs before could not hold what they were asked for, or no example has media.
        """
        self.left += ratio * self._positions
        if self.left > MOST_BEHIND * max(ratio, 0.01) * self._positions:
            raise DataError(
                f"data.vision_ratio = {ratio:g} cannot be reached: {self.left:.0f} vision tokens are missing. Use "
                "larger or more images an example, more data.vision_bins, or a lower ratio"
            )
        empty = 0
        while ratio and (
            len(self.buffer) < self._buffer_size
            or sum(map(vision_tokens, self.buffer)) < self.left + self._positions * ratio
        ):
            drawn = draw()
            empty = 0 if any(map(vision_tokens, drawn)) else empty + 1
            if empty > MOST_EMPTY_DRAWS:
                raise DataError(f"{empty} examples in a row from sources with media had no image or video that is used")
            self.buffer += drawn
        taken = {id(self.buffer[i]) for i in best_subset(list(map(vision_tokens, self.buffer)), max(0, int(self.left)))}
        chosen = [waiting for waiting in self.buffer if id(waiting) in taken]
        self.buffer = [waiting for waiting in self.buffer if id(waiting) not in taken]
        return chosen

    def delivered(self, chosen: list[BufferedExample], left_over: list[BufferedExample]) -> None:
        """Counts the examples that `choose` gave and the pack has taken; those it had no room for wait on."""
        unused = {id(waiting) for waiting in left_over}
        self.left -= sum(vision_tokens(waiting) for waiting in chosen if id(waiting) not in unused)
        self.buffer = left_over + self.buffer
