"""Conversion there and back gives the same bytes, whatever interrupts it, and what it writes trains and evaluates."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath
from safetensors.numpy import load_file, save_file

import kimi_jax as kimi
from kimi_jax import checksums
from kimi_jax import convert as command_line
from kimi_jax.config import ConfigError, MeshConfig
from kimi_jax.hf import convert, leaves, stacks, stream
from kimi_jax.hf.convert import ConvertError, from_hf, to_hf
from kimi_jax.hf.files import INDEX, CheckpointError, Directory
from kimi_jax.hf.leaves import Leaves
from kimi_jax.hf.names import FAMILIES
from kimi_jax.train import checkpoint
from tests.environment import FIXTURES, REPO
from tests.hf import tiny


def tensors_of(path):
    """name -> (dtype, shape, bytes)."""
    directory = Directory(path)
    return {n: (s.dtype, s.shape, directory.whole(n).tobytes()) for n, s in directory.tensors.items()}


def released(tmp_path, model_type="kimi_k25", name="src", **save):
    model = tiny.config(model_type)
    stream.save(tmp_path / name, model, tiny.params(model), model_type, **save)
    return tmp_path / name


@pytest.mark.parametrize("name", ["tiny_fp32", "tiny_int4"])
def test_fixtures_come_back_as_the_same_file(name, tmp_path):
    source = FIXTURES / f"{name}"
    assert from_hf(source, tmp_path / "ours") == []
    to_hf(tmp_path / "ours", tmp_path / "back", int4_experts=name == "tiny_int4")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes(), file
    assert not list(tmp_path.glob("*.partial"))


def test_int4_can_come_back_as_bfloat16(tmp_path):
    """The dequantised weights, in a config.json that no longer speaks of quantisation."""
    from_hf(FIXTURES / "tiny_int4", tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    got = load_file(tmp_path / "back" / "model.safetensors")
    for name, weight in load_file(FIXTURES / "int4_dequant_bf16.safetensors").items():
        np.testing.assert_array_equal(got[name.removeprefix("dequant.")], weight)
    tiny.assert_same(stream.load(tmp_path / "back")[1], stream.load(FIXTURES / "tiny_int4")[1])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_sharded_with_side_files(model_type, tmp_path, monkeypatch):
    """Several files, pieces that cut tensors, mixed dtypes, tokenizer files and buffers: all come back."""
    monkeypatch.setattr(stream, "PIECE", 100)
    monkeypatch.setattr(stream, "MAX_FILE", 20_000)
    source = released(tmp_path, model_type)
    index = json.loads((source / INDEX).read_text())["weight_map"]
    bias = next(n for n in index if n.endswith("e_score_correction_bias"))
    file = source / index[bias]
    tensors = load_file(file)
    tensors[bias] = tensors[bias].astype(ml_dtypes.bfloat16)  # as Moonlight stores it
    buffer = bias.replace("mlp.gate.e_score_correction_bias", "self_attn.rotary_emb.inv_freq")
    tensors[buffer] = np.ones(2, np.float32)
    save_file(tensors, file, {"format": "pt", "made": "by a test"})
    index[buffer] = file.name
    (source / INDEX).write_text(json.dumps({"weight_map": index}))
    (source / "tokenizer_config.json").write_text("{}")
    from_hf(source, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    assert json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"] == index
    assert Directory(tmp_path / "back").metadata == Directory(source).metadata
    for name in ("config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_training_reads_what_from_hf_writes(tmp_path):
    """Over all devices, and the newest step of a trained workdir goes back."""
    source = released(tmp_path)
    from_hf(source, tmp_path / "ours")
    config, params = checkpoint.load(str(tmp_path / "ours"))
    want_config, want = stream.load(source)
    assert config.model == want_config
    tiny.assert_same(jax.device_get(params), jax.device_get(want))


def test_trained_workdir_is_exported(tmp_path):
    """As Orbax saves it: one database, compressed, whole leaves as chunks; no trace of a released checkpoint."""
    import orbax.checkpoint as ocp

    from_hf(released(tmp_path), tmp_path / "ours")
    config, params = checkpoint.load(str(tmp_path / "ours"))
    step = tmp_path / "run" / "checkpoints" / "7"
    with ocp.StandardCheckpointer() as saver:
        saver.save(step / "params", jax.tree.map(lambda a: a * 2, params))
    shutil.copytree(tmp_path / "ours" / "checkpoints" / "0" / "config", step / "config")
    to_hf(tmp_path / "run", tmp_path / "back")
    _, got = stream.load(tmp_path / "back", "bfloat16")
    tiny.assert_same(jax.device_get(got), jax.tree.map(lambda a: np.asarray(a * 2), params))
    to_hf(tmp_path / "run", tmp_path / "packed", int4_experts=True)
    assert "weight_packed" in " ".join(Directory(tmp_path / "packed").tensors)


@pytest.mark.parametrize("model_type", ["kimi_k25", "deepseek_v3"])
def test_cut_for_a_mesh(model_type, tmp_path, monkeypatch):
    """Every chunk lies within the shard of one of 8 devices; restored under that mesh it is the unsharded model."""
    monkeypatch.setattr(stacks, "MIN_CHUNK", 1)
    monkeypatch.setattr(stream, "PIECE", 300)
    source = released(tmp_path, model_type, int4_experts=True)
    from_hf(source, tmp_path / "ours", mesh=MeshConfig(fsdp=8))
    _, params = checkpoint.load(str(tmp_path / "ours"))
    tiny.assert_same(jax.device_get(params), jax.device_get(stream.load(source)[1]))
    stored, cut = Leaves(tmp_path / "ours" / "checkpoints" / "0" / "params").open(), 0
    for leaf, store in stored.items():
        array = stream.get_leaf(params, leaf)
        shard, chunk = array.sharding.shard_shape(array.shape), store.chunk_layout.read_chunk.shape
        assert all(s == n or s % c == 0 for n, s, c in zip(array.shape, shard, chunk, strict=True)), leaf
        cut += shard != array.shape
    assert cut > 15
    to_hf(tmp_path / "ours", tmp_path / "back", int4_experts=True)
    assert tensors_of(tmp_path / "back") == tensors_of(source)


def test_small_shards_share_a_chunk(tmp_path):
    """A file a megabyte, not a file a shard: leaves this small are not cut at all."""
    source = released(tmp_path)
    checkpoint = stream.Released(source)
    plain, cut = (stacks.Stacks(checkpoint, mesh).leaves for mesh in (None, MeshConfig(fsdp=8)))
    checkpoint.close()
    assert cut == plain
    with pytest.raises(ConfigError, match="a number of devices for every axis"):
        from_hf(source, tmp_path / "ours", mesh=MeshConfig(fsdp=-1))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """epath's and tensorstore's file systems replaced by ones where gs://bucket is a folder, which they return. As in
    an object store nothing can be renamed or opened to write in its middle."""
    folder = tmp_path / "bucket"
    folder.mkdir()

    def here(call, path, *rest, **named):
        return call(*(str(p).replace("gs://bucket", str(folder)) for p in (path, *rest[:1])), *rest[1:], **named)

    def never(call, path, *rest):
        pytest.fail(f"{path}: a bucket cannot do that")

    kvstore = leaves._kvstore
    monkeypatch.setattr(
        leaves, "_kvstore", lambda path: kvstore(epath.Path(str(path).replace("gs://bucket", str(folder))))
    )
    names = ["open", "exists", "isdir", "listdir", "glob", "makedirs", "mkdir", "remove", "stat", "copy"]
    with epath.testing.mock_epath(**dict.fromkeys(names, here), rename=never, replace=never):
        yield folder


def test_sources_in_a_bucket(tmp_path, bucket):
    source = released(bucket, name="src", int4_experts=True)
    loaded = kimi.load("gs://bucket/src", "bfloat16", experts="int4")
    from_hf("gs://bucket/src", tmp_path / "ours")
    want = kimi.load(source, "bfloat16", experts="int4")
    assert loaded.config == want.config
    tiny.assert_same(jax.device_get(loaded.params), jax.device_get(want.params))
    to_hf(tmp_path / "ours", tmp_path / "back", int4_experts=True)
    assert tensors_of(tmp_path / "back") == tensors_of(source)


def test_targets_in_a_bucket(tmp_path, bucket, monkeypatch):
    """Both ways, each interrupted once, with several files, side files and a buffer. Until it is whole neither target
    is one: no marker for Orbax and `newest_step`, no config.json."""
    monkeypatch.setattr(stream, "PIECE", 500)
    monkeypatch.setattr(stream, "MAX_FILE", 20_000)
    monkeypatch.setattr(convert, "SYNC_BYTES", 1)
    source = released(tmp_path, int4_experts=True)
    (source / "tiktoken.model").write_bytes(b"IQ== 0\n")
    ours, back = bucket / "ours", bucket / "back"
    for one_way, origin, target, last in (
        (from_hf, source, ours, ours / convert.STEP / "commit_success.txt"),
        (functools.partial(to_hf, int4_experts=True), "gs://bucket/ours", back, back / "config.json"),
    ):
        there, done = f"gs://bucket/{target.name}", []

        def half_way(now, total, done=done):
            done.append(now)
            if now > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            one_way(origin, there, progress=half_way)
        assert not last.exists()
        if target == ours:
            with pytest.raises(FileNotFoundError, match="no checkpoint"):
                to_hf(there, "gs://bucket/back")
        again = []
        one_way(origin, there, progress=lambda now, total, again=again: again.append(now))
        assert next(now for now in again if now) > max(again) / 4  # it went on
        assert last.exists() and not (target / "journal").exists()
        with pytest.raises(ConvertError, match="there already"):
            one_way(origin, there)
    assert tensors_of(back) == tensors_of(source)
    assert (back / "tiktoken.model").read_bytes() == b"IQ== 0\n"
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


CHILD = """
import os, signal, sys
from kimi_jax import checksums
from kimi_jax import convert as command_line
from kimi_jax.hf import convert, stream
stream.PIECE, convert.SYNC_BYTES = 500, 1
kill, command, source, target = sys.argv[1:]
def tick(done, total):
    print(f"{done} {total}", flush=True)
    if kill == "kill" and done >= total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
