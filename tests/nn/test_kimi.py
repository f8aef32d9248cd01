"""The whole model: two ways to the same number, in value and gradient.

Float32 tolerance 2e-5 of each tensor's largest entry: the same sums in another order, through three layers and back.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kimi_jax.config import preset
from kimi_jax.nn import kimi, vision_stage
from kimi_jax.nn.param import ParamInfo, metadata, unbox
from tests.nn import tiny

TOLERANCE = 2e-5


@functools.cache
def reference():
    """(params, batch, ((loss, (nll, aux)), gradients)) of the default configuration."""
    params, batch = tiny.params(), tiny.batch()
    return params, batch, tiny.loss_and_grads()(params, batch)


def test_batch_is_worth_testing_on():
    _, batch, _ = reference()
    ids, grids = batch.vision[0].segment_ids, batch.vision[0].grids
    assert len(np.unique(np.asarray(grids)[np.asarray(ids) > 0], axis=0)) >= 8
    assert any((row == row[0]).all() and row[0] > 0 for row in np.asarray(ids)), "no item fills a bin"
    assert set(np.asarray(grids[..., 0]).flat) == {1, 2, 3, 4}


def test_every_parameter_has_a_gradient_and_nothing_is_dropped():
    _, batch, ((_, (_, aux)), grads) = reference()
    flat, _ = jax.tree_util.tree_flatten_with_path(grads)
    for path, grad in flat:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(grad).all(), name
        assert (np.abs(grad).max() > 0) == (not name.endswith("router/bias")), name
    real = (batch.segment_ids > 0).sum()
    assert aux.dropped == 0
    np.testing.assert_array_equal(aux.expert_load.sum(axis=1), real * tiny.CONFIG.moe.num_experts_per_tok)
    assert aux.max_logits.shape == (3, 2) and aux.expert_load.shape == (2, 4)


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": True}], ids=str)
def test_scan_equals_unrolled_and_remat(changes):
    params, batch, want = reference()
    tiny.assert_trees_close(tiny.loss_and_grads(tiny.replace(**changes))(params, batch), want, TOLERANCE)


@functools.cache
def alone():
    """Every document in a row and bins of its own, eight groups, without the balance loss (which is a row's)."""
    batch = tiny.batch([[document] for row in tiny.documents() for document in row], bins=2, groups=8)
    return batch, tiny.loss_and_grads()(tiny.params(), batch, 0.0)


def test_packed_equals_unpacked():
    """Value, nll of every token, and gradients."""
    params, packed, _ = reference()
    (want, (nll, _)), grads = tiny.loss_and_grads()(params, packed, 0.0)
    batch, ((got, (nll_alone, _)), grads_alone) = alone()
    np.testing.assert_allclose(got, want, rtol=TOLERANCE)
    tiny.assert_trees_close(grads_alone, grads, TOLERANCE)
    learnt, learnt_alone = (np.asarray(b.loss_weights) > 0 for b in (packed, batch))
    assert learnt.sum() > 30
    np.testing.assert_allclose(np.asarray(nll_alone)[learnt_alone], np.asarray(nll)[learnt], atol=1e-4)


def test_one_device_equals_eight():
    """A one-axis fsdp mesh: rows and bins split over it, and every parameter on its first axis that divides."""
    batch, want = alone()
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def spec(a):
        axis = next((i for i, n in enumerate(a.shape) if n % 8 == 0), None)
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if i == axis else None for i in range(a.ndim))))

    params = jax.tree.map(lambda a: jax.device_put(a, spec(a)), tiny.params())
    batch = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("fsdp"))), batch)
    tiny.assert_trees_close(tiny.loss_and_grads()(params, batch, 0.0), want, TOLERANCE)


def test_bfloat16_is_close_to_float32():
    """Loss within 2 %, every parameter's gradient within 40 % in norm: 8 bits of mantissa through 5 layers, and a few
    tokens that take another expert. Logits and losses stay float32."""
    params, batch, ((want, _), want_grads) = reference()
    config = tiny.replace(dtype="bfloat16")
    (got, (nll, aux)), grads = tiny.loss_and_grads(config)(params, batch)
    assert aux.max_logits.dtype == nll.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0.02)
    error = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / (np.linalg.norm(a) + 1e-3), want_grads, grads)
    assert max(jax.tree.leaves(error)) < 0.4, error
    logits = jax.eval_shape(kimi.KimiK25(config).apply, {"params": params}, dataclasses.replace(batch, vision=()))[0]
    assert logits.dtype == jnp.float32


def test_text_only_batches_use_the_same_parameters():
    """An empty `vision` and bins full of padding give the same loss; neither touches the vision tower."""
    params, _, _ = reference()
    rng = np.random.default_rng(0)
    rows = [[[rng.integers(10, 64, 20)], [rng.integers(10, 64, 30)]], [[rng.integers(10, 64, 64)]]]
    padded = tiny.batch(rows)
    (with_bins, _), grads = tiny.loss_and_grads()(params, padded)
    without, _ = tiny.loss()(params, dataclasses.replace(padded, vision=()))
    np.testing.assert_allclose(with_bins, without, rtol=1e-6)
    for part in ("vision", "projector"):
        assert all(not np.any(g) for g in jax.tree.leaves(grads[part])), part


