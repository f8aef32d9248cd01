"""Chunked attention equals the dense statement, in value, gradient and maximum logit; padding changes nothing.

Tolerance 2e-6 in float32: values of size 1, sums of at most 80 terms in another order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.kernels.attention import segment as sa

B, H, D, V = 2, 3, 8, 4


def _inputs(length, seed=0, padding=5):
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(B, length, H, D)).astype(np.float32) for _ in range(2))
    v = rng.normal(size=(B, length, H, V)).astype(np.float32)
    ids = np.sort(rng.integers(1, 4, (B, length)), axis=1).astype(np.int32)
    ids[0, length - padding :] = 0
    return tuple(jnp.asarray(a) for a in (q, k, v, ids))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [7, 64, 80, 77])
def test_chunked_equals_dense(causal, length, monkeypatch):
    monkeypatch.setattr(sa, "CHUNK", 16)
    monkeypatch.setattr(sa, "MAX_SPANS", 3)  # 80 and 77: spans of several chunks, and chunks in a span differ
    q, k, v, ids = _inputs(length)

    def loss(fn):
        def run(q, k, v):
            out, top = fn(q, k, v, ids, causal=causal, scale=0.7)
            return jnp.sin(out).sum(), (out, top)

        return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))

    want, got = loss(sa.dense_attention)(q, k, v), loss(sa.segment_attention)(q, k, v)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6, rtol=2e-6)


def test_maximum_covers_only_pairs_that_may_look():
    """A huge logit between documents, into the future, or at padding must not show."""
    q, k, v, ids = (np.zeros(x.shape, x.dtype) for x in _inputs(16))
    ids[:, :8], ids[:, 8:12] = 1, 2
    q[0, 3, 1, 0], k[0, 5, 1, 0] = 10.0, 10.0  # future
    q[0, 9, 1, 1], k[0, 2, 1, 1] = 10.0, 10.0  # other document
    q[0, 14, 1, 2], k[0, 13, 1, 2] = 10.0, 10.0  # padding
    q[1, 10, 2, 0], k[1, 9, 2, 0] = 2.0, 3.0  # allowed
    _, top = sa.segment_attention(*map(jnp.asarray, (q, k, v, ids)), causal=True, scale=0.5)
    np.testing.assert_allclose(top, [0.0, 0.0, 3.0])


def test_all_padding_is_finite_and_zero():
    q, k, v, _ = _inputs(16)
    ids = jnp.zeros((B, 16), jnp.int32)
    run = jax.grad(lambda q: sa.segment_attention(q, k, v, ids, causal=True, scale=1.0)[0].sum())
    out, top = sa.segment_attention(q, k, v, ids, causal=True, scale=1.0)
    assert not np.any(out) and np.all(top == sa.NEGATIVE) and not np.any(run(q))


def test_long_rows_never_hold_all_logits():
    """Temporary memory of value and gradient at T = 4096 stays far below one [T, T] matrix a head (67 MB)."""
    shape = jax.ShapeDtypeStruct((1, 4096, 4, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(q, k, v, ids):
        return sa.segment_attention(q, k, v, ids, causal=True, scale=1.0)[0].sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 67e6 / 4


def test_bfloat16_is_close_to_float32():
    """Bound 0.05 on values of size 1: probabilities and outputs are rounded to 8 bits of mantissa."""
    q, k, v, ids = _inputs(64)
    want, _ = sa.dense_attention(q, k, v, ids, causal=True, scale=0.3)
    half = (x.astype(jnp.bfloat16) for x in (q, k, v))
    got, _ = sa.segment_attention(*half, ids, causal=True, scale=0.3)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05)
