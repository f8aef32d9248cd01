"""Rotary positions: 1-D with YaRN for the language model, 2-D for the vision tower.

Source: docs/released_model.md section 3 (YaRN constants, interleaved weights that are de-interleaved) and section 2
(vision: even pairs turn with x, odd pairs with y, the layout stays interleaved); section 0 items 3 and 6.

d rotary width (d/2 pairs)   P patches   H heads
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kimi_jax.config import ModelConfig, YarnConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each pair, float32 [d/2]; fast pairs untouched, slow pairs divided by the factor."""
    dim, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    plain = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if yarn is None:
        return plain.astype(np.float32)
    low, high = yarn_range(dim, base, yarn)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return (plain / yarn.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def yarn_range(dim: int, base: float, yarn: YarnConfig) -> tuple[int, int]:
    """(low, high): pairs below low keep their frequency, pairs above high are stretched by the whole factor."""

    def pair(turns: float) -> float:
        """The (fractional) pair that makes this many turns within the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    return max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), dim - 1)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """qk_head_dim^-0.5, times the square of YaRN's magnitude correction."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    return scale * _mscale(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn and yarn.mscale_all_dim else scale


def text_rotary(config: ModelConfig, positions: Int[Array, "*b"]) -> tuple[Float[Array, "*b p"], Float[Array, "*b p"]]:
    """cos and sin [*b, d/2] of every position, in the activations' dtype."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    yarn = config.rope_scaling
    size = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim) if yarn else 1.0
    return (jnp.cos(angles) * size).astype(config.dtype), (jnp.sin(angles) * size).astype(config.dtype)


def apply_rope(
    x: Float[Array, "*b H d"], cos: Float[Array, "*b p"], sin: Float[Array, "*b p"]
) -> Float[Array, "*b H d"]:
    """Turn pairs (2j, 2j+1); the result holds all first members, then all second ones. For the language model."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def vision_rotary(
    coords: Int[Array, "*b 3"], head_dim: int, theta: float
) -> tuple[Float[Array, "*b p"], Float[Array, "*b p"]]:
    """cos and sin [*b, head_dim/2] float32 of patches at (t, y, x): pair 2k turns by x*f_k, pair 2k+1 by y*f_k."""
    frequencies = (theta ** -(np.arange(0, head_dim, 4, dtype=np.float64) / head_dim)).astype(np.float32)
    xy = coords[..., :0:-1].astype(jnp.float32)  # (x, y)
    angles = (frequencies[:, None] * xy[..., None, :]).reshape(*coords.shape[:-1], head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_interleaved(
    x: Float[Array, "*b H d"], cos: Float[Array, "*b p"], sin: Float[Array, "*b p"]
) -> Float[Array, "*b H d"]:
    """Turn pairs (2j, 2j+1) in float32 and leave them where they are. For the vision tower."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    a, b = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
