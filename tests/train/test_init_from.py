"""Starting from weights that exist: whole or by part, from every kind of checkpoint, and a no to what does not fit.

float32 weights come back bit for bit; INT4 and bfloat16 ones are compared with what `kimi.load` gives.
"""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import kimi_jax as kimi
from kimi_jax import sharding
from kimi_jax.config import ConfigError, InitFromConfig, LoRAConfig, MeshConfig
from kimi_jax.hf import stream
from kimi_jax.hf.convert import from_hf
from kimi_jax.nn.kimi import init_params
from kimi_jax.nn.param import unbox
from kimi_jax.train import checkpoint, init_from
from kimi_jax.train import state as state_lib
from tests.hf.tiny import flat
from tests.train.test_batches import Toy
from tests.train.test_loop import config, train
from tests.train.tiny import MODEL

MODEL32 = dataclasses.replace(  # groups of 32 inputs share an INT4 scale
    MODEL, num_hidden_layers=2, moe=dataclasses.replace(MODEL.moe, moe_intermediate_size=32)
)

pytestmark = pytest.mark.slow
TEXT = dataclasses.replace(MODEL32, vision=None)


def fresh(model, seed):
    return jax.jit(lambda: unbox(init_params(model, jax.random.key(seed))))()


def mesh_of(devices):
    return sharding.make_mesh(MeshConfig(), jax.devices()[:devices])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A released VLM in float32, the same converted, a released text model in INT4."""
    folder = tmp_path_factory.mktemp("weights")
    stream.save(folder / "vlm", MODEL32, fresh(MODEL32, 1), "kimi_k25", "float32")
    from_hf(folder / "vlm", folder / "converted")
    stream.save(folder / "text", TEXT, fresh(TEXT, 2), "kimi_k2", "float32", True)
    return folder


def start(options, model=MODEL32, devices=1, said=None):
    """The parameters of step 0, by leaf, on the host; they lie as the run's state does."""
    settings = dataclasses.replace(config("unused"), model=model, init_from=options)
    mesh = mesh_of(devices)
    shardings = jax.tree.map(lambda x: x.sharding, state_lib.abstract_params(model, mesh))
    params = jax.device_put(fresh(model, 0), shardings)
    out = init_from.start(settings, params, mesh, lambda *lines: said.extend(lines) if said is not None else None)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, out, shardings))
    return flat(jax.device_get(out))


def test_init_from_takes_a_whole_model_released_or_converted_on_one_device_or_eight(paths):
    want = flat(jax.device_get(fresh(MODEL32, 1)))
    for name, devices in (("vlm", 1), ("converted", 1), ("vlm", 8), ("converted", 8)):
        said = []
        got = start(InitFromConfig(str(paths / name)), devices=devices, said=said)
        assert {k: v.tobytes() for k, v in got.items()} == {k: v.tobytes() for k, v in want.items()}, (name, devices)
        assert said[0].startswith("weights of ") and said[0].endswith(f" from {paths / name}")


def test_init_from_takes_parts_from_different_checkpoints_and_the_rest_is_fresh(paths):
    """A language model in INT4, the tower of a VLM, and a new projector between them: how K2.5 began."""
    options = InitFromConfig(language=str(paths / "text"), vision=str(paths / "converted"))
    for devices in (1, 8):
        got = start(options, devices=devices)
        language, vision = (flat(kimi.load(paths / name).params) for name in ("text", "vlm"))
        for leaf, array in got.items():
            part = leaf.split(".")[0]
            want = vision[leaf] if part == "vision" else language.get(leaf)
            if part == "projector":
                want = flat(fresh(MODEL32, 0))[leaf]
            assert np.asarray(want).tobytes() == array.tobytes(), leaf


def test_init_from_prefers_a_part_and_the_dtype_of_the_run(paths):
    model = dataclasses.replace(MODEL32, param_dtype="bfloat16")
    got = start(InitFromConfig(str(paths / "vlm"), language=str(paths / "text")), model)
    want = flat(kimi.load(paths / "text", "bfloat16").params)
    for leaf, array in got.items():
        assert array.dtype == ("float32" if leaf.endswith("router.bias") else "bfloat16")
        assert leaf not in want or np.asarray(want[leaf]).tobytes() == array.tobytes(), leaf


def test_init_from_reports_settings_of_the_model_that_differ(paths):
    said = []
    start(InitFromConfig(str(paths / "vlm")), dataclasses.replace(MODEL32, rope_theta=123.0), said=said)
    assert any("config.model.rope_theta = 50000.0 (here 123.0) there" in line for line in said)


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"path": "text"}, MODEL32, r"missing in .*text: vision\.blocks\.\S+ \((.|\n)*config\.init_from\.\{language"),
        ({"path": "vlm"}, TEXT, r"only in .*vlm: projector\n"),
        (
            {"language": "vlm"},
            dataclasses.replace(MODEL32, intermediate_size=40),
            r"dense_layers\.mlp\.gate\.kernel: \(1, 32, 48\) in .*vlm, \(1, 32, 40\) here",
        ),
        ({"vision": "vlm"}, TEXT, r"config\.init_from\.vision: the model of this run has none"),
        ({"path": "nowhere"}, TEXT, r"config\.init_from: .*config\.json is missing"),
    ],
)
def test_init_from_names_what_does_not_fit_leaf_by_leaf(paths, options, model, message):
    options = InitFromConfig(**{part: str(paths / name) for part, name in options.items()})
    with pytest.raises(ConfigError, match=message):
        start(options, model)


def test_init_from_refuses_damaged_weights(paths, tmp_path):
    shutil.copytree(paths / "converted", tmp_path / "damaged")
    file = max((tmp_path / "damaged" / "checkpoints" / "0" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ConfigError, match="the checkpoint is damaged"):
        start(InitFromConfig(str(tmp_path / "damaged")))


def test_init_from_starts_a_run_from_another_runs_workdir_with_frozen_towers_and_goes_on_without_it(paths, tmp_path):
    """Stage two: the weights of stage one are those the first batch sees; the base may be gone when the run goes on."""
    settings = {name: dataclasses.replace(config(tmp_path / name), model=MODEL32, steps=4) for name in ("one", "two")}
    Toy.opened.clear()
    assert train(dataclasses.replace(settings["one"], init_from=InitFromConfig(str(paths / "converted"))), Toy) == 0
    first = flat(jax.device_get(checkpoint.load(str(tmp_path / "one"))[1]))
    second = dataclasses.replace(
        settings["two"], init_from=InitFromConfig(str(tmp_path / "one")), freeze=("vision", "projector")
    )
    assert train(second, Toy) == 0
    seen = Toy.opened[1].updates[0][1]
    np.testing.assert_array_equal(seen, first["embed.embedding"][0])
    shutil.rmtree(tmp_path / "one")
    assert train(dataclasses.replace(second, steps=6), Toy) == 0
    for leaf, array in flat(jax.device_get(checkpoint.load(str(tmp_path / "two"))[1])).items():
        assert (array.tobytes() == first[leaf].tobytes()) == (leaf.split(".")[0] in ("vision", "projector")), leaf


def test_init_from_and_adapters_exclude_each_other(tmp_path):
    settings = dataclasses.replace(config(tmp_path), init_from=InitFromConfig("a"), lora=LoRAConfig("b"))
    with pytest.raises(ConfigError, match="config.init_from and config.lora exclude each other"):
        train(settings)