def test_batch_of_padding_only_is_finite():
    params, batch, _ = reference()
    empty = dataclasses.replace(
        batch, segment_ids=jnp.zeros_like(batch.segment_ids), loss_weights=jnp.zeros_like(batch.loss_weights)
    )
    (value, (_, aux)), grads = tiny.loss_and_grads()(params, empty)
    assert value == 0 and not aux.expert_load.any()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_feature_that_does_not_exist_is_not_silent():
    x = vision_stage.place_features(jnp.zeros((1, 2, 3)), jnp.ones((1, 4, 3)), jnp.array([[-1, 4]]))
    assert not np.isnan(x[0, 0]).any() and np.isnan(x[0, 1]).all()


def test_logits_and_nll_agree():
    params, batch, ((_, (nll, _)), _) = reference()
    model = kimi.KimiK25(tiny.CONFIG)
    logits, _ = jax.jit(model.apply, compiler_options=tiny.QUICK)({"params": params}, batch)
    want = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nll, want, atol=1e-5)


@pytest.mark.parametrize("changes", [{"q_lora_rank": None}, {"moe": None, "vision": None}], ids=str)
def test_variants_run(changes):
    """Moonlight's direct queries; a dense text model."""
    config = tiny.replace(**changes)
    batch = dataclasses.replace(tiny.batch(), vision=())
    value, (_, aux) = tiny.loss(config)(tiny.params(config), batch)
    assert np.isfinite(value) and aux.max_logits.shape == (3, 2) and aux.expert_load.shape[0] == config.num_moe_layers


def test_fresh_parameters():
    """normal(initializer_range) for matrices, embeddings and the table, ones for scales, zeros for biases."""
    params = unbox(
        jax.jit(lambda key: kimi.init_params(tiny.CONFIG, key), compiler_options=tiny.QUICK)(jax.random.key(0))
    )
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in flat:
        name = path[-1].key
        if name in ("scale", "bias"):
            np.testing.assert_array_equal(leaf, float(name == "scale"))
        else:  # 5 standard deviations of a standard deviation
            error = 5 / np.sqrt(2 * leaf.size)
            np.testing.assert_allclose(leaf.std(), tiny.CONFIG.initializer_range, rtol=error, err_msg=str(path))


# ------------------------------------------------------------------------------------------------- sizes and assembly


def test_sizes_of_the_release_from_shapes_alone():
    """docs/released_model.md section 1.5: 1.0264 T text, 32.86 B active, and the exact parts."""
    assert kimi.count_params(preset("kimi_k2_5")) == {
        "text": 1_026_408_232_448, "text_active": 32_861_500_928, "attention_per_layer": 101_124_096,
        "vision": 416_866_032, "projector": 54_277_888, "total": 1_026_879_376_368,
    }  # fmt: skip


def test_sizes_of_the_relatives():
    """Moonlight is 16 B with 3 B active; Kimi-VL adds the same tower; the demo has all mechanisms in 0.5 to 5 M."""
    moonlight, vl = kimi.count_params(preset("moonlight_16b_a3b")), kimi.count_params(preset("kimi_vl_a3b"))
    assert (moonlight["text"], moonlight["text_active"]) == (15_960_110_208, 2_914_776_192)
    assert (vl["text"], vl["vision"], vl["projector"]) == (moonlight["text"], 416_866_032, 30_679_808)
    assert 0.5e6 <= kimi.count_params(preset("demo"))["total"] <= 5e6


def test_metadata_has_an_axis_name_for_every_axis():
    boxed = kimi.abstract_params(tiny.CONFIG)
    infos = jax.tree.leaves(metadata(boxed), is_leaf=lambda x: isinstance(x, ParamInfo))
    for info, leaf in zip(infos, jax.tree.leaves(unbox(boxed)), strict=True):
        assert len(info.axes) == leaf.ndim, info


def test_parts_from_different_checkpoints():
    base, tower, text = (tiny.params(seed=s) for s in (0, 10, 20))
    merged = kimi.merge_params(base, vision=tower, language=text)
    tiny.assert_trees_close(merged["vision"], tower["vision"], 0.0)
    tiny.assert_trees_close(merged["projector"], base["projector"], 0.0)
    for name in base.keys() - {"vision", "projector"}:
        tiny.assert_trees_close(merged[name], text[name], 0.0)
    assert jax.tree.structure(merged) == jax.tree.structure(base)


def test_parts_that_do_not_fit_are_all_listed():
    base, other = tiny.params(), tiny.params(tiny.replace(vocab_size=32, q_lora_rank=None))
    with pytest.raises(ValueError) as error:
        kimi.merge_params(base, language=other)
    text = str(error.value)
    assert "shape of embed/embedding: (32, 32), needs (64, 32)" in text and "shape of lm_head/kernel" in text
    assert (
        "missing: dense_layers/attention/q_a/kernel" in text and "unexpected: dense_layers/attention/q/kernel" in text
    )
