"""Attention whose rows, tokens and heads are distributed to devices equals attention on one: output, maxima, gradients.

float32; pieces are joined in another order: 1e-5 of the largest value of an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.kernels.attention.mla import join_heads, latent_attention
from kimi_jax.kernels.attention.segment import segment_attention
from kimi_jax.nn.mla import shard_attention
from kimi_jax.nn.rope import apply_rope
from tests.nn.tiny import QUICK

B, S, H, I, N, L, R, V, SCALE = 2, 32, 2, 8, 4, 8, 2, 4, 0.5


def inputs():
    rng = np.random.default_rng(0)
    shapes = (B, S, I), (I, H, N + R), (B, S, L + R), (L, H, N + V), (B, S, H, V), (B, S, R // 2)
    *arrays, grad, angles = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    ids = np.ones((B, S), np.int32)  # the first row is one document over all devices, the second three and padding
    ids[1, 5:20], ids[1, 20:27], ids[1, 27:] = 2, 3, 0
    return arrays, (jnp.cos(angles), jnp.sin(angles)), jnp.asarray(ids), grad


def run(fn):
    arrays, turn, ids, grad = inputs()

    def both(arrays):
        out, pullback, top = jax.vjp(lambda *a: fn(*a, *turn, ids), *arrays, has_aux=True)
        return out, top, pullback(grad)

    return jax.device_get(jax.jit(both, compiler_options=QUICK)(arrays))


def one_device(x, query, latent, kernel, cos, sin, ids):
    """The plain statement: project, cut, turn, expand, attend."""
    q = jnp.einsum("bsi,ihd->bshd", x, query, precision="highest")
    q = jnp.concatenate([q[..., :N], apply_rope(q[..., N:], cos, sin)], axis=-1)
    both = jnp.einsum("bsl,lhu->bshu", latent[..., :L], kernel, precision="highest")
    return segment_attention(q, *join_heads(both, latent[..., L:], N), ids, causal=True, scale=SCALE)


def over_mesh(mesh):
    layout = sharding.layout(sharding.make_mesh(mesh))

    def fn(x, query, latent, kernel, cos, sin, ids):
        sharded = shard_attention(layout, x.shape, query.shape, kernel.shape, SCALE)
        return latent_attention(sharded, x, query, cos, sin, latent, kernel, ids)

    return fn


@pytest.fixture(scope="module")
def plain():
    return run(one_device)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(fsdp=2, context=4), MeshConfig(fsdp=1, context=8), MeshConfig(fsdp=2, context=2, tensor=2)],
    ids=lambda m: f"f{m.fsdp}c{m.context}t{m.tensor}",
)
def test_pieces_of_rows_join(plain, mesh):
    got = run(over_mesh(mesh))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_only_latents_are_gathered():
    """Nothing as large as all keys or values crosses between devices."""
    arrays, turn, ids, _ = inputs()
    text = jax.jit(over_mesh(MeshConfig(fsdp=2, context=4))).lower(*arrays, *turn, ids).as_text()
    gathers = [line for line in text.splitlines() if "all_gather" in line]
    latents, of_ids = f"{S // 4}x{L + R}xf32", f"{S // 4}xi32"
    of_tokens = [line for line in gathers if latents in line or of_ids in line]
    assert len(of_tokens) == 2  # the others are of the two matrices
