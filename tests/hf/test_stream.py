"""Released directories in and out of memory: any model of any family comes back; bad files are all named at once."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from kimi_jax.config import ConfigError
from kimi_jax.hf import int4, stream
from kimi_jax.hf.convert import from_hf, to_hf
from kimi_jax.hf.files import INDEX, CheckpointError
from kimi_jax.hf.names import FAMILIES
from tests.hf import tiny
from tests.hf.test_convert import tensors_of


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=4)
@given(data=st.data())
def test_any_model_of_any_family_comes_back(model_type, data, tmp_path_factory):
    """Configuration and every byte, in pieces so small that most tensors are cut; by way of our checkpoint too."""
    model = data.draw(tiny.configs(model_type))
    dtype = data.draw(st.sampled_from(("BF16", "F16", "F32")))
    name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
    params = tiny.params(model, dtype)
    path = tmp_path_factory.mktemp("any") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PIECE", data.draw(st.sampled_from((1, 10, 1 << 23))))
        patch.setattr(stream, "MAX_FILE", data.draw(st.sampled_from((300, 5 << 30))))
        stream.save(path, model, params, model_type, name)
        back, got = stream.load(path)
    from_hf(path, path.with_name("ours"))
    to_hf(path.with_name("ours"), path.with_name("back"))
    assert back == dataclasses.replace(model, dtype=name, param_dtype=name)
    tiny.assert_same(got, params)
    assert tensors_of(path.with_name("back")) == tensors_of(path)


def written(tmp_path, model_type="kimi_k25", **save):
    model = tiny.config(model_type)
    params = tiny.params(model)
    stream.save(tmp_path / "m", model, params, model_type, **save)
    return tmp_path / "m", model, params


def test_library_reads_what_is_written(tmp_path):
    """The safetensors library agrees on every tensor, and the index names them all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "MAX_FILE", 20_000)
        path, _, params = written(tmp_path)
    index = json.loads((path / INDEX).read_text())["weight_map"]
    files = {name: load_file(path / name) for name in set(index.values())}
    assert len(files) > 2
    assert {name for tensors in files.values() for name in tensors} == set(index)
    name = "language_model.model.layers.1.mlp.experts.2.down_proj.weight"
    theirs = files[index[name]][name]
    np.testing.assert_array_equal(theirs, params["moe_layers"]["mlp"]["experts"]["down"][0, 2].T)


def test_everything_wrong_is_listed_at_once_before_any_weight_is_read(tmp_path, monkeypatch):
    path, _, _ = written(tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["language_model.model.extra.weight"] = np.zeros(3, np.float32)
    del tensors["mm_projector.pre_norm.bias"]
    del tensors["language_model.model.layers.2.self_attn.o_proj.weight"]
    tensors["language_model.lm_head.weight"] = np.zeros((48, 31), ml_dtypes.bfloat16)
    tensors["language_model.model.norm.weight"] = np.zeros(32, np.int32)
    save_file(tensors, path / "model.safetensors")
    monkeypatch.setattr(stream.np, "empty", lambda *_: pytest.fail("allocated before the check"))
    with pytest.raises(CheckpointError) as error:
        stream.load(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    for part in (
        "missing: mm_projector.pre_norm.bias [8]",
        "missing: language_model.model.layers.2.self_attn.o_proj.weight [32, 12]",
        "unexpected: language_model.model.extra.weight [3]",
        "shape of language_model.lm_head.weight: [48, 31], must be [48, 32]",
        "dtype of language_model.model.norm.weight: I32",
    ):
        assert any(part in line for line in lines), part


def test_damaged_files_are_named(tmp_path):
    path, _, _ = written(tmp_path)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        stream.load(path)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="header"):
        stream.load(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        stream.load(path)
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is missing(.|\n)*y\.safetensors is missing"):
        stream.load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        stream.load(path)


def test_rotary_buffers_are_no_weights(tmp_path):
    """Moonlight's files carry them."""
    path, _, params = written(tmp_path, "deepseek_v3")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, path / "model.safetensors")
    tiny.assert_same(stream.load(path, "bfloat16")[1], params)


def test_int4_experts_are_written_and_read(tmp_path):
    path, _, params = written(tmp_path, int4_experts=True)
    stored = load_file(path / "model.safetensors")
    _, got = stream.load(path)
    base = "language_model.model.layers.2.mlp.experts.1.up_proj."
    np.testing.assert_array_equal(stored[base + "weight_shape"], [32, 32])
    want = params["moe_layers"]["mlp"]["experts"]["up"][1, 1].T
    scales = int4.minmax_scales(want, 32, want.dtype)
    np.testing.assert_array_equal(stored[base + "weight_scale"], scales)
    ours = int4.dequantise(int4.quantise(want, scales), scales)
    np.testing.assert_array_equal(got["moe_layers"]["mlp"]["experts"]["up"][1, 1], ours.T)


def test_fp8_is_read(tmp_path):
    """Every linear map but the router in 128x128 blocks (here: one partial block each), as K2-Instruct is released."""
    path, _, _ = written(tmp_path, "kimi_k2")
    tensors, want = load_file(path / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight"):
            tensors[name] = weight.astype(ml_dtypes.float8_e4m3fn)
            scale = np.full((1, 1), 0.37, np.float32)
            tensors[name + "_scale_inv"] = scale
            want[name] = (tensors[name].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config))
    _, got = stream.load(path)
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    np.testing.assert_array_equal(got["moe_layers"]["mlp"]["experts"]["gate"][0, 2], want[name].T)
    name = "model.layers.0.self_attn.q_a_proj.weight"
    assert got["dense_layers"]["attention"]["q_a"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["dense_layers"]["attention"]["q_a"]["kernel"][0], want[name].T)


def test_checkpoint_is_never_overwritten(tmp_path):
    path, model, params = written(tmp_path)
    with pytest.raises(FileExistsError, match="another directory"):
        stream.save(path, model, params, "kimi_k25")
