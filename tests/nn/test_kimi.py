"""The whole model: two ways to the same number, in value and gradient.

Float32 tolerance 2e-5 of each tensor's largest entry: the same sums in another order, through three layers and back.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kimi_jax.config import preset
from kimi_jax.nn import kimi
from kimi_jax.nn.param import metadata
from tests.nn import tiny

TOLERANCE = 2e-5


@functools.cache
def reference():
    """(params, batch, ((loss, aux), gradients)) of the default configuration."""
    params, batch = tiny.params(), tiny.batch()
    return params, batch, jax.jit(jax.value_and_grad(tiny.loss(tiny.CONFIG), has_aux=True))(params, batch)


def test_the_batch_is_worth_testing_on():
    _, batch, _ = reference()
    ids, grids = batch["vision"][0]["segment_ids"], batch["vision"][0]["grids"]
    assert len(np.unique(np.asarray(grids)[np.asarray(ids) > 0], axis=0)) >= 8
    assert (np.asarray(ids) > 0).all(axis=1).any(), "no item fills a bin"
    assert set(np.asarray(grids[..., 0]).flat) == {1, 2, 3, 4}


def test_every_parameter_has_a_gradient_and_nothing_is_dropped():
    params, batch, ((_, aux), grads) = reference()
    flat, _ = jax.tree_util.tree_flatten_with_path(grads)
    for path, grad in flat:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(grad).all(), name
        # a key bias shifts all logits of a query alike: its gradient is zero up to rounding, and so not tested here
        assert np.abs(grad).max() > 0 or name.endswith("router/bias"), name
    real = (batch["segment_ids"] > 0).sum()
    assert aux.dropped == 0
    np.testing.assert_array_equal(aux.expert_load.sum(axis=1), real * tiny.CONFIG.moe.num_experts_per_tok)
    assert aux.max_logits.shape == (3, 2) and aux.expert_load.shape == (2, 4)
    assert not np.any(grads["moe_layers"]["mlp"]["router"]["bias"])


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": True}], ids=str)
def test_scan_equals_unrolled_and_remat(changes):
    params, batch, want = reference()
    got = jax.jit(jax.value_and_grad(tiny.loss(tiny.replace(**changes)), has_aux=True))(params, batch)
    tiny.assert_trees_close(got, want, TOLERANCE)


def test_packed_equals_unpacked():
    """Every document alone, in a row and bins of its own, summed: values and gradients (without the balance loss, which
    is a row's)."""
    params, _, _ = reference()
    rows = tiny.documents()

    def nll(params, batch, groups):
        nll, _ = kimi.KimiK25(tiny.CONFIG).apply({"params": params}, batch, groups, method="token_nll")
        return (nll * batch["loss_weights"]).sum(), nll

    run = jax.jit(jax.value_and_grad(nll, has_aux=True), static_argnums=2)
    packed = tiny.batch(rows)
    (want, each), want_grads = run(params, packed, 1)
    alone = tiny.batch([[document] for row in rows for document in row], bins=2, groups=5)
    (got, got_each), got_grads = run(params, alone, 5)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE)
    tiny.assert_trees_close(got_grads, want_grads, TOLERANCE)
    packed_weights, alone_weights = (np.asarray(b["loss_weights"]) > 0 for b in (packed, alone))
    np.testing.assert_allclose(np.asarray(got_each)[alone_weights], np.asarray(each)[packed_weights], atol=1e-4)


def test_groups_place_their_own_features():
    """Two groups of one row each equal one group of two rows."""
    params, batch, want = reference()
    grouped = tiny.batch(bins=2, groups=2)
    got = jax.jit(jax.value_and_grad(tiny.loss(tiny.CONFIG, 2), has_aux=True))(params, grouped)
    tiny.assert_trees_close(got, want, TOLERANCE)


def test_one_device_equals_eight():
    """A one-axis fsdp mesh: rows and bins split over it, and every parameter on its first axis that divides."""
    params, _, _ = reference()
    rows = [row for seed in range(4) for row in tiny.documents(seed)]
    batch = tiny.batch(rows, bins=2, groups=8)
    run = jax.jit(jax.value_and_grad(tiny.loss(tiny.CONFIG, 8), has_aux=True))
    want = run(params, batch)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def spec(a):
        axis = next((i for i, n in enumerate(a.shape) if n % 8 == 0), None)
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if i == axis else None for i in range(a.ndim))))

    params = jax.tree.map(lambda a: jax.device_put(a, spec(a)), params)
    batch = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("fsdp"))), batch)
    tiny.assert_trees_close(run(params, batch), want, TOLERANCE)


