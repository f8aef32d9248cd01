"""Released directories that lie: every one is refused with the file and the field, and nothing large is built."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import kimi_jax as kimi
from kimi_jax.config import ConfigError
from kimi_jax.data.tokenizer import MAX_TOKENIZER, load_tokenizer
from kimi_jax.hf import bounds, stream
from kimi_jax.hf import config as hf_config
from kimi_jax.hf.convert import from_hf, to_hf
from kimi_jax.hf.files import INDEX, SINGLE, CheckpointError, Directory
from kimi_jax.untrusted import MAX_TABLE, parse_object
from tests.environment import FIXTURES
from tests.hf import hostile

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
FUZZ = settings(max_examples=20_000)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A tiny released directory that the tests only read."""
    return hostile.released(tmp_path_factory.mktemp("good") / "m")


@pytest.fixture
def source(tmp_path):
    return hostile.released(tmp_path / "m")


@pytest.fixture
def converted(tmp_path, source):
    from_hf(source, tmp_path / "ours", checksum=False)
    return tmp_path / "ours"


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ------------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (hostile.safetensors({}, length=1 << 63), "its header says"),
        (hostile.safetensors({}, length=MAX_TABLE + 1), "its header says"),
        (hostile.safetensors([]), "JSON object"),
        (hostile.safetensors(b'{"a":' * 100_000), "nested deeper"),
        (hostile.safetensors(b"\xff"), "not JSON"),
        (hostile.safetensors(b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2), b"1234"), "twice"),
        (hostile.safetensors({"a": 1}), "needs dtype, shape and data_offsets"),
        (hostile.safetensors({"a": ONE | {"dtype": ["F32"]}}, b"1234"), "dtype must be a text"),
        (hostile.safetensors({"a": ONE | {"shape": [-1]}}, b"1234"), "shape"),
        (hostile.safetensors({"a": ONE | {"shape": [1.0]}}, b"1234"), "shape"),
        (hostile.safetensors({"a": ONE | {"shape": [True]}}, b"1234"), "shape"),
        (hostile.safetensors({"a": ONE | {"shape": [1] * 9}}, b"1234"), "shape"),
        (hostile.safetensors({"a": ONE | {"shape": [1 << 32, 1 << 32]}}, b"1234"), "4 bytes for F32"),
        (hostile.safetensors({"a": ONE | {"data_offsets": [-4, 0]}}, b"1234"), "data_offsets"),
        (hostile.safetensors({"a": ONE | {"data_offsets": [4, 0]}}, b"1234"), "data_offsets"),
        (hostile.safetensors({"a": ONE | {"data_offsets": "04"}}, b"1234"), "data_offsets"),
        (hostile.safetensors({"a": ONE, "b": ONE | {"data_offsets": [2, 6]}}, b"123456"), "overlaps"),
        (hostile.safetensors({"a": ONE, "b": ONE}, b"1234"), "overlaps"),
        (hostile.safetensors({"a": ONE, "b": ONE | {"data_offsets": [8, 12]}}, b"123456789012"), "unused"),
        (hostile.safetensors({"a": ONE}, b"12345"), "1 bytes follow"),
        (hostile.safetensors({"a": ONE}, b"123"), "truncated"),
        (hostile.safetensors({"__metadata__": {"a": 1}}), "__metadata__"),
        (hostile.safetensors(b'{"a": %s}' % (b"9" * 5000)), "not JSON"),
    ],
)  # fmt: skip
def test_safetensors_header_that_lies_is_refused(tmp_path, content, message):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Directory(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "JSON object"),
        ('{"weight_map": []}', "weight_map must be"),
        ('{"weight_map": {}}', "weight_map must be"),
        ('{"weight_map": {"a": 1}}', "weight_map must be"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "plain file name"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "plain file name"),
        ('{"weight_map": {"a": "x\\u0000.safetensors"}}', "plain file name"),
        ('{"weight_map": {"a": ".."}}', "plain file name"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "twice"),
    ],
)
def test_index_that_lies_is_refused(tmp_path, index, message):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        Directory(tmp_path)


def test_symlink_out_of_the_folder_is_refused_and_the_cache_of_hugging_face_is_not(tmp_path, good):
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((good / "config.json").read_bytes())
    (folder / SINGLE).symlink_to(good / SINGLE)
    with pytest.raises(CheckpointError, match="link out of its folder"):
        stream.load(folder)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "4567").write_bytes((good / SINGLE).read_bytes())
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../../blobs/4567")
    stream.load(folder)


