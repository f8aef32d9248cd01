"""QK-clip's change of the weights multiplies the logits of exactly the right head; in a stack, of one layer only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.nn.decoder import map_attention, map_router_bias
from kimi_jax.nn.mla import MLA, clip_attention
from tests.nn import tiny


def _max_logits(config, params, x):
    """The largest logit of each head for each row of two tokens: [rows, H]."""
    ids, positions = jnp.ones((1, 2), jnp.int32), jnp.array([[0, 3]])
    one = jax.jit(lambda row: MLA(config).apply({"params": params}, row[None], positions, ids)[1])
    return np.stack([one(row) for row in x])


@pytest.mark.parametrize("q_lora_rank", [16, None])
def test_clip_scales_the_logits_of_its_head_only(q_lora_rank):
    """Tolerance 2e-6 relative: sqrt(gamma) twice instead of gamma once, in float32."""
    config = tiny.replace(q_lora_rank=q_lora_rank)
    params = jax.tree.map(lambda a: a[0], tiny.params(config)["dense_layers"]["attention"])
    x = 3 * jax.random.normal(jax.random.key(0), (16, 2, config.hidden_size))
    before = _max_logits(config, params, x)
    gamma = jnp.array([1.0, 0.25])
    after = _max_logits(config, clip_attention(params, gamma), x)
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    np.testing.assert_allclose(after[:, 1], 0.25 * before[:, 1], rtol=2e-6, atol=1e-6)


def test_clip_leaves_the_shared_rotary_key_and_the_values():
    params = jax.tree.map(lambda a: a[0], tiny.params()["dense_layers"]["attention"])
    clipped = clip_attention(params, jnp.array([0.5, 0.5]))
    np.testing.assert_array_equal(clipped["kv_a"]["kernel"], params["kv_a"]["kernel"])
    np.testing.assert_array_equal(clipped["kv_b"]["kernel"][..., 8:], params["kv_b"]["kernel"][..., 8:])
    np.testing.assert_allclose(clipped["q_b"]["kernel"][..., 8:], 0.5 * params["q_b"]["kernel"][..., 8:])


def test_clip_needs_the_weights_it_changes():
    params = jax.tree.map(lambda a: a[0], tiny.params()["dense_layers"]["attention"])
    with pytest.raises(KeyError, match="kv_b"):
        clip_attention({k: v for k, v in params.items() if k != "kv_b"}, jnp.ones(2))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_map_attention_reaches_one_head_of_one_layer_under_scan(layer):
    """Layers 1 and 2 are stacked; only the named head's columns of the named layer may change."""
    params = tiny.params()
    gamma = jnp.ones((3, 2)).at[layer, 1].set(0.5)
    changed = map_attention(params, clip_attention, gamma)
    for number, (stack, row) in enumerate([("dense_layers", 0), ("moe_layers", 0), ("moe_layers", 1)]):
        for name, columns in (("q_b", slice(None)), ("kv_b", slice(8))):
            old, new = (tree[stack]["attention"][name]["kernel"][row] for tree in (params, changed))
            np.testing.assert_array_equal(new[:, 0], old[:, 0])
            assert (number == layer) == bool((new[:, 1, columns] != old[:, 1, columns]).all())
    untouched = {k: v for k, v in changed.items() if k not in ("dense_layers", "moe_layers")}
    assert all(untouched[k] is params[k] for k in untouched)


def test_maps_refuse_what_they_do_not_know():
    params = tiny.params()
    with pytest.raises(KeyError, match="dense_layers"):
        map_attention({"embed": params["embed"]}, clip_attention, jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="4 rows"):
        map_attention(params, clip_attention, jnp.ones((4, 2)))
    with pytest.raises(KeyError, match="moe_layers"):
        map_router_bias({"embed": params["embed"]}, lambda b, n: b, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="3 rows"):
        map_router_bias(params, lambda b, n: b, jnp.ones((3, 4)))


def test_map_router_bias_goes_layer_by_layer():
    params = tiny.params()
    load = jnp.arange(8.0).reshape(2, 4)
    changed = map_router_bias(params, lambda bias, row: bias + row, load)
    old, new = (p["moe_layers"]["mlp"]["router"]["bias"] for p in (params, changed))
    np.testing.assert_allclose(new - old, load, atol=1e-6)
