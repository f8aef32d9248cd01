"""The training step over a mesh of several axes, in microbatches, with less memory: the same numbers as the plain one.

float32 on 8 virtual devices; sums run in another order, so gradients agree to 1e-5 of the largest of their array.
"""

import dataclasses

import jax
import numpy as np
import pytest

from kimi_jax import config as c
from kimi_jax import sharding
from kimi_jax.nn import decoder
from kimi_jax.nn.kimi import init_params
from kimi_jax.nn.param import unbox
from kimi_jax.packed_batch import padding
from kimi_jax.train import state as state_lib
from kimi_jax.train.step import gradients, make_layout, make_optimizer, make_train_step, microbatches
from tests.nn.tiny import QUICK, assert_trees_close
from tests.train.tiny import CONFIG, MODEL, G, make_batch


def changed(**memory) -> c.TrainConfig:
    return dataclasses.replace(CONFIG, memory=c.MemoryConfig(**memory))


def uneven_batch():
    """Loss weights differ from row to row, one row is empty: means of means would be wrong."""
    batch = make_batch(0)
    scale = np.random.default_rng(0).uniform(0.1, 2, (G, 1)).astype(np.float32)
    batch.loss_weights[:] *= scale
    batch.segment_ids[3] = 0
    batch.loss_weights[3] = 0
    batch.feature_index[3] = -1
    return batch


def run(config, mesh_config=None, batch=None):
    """Loss, what is beside it, and gradients; on one device without a mesh."""
    batch = batch or uneven_batch()
    params = jax.jit(lambda: unbox(init_params(config.model, jax.random.key(0))), compiler_options=QUICK)()
    layout = None
    if mesh_config is not None:
        mesh = sharding.make_mesh(mesh_config)
        layout = make_layout(config, mesh)
        placements = jax.tree.map(lambda x: x.sharding, state_lib.abstract_params(config.model, mesh))
        params, batch = jax.device_put(params, placements), sharding.put_batch(batch, mesh)
    fn = jax.jit(lambda p, b: gradients(p, b, config, layout), compiler_options=QUICK)
    return jax.device_get(fn(params, batch))


@pytest.fixture(scope="module")
def plain():
    return run(CONFIG)


def assert_same(got, want):
    (loss, out), grads = got
    (want_loss, want_out), want_grads = want
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    aux, want_aux = out.pop("aux"), want_out["aux"]
    np.testing.assert_array_equal(aux.expert_load, want_aux.expert_load)
    np.testing.assert_allclose(aux.max_logits, want_aux.max_logits, rtol=1e-5)
    assert aux.dropped == want_aux.dropped == 0
    assert_trees_close(out, {k: v for k, v in want_out.items() if k != "aux"}, 1e-5)
    assert_trees_close(grads, want_grads, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_equals_the_full_batch(plain, parts):
    """Embedding included; the weights of the loss are those of the whole batch."""
    got = run(changed(microbatches=parts))
    assert np.abs(got[1]["embed"]["embedding"]).max() > 0
    assert_same(got, plain)


def test_microbatches_hold_whole_packs_of_every_device():
    layout = sharding.layout(sharding.make_mesh(c.MeshConfig(), jax.devices()[:4]))
    batch = padding(16, 1, rows_per_pack=2, pad_id=0)  # 8 packs of two rows on 4 devices
    batch = dataclasses.replace(batch, tokens=np.arange(16, dtype=np.int32)[:, None])
    parts = jax.jit(lambda batch: microbatches(batch, 2, layout))(batch).tokens[..., 0]
    assert parts.tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [{"replica": 2, "fsdp": 1, "expert": 2, "tensor": 2}, {"fsdp": 2, "context": 4}, {"expert": 4, "context": 2}],
    ids=str,
)
def test_mesh_of_several_axes_equals_one_device(plain, axes):
    """Tokens are sent to experts in several rounds, weights are gathered, heads and the tokens of a row are sharded."""
    assert_same(run(changed(expert_capacity_factor=0.5), c.MeshConfig(**axes)), plain)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["layer_inputs", "attention_sum", "attention_output", "expert_inputs"])
def test_remat_policies_change_nothing_but_memory(plain, policy):
    model = dataclasses.replace(MODEL, remat=True, remat_policy=policy)
    assert_same(run(dataclasses.replace(CONFIG, model=model)), plain)


def test_remat_policies_by_name():
    """Each keeps what it says; offloading is in the program lowered for TPU."""
    with pytest.raises(c.ConfigError, match="did you mean 'attention_output'"):
        decoder.remat_policy("attention_outputs")
    batch = make_batch(0)
    params = jax.eval_shape(lambda: unbox(init_params(MODEL, jax.random.key(0))))

    def text(policy):
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, remat=True, remat_policy=policy))
        fn = jax.jit(lambda p, b: gradients(p, b, config))
        return fn.trace(params, batch).lower(lowering_platforms=("tpu",)).as_text()

    assert "pinned_host" in text("offload_layer_inputs")
    assert "pinned_host" not in text("layer_inputs")


@pytest.mark.slow
def test_whole_step_on_a_mesh_of_several_axes():
    """Muon's distributed Newton-Schulz, QK-clip and router bias too: the weights after a step are those of one device.

    Newton-Schulz amplifies rounding where a gradient has singular values near zero: 1e-3 of the largest update."""
    batch = uneven_batch()
    after = []
    for config, mesh in (
        (CONFIG, sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])),
        (changed(microbatches=2), sharding.make_mesh(c.MeshConfig(fsdp=2, expert=2), jax.devices()[:4])),
    ):
        init_state, step = make_train_step(config, mesh)
        state = init_state()
        before = jax.device_get(state.params)
        state, metrics = step(state, batch)
        after.append(jax.tree.map(lambda a, b: a - b, jax.device_get(state.params), before))
        assert metrics["rounds"].value >= 1 and metrics["imbalance"].value >= 1 and metrics["dropped"].value == 0
    assert_trees_close(after[1], after[0], 1e-3)


def test_narrow_moments_are_narrow():
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, momentum_dtype="bfloat16"))
    mesh = sharding.make_mesh(c.MeshConfig())
    wide, narrow = (state_lib.abstract(MODEL, make_optimizer(x), mesh).opt_state for x in (CONFIG, config))
    sizes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) for state in (wide, narrow)]
    muon = sum(x.size for x in jax.tree.leaves(narrow) if x.dtype == "bfloat16")
    assert sizes[0] - sizes[1] == 2 * muon > 0
