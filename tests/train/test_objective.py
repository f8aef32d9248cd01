"""The seam of what is minimised: next-token is the loss it always was, columns go too, temperature is the sampler's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import MemoryConfig, MeshConfig
from kimi_jax.kernels.vocab.cross_entropy import chunked_cross_entropy
from kimi_jax.kernels.vocab.vocab_parallel import sharded_cross_entropy
from kimi_jax.nn.kimi import KimiK25, init_params
from kimi_jax.nn.param import unbox
from kimi_jax.train.objective import Last, Max, Mean, Objective, Sum, merge_microbatches, next_token
from kimi_jax.train.step import gradients, make_layout
from tests.nn.tiny import QUICK, assert_trees_close
from tests.train.tiny import CONFIG, MODEL, G, make_text_batch

SMALL = dataclasses.replace(MODEL, vision=None, num_hidden_layers=2)
TEXT = dataclasses.replace(CONFIG, model=SMALL)


def text_batch(seed=0):
    return make_text_batch(seed)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: unbox(init_params(SMALL, jax.random.key(0))), compiler_options=QUICK)()


def test_next_token_is_bit_for_bit_the_loss_written_out(params):
    """The formula of pre-training as it stood in the step before objectives: value and gradient are the same bits."""

    def written_out(params, batch):
        nll, aux = KimiK25(SMALL).apply({"params": params}, batch, method="token_nll")
        weights = batch.loss_weights
        of_modality = batch.modality[None] == jnp.arange(3)[:, None, None]
        nll_sum = jnp.sum(jnp.where(of_modality, weights * nll, 0.0), axis=(1, 2))
        total = jnp.sum(jnp.sum(jnp.where(of_modality, weights, 0.0), axis=(1, 2)))
        balance = TEXT.optimizer.balance_loss_weight * aux.balance_loss
        return jnp.sum(nll_sum) / jnp.maximum(total, 1e-6) + balance

    batch = text_batch()
    batch.loss_weights[:] *= np.random.default_rng(0).uniform(0.1, 2, (G, 1)).astype(np.float32)
    want, want_grads = jax.jit(jax.value_and_grad(written_out), compiler_options=QUICK)(params, batch)
    (loss, _), grads = jax.jit(lambda p, b: gradients(p, b, TEXT), compiler_options=QUICK)(params, batch)
    assert loss == want
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_array_equal(a, b)


def weighted_by_a_column():
    """-log p by the column "price" over the sum of prices, and each kind of metric."""

    def loss(logp, batch, totals):
        price = batch.columns["price"]
        metrics = {"loss": Mean(jnp.sum(-logp * price), jnp.sum(price)), "targets": Sum(jnp.sum(price > 0))}
        return jnp.sum(-logp * price) / totals["price"], metrics | {"dearest": Max(price.max())}

    return Objective(("price",), lambda batch: {"price": jnp.sum(batch.columns["price"])}, loss)


@pytest.mark.parametrize("devices, parts", [(1, 4), (8, 1)])
def test_columns_go_through_microbatches_and_devices(params, devices, parts):
    """With the loss weights as prices it is next-token again; the metrics are those of the whole batch."""
    batch = text_batch()
    price = batch.loss_weights * np.random.default_rng(1).uniform(0.5, 2, (G, 32)).astype(np.float32)
    want = dataclasses.replace(batch, loss_weights=price)
    batch = dataclasses.replace(batch, columns={"price": price})
    plain = jax.jit(lambda p, b: gradients(p, b, TEXT), compiler_options=QUICK)
    (want_loss, want_out), want_grads = plain(params, want)

    config = dataclasses.replace(TEXT, memory=MemoryConfig(microbatches=parts))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    layout = make_layout(config, mesh)
    run = jax.jit(
        lambda p, b: gradients(p, b, config, layout, objective=weighted_by_a_column()), compiler_options=QUICK
    )
    (loss, out), grads = run(jax.device_put(params, sharding.replicated(mesh)), sharding.put_batch(batch, mesh))
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)  # float32 sums in another order
    assert_trees_close(grads, want_grads, 1e-5)
    np.testing.assert_allclose(out["metrics"]["loss"], want_out["metrics"]["loss"], rtol=1e-5)
    assert out["metrics"]["targets"].value == (price > 0).sum()
    assert out["metrics"]["dearest"].value == price.max()


def test_column_that_is_missing_or_of_another_shape_is_named(params):
    for column, message in (
        ({}, r"needs the column 'price' in every batch; there are: none"),
        ({"price": np.ones((G, 31), np.float32)}, r"'price' of a batch must be float32 \(8, 32\), not float32 \(8, 31"),
        ({"price": np.ones((G, 32), np.int32)}, r"must be float32 \(8, 32\), not int32"),
    ):
        with pytest.raises(ValueError, match=message):
            gradients(params, dataclasses.replace(text_batch(), columns=column), TEXT, objective=weighted_by_a_column())


def test_metrics_of_microbatches_merge_as_they_say():
    stacked = {"mean": Mean(np.array([1, 5]), np.array([1, 2])), "sum": Sum(np.array([[1, 2], [3, 4]]))}
    stacked |= {"max": Max(np.array([7, 3])), "last": Last(np.array([7, 3]))}
    merged = merge_microbatches(stacked)
    assert merged["mean"] == Mean(6, 3) and merged["sum"].value.tolist() == [4, 6]
    assert merged["max"] == Max(7) and merged["last"] == Last(3)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_temperature_divides_the_logits(devices, temperature):
    """Value and gradients against a plain softmax of logits / T, in chunks and over devices; float32 rounding."""
    rng = np.random.default_rng(0)
    hidden, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 6, 16), (16, 24)))
    targets, weights = rng.integers(0, 24, (8, 6)).astype(np.int32), rng.uniform(size=(8, 6)).astype(np.float32)

    def plain(hidden, kernel):
        logp = jax.nn.log_softmax(jnp.matmul(hidden, kernel, precision="highest") / temperature)
        return jnp.sum(-jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * weights)

    def ours(hidden, kernel):
        if devices == 1:
            flat = hidden.reshape(-1, 16)
            nll = chunked_cross_entropy(flat, kernel, jnp.asarray(targets.reshape(-1)), 10, temperature)
            return jnp.sum(nll.reshape(targets.shape) * weights)
        over_mesh = sharding.layout(sharding.make_mesh(MeshConfig())).vocabulary(("embed", "vocab"), kernel.shape)
        return jnp.sum(sharded_cross_entropy(over_mesh, hidden, kernel, jnp.asarray(targets), temperature) * weights)

    found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, kernel) for f in (ours, plain))
    assert_trees_close(found, wanted, 1e-5)


def test_next_token_needs_no_columns_and_has_temperature_one():
    assert next_token().columns == () and next_token().temperature == 1.0
