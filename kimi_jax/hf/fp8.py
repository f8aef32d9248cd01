"""FP8 block weights of K2-Instruct and DeepSeek-V3, in.

Source: docs/released_model.md section 1.3: float8 e4m3 weights and one float32 `weight_scale_inv` for each block of 128
x 128; weight = value * scale. Blocks at the right and lower edge may be partial.

r rows   c columns   b blocks a column
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def dequantise(weights: np.ndarray, scales: np.ndarray, block: tuple[int, int], first_row: int = 0) -> np.ndarray:
    """float8 [r, c] from row `first_row` of a matrix, all its scales float32 [b, c/block] -> bfloat16 [r, c]."""
    rows, columns = weights.shape
    of_row = (first_row + np.arange(rows)) // block[0]
    of_column = np.arange(columns) // block[1]
    wide = _VALUES[weights.view(np.uint8)]
    wide *= scales[of_row][:, of_column]
    return wide.astype(ml_dtypes.bfloat16)
