"""One golden step after another: MuonClip against NumPy and optax.contrib.muon, its state, its errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax.config import OptimizerConfig, preset
from kimi_jax.nn.kimi import init_params
from kimi_jax.nn.param import AdamW, Muon, ParamInfo, RouterBias, metadata, unbox
from kimi_jax.optim.muonclip import as_matrices, group_rms, muonclip, step_metrics
from kimi_jax.optim.schedules import wsd
from tests.optim import oracle

# Every kind of parameter the model has: name -> (shape, group).
KINDS = {
    "embedding": ((11, 6), AdamW()),
    "norm": ((2, 6), AdamW()),
    "kernel": ((6, 10), Muon()),
    "tall": ((10, 6), Muon()),
    "layers": ((3, 6, 10), Muon(batch=1)),
    "experts": ((2, 3, 5, 7), Muon(batch=2)),
    "q_b": ((2, 5, 3, 4), Muon(batch=1, rows=1)),
    "o": ((2, 3, 4, 6), Muon(batch=1, rows=2)),
    "router_bias": ((2, 4), RouterBias()),
}
INFOS = {name: ParamInfo(("x",) * len(shape), group) for name, (shape, group) in KINDS.items()}
GROUPS = {name: group for name, (_, group) in KINDS.items()}
CONFIG = OptimizerConfig(peak_lr=0.02, final_lr=0.002, warmup_steps=2, decay_fraction=0.5)


def draw(seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    values = {name: scale * rng.normal(size=shape).astype(np.float32) for name, (shape, _) in KINDS.items()}
    values["router_bias"] *= 0.0  # it takes no gradient
    return values


def run(config: OptimizerConfig, gradients: list, params: dict) -> list[dict]:
    """Parameters after each update."""
    optimizer = muonclip(config, len(gradients), INFOS)
    update = jax.jit(optimizer.update)
    params, state, history = jax.tree.map(jnp.asarray, params), optimizer.init(params), []
    for grads in gradients:
        updates, state = update(jax.tree.map(jnp.asarray, grads), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"muon_nesterov": False},
        {"weight_decay": 0.0},
        {"grad_clip_norm": 0.0},
        {"grad_clip_norm": 1e6},
        {"newton_schulz_steps": 3, "update_rms": 0.5, "muon_momentum": 0.8},
    ],
    ids=str,
)
def test_six_steps_equal_the_numpy_reference(changes):
    config = dataclasses.replace(CONFIG, **changes)
    gradients = [draw(seed, 10.0 ** (seed % 3 - 1)) for seed in range(1, 7)]
    reference = oracle.MuonClip({k: v.astype(np.float64) for k, v in draw(0).items()}, GROUPS, config)
    schedule = wsd(config, len(gradients))
    for n, params in enumerate(run(config, gradients, draw(0))):
        reference.step({k: g.astype(np.float64) for k, g in gradients[n].items()}, float(schedule(n)))
        for name in KINDS:
            # A step moves a weight by about lr * update_rms = 4e-3; float32 Newton-Schulz is good to 2e-4 of that.
            np.testing.assert_allclose(params[name], reference.params[name], rtol=1e-6, atol=4e-6, err_msg=name)


def test_numpy_reference_notices_a_wrong_group():
    """Negative control of the golden test: taking `o` as rows=1 is a different update."""
    config = dataclasses.replace(CONFIG, warmup_steps=0)
    wrong = oracle.MuonClip({k: v.astype(np.float64) for k, v in draw(0).items()}, {"o": Muon(1, 1)}, config)
    wrong.step(draw(1), config.peak_lr)
    (params,) = run(dataclasses.replace(config, decay_fraction=0.0), [draw(1)], draw(0))
    assert np.abs(np.asarray(params["o"]) - wrong.params["o"]).max() > 1e-3


def optax_muon(config: OptimizerConfig, nesterov: bool, total: int) -> optax.GradientTransformation:
    def axes(shape, group):
        if not isinstance(group, Muon):
            return None
        split = group.batch + group.rows
        return optax.contrib.MuonDimensionNumbers(tuple(range(group.batch, split)), tuple(range(split, len(shape))))

    return optax.contrib.muon(
        wsd(config, total), beta=config.muon_momentum, weight_decay=config.weight_decay, nesterov=nesterov,
        adam_b1=config.adam_b1, adam_b2=config.adam_b2, adam_weight_decay=config.weight_decay,
        consistent_rms=config.update_rms, eps=1e-8,
        muon_weight_dimension_numbers={name: axes(*kind) for name, kind in KINDS.items() if name != "router_bias"},
    )  # fmt: skip


def test_equals_optax_muon_without_nesterov():
    """optax averages the momentum and corrects its bias; Newton-Schulz does not see the scale, so updates agree."""
    config = dataclasses.replace(CONFIG, muon_nesterov=False, grad_clip_norm=0.0)
    gradients = [draw(seed) for seed in range(1, 5)]
    params = jax.tree.map(jnp.asarray, draw(0))
    del params["router_bias"]
    other = optax_muon(config, nesterov=False, total=4)
    state, update = other.init(params), jax.jit(other.update)
    for n, ours in enumerate(run(config, gradients, draw(0))):
        grads = {name: gradients[n][name] for name in params}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in params:  # tolerance as above, twice: both sides are float32
            np.testing.assert_allclose(ours[name], params[name], rtol=2e-6, atol=8e-6, err_msg=name)


def test_equals_optax_muon_with_nesterov_once_its_bias_correction_is_over():
    """optax corrects momentum and gradient by different powers, which vanish for a large count; start there."""
    config = dataclasses.replace(CONFIG, warmup_steps=0, decay_fraction=0.0, grad_clip_norm=0.0)
    gradients = [draw(seed) for seed in range(1, 4)]
    params = {name: jnp.asarray(value) for name, value in draw(0).items() if isinstance(GROUPS[name], Muon)}
    other = optax_muon(config, nesterov=True, total=3)
    state = other.init({**params, "embedding": jnp.zeros((11, 6)), "norm": jnp.zeros((2, 6))})
    state = jax.tree.map(lambda x: x + 10_000 if x.dtype == jnp.int32 else x, state)
    full = {**params, "embedding": jnp.zeros((11, 6)), "norm": jnp.zeros((2, 6))}
    update = jax.jit(other.update)
    for n, ours in enumerate(run(config, gradients, draw(0))):
        updates, state = update({name: gradients[n][name] for name in full}, state, full)
        full = optax.apply_updates(full, updates)
        for name in params:  # optax applies Nesterov to its Adam group too, ours does not: matrices only
            np.testing.assert_allclose(ours[name], full[name], rtol=2e-6, atol=8e-6, err_msg=name)


def test_norms_decay_and_the_router_bias_does_not_move():
    """With a gradient of exactly zero only the decay is left, and nothing is NaN."""
    start = draw(0)
    start["router_bias"] = np.ones((2, 4), np.float32)
    config = dataclasses.replace(CONFIG, warmup_steps=0, decay_fraction=0.0)
    (params,) = run(config, [jax.tree.map(np.zeros_like, start)], start)
    for name, value in params.items():
        kept = 1.0 if name == "router_bias" else 1 - config.peak_lr * config.weight_decay
        np.testing.assert_allclose(value, kept * start[name], rtol=1e-6, err_msg=name)


def test_update_rms_is_near_the_target_for_every_shape_and_about_equal_to_adam():
    """Moonlight's matching: 0.2 whatever the shape (singular values end in 0.7..1.2, so does the RMS around 0.2)."""
    infos = {"wide": ParamInfo(("x", "y"), Muon()), "experts": ParamInfo(("e", "x", "y"), Muon(1)),
             "norm": ParamInfo(("x",), AdamW()), "bias": ParamInfo(("x",), RouterBias())}  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {"wide": (16, 80), "experts": (3, 64, 24), "norm": (100,), "bias": (4,)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    grads = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    config = OptimizerConfig(peak_lr=1.0, final_lr=1.0, warmup_steps=0, muon_nesterov=False)
    optimizer = muonclip(config, 10, infos)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    for name in ("wide", "experts"):
        rms = group_rms({name: updates[name]}, {name: infos[name]})
        assert rms.keys() == {"muon"} and 0.7 * 0.2 < rms["muon"] < 1.2 * 0.2
    metrics = step_metrics(grads, updates, infos)
    assert metrics.keys() == {"grad_norm", "update_rms_muon", "update_rms_adamw"}
    np.testing.assert_allclose(metrics["update_rms_adamw"], 1.0, rtol=1e-4)  # the first Adam step is the sign
    squares = sum(float(jnp.sum(g**2)) for g in grads.values())
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(squares), rtol=1e-5)


