"""The model equals the published torch implementation on its tiny random checkpoint, in float32.

Every comparison is max |ours - theirs| / max |theirs| over the whole tensor, at most 1e-5: both are float32, sums
run in another order, and three layers amplify the rounding a little (measured: at most 1e-6). `layerN` in the fixture
is the OUTPUT of layer N. The multimodal prompt is already expanded, one media pad for each feature.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from kimi_jax.data.patches import item_layout, num_features
from kimi_jax.hf import stream
from kimi_jax.nn.decoder import DecoderLayer
from kimi_jax.nn.kimi import KimiK25, abstract_params
from kimi_jax.nn.layers import rms_norm
from kimi_jax.nn.mla import MLA
from kimi_jax.nn.moe import route
from kimi_jax.nn.moonvit import MoonViT3D, VisionBlock
from kimi_jax.nn.param import unbox
from kimi_jax.nn.projector import Projector
from kimi_jax.nn.rope import vision_rotary
from kimi_jax.packed_batch import padding
from tests.environment import FIXTURES
from tests.nn.packed import fill_bins
from tests.nn.tiny import QUICK

TOLERANCE = 1e-5


def assert_close(ours, theirs):
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


@pytest.fixture(scope="module")
def released():
    """(config, params, inputs and outputs of the torch implementation)."""
    config, params = stream.load(FIXTURES / "tiny_fp32", "float32")
    return config, params, load_file(FIXTURES / "io.safetensors")


@pytest.fixture(scope="module")
def vision_bin(released):
    """All items of the fixture in one bin, padded from 244 to 256 patches: (bin, grids, first slot of each item)."""
    config, _, io = released
    grids = [tuple(int(n) for n in g) for g in io["vision.grid_thws"]]
    pixels = np.split(io["vision.pixel_values"].reshape(244, -1), np.cumsum([math.prod(g) for g in grids])[:-1])
    bins, first = fill_bins([list(zip(pixels, grids, strict=True))], 256, pixels[0].shape[1])
    return jax.tree.map(jnp.asarray, bins), grids, first[0]


def in_raster_order(packed, grids):
    """Patches of one bin back in the released order, items one after the other."""
    start, out = 0, []
    for grid in grids:
        order = item_layout(grid)[0]
        out.append(np.asarray(packed)[start : start + len(order)][np.argsort(order)])
        start += len(order)
    return np.concatenate(out)


def of_items(slots, grids, first):
    """What stands in the feature slots of each item, items one after the other."""
    return np.concatenate([np.asarray(slots)[s : s + num_features(g)] for s, g in zip(first, grids, strict=True)])


def text_batch(ids):
    ids = jnp.asarray(ids, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    batch = padding(*ids.shape, ids.shape[0], 0)
    return dataclasses.replace(batch, tokens=ids, positions=positions, segment_ids=jnp.ones_like(ids))


def multimodal_batch(config, io, vision_bin):
    bins, grids, first = vision_bin
    ids = io["mm.input_ids"]
    index = np.full(ids.shape, -1, np.int32)
    slots = [s + np.arange(num_features(g)) for s, g in zip(first, grids, strict=True)]
    index[ids == config.media_placeholder_token_id] = np.concatenate(slots)
    return dataclasses.replace(text_batch(ids), feature_index=jnp.asarray(index), vision=(bins,))


def test_tree_has_the_models_shapes(released):
    config, params, _ = released
    ours = jax.tree.map(lambda a: a.shape, unbox(abstract_params(config)))
    assert jax.tree.map(lambda a: a.shape, params) == ours


def test_text_logits(released):
    config, params, io = released
    logits, aux = jax.jit(KimiK25(config).apply, compiler_options=QUICK)(
        {"params": params}, text_batch(io["text.input_ids"])
    )
    assert_close(logits, io["text.logits"])
    assert aux.dropped == 0


def test_multimodal_logits(released, vision_bin):
    config, params, io = released
    logits, _ = jax.jit(KimiK25(config).apply, compiler_options=QUICK)(
        {"params": params}, multimodal_batch(config, io, vision_bin)
    )
    assert_close(logits, io["mm.logits"])


def by_expert(experts, gates):
    order = np.argsort(np.asarray(experts), axis=-1)
    return (np.take_along_axis(np.asarray(a), order, axis=-1) for a in (experts, gates))


def _layer_params(params, config, number):
    routed = number >= config.num_dense_layers
    stack, row = ("moe_layers", number - config.num_dense_layers) if routed else ("dense_layers", number)
    return routed, jax.tree.map(lambda a: a[row], params[stack])


@pytest.mark.parametrize("prefix", ["text_only", "mm"])
def test_every_decoder_layer_and_its_router(released, vision_bin, prefix):
    """Each layer on the released input of that layer, so that an error shows where it arises."""
    config, params, io = released
    if prefix == "mm":
        batch = multimodal_batch(config, io, vision_bin)
        x = params["embed"]["embedding"][batch.tokens]
        pads = batch.tokens[0] == config.media_placeholder_token_id
        x = x.at[0, pads].set(io["vision.features"])
    else:
        batch = text_batch(io["text.input_ids"])
        x = params["embed"]["embedding"][batch.tokens]
    where = batch.positions, batch.segment_ids
    attend = jax.jit(lambda p, x: MLA(config).apply({"params": p}, x, *where)[0], compiler_options=QUICK)

    def layer_output(p, x, routed):
        return DecoderLayer(config, routed).apply({"params": p}, x, *where)[0]

    step = jax.jit(layer_output, static_argnums=2, compiler_options=QUICK)
    for number in range(config.num_hidden_layers):
        routed, layer = _layer_params(params, config, number)
        if routed:
            normed = rms_norm(x, layer["input_norm"]["scale"], config.rms_norm_eps)
            normed = rms_norm(
                x + attend(layer["attention"], normed), layer["post_attention_norm"]["scale"], config.rms_norm_eps
            )
            router = layer["mlp"]["router"]
            routing = route(normed, router["kernel"], router["bias"], config.moe)
            name = f"{prefix}.text.layer{number}"
            # torch returns the chosen experts in no particular order
            experts, gates = by_expert(routing.experts[0], routing.gates[0])
            their_experts, their_gates = by_expert(io[name + ".topk_indices"], io[name + ".topk_weights"])
            np.testing.assert_array_equal(experts, their_experts)
            assert_close(gates, their_gates)
        theirs = io[f"{prefix}.text.layer{number}"]
        assert_close(step(layer, x, routed), theirs)
        x = jnp.asarray(theirs)


def test_vision_tower_step_by_step(released, vision_bin):
    """patch_embed includes the position embedding; layer 0 and 1 take the released input; final is after the norm."""
    config, params, io = released
    bins, grids, first = vision_bin
    v = config.vision
    tower = params["vision"]

    def first_steps(module, bins):
        x = module.patch_embed(bins.patches)
        return x + module.pos_emb(bins.coords, bins.grids)

    x = MoonViT3D(config).apply({"params": tower}, bins, method=first_steps)
    assert_close(in_raster_order(x[0], grids), io["vision_only.vision.patch_embed"])
    cos, sin = vision_rotary(bins.coords, v.hidden_size // v.num_attention_heads, v.rope_theta)
    step = jax.jit(VisionBlock(config).apply, compiler_options=QUICK)
    for number in range(v.num_hidden_layers):
        block = jax.tree.map(lambda a, n=number: a[n], tower["blocks"])
        x, _ = step({"params": block}, x, cos, sin, bins.segment_ids)
        assert_close(in_raster_order(x[0], grids), io[f"vision_only.vision.layer{number}"])
    x = MoonViT3D(config).apply({"params": tower}, x, method=lambda module, x: module.final_norm(x))
    assert_close(in_raster_order(x[0], grids), io["vision_only.vision.final"])


def test_pooled_windows_and_features(released, vision_bin):
    config, params, io = released
    bins, grids, first = vision_bin
    pooled = jax.jit(MoonViT3D(config).apply, compiler_options=QUICK)({"params": params["vision"]}, bins)
    assert_close(of_items(pooled[0], grids, first), io["vision.pooled"])
    features = jax.vmap(Projector(config).bind({"params": params["projector"]}))(pooled)
    assert_close(of_items(features[0], grids, first), io["vision.features"])
