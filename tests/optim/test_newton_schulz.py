"""Newton-Schulz moves singular values by a known polynomial, keeps singular vectors, and stays cheap and finite."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.nn.param import Muon
from kimi_jax.optim import newton_schulz
from kimi_jax.optim.muonclip import as_matrices
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
def test_gram_matrix_is_on_the_short_side(shape):
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


@pytest.mark.parametrize(
    "shape, batch, rows, spec",
    [
        ((2, 4, 6, 8), 2, 1, P(None, "expert", "fsdp", None)),  # an expert weight: 4 matrices a device, 2 of them whole
        ((3, 8, 4, 2), 1, 2, P(None, ("fsdp", "expert"), "tensor", None)),  # 3 matrices for 8 devices: zeros fill up
        ((6, 10), 0, 1, P("fsdp", "tensor")),
        ((5, 3, 3), 1, 1, P(None, None, None)),
    ],
    ids=str,
)
def test_distributed_over_devices_equals_one_device(shape, batch, rows, spec, monkeypatch):
    """Whatever is sharded, and however few matrices a device may hold at a time (here one)."""
    monkeypatch.setattr(newton_schulz, "ROOM", 1)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    where = newton_schulz.Distribution(batch, rows, mesh, spec)
    fn = jax.jit(lambda x: newton_schulz.orthogonalize_sharded([x], [where])[0])
    got = fn(jax.device_put(leaf, NamedSharding(mesh, spec)))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    want = orthogonalize(as_matrices(leaf, Muon(batch, rows))).reshape(shape)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_no_device_gathers_a_stack_of_experts():
    """The compiled program exchanges parts; nothing in it is as large as what all devices hold together."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, expert=2))
    where = newton_schulz.Distribution(2, 1, mesh, P(None, "expert", "fsdp", None))
    expert_weight = jax.ShapeDtypeStruct((6, 8, 32, 16), jnp.float32, sharding=NamedSharding(mesh, where.spec))
    text = jax.jit(lambda x: newton_schulz.orthogonalize_sharded([x], [where])).lower(expert_weight).compile().as_text()
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert "all-to-all" in text and "all-gather" not in text
    assert max(sizes) <= 6 * 8 * 32 * 16 // 8