def test_side_file_keeps_any_name_and_a_link_out_is_not_copied(tmp_path, source):
    for name in (".gitattributes", "read me \u00e9.txt"):
        (source / name).write_text("x")
    from_hf(source, tmp_path / "ours", checksum=False)
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / ".gitattributes").read_text() == "x"
    (tmp_path / "secret").write_text("y")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link out of its folder"):
        from_hf(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json", "tokenizer_config.json", "tiktoken.model"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
def test_file_that_is_not_regular_is_refused_without_waiting(source, name, kind, monkeypatch):
    monkeypatch.chdir(source)  # a socket's path is short
    (source / name).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "fifo":
            os.mkfifo(name)
        elif kind == "folder":
            (source / name).mkdir()
        elif kind == "socket":
            server.bind(name)
        else:
            (source / name).symlink_to("/dev/zero")
        if name == "tiktoken.model":
            with pytest.raises(ValueError, match="not a regular file"):
                load_tokenizer(source)
        else:
            with pytest.raises((ValueError, FileNotFoundError), match="not a regular file|link out|neither config"):
                kimi.load(source)


def test_tokenizer_file_above_the_limit_is_refused(tmp_path):
    for name in ("tiktoken.model", "tokenizer.json"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, MAX_TOKENIZER + 1)  # sparse
        with pytest.raises(ValueError, match="larger than"):
            load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name", stream.SIDE_FILES)
@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1, "a": 2}', "[" * 100_000, '{"a": NaN}'])
def test_side_file_that_is_no_json_object_is_named(source, name, text):
    (source / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        stream.load(source)


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "vocab_size", 10**9),
        ("text_config", "vocab_size", 10**12),
        ("text_config", "hidden_size", 10**9),
        ("text_config", "qk_rope_head_dim", 10**9),
        ("text_config", "n_routed_experts", 10**9),
        ("text_config", "n_shared_experts", 10**9),
        ("text_config", "num_attention_heads", 10**9),
        ("vision_config", "vt_num_hidden_layers", 10**9),
        ("vision_config", "init_pos_emb_height", 10**9),
        ("vision_config", "init_pos_emb_time", 10**9),
        ("vision_config", "patch_size", 10**9),
    ],
)
def test_size_that_the_files_cannot_hold_is_refused_before_anything_is_built(source, where, key, value):
    file = source / "config.json"
    released = json.loads(file.read_text())
    released[where][key] = value
    if key == "num_attention_heads":
        released[where]["num_key_value_heads"] = value
    file.write_text(json.dumps(released))
    tracemalloc.start()
    try:
        with pytest.raises((CheckpointError, ConfigError), match=key.removeprefix("vt_")):
            stream.Released(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 25  # the list of 1e9 layers would take 20 GB


def test_bounds_take_the_released_size():
    """A million million parameters pass where the files have them: 61 layers of 384 experts in words of 8 codes."""
    config = kimi.config.preset("kimi_k2_5")
    bounds.check(config, bounds.CODES_PER_WORD * 163840, 60 * 384 * 9, "here")
    with pytest.raises(CheckpointError, match="n_routed_experts"):
        bounds.check(config, bounds.CODES_PER_WORD * 163840, 20_000, "here")


# ------------------------------------------------------------------------------------------------------------ to-hf


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/tmp/evil.safetensors", "a/b.safetensors", "..", "config.json", ""]
)
def test_layout_that_names_a_file_outside_writes_nothing(tmp_path, converted, name):
    file = converted / "released" / "layout.json"
    layout = json.loads(file.read_text())
    layout["files"] = {name: layout["files"][SINGLE]}
    file.write_text(json.dumps(layout))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"layout\.json.*plain name"):
        to_hf(converted, tmp_path / "back")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([], "JSON object"),
        ({}, "files must be"),
        ({"files": {SINGLE: 1}, "metadata": {}}, "must be a list"),
        ({"files": {SINGLE: [["a"]]}, "metadata": {}}, "tensor, dtype"),
        ({"files": {SINGLE: [["a", "F32"]]}, "metadata": {SINGLE: 1}}, "metadata must be"),
        ({"files": {SINGLE: [["a", "X"]]}, "metadata": {}}, "unknown dtype"),
        ({"files": {SINGLE: [["a", "F32"], ["a", "F32"]]}, "metadata": {}}, "twice"),
        ({"files": {SINGLE: [["a", "F32"]]}, "metadata": {}}, "does not have"),
        ({"files": {SINGLE: [["language_model.lm_head.weight", "I8"]]}, "metadata": {}}, "cannot be written as I8"),
        ({"files": {SINGLE: [["language_model.lm_head.weight", "F32"]]}, "metadata": {}}, "names no file for"),
    ],
)  # fmt: skip
def test_layout_of_another_shape_is_refused(tmp_path, converted, layout, message):
    (converted / "released" / "layout.json").write_text(json.dumps(layout))
    with pytest.raises(CheckpointError, match=message):
        to_hf(converted, tmp_path / "back")


@pytest.mark.parametrize("key", ["../../x", "/etc", "..", "a/b"])
def test_leaf_name_that_leads_out_of_the_checkpoint_is_refused(tmp_path, converted, key):
    file = converted / "checkpoints/0/params/_METADATA"
    metadata = json.loads(file.read_text())
    next(iter(metadata["tree_metadata"].values()))["key_metadata"] = [{"key": key}]
    file.write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match="plain file name"):
        to_hf(converted, tmp_path / "back")


