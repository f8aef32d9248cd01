"""The Decoupled Encoder Process: its gradient is the end-to-end one, nothing but features is kept, work is shared.

That whole batches on meshes of several axes (context, tensor) give the numbers of one device is in
tests/train/test_pods.py. Here float32; gradients agree to 1e-5 of the largest of their array, as sums
run in another order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import config as c
from kimi_jax import sharding
from kimi_jax.nn import vision_stage
from kimi_jax.nn.kimi import KimiK25, init_params
from kimi_jax.nn.param import unbox
from kimi_jax.packed_batch import VisionBins
from tests.nn.tiny import QUICK, assert_trees_close
from tests.train.tiny import MODEL, G, P, make_batch


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: unbox(init_params(MODEL, jax.random.key(0))), compiler_options=QUICK)()


def nll(params, batch):
    """Summed loss of the whole model."""
    model = KimiK25(MODEL)
    return model.apply({"params": params}, batch, method=model.token_nll)[0].sum()


@pytest.mark.slow
def test_gradient_is_that_of_the_three_phases(params):
    """Encode; go through the decoder and back to the features; encode again and go back from there (the paper)."""
    batch, model = jax.tree.map(jnp.asarray, make_batch(0)), KimiK25(MODEL)

    def encode(params):
        """Written without the stage: tower and projector, nothing recomputed."""
        return tuple(
            model.apply({"params": params}, each, method=lambda m, each: m.projector(m.vision(each)))
            for each in batch.vision
        )

    def decode(params, features):
        def run(model):
            tokens = model.embed(jnp.asarray(batch.tokens))
            places = jnp.asarray(batch.feature_index)
            x = vision_stage.place_features(tokens, vision_stage.join_classes(features, G), places)
            for layers in (model.dense_layers, model.moe_layers):
                x, _ = layers(x, jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids), None)
            return model.lm_head.token_nll(model.final_norm(x), jnp.asarray(batch.targets)).sum()

        return model.apply({"params": params}, method=run)

    @jax.jit
    def phases(params):
        features = encode(params)
        backbone, at_features = jax.grad(decode, argnums=(0, 1))(params, features)
        _, pullback = jax.vjp(encode, params)
        return jax.tree.map(jnp.add, backbone, pullback(at_features)[0])

    want = phases(params)
    got = jax.jit(jax.grad(nll))(params, batch)
    assert np.abs(want["vision"]["patch_embed"]["kernel"]).max() > 0
    assert_trees_close(got, want, 1e-5)


@pytest.mark.slow
def test_only_features_wait_for_the_backward_pass(params):
    """Of all that the tower makes of patches, nothing is among what the forward pass keeps."""
    batch = jax.tree.map(jnp.asarray, make_batch(0))
    given = [leaf.shape for leaf in jax.tree.leaves((params, batch))]

    def kept(model_nll):
        residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: model_nll(p, batch), p)[1], params)
        shapes = [leaf.shape for leaf in jax.tree.leaves(residuals)]
        patches = [s for s in shapes if any(s[i : i + 2] == (G, P) for i in range(len(s)))]
        return [shape for shape in patches if shape not in given]

    def plain(params, batch):
        """The control: the same tower, whose gradient is left to jax."""
        model = KimiK25(MODEL)
        each = batch.vision[0]
        tower = lambda m, each: m.projector(m.vision(each))  # noqa: E731
        return model.apply({"params": params}, each, method=tower).sum()

    assert kept(plain)
    assert not kept(nll)


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "bins"), [({"context": 2, "tensor": 2}, 5), ({"fsdp": 2, "tensor": 4}, 6)], ids=str)
def test_devices_of_a_group_share_its_bins(axes, bins):
    """Every device encodes its part of the group's bins, also where they do not divide; features find their rows."""
    mesh_config = c.MeshConfig(**({"fsdp": 1} | axes))
    mesh = sharding.make_mesh(mesh_config, jax.devices()[: int(np.prod(list(axes.values())))])
    layout = sharding.layout(mesh)
    groups, width, windows, length = layout.parts("batch"), 8, 3, 16
    values = jnp.arange(bins * windows, dtype=jnp.float32).reshape(bins, windows)
    index = jnp.asarray(np.random.default_rng(0).integers(-1, bins // groups * windows, (2 * groups, length)))

    def encode(values):  # a feature is its number, and one line that says how many bins were encoded here
        count = jax.shard_map(
            lambda v: jnp.full((1,), len(v)), mesh=mesh, in_specs=jax.P(layout.axes("bins")),
            out_specs=jax.P(layout.axes("bins")), check_vma=False,
        )(values)  # fmt: skip
        return jnp.broadcast_to(values[..., None], (*values.shape, width)), count

    @jax.jit
    def run(values, x):
        sharded = vision_stage.shard_bins(layout, VisionBins(*[values] * 5)).patches  # any array of a bin will do
        features, count = encode(sharded)
        return vision_stage.fuse(layout, x, (features,), index, (bins,), groups), count

    x = jnp.full((2 * groups, length, width), -1.0)
    x = jax.device_put(x, sharding.batch_sharding(mesh))
    values = jax.device_put(values, sharding.batch_sharding(mesh))
    fused, count = run(values, x)
    assert (count == -(-bins // groups // (mesh.size // groups))).all() and len(count) == mesh.size
    features = jnp.broadcast_to(values.reshape(groups, -1, 1), (groups, bins // groups * windows, width))
    np.testing.assert_array_equal(fused, vision_stage.place_features(x, jnp.asarray(features), index))
    grad = jax.jit(jax.grad(lambda v: run(v, x)[0].sum()))(values)
    counts = jnp.stack([jnp.bincount(i[i >= 0], length=features.shape[1]) for i in index.reshape(groups, -1)])
    np.testing.assert_array_equal(grad.reshape(groups, -1), counts * width)
