"""Chunked cross entropy equals optax on whole logits, in value and gradient.

Tolerance 1e-5: float32 sums of at most 40 terms in another order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kimi_jax.kernels.vocab.cross_entropy import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_equals_optax(chunk):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(21, 8)) * 3, jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(8, 40)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 40, 21), jnp.int32)
    weights = rng.uniform(size=21).astype(np.float32)

    def whole(h, k):
        nll = optax.softmax_cross_entropy_with_integer_labels(h @ k, targets)
        return (weights * nll).sum(), nll

    def chunked(h, k):
        nll = chunked_cross_entropy(h, k, targets, chunk)
        return (weights * nll).sum(), nll

    want, got = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, kernel) for f in (whole, chunked))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_whole_logits_are_never_held():
    """32,768 tokens x 4,096 words would be 537 MB; a chunk is 8 MB."""
    h, k = jax.ShapeDtypeStruct((32768, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4096), jnp.float32)
    t = jax.ShapeDtypeStruct((32768,), jnp.int32)
    grad = jax.jit(jax.grad(lambda h, k, t: chunked_cross_entropy(h, k, t).sum(), (0, 1)))
    assert grad.lower(h, k, t).compile().memory_analysis().temp_size_in_bytes < 60e6
