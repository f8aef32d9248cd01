"""Checkpoints: exact, never half of one, readable elsewhere, and clear about what does not fit."""

import contextlib
import dataclasses
import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax import checksums, sharding
from kimi_jax.config import CheckpointConfig, MeshConfig, TrainConfig
from kimi_jax.hf.convert import from_hf
from kimi_jax.train.checkpoint import CheckpointMismatch, Checkpoints, CheckpointUnavailable, NoCheckpoint
from kimi_jax.train.state import TrainState
from tests.environment import FIXTURES

CONFIG = TrainConfig(checkpoint=CheckpointConfig(interval=1, keep=2))


def make_state(step: int, width: int = 16, momentum: bool = True) -> TrainState:
    key = jax.random.key(step)
    params = {"a": {"kernel": jax.random.normal(key, (8, width))}, "b": jnp.arange(8, dtype=jnp.bfloat16) + step}
    opt_state = (jax.tree.map(jnp.sqrt, jax.tree.map(jnp.abs, params)) if momentum else (), jnp.int32(step), ())
    scalars = [jnp.int32(step), jnp.int32(1), jnp.int32(0), jnp.float32(2.5), jnp.float32(7.0)]
    return TrainState(*scalars, params=params, opt_state=opt_state)


def abstract(state: TrainState, num_devices: int = 1, axes: MeshConfig | None = None) -> TrainState:
    mesh = sharding.make_mesh(axes or MeshConfig(), jax.devices()[:num_devices])

    def shape(x):
        spec = PartitionSpec(("fsdp", "expert", "tensor")) if x.ndim else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(shape, state)


def save(directory, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(str(directory), CONFIG.checkpoint)
    for step in steps:
        checkpoints.save(make_state(step), {"data": {"position": step}, "sum": 0.1 + 0.2 * step}, CONFIG)
        assert checkpoints.wait()
    return checkpoints


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_newest_comes_back_bit_for_bit_on_any_mesh(tmp_path, num_devices):
    checkpoints = save(tmp_path, 1, 2, 3)
    wanted = abstract(make_state(3), num_devices)
    found = checkpoints.restore(wanted, CONFIG)
    assert found.step == 3 and equal(found.state, make_state(3))
    assert found.host == {"data": {"position": 3}, "sum": 0.1 + 0.2 * 3}
    assert found.config == CONFIG
    assert jax.tree.map(lambda x: x.sharding, found.state) == jax.tree.map(lambda x: x.sharding, wanted)
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]  # keep=2


def test_moves_over_meshes_bit_for_bit(tmp_path):
    """8 -> 4 -> 1 -> 8 devices, each of which saves what it restored; some in a mesh of two axes."""
    save(tmp_path, 1).close()
    square, split = MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=2, expert=4)
    for n, (devices, axes) in enumerate([(8, None), (4, square), (1, None), (8, split)]):
        wanted = abstract(make_state(1), devices, axes)
        with contextlib.closing(Checkpoints(str(tmp_path), CONFIG.checkpoint)) as checkpoints:
            found = checkpoints.restore(wanted, CONFIG)
            assert found.step == n + 1 and len(found.state.params["b"].sharding.device_set) == devices
            assert equal(found.state.replace(step=jnp.int32(1)), make_state(1))
            checkpoints.save(found.state.replace(step=found.state.step + 1), {}, CONFIG)


def test_nothing_saved_is_none(tmp_path):
    assert Checkpoints(str(tmp_path), CONFIG.checkpoint).restore(abstract(make_state(1)), CONFIG) is None


def test_state_given_away_right_after_save_is_saved_whole(tmp_path):
    """The copy off the devices is made before `save` returns: donating the buffers must not reach into the file."""
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints = Checkpoints(str(tmp_path), CONFIG.checkpoint)
    state = make_state(1, width=4096)
    want = jax.tree.map(lambda x: np.array(x, copy=True), state)
    checkpoints.save(state, {}, CONFIG)
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    assert equal(checkpoints.restore(abstract(make_state(1, width=4096)), CONFIG).state, want)


def truncate(directory):
    for path in directory.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: truncate(step / "params" / "d"),
        lambda step: (step / "host" / "metadata").write_text('{"data"'),
        lambda step: (step / "optimizer" / "manifest.ocdbt").unlink(),
        lambda step: (step / "config" / "metadata").unlink(),
    ],
    ids=["truncated array", "truncated json", "missing manifest", "missing file"],
)
def test_damaged_newest_falls_back_and_its_number_can_be_saved_again(tmp_path, damage):
    save(tmp_path, 1, 2).close()
    damage(tmp_path / "checkpoints" / "2")
    checkpoints = Checkpoints(str(tmp_path), CONFIG.checkpoint)
    with pytest.warns(UserWarning, match="falling back"):
        found = checkpoints.restore(abstract(make_state(1)), CONFIG)
    assert found.step == 1 and equal(found.state, make_state(1))
    assert (tmp_path / "damaged_checkpoints" / "2").is_dir()
    checkpoints.save(make_state(2), {}, CONFIG)
    assert checkpoints.restore(abstract(make_state(2)), CONFIG).step == 2


def test_what_a_killed_save_left_behind_is_ignored(tmp_path):
    save(tmp_path, 1).close()
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (tmp_path / "checkpoints" / "1").rename(half)
    save(tmp_path, 1).close()
    assert Checkpoints(str(tmp_path), CONFIG.checkpoint).restore(abstract(make_state(1)), CONFIG).step == 1


