"""The TPU kernels of MLA's attention, interpreted, against the plain statement; and that a TPU program has them.

bfloat16: probabilities are rounded before they meet values, 2^-9 of the largest of a sum; gradients are rounded twice.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.kernels.attention import mla_flash
from kimi_jax.kernels.attention.mla import _attend, _attend_grads, _Call, latent_attention
from kimi_jax.kernels.attention.segment import AttentionSpec
from kimi_jax.nn.mla import shard_attention

B, T, H, N, R, V = 1, 256, 2, 128, 64, 128


def inputs():
    rng = np.random.default_rng(0)
    shapes = (B, T, H * (N + 2 * R)), (B, T, H * (N + V)), (B, T, R), (B, T, H, V), (B, T, R // 2)
    q, kv, rope, grad, angles = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    ids = np.ones((B, T), np.int32)
    ids[:, 100:200], ids[:, 230:] = 2, 0
    narrow = [x.astype(jnp.bfloat16) for x in (q, kv, rope, grad)]
    return *narrow, jnp.cos(angles), jnp.sin(angles), jnp.asarray(ids)


@pytest.mark.parametrize("causal", [True, False])
def test_kernels_equal_the_plain_form(causal, monkeypatch):
    monkeypatch.setattr(mla_flash, "BLOCKS", (128,))  # two blocks each way
    q, kv, rope, grad, cos, sin, ids = inputs()
    call = _Call(AttentionSpec(causal, 0.1), H, N)
    turn, twice = call.turn(cos, sin, rope)
    arrays = q, turn, kv, twice, ids, ids
    out, lse, top = mla_flash.forward(call.flash(q, kv, rope), *arrays, interpret=True)
    wide = [x.astype(jnp.float32) for x in (q, cos, sin, kv, rope)]
    want = _attend(call, *wide, ids, ids)
    close((out.reshape(B, T, H, V), lse, top.max(axis=(0, 2))), want, 0.01)
    flat = want[0].reshape(B, T, -1).astype(jnp.bfloat16)
    shape = call.flash(q, kv, rope)
    dq, dkv, drope = mla_flash.backward(shape, *arrays, flat, want[1], grad.reshape(B, T, -1), interpret=True)
    got = dq, dkv, drope[..., :R] + drope[..., R:]
    close(got, _attend_grads(call, *wide, ids, ids, *want[:2], grad.astype(jnp.float32)), 0.02)


def close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * np.abs(b[b > mla_flash.NOTHING]).max()


def test_tpu_program_has_the_kernels_and_no_head_is_copied():
    """Rows of heads are neither transposed nor padded: no such array but the output has an axis of heads."""
    layout = sharding.layout(sharding.make_mesh(MeshConfig(fsdp=8)))
    shapes = (8, T, 32), (32, H, N + R), (8, T, R // 2), (8, T, R // 2), (8, T, 16 + R), (16, H, N + V)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    ids, grad = jax.ShapeDtypeStruct((8, T), jnp.int32), jax.ShapeDtypeStruct((8, T, H, V), jnp.bfloat16)
    sharded = shard_attention(layout, shapes[0], shapes[1], shapes[5], 0.1)

    def both(*args):
        *args, grad = args
        _, pullback = jax.vjp(lambda *a: latent_attention(sharded, *a, args[-1])[0], *args[:-1])
        return pullback(grad)

    text = jax.jit(both).trace(*arrays, ids, grad).lower(lowering_platforms=("tpu",)).as_text()
    assert "mla_flash_forward" in text and "mla_flash_backward" in text
    assert f"1x{H}x{T}x{N}" not in text and f"1x{T}x{H}x{N + R}" not in text
