"""`kimi.load`: a directory in, the published torch implementation's numbers out.

float32: max |ours - theirs| / max |theirs| at most 1e-5 (measured: at most 1e-6, as in tests/parity). bfloat16 has
8 bits: 2^-8 = 0.4 % a rounding. With the experts pinned the roundings of three layers and the tower add up to 1.3 % of
the largest logit (measured), so 3 % is the bound; free, a token near the border of two experts takes another one and
differs by what the experts differ, which no bound on rounding covers.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kimi_jax as kimi
from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.hf import stream
from kimi_jax.hf.convert import from_hf
from kimi_jax.infer.media import bucket
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import metadata, unbox
from tests.environment import FIXTURES
from tests.hf import tiny

EXACT, BF16 = 1e-5, 0.03


def error(ours, theirs):
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def io():
    return load_file(FIXTURES / "io.safetensors")


@pytest.fixture(scope="module")
def media(io):
    return io["vision.pixel_values"], io["vision.grid_thws"]


@pytest.fixture(scope="module")
def model():
    return kimi.load(FIXTURES / "tiny_fp32", dtype="float32")


def expert_ids(io, prefix):
    return np.stack([io[f"{prefix}.text.layer{layer}.topk_indices"] for layer in (1, 2)])[None]


def test_fixture_in_float32(model, io, media):
    assert error(model.logits(io["text.input_ids"]), io["text.logits"]) <= EXACT
    assert error(model.vision_features(*media), io["vision.features"]) <= EXACT
    assert error(model.logits(io["mm.input_ids"], *media), io["mm.logits"]) <= EXACT


def test_pinned_to_the_released_experts_nothing_changes(model, io, media):
    """The experts are the router's own, so pinning them proves that the pin reaches the right layers and tokens."""
    pinned = model.logits(io["mm.input_ids"], *media, routed_experts=expert_ids(io, "mm"))
    assert error(pinned, io["mm.logits"]) <= EXACT
    other = model.logits(io["mm.input_ids"], *media, routed_experts=expert_ids(io, "mm")[:, ::-1])
    assert error(other, io["mm.logits"]) > 0.01


def test_bfloat16_pinned(io, media):
    model = kimi.load(FIXTURES / "tiny_fp32", dtype="bfloat16")
    assert model.params["embed"]["embedding"].dtype == ml_dtypes.bfloat16
    assert model.params["moe_layers"]["mlp"]["router"]["bias"].dtype == np.float32
    assert error(model.vision_features(*media), io["vision.features"]) <= BF16
    pinned = model.logits(io["mm.input_ids"], *media, routed_experts=expert_ids(io, "mm"))
    assert error(pinned, io["mm.logits"]) <= BF16


def test_int4_is_the_model_of_its_dequantised_weights(tmp_path, io, media):
    """The same numbers to the bit: a checkpoint with the weights that compressed-tensors dequantises, loaded plain."""
    source = FIXTURES / "tiny_int4"
    packed = kimi.load(source)
    weights = {n: a for n, a in load_file(source / "model.safetensors").items() if ".experts." not in n}
    dequantised = load_file(FIXTURES / "int4_dequant_bf16.safetensors")
    weights |= {name.removeprefix("dequant."): weight for name, weight in dequantised.items()}
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    del config["text_config"]["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = kimi.load(tmp_path)
    tiny.assert_same(jax.device_get(packed.params), jax.device_get(plain.params))
    logits = packed.logits(io["mm.input_ids"], *media)
    np.testing.assert_array_equal(logits, plain.logits(io["mm.input_ids"], *media))
    assert error(logits, io["mm.logits"]) < 1  # another model than tiny_fp32 only by 4 bits a weight


def test_our_own_checkpoint(tmp_path, model, io):
    """A workdir, in the dtype that is asked for."""
    from_hf(FIXTURES / "tiny_fp32", tmp_path / "ours")
    ours = kimi.load(tmp_path / "ours")
    assert ours.config == model.config
    tiny.assert_same(jax.device_get(ours.params), jax.device_get(model.params))
    assert error(ours.logits(io["text.input_ids"]), io["text.logits"]) <= EXACT
    narrow, want = (kimi.load(path, "bfloat16") for path in (tmp_path / "ours", FIXTURES / "tiny_fp32"))
    assert narrow.config == want.config
    tiny.assert_same(jax.device_get(narrow.params), jax.device_get(want.params))


@pytest.mark.parametrize("experts", ["float", "int4"])
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "expert": 2, "replica": 2}], ids=str)
def test_on_a_mesh_every_device_gets_its_part_and_no_more(experts, axes, io, media, monkeypatch):
    """Read in pieces that part boundaries cut. What is put on a device is its share of each array, counted as it
    happens; nothing is made whole on one device first. The weights are those of the plain load, the logits too."""
    source = FIXTURES / ("tiny_int4" if experts == "int4" else "tiny_fp32")
    plain, mesh, put = kimi.load(source, experts=experts), sharding.make_mesh(MeshConfig(**axes)), {}

    def count(array, device):
        put[device] = put.get(device, 0) + array.nbytes
        return jax.device_put(array, device)

    def whole(*_):
        pytest.fail("an array was made whole on one device")

    with monkeypatch.context() as patch:
        patch.setattr(stream, "PIECE", 1000)
        patch.setattr(stream, "jax", SimpleNamespace(**{**vars(jax), "device_put": count}))
        patch.setattr(stream, "jnp", SimpleNamespace(**{**vars(jnp), "asarray": whole}))
        model = kimi.load(source, experts=experts, mesh=mesh)
    leaves = jax.tree.leaves(model.params)
    share = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    assert put == dict.fromkeys(jax.devices(), share)
    cut = 8 // axes.get("replica", 1)
    # every device holds all of the norms, the biases and the position table
    assert share < 1.2 * sum(leaf.nbytes for leaf in leaves) / cut
    boxed = abstract_params(model.config)
    wanted = jax.tree.leaves(sharding.param_shardings(metadata(boxed), unbox(boxed), mesh))
    assert [leaf.sharding for leaf in leaves] == wanted
    tiny.assert_same(jax.device_get(model.params), jax.device_get(plain.params))
    theirs = plain.logits(io["mm.input_ids"], *media)
    assert error(model.logits(io["mm.input_ids"], *media), theirs) <= EXACT