def test_bfloat16_is_close_to_float32():
    """Mean nll within 2 %, every parameter's gradient within 30 % in norm: 8 bits of mantissa through 5 layers, and a few
    tokens that take another expert. Logits and losses stay float32."""
    params, batch, ((want, _), want_grads) = reference()
    config = tiny.replace(dtype="bfloat16")
    (got, aux), grads = jax.jit(jax.value_and_grad(tiny.loss(config), has_aux=True))(params, batch)
    assert aux.max_logits.dtype == jnp.float32 and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0.02)
    error = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b) / (jnp.linalg.norm(a) + 1e-3), want_grads, grads)
    assert max(jax.tree.leaves(error)) < 0.3, error
    logits, _ = kimi.KimiK25(config).apply({"params": params}, {**batch, "vision": ()})
    assert logits.dtype == jnp.float32


def test_text_only_batches_use_the_same_parameters():
    """An empty `vision` and bins full of padding give the same loss; neither touches the vision tower."""
    params, _, _ = reference()
    rng = np.random.default_rng(0)
    rows = [[[rng.integers(10, 64, 20)], [rng.integers(10, 64, 30)]], [[rng.integers(10, 64, 64)]]]
    padded = tiny.batch(rows)
    run = jax.jit(jax.value_and_grad(tiny.loss(tiny.CONFIG), has_aux=True))
    (with_bins, _), grads = run(params, padded)
    (without, _), _ = run(params, {**padded, "vision": ()})
    assert np.isfinite(with_bins)
    np.testing.assert_allclose(with_bins, without, rtol=1e-6)
    for part in ("vision", "projector"):
        assert all(not np.any(g) for g in jax.tree.leaves(grads[part])), part


def test_a_batch_of_padding_only_is_finite():
    params, batch, _ = reference()
    empty = {**batch, "segment_ids": jnp.zeros_like(batch["segment_ids"]), "loss_weights": jnp.zeros_like(batch["loss_weights"])}
    (value, aux), grads = jax.jit(jax.value_and_grad(tiny.loss(tiny.CONFIG), has_aux=True))(params, empty)
    assert value == 0 and not aux.expert_load.any()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_feature_that_does_not_exist_is_not_silent():
    x = kimi.place_features(jnp.zeros((1, 2, 3)), jnp.ones((1, 4, 3)), jnp.array([[-1, 4]]))
    assert not np.isnan(x[0, 0]).any() and np.isnan(x[0, 1]).all()


def test_logits_and_nll_agree():
    params, batch, _ = reference()
    model = kimi.KimiK25(tiny.CONFIG)
    logits, _ = jax.jit(model.apply)({"params": params}, batch)
    nll, _ = jax.jit(lambda p, b: model.apply({"params": p}, b, method="token_nll"))(params, batch)
    want = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nll, want, atol=1e-5)


@pytest.mark.parametrize("changes", [{"q_lora_rank": None}, {"moe": None}, {"vision": None}], ids=str)
def test_variants_run(changes):
    """Moonlight's direct queries, a dense model, a text model."""
    config = tiny.replace(**changes)
    batch = tiny.batch()
    if config.vision is None:
        batch["vision"] = ()
    value, aux = jax.jit(tiny.loss(config))(tiny.params(config), batch)
    assert np.isfinite(value) and aux.max_logits.shape == (3, 2) and aux.expert_load.shape[0] == config.num_moe_layers


# ------------------------------------------------------------------------------------------------- sizes and assembly


def test_sizes_of_the_release_from_shapes_alone():
    """reference.md section 1.5: 1.0264 T text, 32.86 B active, and the exact parts."""
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
    shapes, infos = jax.tree.map(lambda p: p.shape, kimi.unbox(boxed)), metadata(boxed)
    jax.tree.map(lambda info, shape: (_ for _ in ()).throw(AssertionError((info, shape)))
                 if len(info.axes) != len(shape) else None, infos, shapes,
                 is_leaf=lambda x: not isinstance(x, dict))  # fmt: skip


def test_parts_from_different_checkpoints():
    base, tower, text = (tiny.params(seed=s) for s in (0, 10, 20))
    merged = kimi.merge_params(base, vision=tower, language=text)
    assert merged["vision"] == tower["vision"] or all(
        jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), merged["vision"], tower["vision"]))
    )
    np.testing.assert_array_equal(merged["embed"]["embedding"], text["embed"]["embedding"])
    np.testing.assert_array_equal(merged["projector"]["fc0"]["kernel"], base["projector"]["fc0"]["kernel"])
    assert jax.tree.structure(merged) == jax.tree.structure(base)


def test_parts_that_do_not_fit_are_all_listed():
    base, other = tiny.params(), tiny.params(tiny.replace(vocab_size=32, q_lora_rank=None))
    with pytest.raises(ValueError) as error:
        kimi.merge_params(base, language=other)
    text = str(error.value)
    assert "shape of embed/embedding: (32, 32), needs (64, 32)" in text and "shape of lm_head/kernel" in text
    assert "missing: dense_layers/attention/q_a/kernel" in text and "unexpected: dense_layers/attention/q/kernel" in text
