"""Adapters: nothing at first, merged the same model. tests/train/test_adapters.py is a run of them.

Tolerance 1e-5 of the largest entry where sums run in another order (float32).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import ConfigError, LoRAConfig, MeshConfig
from kimi_jax.hf import stream
from kimi_jax.nn import lora
from kimi_jax.nn.kimi import KimiK25, abstract_params
from kimi_jax.nn.param import AdamW, metadata, unbox
from kimi_jax.packed_batch import padding
from tests.nn import tiny

FLOAT = tiny.replace(vision=None, num_hidden_layers=2)  # a dense layer and one with experts
INT4 = dataclasses.replace(FLOAT, moe=dataclasses.replace(FLOAT.moe, int4_group_size=16))
ALL = LoRAConfig(rank=3, alpha=6.0, targets=("attention", "mlp", "shared", "experts"))


def random_tree(shapes, seed=0):
    """Values for a tree of shapes: INT4 words are any bits, everything else is normal, around 1 in norms."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(-(2**31), 2**31, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.1, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def base(config):
    return random_tree(unbox(abstract_params(config)), 1)


def adapters_of(config, options, seed=2):
    """Adapters that are not zero."""
    return random_tree(unbox(jax.eval_shape(lambda: lora.init(config, options, jax.random.key(0)))), seed)


def text_batch():
    """Two rows of two documents."""
    tokens = np.random.default_rng(3).integers(10, 64, (2, 12), np.int32)
    ids = np.repeat(np.array([[1, 2]], np.int32), 6, axis=1).repeat(2, axis=0)
    positions = np.tile(np.arange(6, dtype=np.int32), (2, 2))
    batch = dataclasses.replace(padding(2, 12, 1, 0), tokens=tokens, positions=positions, segment_ids=ids)
    weights = (positions < 5).astype(np.float32)
    return dataclasses.replace(batch, targets=np.roll(tokens, -1, 1), loss_weights=weights)


def apply(config, params, adapters=None, options=ALL, batch=None):
    variables = {"params": params}
    if adapters is not None:
        variables["lora"] = lora.scaled(adapters, options)
    run = jax.jit(lambda v, b: KimiK25(config).apply(v, b)[0], compiler_options=tiny.QUICK)
    return run(variables, batch or text_batch())


def loss(adapters, params, config):
    variables = {"params": params, "lora": lora.scaled(adapters, ALL)}
    nll, _ = KimiK25(config).apply(variables, text_batch(), method="token_nll")
    return (nll * text_batch().loss_weights).mean()


@pytest.fixture(scope="module")
def int4_base():
    return base(INT4)


def test_fresh_adapters_change_nothing(int4_base):
    """To the bit: the product that is added is zero. And every matrix of the targets has a pair."""
    boxed = lora.init(INT4, ALL, jax.random.key(0))
    assert all(isinstance(info.group, AdamW) for info in jax.tree.leaves(metadata(boxed)))
    adapters = unbox(boxed)
    assert adapters["moe_layers"]["mlp"]["experts"]["gate"]["a"].shape == (1, 4, 32, 3)
    assert adapters["moe_layers"]["attention"]["o"]["kernel"]["a"].shape == (1, 2, 8, 3)
    assert adapters["moe_layers"]["attention"]["q_b"]["kernel"]["b"].shape == (1, 3, 2, 16)
    assert "router" not in adapters["moe_layers"]["mlp"] and "kv_a_norm" not in adapters["moe_layers"]["attention"]
    want, got = apply(INT4, int4_base), apply(INT4, int4_base, adapters)
    np.testing.assert_array_equal(got, want)
    moved = apply(INT4, int4_base, adapters_of(INT4, ALL))
    assert np.abs(np.asarray(moved - want)).max() > 0.01 * np.abs(np.asarray(want)).max()


@pytest.mark.parametrize("scan", [True, False])
def test_merged_is_the_same_model(scan):
    """Over stacked weights, scanned and unrolled; the tower and the projector once."""
    config, options, batch = FLOAT, ALL, text_batch()
    if scan:
        config, batch = tiny.replace(num_hidden_layers=2), tiny.batch()
        options = LoRAConfig(rank=3, targets=tuple(lora.TARGETS))
    config = dataclasses.replace(config, scan_layers=scan)
    params, adapters = base(config), adapters_of(config, options)
    want = apply(config, params, adapters, options, batch)
    merged = lora.merge(params, adapters, options)
    assert merged["embed"]["embedding"] is params["embed"]["embedding"]
    tiny.assert_trees_close(apply(config, merged, batch=batch), want, 1e-5)


def test_gradients_are_those_of_the_merged_weights():
    """By the chain rule through `merge`, which plain autodiff of the whole model knows nothing else about."""
    config, batch = FLOAT, text_batch()
    params, adapters = base(config), adapters_of(config, ALL)
    direct = jax.jit(jax.grad(lambda a: loss(a, params, config)), compiler_options=tiny.QUICK)(adapters)

    def through_merge(a):
        nll, _ = KimiK25(config).apply({"params": lora.merge(params, a, ALL)}, batch, method="token_nll")
        return (nll * batch.loss_weights).mean()

    want = jax.jit(jax.grad(through_merge), compiler_options=tiny.QUICK)(adapters)
    tiny.assert_trees_close(direct, want, 3e-5)


def test_sharded_base_and_adapters_give_the_same_loss(int4_base):
    """Under the rules of `kimi_jax.sharding` on 8 devices: INT4 words and scales sharded like their floats."""
    mesh = sharding.make_mesh(MeshConfig())
    boxed, adapters = lora.init(INT4, ALL, jax.random.key(0)), adapters_of(INT4, ALL)
    run = jax.jit(lambda a, p: loss(a, p, INT4), compiler_options=tiny.QUICK)
    want = run(adapters, int4_base)
    placed = [
        jax.device_put(tree, sharding.param_shardings(metadata(boxes), tree, mesh))
        for tree, boxes in ((adapters, boxed), (int4_base, abstract_params(INT4)))
    ]
    words = placed[1]["moe_layers"]["mlp"]["experts"]["gate"]["words"]
    assert words.addressable_shards[0].data.size < words.size
    np.testing.assert_allclose(run(*placed), want, rtol=1e-5)


def test_merged_int4_model_goes_back_with_its_words(int4_base, tmp_path):
    """Adapters of attention merge into floats beside INT4 experts; the export holds the words as they were."""
    options = LoRAConfig(rank=2, targets=("attention",))
    merged = lora.merge(int4_base, adapters_of(INT4, options), options)
    stream.save(tmp_path / "m", INT4, merged, "kimi_k2", "float32")
    config, back = stream.load(tmp_path / "m", keep_int4=True)
    assert config.moe.int4_group_size == 16
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(merged), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_what_cannot_be_done_is_said(int4_base):
    experts = LoRAConfig(rank=2, targets=("experts",))
    with pytest.raises(ValueError, match=r"moe_layers\.mlp\.experts\.\w+ is INT4"):
        lora.merge(int4_base, adapters_of(INT4, experts), experts)
    for options, message in (
        (LoRAConfig(targets=("attn",)), "did you mean 'attention'"),
        (LoRAConfig(rank=0), "rank of at least 1"),
        (LoRAConfig(targets=("vision",)), "none of vision"),
    ):
        with pytest.raises(ConfigError, match=message):
            lora.init(FLOAT, options, jax.random.key(0))