def test_workdir_on_a_mesh(tmp_path, model, io):
    from_hf(FIXTURES / "tiny_fp32", tmp_path / "ours", mesh=MeshConfig(fsdp=8))
    ours = kimi.load(tmp_path / "ours", mesh=sharding.make_mesh(MeshConfig(fsdp=4, expert=2)))
    gate = ours.params["moe_layers"]["mlp"]["experts"]["gate"]
    assert {part.data.size for part in gate.addressable_shards} == {gate.size // 8}
    tiny.assert_same(jax.device_get(ours.params), jax.device_get(model.params))
    assert error(ours.logits(io["text.input_ids"]), io["text.logits"]) <= EXACT


def test_rows_and_items_do_not_touch_each_other(model, io, media):
    """Several rows with media at once equal each row alone; items come in order of appearance."""
    ids, (pixels, grids) = io["mm.input_ids"], media
    both = model.logits(np.concatenate([ids, ids]), np.concatenate([pixels, pixels]), np.concatenate([grids, grids]))
    for row in both:
        assert error(row[None], io["mm.logits"]) <= EXACT
    starts = np.cumsum([0, *grids.prod(axis=1)])
    order = [2, 0, 3, 1]
    shuffled = np.concatenate([pixels[starts[i] : starts[i + 1]] for i in order])
    counts = np.cumsum([0, *(grids[:, 1] * grids[:, 2] // 4)])
    want = np.concatenate([io["vision.features"][counts[i] : counts[i + 1]] for i in order])
    assert error(model.vision_features(shuffled, grids[order]), want) <= EXACT


def test_one_program_a_bucket(model):
    """Lengths of one bucket share the compiled program."""
    program = model._logits
    ids = np.ones((1, 33), np.int32)
    first = model.logits(ids)
    before = program._cache_size()
    assert model.logits(ids[:, :35]).shape == (1, 33, 512)
    model.logits(np.ones((1, 40), np.int32))
    assert program._cache_size() == before
    np.testing.assert_array_equal(model.logits(ids), first)
    sizes = {bucket(n, 16) for n in range(1, 4097)}
    assert len(sizes) <= 1 + 4 * 8
    assert all(n <= bucket(n, 16) <= max(1.25 * n + 1, 16) for n in range(1, 4097))


@pytest.mark.parametrize("model_type", ["kimi_vl", "kimi_k2", "deepseek_v3"])
def test_other_families_load_and_answer(model_type, tmp_path):
    """With q_lora and YaRN (Kimi-K2) and without either (Kimi-VL, Moonlight)."""
    config = tiny.config(model_type)
    stream.save(tmp_path / "m", config, tiny.params(config), model_type)
    model = kimi.load(tmp_path / "m")
    if model_type == "kimi_vl":
        logits = model.logits([[3, 5, 5, 4]], np.zeros((8, 3, 2, 2), np.float32), [[1, 2, 4]])
    else:
        logits = model.logits([[3, 4, 6, 7]])
    assert logits.shape == (1, 4, config.vocab_size)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("ids", "pixels", "grids", "message"),
    [
        ([1, 2], None, None, r"ints \[B, S\]"),
        ([[1, 512]], None, None, "vocabulary has 0..511"),
        ([[1, -1]], None, None, "vocabulary"),
        ([[1.5]], None, None, "ints"),
        ([[505, 1]], None, None, "1 media pads .* have 0 features"),
        ([[505]], (4, 3, 14, 14), None, "belong together"),
        ([[505]], (4, 3, 14, 14), [[1, 2, 4]], "asks for 8 patches, pixel_values has 4"),
        ([[505]], (4, 3, 7, 7), [[1, 2, 2]], r"\[N, 3, 14, 14\]"),
        ([[505]], (20, 3, 14, 14), [[5, 2, 2]], "at most 4 frames"),
        ([[505]], (3, 3, 14, 14), [[1, 1, 3]], "even h, w"),
        ([[505, 505]], (4, 3, 14, 14), [[1, 2, 2]], "2 media pads .* have 1 features"),
    ],
)
def test_requests_that_do_not_fit(model, ids, pixels, grids, message):
    pixels = None if pixels is None else np.zeros(pixels, np.float32)
    with pytest.raises(ValueError, match=message):
        model.logits(ids, pixels, grids)


def test_text_only_models_take_no_images(tmp_path):
    config = tiny.config("kimi_k2")
    stream.save(tmp_path / "m", config, tiny.params(config), "kimi_k2")
    with pytest.raises(ValueError, match="text-only"):
        kimi.load(tmp_path / "m").vision_features(np.zeros((4, 3, 2, 2)), [[1, 2, 2]])


def test_what_is_not_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither config\.json"):
        kimi.load(tmp_path)
    with pytest.raises(kimi.ConfigError, match="float32, bfloat16"):
        kimi.load(tmp_path, dtype="int8")
