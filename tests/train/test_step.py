"""The training step: what is normalised by what, skipped when not finite, and the same on one device and on eight."""

import dataclasses

import jax
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.nn.kimi import KimiK25, init_params
from kimi_jax.nn.param import unbox
from kimi_jax.optim import schedules
from kimi_jax.train import state as state_lib
from kimi_jax.train.objective import Mean
from kimi_jax.train.step import loss_fn, make_optimizer, make_train_step
from tests.train.tiny import CONFIG, MODEL, G, make_batch, make_text_batch, with_model, with_optimizer


def mesh_of(num_devices: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(), jax.devices()[:num_devices])


@pytest.fixture(scope="module")
def one_device():
    return make_train_step(CONFIG, mesh_of(1))


def run(maker, steps, batches=make_batch):
    init_state, train_step = maker
    state, metrics = init_state(), []
    for i in range(steps):
        state, m = train_step(state, batches(i))
        metrics.append(jax.device_get(m))
    return state, metrics


def values(metrics):
    """What a step measured, without how it is reduced."""
    measured = {k: m for k, m in metrics.items() if isinstance(m, tuple)}
    return {k: m.total / max(m.weight, 1e-9) if isinstance(m, Mean) else m.value for k, m in measured.items()}


def host(tree):
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


# ---------------------------------------------------------------------------------------------------------------- loss


def test_loss_is_the_weighted_mean_over_the_whole_batch():
    params = jax.jit(lambda: unbox(init_params(MODEL, jax.random.key(0))))()
    batch = make_batch(0)
    batch.loss_weights[:] *= np.random.default_rng(0).uniform(0.1, 2, (G, 1)).astype(np.float32)
    loss, out = jax.jit(lambda p, b: loss_fn(p, b, CONFIG))(params, batch)
    logits, aux = jax.jit(lambda p, b: KimiK25(MODEL).apply({"params": p}, b))(params, batch)
    logp = jax.nn.log_softmax(logits)
    nll = -np.take_along_axis(np.asarray(logp), batch.targets[..., None], -1)[..., 0]
    w = batch.loss_weights
    want = (nll * w).sum() / w.sum() + CONFIG.optimizer.balance_loss_weight * aux.balance_loss
    np.testing.assert_allclose(loss, want, rtol=1e-5)  # fp32 sums in another order
    for modality in (0, 1, 2):
        mine = batch.modality == modality
        found = out["metrics"][f"loss_{('text', 'image', 'video')[modality]}"]
        np.testing.assert_allclose(found.total, (nll * w)[mine].sum(), rtol=1e-5)
        np.testing.assert_allclose(found.weight, w[mine].sum(), rtol=1e-6)
    np.testing.assert_allclose(out["metrics"]["loss"].total, (nll * w).sum(), rtol=1e-5)


def test_batch_without_targets_has_loss_zero(one_device):
    batch = dataclasses.replace(make_batch(0), loss_weights=np.zeros_like(make_batch(0).loss_weights))
    _, (metrics,) = run(one_device, 1, lambda _: batch)
    assert metrics["finite"] and metrics["loss"] == (0, 0) and metrics["loss_total"] < 1e-3  # the balance loss


def test_metrics_count_what_is_in_the_batch(one_device):
    _, (metrics,) = run(one_device, 1)
    m = values(metrics)
    assert m["tokens"] == G * 28 and m["patches"] == G * 16 and m["features"] == G * 4
    assert m["token_pairs"] == G * (16 * 17 // 2 + 12 * 13 // 2) and m["patch_pairs"] == G * 16 * 16
    assert m["expert_load"].shape == (2, 4) and (m["expert_load"].sum(-1) == G * 28 * 2).all()  # two experts a token
    assert m["dropped"] == 0 and m["max_logit"].shape == (3,) and m["clipped_heads"] == 0
    np.testing.assert_allclose(m["lr"], CONFIG.optimizer.peak_lr / 2, rtol=1e-6)  # first of two warm-up steps
    assert m["grad_norm"] > 0 and m["update_rms_muon"] > 0 and m["update_rms_adamw"] > 0


# ---------------------------------------------------------------------------------------------------------------- state


def test_state_is_made_in_its_shardings_and_keeps_them():
    mesh = mesh_of(8)
    init_state, train_step = make_train_step(CONFIG, mesh)
    state = init_state()
    wanted = state_lib.shardings(MODEL, make_optimizer(CONFIG), mesh)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state, wanted))
    kernel = state.params["moe_layers"]["mlp"]["experts"]["gate"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    state, _ = train_step(state, make_batch(0))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state, wanted))


def test_schedule_is_made_once_for_optimizer_and_log(monkeypatch):
    made, real = [], schedules.wsd
    monkeypatch.setattr(schedules, "wsd", lambda *given: made.append(given) or real(*given))
    mesh = mesh_of(1)
    optimizer = make_optimizer(CONFIG, mesh)
    _, train_step = make_train_step(CONFIG, mesh, optimizer=optimizer)
    jax.eval_shape(train_step, state_lib.abstract(MODEL, optimizer, mesh), make_batch(0))
    assert len(made) == 1


