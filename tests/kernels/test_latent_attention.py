"""Attention whose rows, tokens and heads are dealt to devices equals attention on one: output, maxima, gradients.

float32; pieces are joined in another order: 1e-5 of the largest value of an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.kernels.latent_attention import expand, latent_attention
from kimi_jax.kernels.segment_attention import segment_attention
from kimi_jax.nn.mla import cut_attention
from tests.nn.tiny import QUICK

B, S, H, D, L, R, V, SCALE = 2, 32, 2, 6, 8, 2, 4, 0.5


def inputs():
    rng = np.random.default_rng(0)
    shapes = (B, S, H, D), (B, S, L + R), (L, H, D - R + V), (B, S, H, V)
    q, latent, kernel, grad = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    ids = np.ones((B, S), np.int32)  # the first row is one document over all devices, the second three and padding
    ids[1, 5:20], ids[1, 20:27], ids[1, 27:] = 2, 3, 0
    return (q, latent, kernel), jnp.asarray(ids), grad


def run(fn):
    arrays, ids, grad = inputs()

    def both(arrays):
        out, pullback, top = jax.vjp(lambda *a: fn(*a, ids), *arrays, has_aux=True)
        return out, top, pullback(grad)

    return jax.device_get(jax.jit(both, compiler_options=QUICK)(arrays))


@pytest.fixture(scope="module")
def plain():
    return run(
        lambda q, latent, kernel, ids: segment_attention(q, *expand(latent, kernel, D), ids, causal=True, scale=SCALE)
    )


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(fsdp=2, context=4), MeshConfig(fsdp=1, context=8), MeshConfig(fsdp=2, context=2, tensor=2)],
    ids=lambda m: f"f{m.fsdp}c{m.context}t{m.tensor}",
)
def test_pieces_of_rows_join(plain, mesh):
    layout = sharding.layout(sharding.make_mesh(mesh))
    cut = cut_attention(layout, (B, S, H, D), SCALE)
    got = run(lambda *a: latent_attention(cut, *a))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_only_latents_are_gathered():
    """Nothing as large as all keys or values crosses between devices."""
    layout = sharding.layout(sharding.make_mesh(MeshConfig(fsdp=2, context=4)))
    cut = cut_attention(layout, (B, S, H, D), SCALE)
    arrays, ids, _ = inputs()
    text = jax.jit(lambda *a: latent_attention(cut, *a)[0]).lower(*arrays, ids).as_text()
    gathers = [line for line in text.splitlines() if "all_gather" in line]
    assert len(gathers) == 2 and f"{S // 4}x{L + R}xf32" in gathers[0]