def test_state_holds_one_momentum_for_matrices_and_two_moments_for_the_rest():
    params = jax.tree.map(jnp.asarray, draw(0))
    state = muonclip(CONFIG, 10, INFOS).init(params)
    held = dict.fromkeys(KINDS, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert isinstance(leaf, jax.Array)
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in KINDS]
        for name in names:
            held[name] += 1
            assert leaf.shape == params[name].shape
    assert held == {name: {Muon: 1, AdamW: 2, RouterBias: 0}[type(group)] for name, group in GROUPS.items()}


def test_state_survives_orbax(tmp_path):
    params, grads = jax.tree.map(jnp.asarray, draw(0)), jax.tree.map(jnp.asarray, draw(1))
    optimizer = muonclip(CONFIG, 10, INFOS)
    _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        back = saver.restore(tmp_path / "state", jax.eval_shape(optimizer.init, params))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_sharded_over_eight_devices_equals_one_device():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    infos = {"experts": ParamInfo(("e", "x", "y"), Muon(1)), "table": ParamInfo(("v", "d"), AdamW())}
    rng = np.random.default_rng(0)
    shapes = {"experts": (4, 16, 24), "table": (16, 8)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    grads = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    optimizer = muonclip(dataclasses.replace(CONFIG, warmup_steps=0), 10, infos)
    want, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    layout = {
        "experts": NamedSharding(mesh, PartitionSpec(None, "fsdp")),
        "table": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
    params, grads = jax.device_put(params, layout), jax.device_put(grads, layout)
    got, _ = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params), params)
    for name in want:  # only the order of additions differs
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=4e-6, err_msg=name)


