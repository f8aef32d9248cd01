"""The router bias: its mean stays, overloaded experts go down, and a skewed router becomes balanced only with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kimi_jax.optim import router_bias
from tests.optim import tiny


@given(hnp.arrays(np.float32, (2, 5), elements=st.floats(0, 1000, width=16)), st.floats(0.0, 1.0))
def test_mean_stays_and_the_direction_is_against_the_load(load, rate):
    bias = np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5)
    after = np.asarray(router_bias.step(jnp.asarray(bias), jnp.asarray(load), rate))
    np.testing.assert_allclose(after.mean(-1), bias.mean(-1), atol=1e-6)  # float32 rounding of values of order one
    direction = np.sign(load.mean(-1, keepdims=True, dtype=np.float32) - load)
    moved = after - bias
    for row in range(2):
        up, down = moved[row][direction[row] > 0], moved[row][direction[row] < 0]
        if up.size and down.size:
            assert up.min() >= -1e-6 and down.max() <= 1e-6
            np.testing.assert_allclose(up.max() - down.min(), 2 * rate, atol=1e-6)


def test_values_of_moonlights_rule():
    """Loads 7, 1, 1, 3 of mean 3: signs -1, +1, +1, 0 of mean 1/4."""
    after = router_bias.step(jnp.zeros(4), jnp.asarray([7.0, 1.0, 1.0, 3.0]), 0.1)
    np.testing.assert_allclose(after, [-0.125, 0.075, 0.075, -0.025], rtol=1e-6)


def test_equal_loads_and_an_empty_batch_change_nothing():
    bias = jnp.asarray([[0.3, -0.1, 0.2]])
    for load in (jnp.full((1, 3), 5.0), jnp.zeros((1, 3))):
        np.testing.assert_array_equal(router_bias.step(bias, load, 0.1), bias)


def route(scores: jax.Array, bias: jax.Array, k: int) -> jax.Array:
    """Tokens for each expert when the top k of score + bias are picked."""
    _, expert_ids = jax.lax.top_k(scores + bias, k)
    return jnp.sum(jax.nn.one_hot(expert_ids, scores.shape[-1]), axis=(0, 1))


@pytest.mark.parametrize("rate,balanced", [(0.01, True), (0.0, False)])
def test_skewed_router_becomes_balanced_and_without_the_bias_stays_skewed(rate, balanced):
    """Inputs share a component that two of eight experts like; load is measured on fresh tokens each step."""
    experts, k, width = 8, 2, 16
    weights = jax.random.normal(jax.random.key(0), (width, experts)) / width**0.5
    favourite = 2.0 * weights[:, :2].sum(-1)

    @jax.jit
    def advance(bias: jax.Array, key: jax.Array):
        x = jax.random.normal(key, (512, width)) + favourite
        load = route(jax.nn.sigmoid(x @ weights), bias, k)
        return router_bias.step(bias, load, rate), load.max() / load.mean()

    bias, skew = jnp.zeros(experts), []
    for key in jax.random.split(jax.random.key(1), 300):
        bias, worst = advance(bias, key)
        skew.append(float(worst))
    assert skew[0] > 2.0
    late = np.mean(skew[-50:])  # 512 tokens, 128 expected an expert: chance alone gives about 1.15
    assert late < 1.3 if balanced else late > 2.0


def test_every_layer_of_the_tree_moves_by_its_own_load_and_nothing_else_moves():
    params, _ = tiny.build(tiny.CONFIG)
    load = jnp.asarray([[9.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 6.0]])
    after = router_bias.apply(params, load, 0.1)
    want = jax.tree.map(np.array, params)
    want["moe_layers"]["mlp"]["router"]["bias"] += 0.1 * np.asarray([[-1.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, -1.5]])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, want)
    after["moe_layers"]["mlp"]["router"]["bias"] = params["moe_layers"]["mlp"]["router"]["bias"]
    jax.tree.map(np.testing.assert_array_equal, after, params)


def test_rate_zero_and_models_without_experts_are_left_alone():
    params = {"nothing": jnp.zeros(1)}
    assert router_bias.apply(params, jnp.ones((2, 4)), 0.0) is params
    assert router_bias.apply(params, jnp.zeros((0, 0)), 0.1) is params


def test_tree_without_routers_is_an_error():
    with pytest.raises(KeyError):
        router_bias.apply({"nothing": jnp.zeros(1)}, jnp.ones((2, 4)), 0.1)
