"""What a line of results says: whether the swarm is faster, whether it keeps its quality, and where that ends.

A verdict needs the whole 95 % interval on one side; what its interval does not decide is "open".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import statistics

Row = dict[str, Any]
LOSS = 0.05  # item F1 that a swarm may lose before its quality counts as lost


def estimates(log_gains: Sequence[float] | np.ndarray, changes: Sequence[float] | np.ndarray) -> Row:
    """gain (geometric mean) and f1_change of paired runs with their intervals and smallest effects.

    log_gains: logarithm of sequential time over time, a task each. changes: of item F1. Raises ValueError without any.
    """
    gain, change = statistics.estimate(list(log_gains)), statistics.estimate(list(changes))
    return {
        "gain": math.exp(gain.mean),
        "gain_low": math.exp(gain.low),
        "gain_high": math.exp(gain.high),
        "gain_smallest": math.exp(gain.smallest),
        "f1_change": change.mean,
        "f1_low": change.low,
        "f1_high": change.high,
        "f1_smallest": change.smallest,
    }


def speed(row: Row) -> str:
    """faster, slower (than one agent), or open."""
    return "faster" if row["gain_low"] > 1 else "slower" if row["gain_high"] < 1 else "open"


def quality(row: Row) -> str:
    """kept, lost (more than LOSS of item F1), or open."""
    return "kept" if row["f1_low"] > -LOSS else "lost" if row["f1_high"] < -LOSS else "open"


def useful(row: Row) -> bool:
    """Whether the swarm is faster at the quality of one agent."""
    return speed(row) == "faster" and quality(row) == "kept"


def broken(row: Row) -> str:
    """Why there is no gain: "time", "quality", "time, quality"; "" if the line does not show that."""
    reasons = [name for name, bad in (("time", speed(row) == "slower"), ("quality", quality(row) == "lost")) if bad]
    return ", ".join(reasons)


@dataclass(frozen=True)
class Break:
    """Where a gain ends along the levels of a fault.

    holds: the last level up to which every level is `useful`, None if the first is not. ends: the first level that is
    `broken`, None if none is; the gain ends between the two. why: of `ends`. worst: the last level that was tried.
    """

    holds: float | None
    ends: float | None
    why: str
    worst: float

    def __str__(self) -> str:
        if self.holds == self.worst:
            return "all levels"
        held = "" if self.holds is None else f"up to {self.holds:g}; "
        if self.ends is None:
            return f"{held}then open" if held else "open"
        return f"{held}not at {self.ends:g} ({self.why})" if held else f"never ({self.why})"


def find_break(line: Sequence[Row]) -> Break:
    """Reads the lines of one fault, ascending levels."""
    holds = None
    for row in line:
        if not useful(row):
            break
        holds = row["level"]
    first = next((row for row in line if broken(row)), None)
    return Break(holds, first and first["level"], broken(first) if first else "", line[-1]["level"])