@pytest.mark.parametrize(
    "state, message",
    [
        (make_state(1, width=24), r"a\.kernel: \(8, 16\) in the checkpoint, \(8, 24\) here"),
        (make_state(1, momentum=False), r"opt_state\.0\.a\.kernel: only in the checkpoint"),
    ],
    ids=["other shape", "other optimizer"],
)
def test_other_shapes_are_an_error_that_names_them_and_the_setting(tmp_path, state, message):
    checkpoints = save(tmp_path, 1)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, hidden_size=24))
    with pytest.raises(CheckpointMismatch, match=message) as error:
        checkpoints.restore(abstract(state), other)
    assert "config.model.hidden_size = 24" in str(error.value)
    assert (tmp_path / "checkpoints" / "1").is_dir()  # a mismatch is not damage


def files_of(step):
    return sorted(p for p in step.rglob("*") if p.is_file())


def flip(path, at: float):
    """One bit of the file, at this share of its length."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def restore(directory, verify: bool = True):
    options = dataclasses.replace(CONFIG.checkpoint, verify=verify)
    with contextlib.closing(Checkpoints(str(directory), options)) as checkpoints:
        return checkpoints.restore(abstract(make_state(1)), CONFIG)


def test_checksums_find_a_flipped_bit_in_every_file_and_a_missing_file(tmp_path):
    """Each file of a step in turn; the list of checksums too. Restoring falls back, loading refuses."""
    save(tmp_path / "whole", 1, 2).close()
    names = [p.relative_to(tmp_path / "whole") for p in files_of(tmp_path / "whole" / "checkpoints" / "2")]
    assert len(names) > 10 and any("/d/" in str(name) for name in names)
    for number, name in enumerate(n for n in names if n.name not in checksums.LATER):
        for kind in ("flip", "missing") if name.name != checksums.NAME else ("flip",):
            copy = tmp_path / f"{number} {kind}"
            shutil.copytree(tmp_path / "whole", copy)
            flip(copy / name, number / len(names)) if kind == "flip" else (copy / name).unlink()
            assert checksums.problems(copy / "checkpoints" / "2"), name
            if number % 4 == 0:
                with pytest.warns(UserWarning, match="falling back"):
                    assert restore(copy).step == 1, name
    assert not checksums.problems(tmp_path / "whole" / "checkpoints" / "2")


def test_checksums_can_be_switched_off(tmp_path):
    options = dataclasses.replace(CONFIG.checkpoint, verify=False)
    with contextlib.closing(Checkpoints(str(tmp_path), options)) as checkpoints:
        checkpoints.save(make_state(1), {}, CONFIG)
    assert not (tmp_path / "checkpoints" / "1" / checksums.NAME).exists()
    assert restore(tmp_path).step == 1  # a step without checksums is restored as before


def test_unreadable_checkpoints_stop_the_run_and_stay_where_they_are(tmp_path):
    save(tmp_path, 1, 2).close()
    for step in ("1", "2"):
        (tmp_path / "checkpoints" / step / "params" / "_METADATA").unlink()
    before = files_of(tmp_path)
    for _ in range(2):  # starting again does not start at step 0 either
        with pytest.raises(NoCheckpoint, match="none of the 2 checkpoints"):
            restore(tmp_path)
    assert files_of(tmp_path) == before
    shutil.move(tmp_path / "checkpoints", tmp_path / "damaged_checkpoints")
    with pytest.raises(NoCheckpoint, match="holds damaged checkpoints"):
        restore(tmp_path)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("recorded", [True, False], ids=["checksums", "none"])
def test_missing_metadata_falls_back_to_the_step_before(tmp_path, verify, recorded):
    save(tmp_path, 1, 2).close()
    if not recorded:  # a checkpoint of an older version
        (tmp_path / "checkpoints" / "2" / checksums.NAME).unlink()
    (tmp_path / "checkpoints" / "2" / "params" / "_METADATA").unlink()
    with pytest.warns(UserWarning, match="falling back"):
        assert restore(tmp_path, verify).step == 1


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ENOSPC, errno.EACCES], ids=str)
@pytest.mark.parametrize("place", ["checksums", "arrays"])
def test_passing_trouble_is_raised_and_moves_nothing(tmp_path, monkeypatch, number, place):
    save(tmp_path, 1, 2).close()

    def fail(*_):
        raise OSError(number, os.strerror(number))

    if place == "checksums":
        monkeypatch.setattr(checksums, "_sum", fail)
    else:
        monkeypatch.setattr(Checkpoints, "_restore_step", fail)
    with pytest.raises(CheckpointUnavailable, match="Nothing shows that it is damaged"):
        restore(tmp_path)
    monkeypatch.undo()
    assert restore(tmp_path).step == 2 and not (tmp_path / "damaged_checkpoints").exists()


def test_converted_weights_are_not_taken_for_a_damaged_run(tmp_path):
    from_hf(FIXTURES / "tiny_fp32", tmp_path / "converted")
    before = files_of(tmp_path)
    with pytest.raises(NoCheckpoint, match=r"weights without an optimizer state.*--config.lora.base="):
        restore(tmp_path / "converted")
    assert files_of(tmp_path) == before
