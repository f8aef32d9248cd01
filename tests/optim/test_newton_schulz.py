"""Newton-Schulz moves singular values by a known polynomial, keeps singular vectors, and stays cheap and finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.optim.newton_schulz import default_dtype, orthogonalize

# float32 rounding (6e-8) grows by at most 3.4445 a step for five steps (485) and by the few dozen terms of a product.
TOLERANCE = 2e-4


def by_svd(matrix: np.ndarray, steps: int = 5) -> np.ndarray:
    """The same map computed on the singular values alone, in float64."""
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s / np.sqrt(np.sum(s**2))
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


@settings(max_examples=20)
@given(st.sampled_from([(1, 1), (1, 7), (7, 1), (6, 6), (5, 12), (12, 5), (3, 40)]), st.integers(0, 2**16))
def test_matches_the_polynomial_on_singular_values(shape, seed):
    matrices = np.random.default_rng(seed).normal(size=(3, *shape)).astype(np.float32)
    got = orthogonalize(jnp.asarray(matrices))
    for x, y in zip(matrices, np.asarray(got), strict=True):
        np.testing.assert_allclose(y, by_svd(x), atol=TOLERANCE)


def test_singular_values_come_out_near_one():
    matrix = np.random.default_rng(0).normal(size=(1, 48, 64)).astype(np.float32)
    singular = np.linalg.svd(np.asarray(orthogonalize(jnp.asarray(matrix)))[0], compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.25  # the band in which these coefficients end


def test_every_matrix_of_a_stack_is_separate():
    rng = np.random.default_rng(1)
    stack = rng.normal(size=(4, 8, 12)).astype(np.float32)
    alone = np.concatenate([np.asarray(orthogonalize(jnp.asarray(m[None]))) for m in stack])
    np.testing.assert_allclose(orthogonalize(jnp.asarray(stack)), alone, atol=1e-5)  # order of additions only
    stack[2] *= 1000
    np.testing.assert_allclose(orthogonalize(jnp.asarray(stack)), alone, atol=1e-4)


def test_zero_stays_zero_and_the_next_matrix_is_untouched():
    stack = jnp.stack([jnp.zeros((4, 6)), jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)])
    out = np.asarray(orthogonalize(stack))
    assert np.all(out[0] == 0) and np.all(np.isfinite(out[1])) and np.abs(out[1]).max() > 0.1


@pytest.mark.parametrize("shape", [(4, 64), (64, 4)])
def test_the_gram_matrix_is_on_the_short_side(shape):
    text = str(jax.make_jaxpr(orthogonalize)(jnp.zeros((1, *shape))))
    assert "f32[1,4,4]" in text and "64,64]" not in text


def test_bfloat16_iteration_stays_in_the_band_and_keeps_the_dtype_of_the_input():
    matrix = jnp.asarray(np.random.default_rng(2).normal(size=(2, 24, 32)), jnp.float32)
    out = orthogonalize(matrix, dtype=jnp.bfloat16)
    assert out.dtype == jnp.float32
    # bfloat16 has 8 bits; five steps of it leave a few percent of the singular values.
    np.testing.assert_allclose(out, orthogonalize(matrix, dtype=jnp.float32), atol=0.06)
    assert "bf16[2,24,24]" in str(jax.make_jaxpr(lambda x: orthogonalize(x, dtype=jnp.bfloat16))(matrix))


def test_default_dtype_on_cpu_is_float32():
    assert default_dtype() == jnp.float32