@pytest.mark.parametrize("name", ["demo", "kimi_k2_5"])
def test_every_parameter_of_the_real_models_has_its_group(name):
    """From shapes alone. Matrices are Muon, input axes as rows; everything else AdamW, one bias neither."""
    boxed = jax.eval_shape(functools.partial(init_params, preset(name)), jax.random.key(0))
    params, infos = unbox(boxed), metadata(boxed)
    optimizer = muonclip(CONFIG, 10, infos)
    updates, _ = jax.eval_shape(optimizer.update, params, jax.eval_shape(optimizer.init, params), params)
    jax.tree.map(lambda u, p: np.testing.assert_equal((u.shape, u.dtype), (p.shape, p.dtype)), updates, params)

    c = preset(name)
    moe = params["moe_layers"]
    stacks = {path: jax.eval_shape(lambda leaf, info=info: as_matrices(leaf, info.group), leaf).shape
              for path, leaf, info in (
                  ("q_b", moe["attention"]["q_b"]["kernel"], infos["moe_layers"]["attention"]["q_b"]["kernel"]),
                  ("o", moe["attention"]["o"]["kernel"], infos["moe_layers"]["attention"]["o"]["kernel"]),
                  ("up", moe["mlp"]["experts"]["up"], infos["moe_layers"]["mlp"]["experts"]["up"]),
              )}  # fmt: skip
    layers, experts, heads = c.num_moe_layers, c.moe.n_routed_experts, c.num_attention_heads
    assert stacks["q_b"] == (layers, c.q_lora_rank, heads * c.qk_head_dim)
    assert stacks["o"] == (layers, heads * c.v_head_dim, c.hidden_size)
    assert stacks["up"] == (layers * experts, c.hidden_size, c.moe.moe_intermediate_size)
    for path, info in jax.tree_util.tree_leaves_with_path(infos):
        names = [key.key for key in path]
        if names[-1] in ("scale", "embedding", "table") or "lm_head" in names:
            assert info.group == AdamW(), names
        elif names[-1] == "bias":
            assert info.group == (RouterBias() if "router" in names else AdamW()), names
        else:
            assert isinstance(info.group, Muon), names


