"""The TPU's attention, interpreted, against the dense statement; and what decides whether maxima are computed.

float32: values of size 1, sums of 256 terms in another order, and exp of logits up to 10: 2e-5.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.kernels.attention import segment as sa
from kimi_jax.kernels.attention import splash

T = 256


def inputs(d, v):
    rng = np.random.default_rng(0)
    q, k, v, grad = (jnp.asarray(rng.normal(size=(1, T, 1, w)), jnp.float32) for w in (d, d, v, v))
    ids = np.repeat([[1, 2, 3, 0]], [70, 100, 66, 20], axis=1).astype(np.int32)
    return q, k, v, grad, jnp.asarray(ids)


@pytest.mark.parametrize("causal, d, v", [(True, 192, 128), (False, 72, 72)])
def test_kernel_equals_dense(causal, d, v, monkeypatch):
    """MLA's head widths, and MoonViT's, which are filled up; several blocks; padding gives and takes nothing."""
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    q, k, v, grad, ids = inputs(d, v)
    how = {"causal": causal, "scale": d**-0.5}
    (want, top), pullback = jax.vjp(lambda *a: sa.dense_attention(*a, ids, **how), q, k, v)
    out, lse = splash.forward(q, k, v, ids, ids, **how, interpret=True)
    np.testing.assert_allclose(out, want, atol=2e-5)
    assert (lse[0, 0, -20:] == splash.NOTHING).all() and lse.max() >= top.max()
    grads = splash.backward(q, k, v, ids, ids, out, lse, grad, **how, interpret=True)
    for a, b in zip(grads, pullback((grad, jnp.zeros_like(top))), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_allclose(splash.largest(q, k, ids, ids, **how, block=64), top, rtol=1e-6)


def test_maxima_are_computed_only_above_the_threshold():
    lse = jnp.asarray([[[1.0, 2.0], [0.5, splash.NOTHING]]])
    exact = functools.partial(lambda: jnp.asarray([0.9, 0.1]))
    np.testing.assert_allclose(splash.bounded(lse, exact, 2.0), [2.0, 0.5])  # bounds: no head can exceed 2
    np.testing.assert_allclose(splash.bounded(lse, exact, 1.9), [0.9, 0.1])


def test_tpu_program_calls_the_kernel_and_never_holds_all_pairs():
    """Forward and backward in bfloat16 at 4,096 tokens, with the exact maximum behind a condition."""
    shapes = [jax.ShapeDtypeStruct((1, 4096, 2, w), jnp.bfloat16) for w in (192, 192, 128)]
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(q, k, v, ids):
        out, top = sa.segment_attention(q, k, v, ids, causal=True, scale=0.07, exact_above=100.0)
        return out.astype(jnp.float32).sum(), top

    run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    text = run.trace(*shapes, ids).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3 and "stablehlo.case" in text
    assert "4096x4096" not in text
