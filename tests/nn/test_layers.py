"""`project` is x @ kernel with the gradients of autodiff in every dtype; its rule only changes how they are made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.nn.layers import precision, project

# one rounding of the result of a float32 (8 bits of mantissa for bfloat16) sum of 24 to 60 products
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("lead", [(), (5,), (3, 20)])
def test_project_has_the_gradients_of_autodiff(dtype, wide, lead):
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        jnp.asarray(rng.normal(size=shape), d)
        for shape, d in (((*lead, 24), dtype), ((24, 32), dtype), ((*lead, 32), "float32"))
    )

    def plain(x, kernel):
        wider = jnp.float32 if wide else None
        return jnp.matmul(x, kernel, precision=precision(x.dtype), preferred_element_type=wider)

    def loss(fn):
        return lambda x, kernel: (weights * fn(x, kernel).astype(jnp.float32)).sum()

    y = project(x, kernel, wide)
    assert y.dtype == (jnp.float32 if wide else x.dtype)
    np.testing.assert_array_equal(y, plain(x, kernel))
    got = jax.grad(loss(lambda *a: project(*a, wide)), argnums=(0, 1))(x, kernel)
    # of the same numbers in float32: autodiff in bfloat16 is itself less exact than the tolerance
    want = jax.grad(loss(plain), argnums=(0, 1))(x.astype("float32"), kernel.astype("float32"))
    for a, b, of in zip(got, want, (x, kernel), strict=True):
        assert a.dtype == of.dtype and a.shape == b.shape
        np.testing.assert_allclose(np.float32(a), b, rtol=0, atol=TOLERANCE[dtype] * np.abs(b).max())
