"""INT4 weights as released (compressed-tensors pack-quantized), both ways, in NumPy.

Source: docs/released_model.md section 4. Codes are q + 8 in eight nibbles of an int32, least significant first; one
scale for `group` neighbours along the input; weight = q * scale, computed in float32 and rounded once.

r rows   c columns (inputs)   g = c / group scales a row
"""

from __future__ import annotations

import numpy as np

_LOW, _HIGH = -8, 7
# the two codes in each byte, as float32: [256, 2]
_PAIRS = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.float32) + _LOW


def unpack(words: np.ndarray) -> np.ndarray:
    """int32 [r, c/8] -> codes q in -8..7, int8 [r, c]."""
    return _codes(words).astype(np.int8)


def _codes(words: np.ndarray) -> np.ndarray:
    packed = np.ascontiguousarray(words, "<i4").view(np.uint8)
    return _PAIRS[packed].reshape(words.shape[0], -1)


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes q in -8..7 [r, c] -> int32 [r, c/8]. Raises ValueError if c is not a multiple of 8."""
    if codes.shape[1] % 8:
        raise ValueError(f"{codes.shape[1]} columns do not fill words of 8 codes")
    nibbles = (codes.astype(np.int8) - _LOW).astype(np.uint8)
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return np.ascontiguousarray(packed).view("<i4")


def dequantise(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int32 [r, c/8] and scales [r, g] -> weights [r, c] in the dtype of the scales, bit for bit the released ones."""
    codes = _codes(words)
    grouped = codes.reshape(*scales.shape, -1)
    grouped *= scales.astype(np.float32)[..., None]
    return codes.astype(scales.dtype)


def quantise(weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Weights [r, c] and scales [r, g] -> int32 [r, c/8]: nearest code, ties to even, clipped to -8..7.

    With the scales that weights were dequantised with this gives back every word: rounding to bfloat16 moves
    weight / scale by at most 8 * 2^-8, far less than half a code. A scale of 0 gives code 0 (`lost` finds the
    released groups for which that is not what the file had).
    """
    grouped = weights.astype(np.float32).reshape(*scales.shape, -1)
    wide = scales.astype(np.float32)[..., None]
    codes = np.divide(grouped, wide, out=np.zeros_like(grouped), where=wide != 0)
    return pack(np.clip(np.rint(codes), _LOW, _HIGH).reshape(weights.shape))


def minmax_scales(weights: np.ndarray, group: int, dtype: np.dtype) -> np.ndarray:
    """Scales [r, c/group] of new codes: largest magnitude of the group / 7.5, the rule of compressed-tensors."""
    grouped = np.abs(weights.astype(np.float32)).reshape(len(weights), -1, group)
    scales = (grouped.max(axis=-1) / 7.5).astype(dtype)
    return np.where(scales == 0, np.asarray(1, dtype), scales)


def unusable(scales: np.ndarray) -> np.ndarray:
    """Which scales cannot give back their codes: 0, not finite, or so large that -8 times them overflows."""
    wide = scales.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return (wide == 0) | ~np.isfinite((wide * _LOW).astype(scales.dtype).astype(np.float32))


def lost(words: np.ndarray, scales: np.ndarray) -> int:
    """How many groups cannot be written back as they are: an unusable scale, and codes other than 0."""
    codes = unpack(words).reshape(*scales.shape, -1)
    return int((unusable(scales) & (codes != 0).any(axis=-1)).sum())
