"""QK-clip brings the largest logit of exactly the offending heads to tau, scanned or not; nothing else moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.config import YarnConfig
from kimi_jax.optim import qk_clip
from tests.optim import tiny

VARIANTS = {
    "scanned": tiny.CONFIG,
    "unrolled": dataclasses.replace(tiny.CONFIG, scan_layers=False),
    "plain_q_and_yarn": dataclasses.replace(
        tiny.CONFIG, q_lora_rank=None, rope_scaling=YarnConfig(factor=4.0, original_max_position_embeddings=8)
    ),
}


@functools.cache
def started(variant: str):
    """(config, params with logits of order 1, batch, compiled forward, its max logits [L,H])."""
    config = VARIANTS[variant]
    params, _ = tiny.build(config)
    batch = tiny.text_batch(2, 12, config.vocab_size)
    forward = jax.jit(functools.partial(tiny.max_logits, config))
    return config, params, batch, forward, forward(params, batch)


def query_name(config) -> str:
    return "q" if config.q_lora_rank is None else "q_b"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer,head", [(0, 1), (1, 0), (2, 2)])
def test_one_head_of_one_layer_is_brought_to_tau(variant, layer, head):
    config, params, batch, forward, before = started(variant)
    tau = 0.25 * float(before[layer, head])
    assert tau > 0.01  # otherwise the test proves little
    reported = jnp.full_like(before, -jnp.inf).at[layer, head].set(before[layer, head])
    clipped, stats = qk_clip.apply(params, reported, tau)
    assert stats["clipped_heads"] == 1
    np.testing.assert_allclose(stats["min_gamma"], 0.25, rtol=1e-6)

    after = forward(clipped, batch)
    # Only float32 rounding of the scaled weights is between the logit and tau.
    np.testing.assert_allclose(after[layer, head], tau, rtol=1e-5)
    others = np.arange(config.num_attention_heads) != head
    np.testing.assert_array_equal(after[: layer + 1][:, others], before[: layer + 1][:, others])
    np.testing.assert_array_equal(after[:layer], before[:layer])


@pytest.mark.parametrize("variant", ["scanned", "plain_q_and_yarn"])
def test_which_weights_get_which_factor(variant):
    """Non-rotary queries and keys sqrt(gamma), rotary queries gamma; values, shared rotary key, all else untouched."""
    config, params, _, _, before = started(variant)
    layer, head, nope = 2, 1, config.qk_nope_head_dim
    reported = jnp.zeros_like(before).at[layer, head].set(400.0)
    clipped, _ = qk_clip.apply(params, reported, 100.0)

    want = jax.tree.map(np.array, params)
    attention = want["moe_layers"]["attention"]  # row 0 is layer 1, after the dense one
    attention[query_name(config)]["kernel"][layer - 1, :, head, :nope] *= 0.5
    attention[query_name(config)]["kernel"][layer - 1, :, head, nope:] *= 0.25
    attention["kv_b"]["kernel"][layer - 1, :, head, :nope] *= 0.5
    # Powers of two are exact; everything not named above has to be bit-identical.
    jax.tree.map(np.testing.assert_array_equal, clipped, want)


def test_heads_below_tau_leave_the_tree_bit_identical():
    _, params, _, _, before = started("scanned")
    clipped, stats = jax.jit(qk_clip.apply, static_argnums=2)(params, before, float(before.max()))
    jax.tree.map(np.testing.assert_array_equal, clipped, params)
    assert stats["clipped_heads"] == 0 and stats["min_gamma"] == 1


def test_tau_zero_is_off():
    _, params, _, _, before = started("scanned")
    clipped, stats = qk_clip.apply(params, 1e6 + before, 0.0)
    jax.tree.map(np.testing.assert_array_equal, clipped, params)
    assert stats["clipped_heads"] == 0 and stats["min_gamma"] == 1


def test_all_layers_at_once_and_the_report():
    """Clipping every head changes what deeper layers see, so only layer 0 is exact; the counts are of all layers."""
    _, params, batch, forward, before = started("scanned")
    tau = 0.1 * float(before.min())
    clipped, stats = jax.jit(qk_clip.apply, static_argnums=2)(params, before, tau)
    np.testing.assert_allclose(forward(clipped, batch)[0], tau, rtol=1e-5)
    assert stats["clipped_heads"] == before.size
    np.testing.assert_allclose(stats["min_gamma"], tau / before.max(), rtol=1e-6)


@settings(max_examples=30)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32) | st.just(-np.inf), min_size=1, max_size=6), st.floats(0.1, 1e3)
)
def test_scale_factors(logits, tau):
    gamma = np.asarray(qk_clip.scale_factors(jnp.asarray([logits], jnp.float32), tau))[0]
    for g, s in zip(gamma, np.float32(logits), strict=True):
        assert 0 < g <= 1
        if s > np.float32(tau):
            np.testing.assert_allclose(np.float64(g) * np.float64(s), tau, rtol=1e-6)
        else:
            assert g == 1


def test_errors():
    _, params, _, _, before = started("scanned")
    with pytest.raises(ValueError, match="qk_clip_tau"):
        qk_clip.apply(params, before, -1.0)
    with pytest.raises(KeyError):
        qk_clip.apply({"embed": params["embed"]}, before, 1.0)