# --------------------------------------------------------------------------------------------------------------- errors


def test_leaf_without_a_known_group_is_refused():
    unknown = ParamInfo(("x",), AdamW())
    object.__setattr__(unknown, "group", "sgd")  # past the type check that tests switch on
    with pytest.raises(TypeError, match=r"attention\.q has no optimizer group .*'sgd'"):
        muonclip(CONFIG, 10, {"attention": {"q": unknown}})
    with pytest.raises(TypeError, match="attention has no optimizer group"):
        muonclip(CONFIG, 10, {"attention": 3})


def test_infos_of_another_model_are_refused_by_name():
    optimizer = muonclip(CONFIG, 10, INFOS)
    params = jax.tree.map(jnp.asarray, draw(0))
    state = optimizer.init(params)
    other = {**params, "extra": jnp.zeros(3)}
    del other["kernel"]
    with pytest.raises(ValueError, match=r"1 without info \['extra'\], 1 infos without parameter \['kernel'\]"):
        optimizer.init(other)
    with pytest.raises(ValueError, match="extra"):
        optimizer.update(other, state, params)
    with pytest.raises(ValueError, match="update\\(grads, state, params\\)"):
        optimizer.update(params, state)


@pytest.mark.parametrize("group", [Muon(0, 2), Muon(1, 1), Muon(0, 0), Muon(-1, 1)], ids=str)
def test_split_that_leaves_no_columns_is_refused(group):
    with pytest.raises(ValueError, match=r"parameter w of shape \(3, 4\) cannot be split"):
        muonclip(CONFIG, 10, {"w": ParamInfo(("x", "y"), group)}).init({"w": jnp.zeros((3, 4))})


def test_as_matrices_shapes():
    assert as_matrices(jnp.zeros((2, 5, 3, 4)), Muon(1, 1)).shape == (2, 5, 12)
    assert as_matrices(jnp.zeros((2, 3, 4, 6)), Muon(1, 2)).shape == (2, 12, 6)
    assert as_matrices(jnp.zeros((6, 10)), Muon()).shape == (1, 6, 10)


def test_adamw_for_matrices_is_optax_adamw_for_every_leaf():
    config = dataclasses.replace(CONFIG, matrices="adamw", grad_clip_norm=0.0)
    gradients, params = [draw(seed) for seed in (1, 2, 3, 4)], draw(0)
    found = run(config, gradients, params)[-1]
    adamw = optax.adamw(wsd(config, 4), config.adam_b1, config.adam_b2, config.adam_eps,
                        weight_decay=config.weight_decay)  # fmt: skip
    expected, state = jax.tree.map(jnp.asarray, params), adamw.init(params)
    for grads in gradients:
        updates, state = adamw.update(jax.tree.map(jnp.asarray, grads), state, expected)
        expected = optax.apply_updates(expected, updates)
    for name in set(KINDS) - {"router_bias"}:
        # the same formula in another order of operations: a few roundings of float32
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    muon = run(dataclasses.replace(config, matrices="muon"), gradients, params)[-1]
    assert not np.allclose(found["kernel"], muon["kernel"]) and np.allclose(found["norm"], muon["norm"])
