"""Pieces of the vision tower against direct statements of docs/released_model.md section 2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.data.patches import item_layout
from kimi_jax.nn import moonvit


def test_every_byte_is_normalised_bit_exactly():
    """Divide in float64, round to float32, then subtract and double in float32, as the released processor does."""
    every = np.arange(256, dtype=np.uint8)
    want = ((every / np.float64(255)).astype(np.float32) - np.float32(0.5)) * np.float32(2)
    got = jax.jit(moonvit.normalise_pixels)(jnp.asarray(every))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(got).view(np.int32), want.view(np.int32))


def test_float_patches_count_as_normalised():
    x = jnp.asarray([[0.25, -1.0]])
    np.testing.assert_array_equal(moonvit.normalise_pixels(x), x)


def _keys(x):
    """torch's cubic kernel with a = -0.75, written in the usual expanded form."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize("size", [2, 6, 8, 10, 34])
def test_bicubic_weights(size):
    """Up and down, no antialias, border repeated: a float64 loop over the four taps. Tolerance: float32 rounding."""
    table = 8
    want = np.zeros((size, table))
    for i in range(size):
        source = (i + 0.5) * table / size - 0.5
        for tap in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
            want[i, min(max(tap, 0), table - 1)] += _keys(source - tap)
    got = moonvit.cubic_weights(jnp.arange(size), jnp.full(size, size), table)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_position_table_itself_when_the_grid_fits():
    """Exactly, not nearly: the weights are one-hot."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 4)), jnp.float32)
    order, coords, _ = item_layout((1, 8, 6))
    grids = jnp.broadcast_to(jnp.array([1, 8, 6]), (1, 48, 3))
    got = moonvit.position_embedding(table, jnp.asarray(coords)[None], grids, 4)
    np.testing.assert_array_equal(got[0], table.reshape(48, 4)[order])


def test_temporal_row_only_for_several_frames():
    table = jnp.zeros((4, 4, 8))
    for t in (1, 3):
        _, coords, _ = item_layout((t, 2, 2))
        grids = jnp.broadcast_to(jnp.array([t, 2, 2]), (1, 4 * t, 3))
        got = np.asarray(moonvit.position_embedding(table, jnp.asarray(coords)[None], grids, 4))[0]
        frames, omega = coords[:, 0], 1 / 10000 ** (np.arange(4) / 4)
        want = np.concatenate([np.sin(frames[:, None] * omega), np.cos(frames[:, None] * omega)], axis=1)
        np.testing.assert_allclose(got, want if t > 1 else 0 * want, atol=1e-6)


def test_mean_over_frames_lands_in_the_first_frames_slots():
    grid = (3, 2, 4)
    _, _, slots = item_layout(grid)
    x = np.random.default_rng(0).normal(size=(1, 32, 5)).astype(np.float32)  # 24 patches of the item, 8 of padding
    slots = np.concatenate([slots, [8, 8]])[None].astype(np.int32)
    got = np.asarray(moonvit.pool_frames(jnp.asarray(x), jnp.asarray(slots)))
    want = x[0, :24].reshape(3, 2, 4, 5).mean(axis=0)
    np.testing.assert_allclose(got[0, :2], want, atol=1e-6)
    assert not got[0, 2:].any()
