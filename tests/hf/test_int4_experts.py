"""Experts that stay INT4 in memory: the same numbers, a fraction of the bytes, and the same files again."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import kimi_jax as kimi
from kimi_jax import sharding
from kimi_jax.config import ConfigError, MeshConfig
from kimi_jax.hf import stream
from kimi_jax.hf.names import FAMILIES
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.moe import Int4ExpertWeight
from kimi_jax.nn.param import Frozen, metadata, unbox
from tests.environment import FIXTURES
from tests.hf import tiny
from tests.hf.test_convert import tensors_of


@pytest.fixture(scope="module")
def io():
    return load_file(FIXTURES / "io.safetensors")


def experts_of(model):
    return model.params["moe_layers"]["mlp"]["experts"]


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_dequantised_model(dtype, io):
    """Through the public surface, images too. Bytes of the experts: 4 bits a weight and 16 for every 32 of them.

    The matrices are equal to the bit (tests/kernels/moe/test_expert_weights.py). The programs are two, and the compiler
    may round a product before it adds it in one of them: a few units in the last place.
    """
    source = FIXTURES / "tiny_int4"
    floats, packed = kimi.load(source, dtype), kimi.load(source, dtype, experts="int4")
    request = [io["text.input_ids"]]
    if dtype == "float32":
        request = [io["mm.input_ids"], io["vision.pixel_values"], io["vision.grid_thws"]]
    got, want = (np.asarray(model.logits(*request), np.float32) for model in (packed, floats))
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()
    weights = sum(leaf.size for leaf in jax.tree.leaves(experts_of(floats)))
    assert nbytes(experts_of(packed)) == weights * (4 + 16 / 32) / 8
    assert nbytes(experts_of(packed)) <= 0.29 * 2 * weights  # 0.28125 of bfloat16
    rest = [{k: v for k, v in model.params.items() if k != "moe_layers"} for model in (packed, floats)]
    tiny.assert_same(*map(jax.device_get, rest))


def test_tree_is_the_one_that_the_model_declares():
    """Shapes, dtypes and logical axes, so that sharding, checkpoints and memory plans know INT4 too."""
    packed = kimi.load(FIXTURES / "tiny_int4", experts="int4")
    assert packed.config.moe.int4_group_size == 32
    boxed = abstract_params(packed.config)
    want = jax.tree.map(lambda a: (a.shape, a.dtype), unbox(boxed))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), packed.params) == want
    infos = metadata(boxed)["moe_layers"]["mlp"]["experts"]
    assert infos["down"]["words"].axes == infos["down"]["scales"].axes == ("layers", "expert", "expert_mlp", "embed")
    assert isinstance(infos["gate"]["words"].group, Frozen)


def test_random_words_make_weights_of_the_usual_size():
    """Before weights are loaded (benchmarks, memory plans) the experts are as wide as float ones would be."""
    expert_weight = Int4ExpertWeight((4, 64, 32), ("expert", "embed", "expert_mlp"), 16, 0.02)
    words, scales = expert_weight.apply(unbox(expert_weight.init(jax.random.key(0))))
    codes = (np.asarray(words).view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15) - 8.0
    assert abs(codes.std() * np.asarray(scales, np.float32).mean() / 0.02 - 1) < 0.05
    with pytest.raises(ValueError, match="60 inputs of .* groups of 16"):
        Int4ExpertWeight((4, 60, 32), expert_weight.axes, 16, 0.02).init(jax.random.key(0))


def test_under_a_mesh_and_unrolled(io):
    """Sharded over 8 devices by the rules; sums in another order: 1e-5 of the largest logit."""
    model = kimi.load(FIXTURES / "tiny_int4", experts="int4")
    want = model.logits(io["text.input_ids"])
    config = dataclasses.replace(model.config, scan_layers=False)
    mesh = sharding.make_mesh(MeshConfig())
    placements = sharding.param_shardings(metadata(abstract_params(config)), model.params, mesh)
    placed = jax.device_put(model.params, placements)
    words = experts_of(kimi.Model(config, placed))["gate"]["words"]
    assert words.addressable_shards[0].data.size * 8 == words.size
    got = kimi.Model(config, placed).logits(io["text.input_ids"])
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_written_again_it_is_the_same_file(tmp_path):
    source = FIXTURES / "tiny_int4"
    config, params = stream.load(source, "float32", keep_int4=True)
    stream.save(tmp_path / "m", config, params, "kimi_k25", "float32")
    got, want = tensors_of(tmp_path / "m"), tensors_of(source)
    packed = [name for name in want if ".experts." in name and "shared" not in name]
    assert len(packed) == 3 * 48
    assert {name: got[name] for name in packed} == {name: want[name] for name in packed}
    assert got.keys() == want.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=3)
@given(data=st.data())
def test_any_model_of_any_family_keeps_its_words(model_type, data, tmp_path_factory):
    """Packed, loaded as words, written, loaded again as words and as floats."""
    model = data.draw(tiny.configs(model_type, int4=True))
    path = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PIECE", data.draw(st.sampled_from((10, 1 << 23))))
        stream.save(path / "a", model, tiny.params(model), model_type, int4_experts=True)
        config, words = stream.load(path / "a", keep_int4=True)
        stream.save(path / "b", config, words, model_type)
    assert tensors_of(path / "b") == tensors_of(path / "a")
    again, back = stream.load(path / "b", keep_int4=True)
    assert again == config
    tiny.assert_same(back, words)
    tiny.assert_same(stream.load(path / "b")[1], stream.load(path / "a")[1])


def test_experts_that_are_not_int4_cannot_stay_so(tmp_path):
    model = tiny.config("kimi_k2")
    stream.save(tmp_path / "floats", model, tiny.params(model), "kimi_k2")
    with pytest.raises(ConfigError, match=r"are not INT4(.|\n)*to-hf --int4"):
        kimi.load(tmp_path / "floats", experts="int4")
    stream.save(tmp_path / "packed", model, tiny.params(model), "kimi_k2", int4_experts=True)
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    base = "model.layers.1.mlp.experts.1.up_proj.weight"
    plain = load_file(tmp_path / "floats" / "model.safetensors")[base]
    for part in ("_packed", "_scale", "_shape"):
        del tensors[base + part]
    save_file({**tensors, base: plain}, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"not INT4, model\.layers\.1\.mlp\.experts\.1\.up_proj"):
        kimi.load(tmp_path / "packed", experts="int4")
    with pytest.raises(ConfigError, match="float, int4"):
        kimi.load(tmp_path / "floats", experts="int8")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a workdir and holds floats"):
        kimi.load(tmp_path / "run", experts="int4")


def test_config_json_says_nothing_of_memory(tmp_path):
    """`int4_group_size` is ours; the file says it as its quantization_config."""
    model = tiny.config("kimi_k2")
    stream.save(tmp_path / "m", model, tiny.params(model), "kimi_k2", int4_experts=True)
    assert "int4_group_size" not in (tmp_path / "m" / "config.json").read_text()
    assert "quantization_config" in json.loads((tmp_path / "m" / "config.json").read_text())