@pytest.mark.parametrize("tree", [None, [], {"a": 1}, {"a": {"key_metadata": [1]}}, {"a": {"key_metadata": None}}])
def test_leaf_metadata_of_another_type_is_refused(tmp_path, converted, tree):
    change(converted / "checkpoints/0/params/_METADATA", tree_metadata=tree)
    with pytest.raises(CheckpointError, match="_METADATA: tree_metadata"):
        to_hf(converted, tmp_path / "back")


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 10**9), ("qk_rope_head_dim", 10**9), ("vocab_size", 0)]
)
def test_settings_of_a_checkpoint_larger_than_its_weights_are_refused(tmp_path, converted, key, value):
    file = converted / "checkpoints/0/config/metadata"
    found = json.loads(file.read_text())
    found["model"][key] = value
    file.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=key):
        to_hf(converted, tmp_path / "back")


def test_settings_of_a_checkpoint_of_another_type_are_refused(tmp_path, converted):
    file = converted / "checkpoints/0/config/metadata"
    for text in ("[]", "{", '{"model": 1}', '{"model": {"vision": 0.5}}', '{"data": {"sources": []}}'):
        file.write_text(text)
        with pytest.raises((CheckpointError, ConfigError), match="metadata|config"):
            to_hf(converted, tmp_path / "back")


# ---------------------------------------------------------------------------------------------------- quantised tensors


def test_group_that_does_not_divide_the_inputs_is_refused(tmp_path):
    """Experts of 32 inputs with groups of 24 would be split at other places without a word."""
    source = hostile.released(tmp_path / "m", int4_experts=True)
    released = json.loads((source / "config.json").read_text())
    released["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 24
    (source / "config.json").write_text(json.dumps(released))
    with pytest.raises(CheckpointError, match="32 inputs cannot be INT4 in groups of 24"):
        stream.load(source)


def test_scales_of_another_group_size_are_not_written_back(tmp_path):
    source = hostile.released(tmp_path / "m", int4_experts=True)
    from_hf(source, tmp_path / "ours", checksum=False)
    file = tmp_path / "ours/released/config.json"
    file.write_text(file.read_text().replace('"group_size": 32', '"group_size": 16'))
    with pytest.raises(CheckpointError, match="for groups of 16 inputs"):
        to_hf(tmp_path / "ours", tmp_path / "back", int4_experts=True)


def test_packed_experts_under_another_quantisation_are_refused(tmp_path):
    source = hostile.released(tmp_path / "m", int4_experts=True)
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    released = json.loads((source / "config.json").read_text())
    for section in (fp8, None):
        released["text_config"]["quantization_config"] = section
        (source / "config.json").write_text(json.dumps(released))
        with pytest.raises(CheckpointError, match=r"unexpected: .*weight_packed"):
            stream.load(source)


@pytest.mark.parametrize("values", [np.ones((2, 2), np.float32), np.ones(2, np.int32), np.ones(1 << 15, np.float32)])
def test_rotary_buffer_that_is_none_is_refused(tmp_path, values):
    source = hostile.released(tmp_path / "m", "deepseek_v3")
    tensors = load_file(source / SINGLE) | {"model.layers.0.self_attn.rotary_emb.inv_freq": values}
    save_file(tensors, source / SINGLE)
    with pytest.raises(CheckpointError, match="no vector of rotary frequencies"):
        stream.load(source)


# ------------------------------------------------------------------------------------------------------------- fuzz


def check_header(folder, content):
    """Opened, or refused with a CheckpointError; what was opened lies in the file without gaps."""
    (folder / SINGLE).write_bytes(content)
    try:
        directory = Directory(folder)
    except CheckpointError:
        return
    assert sum(stored.nbytes for stored in directory.tensors.values()) < len(content)
    directory.close()


@st.composite
def files(draw):
    """Mutated headers of a sound file, or its bytes with some replaced."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": ONE,
        "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [4, 16]},
    }
    if draw(st.booleans()):
        content = hostile.safetensors(draw(hostile.mutations(header)), bytes(draw(st.sampled_from((0, 4, 16, 17)))))
    else:
        content = hostile.safetensors(header, bytes(16))
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.integers(0, len(changed)))]) if draw(st.booleans()) else bytes(changed)


@settings(max_examples=300)
@given(content=files())
def test_safetensors_fuzz(tmp_path_factory, content):
    check_header(tmp_path_factory.getbasetemp(), content)


@pytest.mark.fuzz
@FUZZ
@given(content=st.one_of(files(), st.binary(max_size=200)))
def test_safetensors_fuzz_long(tmp_path_factory, content):
    check_header(tmp_path_factory.getbasetemp(), content)


def check_config(released):
    """A configuration, or a ConfigError; a configuration comes back from what is written for it."""
    try:
        text = json.dumps(released).encode()
        found = parse_object(text, "config.json", ConfigError)
        config = hf_config.from_released(found)
        hf_config.quantization(found)
    except ConfigError:
        return
    again = hf_config.to_released(config, found["model_type"], config.dtype)
    assert hf_config.from_released(again) == config


def fixture_config():
    return json.loads((FIXTURES / "tiny_int4" / "config.json").read_text())


@settings(max_examples=500)
@given(released=hostile.mutations(fixture_config()))
def test_config_fuzz(released):
    check_config(released)


@pytest.mark.fuzz
@FUZZ
@given(released=hostile.mutations(fixture_config()))
def test_config_fuzz_long(released):
    check_config(released)
