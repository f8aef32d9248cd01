"""Video by the released rule (reference.md section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Video:
    """One video of an example, already sampled.

    frames:     uint8 [N, H, W, 3], or a list of uint8 [H, W, 3] of one size.
    timestamps: seconds of each frame since the start, N of them.
    """

    frames: np.ndarray | Sequence[np.ndarray]
    timestamps: Sequence[float]
