"""Rotary constants of the releases and the rotations themselves, against the stated numbers and complex arithmetic."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config import YarnConfig, preset
from kimi_jax.nn import rope

K2_5 = preset("kimi_k2_5")
K2 = dataclasses.replace(K2_5, rope_scaling=YarnConfig(factor=32.0, beta_fast=1.0, beta_slow=1.0))
GOLDEN = """1 .713111103 .508527458 .362636536 .258600146 .184410617 .131505266 .0937778577 .0668740347 .0437766574
.0284279585 .0182829555 .01161916 .00727411965 .00446584867 .0026702038 .00153729669 .000834655075 .000408646069
.000158374969 1.80702336e-5 1.28860838e-5 9.18920978e-6 6.55292706e-6 4.67296513e-6 3.33234311e-6 2.37633071e-6
1.69458781e-6 1.20842935e-6 8.61744411e-7 6.14519479e-7 4.38220638e-7"""


def test_frequencies_of_the_release():
    """Tolerance 3e-6: the list was computed in float32 step by step."""
    golden = np.array([float(x) for x in GOLDEN.split()])
    got = rope.inverse_frequencies(K2_5)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, golden, rtol=3e-6)


@pytest.mark.parametrize(("config", "span", "scale"), [(K2_5, (8, 20), 0.14467963), (K2, (19, 20), 0.13086080)])
def test_yarn_range_and_softmax_scale_of_each_release(config, span, scale):
    assert rope.yarn_range(64, 50000.0, config.rope_scaling) == span
    assert rope.softmax_scale(config) == pytest.approx(scale, rel=1e-6)


def test_without_yarn():
    config = preset("moonlight_16b_a3b")
    assert rope.softmax_scale(config) == pytest.approx(192**-0.5)
    np.testing.assert_allclose(rope.inverse_frequencies(config), 50000.0 ** -(np.arange(32) / 32), rtol=1e-6)


def test_yarns_cosines_are_not_scaled_when_the_two_mscales_agree():
    cos, _ = rope.text_rotary(dataclasses.replace(K2_5, dtype="float32"), jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_array_equal(cos, 1.0)


def test_text_rotation_deinterleaves():
    """Pairs (2j, 2j+1) as complex numbers; first members first in the result. Float32 rounding only."""
    rng = np.random.default_rng(0)
    x, angle = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 4))
    got = rope.apply_rope(*(jnp.asarray(a, jnp.float32) for a in (x, np.cos(angle), np.sin(angle))))
    want = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(got, np.concatenate([want.real, want.imag], axis=-1), atol=1e-6)


def test_vision_rotation_even_pairs_x_odd_pairs_y():
    x = np.random.default_rng(0).normal(size=(1, 1, 1, 8))
    coords = jnp.asarray([[[3, 5, 7]]])  # t, y, x; t must not matter
    got = rope.rotate_interleaved(jnp.asarray(x, jnp.float32), *rope.vision_rotary(coords, 8, 10000.0))
    slow = 10000 ** (-4 / 8)
    angles = np.array([7.0, 5.0, 7 * slow, 5 * slow])
    want = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    np.testing.assert_allclose(got[..., 0::2], want.real, atol=1e-6)
    np.testing.assert_allclose(got[..., 1::2], want.imag, atol=1e-6)
    assert math.isclose(float(np.abs(got).max()), np.abs(np.stack([want.real, want.imag])).max(), rel_tol=1e-6)