def test_moments_are_sharded_like_their_parameter():
    mesh = mesh_of(8)
    tx = make_optimizer(CONFIG)
    placed, abstract = state_lib.shardings(MODEL, tx, mesh), state_lib.abstract(MODEL, tx, mesh)
    sizes = {"params": 0, "opt_state": 0}
    for part in sizes:
        for x, s in zip(jax.tree.leaves(getattr(abstract, part)), jax.tree.leaves(getattr(placed, part)), strict=True):
            sizes[part] += np.prod(s.shard_shape(x.shape), dtype=int)
    total = sum(x.size for x in jax.tree.leaves(abstract.params))
    # what is not sharded: norms, biases, tables of this tiny model
    assert sizes["params"] < total / 5 and sizes["opt_state"] < 2 * total / 5


def test_one_device_and_eight_give_the_same_curve(one_device):
    """Sums over the batch run in another order; Muon's orthogonalisation amplifies that a little from step to step."""
    steps = 8
    _, one = run(one_device, steps)
    _, eight = run(make_train_step(CONFIG, mesh_of(8)), steps)
    losses = [[m["loss_total"] for m in ms] for ms in (one, eight)]
    np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=1e-5)
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)
    np.testing.assert_allclose(one[0]["grad_norm"].total, eight[0]["grad_norm"].total, rtol=1e-4)


def test_groups_that_do_not_divide_over_the_devices_are_refused():
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, num_packs=6))
    with pytest.raises(sharding.ShardingError, match="num_packs=6 cannot be sharded over 8 devices"):
        make_train_step(config, mesh_of(8))


# ------------------------------------------------------------------------------------------------------------- learning


def test_loss_goes_down_and_without_learning_rate_it_does_not(one_device):
    _, learning = run(one_device, 20)
    still = with_optimizer(peak_lr=1e-12, final_lr=1e-12, router_bias_rate=0.0)
    _, control = run(make_train_step(still, mesh_of(1)), 20)

    def mean(metrics):
        return np.mean([m["loss"].total / m["loss"].weight for m in metrics])

    assert mean(learning[-5:]) < mean(learning[:2]) - 0.5  # nats; a uniform guess is log 64 = 4.16
    assert abs(mean(control[-5:]) - mean(control[:2])) < 0.1


def test_router_bias_moves_against_the_load_and_stays_centred(one_device):
    state, (m,) = run(one_device, 1)
    bias = np.asarray(state.params["moe_layers"]["mlp"]["router"]["bias"])
    assert np.abs(bias.mean(-1)).max() < 1e-9
    load = m["expert_load"].value
    busiest, idlest = load.argmax(-1), load.argmin(-1)
    assert all(bias[layer, busiest[layer]] < bias[layer, idlest[layer]] for layer in range(2))


def test_plain_text_model_trains_and_its_heads_over_tau_are_clipped():
    """No vision, no experts, and a tau that every head exceeds (one program for both, as compiling is what costs)."""
    config = with_optimizer(with_model(vision=None, moe=None), qk_clip_tau=1e-6)
    _, metrics = run(make_train_step(config, mesh_of(1)), 2, make_text_batch)
    assert all(m["finite"] for m in metrics)
    first, second = map(values, metrics)
    assert first["expert_load"].size == first["patches"] == first["features"] == 0
    assert first["clipped_heads"] > 0
    assert second["max_logit"].max() < first["max_logit"].max()


# ----------------------------------------------------------------------------------------------------------- not finite


def test_step_that_is_not_finite_changes_nothing_but_the_counters(one_device):
    init_state, train_step = one_device
    state, _ = train_step(init_state(), make_batch(0))
    before = host(state)
    bad = make_batch(1)
    bad.loss_weights[0, 0] = np.nan
    for n in (1, 2):
        state, metrics = train_step(state, bad)
        assert not metrics["finite"] and metrics["skipped_in_row"] == n
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (3, 2, 2)
    for a, b in zip(
        jax.tree.leaves((before.params, before.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    state, metrics = train_step(state, make_batch(1))
    assert metrics["finite"] and int(state.skipped_in_row) == 0 and int(state.skipped) == 2
    assert not np.array_equal(before.params["embed"]["embedding"], state.params["embed"]["embedding"])


def test_gradient_that_is_not_finite_is_enough(one_device):
    """The loss itself may look fine: here one weight is so large that only the square in the norm overflows."""
    init_state, train_step = one_device
    state = init_state()
    state = state.replace(params=state.params | {"embed": {"embedding": state.params["embed"]["embedding"] * np.inf}})
    state, metrics = train_step(state, make_batch(0))
    assert not metrics["finite"]


# -------------------------------------------------------------------------------------------------------------- no leak


def leak_check(maker, steps):
    """(growth of live arrays, growth of resident megabytes) over `steps` steps after some of warming up."""
    import psutil

    init_state, train_step = maker
    state = init_state()
    batches = [make_batch(i) for i in range(4)]
    memory = psutil.Process()
    for i in range(10 + steps):
        if i == 10:
            jax.block_until_ready(state)
            arrays, resident = len(jax.live_arrays()), memory.memory_info().rss
        state, metrics = train_step(state, batches[i % 4])
        jax.device_get(metrics)
    jax.block_until_ready(state)
    return len(jax.live_arrays()) - arrays, (memory.memory_info().rss - resident) / 2**20


def test_no_leak_over_60_steps(one_device):
    arrays, megabytes = leak_check(one_device, 60)
    assert arrays <= 20  # the metrics of the last step
    assert megabytes < 50  # the allocator's own play; one leaked state a step would be over 60


@pytest.mark.slow
def test_no_leak_over_1000_steps(one_device):
    arrays, megabytes = leak_check(one_device, 1000)
    assert arrays <= 20 and megabytes < 50
