"""Frozen parameters stay bit for bit, whatever would move them: updates, weight decay, QK-clip, the router bias."""

import dataclasses

import jax
import numpy as np
import pytest

from kimi_jax import config as c
from kimi_jax import sharding
from kimi_jax.nn import param
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import AdamW, Muon, RouterBias, metadata
from kimi_jax.train import state as state_lib
from kimi_jax.train.step import gradients, make_layout, make_train_step
from tests.nn.tiny import QUICK, assert_trees_close
from tests.train.tiny import CONFIG, MODEL, make_batch, with_model, with_optimizer

FROZEN = ("vision", "attention", "router", "embedding")  # Muon, AdamW and router-bias leaves, in both stacks of layers


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def host(tree):
    return {name: np.array(leaf, copy=True) for name, leaf in flat(tree).items()}


def is_frozen(info):
    return bool(set(info.parts) & set(FROZEN))


@pytest.mark.parametrize(
    "devices, scan, dtype, parts, steps",
    [
        pytest.param(1, True, "float32", 1, 100, marks=pytest.mark.slow),
        (8, False, "bfloat16", 1, 10),
        pytest.param(1, True, "bfloat16", 2, 10, marks=pytest.mark.slow),
    ],
)
def test_frozen_parameters_are_the_same_bits_after_many_steps(devices, scan, dtype, parts, steps):
    """Every head is over tau and every weight decays, so that a frozen one would move at once; the others all do."""
    config = with_optimizer(with_model(scan_layers=scan, dtype=dtype), qk_clip_tau=1e-6, weight_decay=0.5)
    config = dataclasses.replace(config, freeze=FROZEN, memory=c.MemoryConfig(microbatches=parts), steps=100)
    init, step = make_train_step(config, sharding.make_mesh(c.MeshConfig(), jax.devices()[:devices]))
    state = init()
    before, moments = host(state.params), list(flat(state.opt_state))
    for i in range(steps):
        state, metrics = step(state, make_batch(i))
    assert metrics["finite"] and metrics["clipped_heads"].value == 0
    infos = flat(state_lib.infos(MODEL))
    groups = {type(info.group) for info in infos.values() if is_frozen(info)}
    assert groups == {Muon, AdamW, RouterBias}
    for name, after in host(state.params).items():
        assert (after.tobytes() == before[name].tobytes()) == is_frozen(infos[name]), name
        has_moments = any(path.endswith(f".{name}") for path in moments)
        assert has_moments == (not is_frozen(infos[name]) and infos[name].group != RouterBias()), name


@pytest.mark.slow
def test_gradients_of_what_learns_are_the_same_and_the_frozen_have_none():
    """On one device and on eight, in microbatches; float32 sums in another order once the rest is not computed."""
    params = jax.jit(lambda: param.unbox(state_lib.create(MODEL, _no_optimizer(), jax.random.key(0)).params))()
    full = jax.jit(lambda p, b: gradients(p, b, CONFIG)[1], compiler_options=QUICK)(params, make_batch(0))
    frozen = dataclasses.replace(CONFIG, freeze=FROZEN)
    infos = state_lib.infos(MODEL, None, FROZEN)
    mesh = sharding.make_mesh(c.MeshConfig())
    for config, layout in (
        (dataclasses.replace(frozen, memory=c.MemoryConfig(microbatches=2)), None),
        (frozen, make_layout(frozen, mesh)),
    ):
        run = jax.jit(lambda p, b, s=config, at=layout: gradients(p, b, s, at)[1], compiler_options=QUICK)
        put = (params, make_batch(0)) if layout is None else (params, sharding.put_batch(make_batch(0), mesh))
        found = run(*put)
        assert set(flat(found)) == {name for name, info in flat(infos).items() if not is_frozen(info)}
        assert_trees_close(found, param.learned(full, infos), 1e-5)


def _no_optimizer():
    import optax

    return optax.identity()


def test_parts_of_every_model_are_language_vision_and_projector():
    for name in c.PRESETS:
        for leaf, info in flat(metadata(abstract_params(c.preset(name)))).items():
            assert len({"language", "vision", "projector"} & set(info.parts)) == 1, (name, leaf)
            top = leaf.split(".")[0]
            assert (top if top in ("vision", "projector") else "language") in info.parts, (name, leaf)


def test_parts_are_those_one_expects():
    infos = flat(state_lib.infos(MODEL))
    parts = {leaf: set(info.parts) - {"language"} for leaf, info in infos.items()}
    assert parts["moe_layers.mlp.experts.gate"] == {"experts"} and parts["embed.embedding"] == {"embedding"}
    assert parts["moe_layers.mlp.shared.up.kernel"] == {"shared_experts"}
    assert parts["dense_layers.mlp.up.kernel"] == {"mlp"} and parts["lm_head.kernel"] == {"lm_head"}
    assert parts["moe_layers.attention.kv_a_norm.scale"] == {"attention", "norm"}
    assert parts["moe_layers.mlp.router.bias"] == {"router"} and parts["final_norm.scale"] == {"norm"}


def test_freeze_of_adapters_goes_by_what_they_adapt():
    options = c.LoRAConfig("somewhere", targets=("attention", "projector"))
    infos = state_lib.infos(MODEL, options, ("projector",))
    assert {name.split(".")[0] for name in flat(param.learned(infos, infos))} == {"dense_layers", "moe_layers"}
    with pytest.raises(c.ConfigError, match="no parameters are called 'vision'"):
        state_lib.infos(MODEL, options, ("vision",))


def test_freeze_of_an_unknown_name_or_of_everything_is_an_error():
    with pytest.raises(c.ConfigError, match=r"called 'expert' \(did you mean 'experts'\?\); there are: attention, emb"):
        make_train_step(dataclasses.replace(CONFIG, freeze=("expert",)))
    with pytest.raises(c.ConfigError, match=r"config\.freeze = \('language', 'vision', 'projector'\) leaves nothing"):
        make_train_step(dataclasses.replace(CONFIG, freeze=("language", "vision", "projector")))