if command == "from":
    convert.from_hf(source, target, tick)
else:
    convert.to_hf(source, target, int4_experts=True, progress=tick)
"""


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment
    )


def kill_half_way(*arguments):
    """Runs until half of the bytes are done, kill -9; returns the bytes that were done."""
    child = start("kill", *arguments)
    output = child.communicate(timeout=600)[0]
    assert child.returncode == -signal.SIGKILL
    return int(output.split()[-2])


def finish(*arguments):
    """Runs to the end; returns the bytes that were done when it began."""
    child = start("", *arguments)
    output = child.communicate(timeout=600)[0]
    assert child.returncode == 0
    return int(output.split()[0])


def test_killed_half_way_both_ways_and_run_again(tmp_path):
    """kill -9 in both directions; the second run does not begin anew, and the result is the same to the byte."""
    source, ours, back = released(tmp_path, int4_experts=True), tmp_path / "ours", tmp_path / "back"
    for command, origin, target in (("from", source, ours), ("to", ours, back)):
        done = kill_half_way(command, origin, target)
        assert not target.exists()
        assert finish(command, origin, target) >= done
        assert not target.with_name(target.name + ".partial").exists()
    assert tensors_of(back) == tensors_of(source)


def test_interrupted_run_of_another_source_is_not_continued(tmp_path, monkeypatch):
    source = released(tmp_path)

    def fail(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        from_hf(source, tmp_path / "ours", fail)
    other = released(tmp_path, name="other")
    with pytest.raises(ConvertError, match="another source"):
        from_hf(other, tmp_path / "ours")
    from_hf(source, tmp_path / "ours")


def test_reasons_not_to_start(tmp_path, monkeypatch):
    source = released(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(ConvertError, match="there already"):
        from_hf(source, tmp_path / "taken")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(ConvertError, match="are free"):
        from_hf(source, tmp_path / "ours")
    assert not list(tmp_path.glob("ours*"))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        to_hf(source, tmp_path / "back")


def test_lost_codes_are_reported(tmp_path):
    source = released(tmp_path, int4_experts=True)
    tensors = load_file(source / "model.safetensors")
    name = next(n for n in tensors if n.endswith("weight_scale"))
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = 0
    save_file(tensors, source / "model.safetensors")
    notes = from_hf(source, tmp_path / "ours")
    assert len(notes) == 1
    assert name.removesuffix("_scale") in notes[0]


def test_half_packed_stacks_are_refused(tmp_path):
    """Our leaf holds all experts; some of them INT4 and some not has no way back."""
    source, plain = released(tmp_path, int4_experts=True), released(tmp_path, name="plain")
    tensors, whole = load_file(source / "model.safetensors"), load_file(plain / "model.safetensors")
    base = "language_model.model.layers.1.mlp.experts.0.up_proj.weight"
    for part in ("_packed", "_scale", "_shape"):
        del tensors[base + part]
    tensors[base] = whole[base]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.0\.up_proj"):
        from_hf(source, tmp_path / "ours")


def test_command(tmp_path):
    """As a process, with its help."""
    source = released(tmp_path, int4_experts=True)
    command = [sys.executable, "-m", "kimi_jax.convert", "from-hf", str(source), str(tmp_path / "ours")]
    made = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=600)
    assert made.returncode == 0, made.stderr
    assert "ours is ready" in made.stdout
    assert "from-hf SOURCE TARGET" in command_line.__doc__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["from_hf", "a", "b"], "did you mean 'from-hf'"),
        ([], "say from-hf SOURCE TARGET"),
        (["from-hf", "nowhere", "b"], "config.json is missing"),
        (["to-hf", "nowhere", "b"], "no checkpoint in"),
        (["from-hf", "a", "b", "--mesh=fsdp"], "write the axes with their sizes"),
        (["from-hf", "a", "b", "--mesh=fsd=8"], r"unknown setting mesh\.fsd \(did you mean 'fsdp'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with flagsaver.flagsaver():
        rest = flags.FLAGS(["convert", *arguments])
        with pytest.raises(SystemExit, match=message):
            command_line.main(rest)


def test_converted_checkpoint_with_damage_is_neither_loaded_nor_exported(tmp_path):
    """One flipped bit in each kind of file, and a missing chunk, which would be read as zeros."""
    from_hf(FIXTURES / "tiny_int4", tmp_path / "ours")
    assert not checksums.problems(tmp_path / "ours" / "checkpoints" / "0")
    every = sorted(p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*") if p.is_file())
    loaded = [name for name in every if {"params", "config"} & set(name.parts)]
    others = [name for name in every if "released" in name.parts and name.name != checksums.NAME]
    chunk = next(name for name in loaded if "experts.gate" in str(name) and not name.name.startswith("."))
    kinds = [chunk, loaded[0], loaded[-1], others[0], others[-1]]
    for number, name in enumerate([*kinds, chunk]):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "ours", copy)
        if number < len(kinds):
            data = bytearray((copy / name).read_bytes())
            data[len(data) // 2] ^= 16
            (copy / name).write_bytes(data)
        else:
            (copy / name).unlink()
        with pytest.raises(CheckpointError, match=name.name):
            to_hf(copy, tmp_path / "back")
        assert not (tmp_path / "back").exists()
        if name in loaded:
            with pytest.raises(CheckpointError, match=name.name):
                kimi.load(copy)
    to_hf(tmp_path / "5", tmp_path / "zeros", verify=False)  # switched off: the missing chunk is exported as zeros
    from_hf(FIXTURES / "tiny_fp32", tmp_path / "without", checksum=False)
    assert not list((tmp_path / "without").rglob(checksums.NAME))
    to_hf(tmp_path / "without", tmp_path / "back")
