"""The policy loss inside the training step: one number, whatever a batch is divided into.

N counts generated tokens of the global batch. So packing, microbatches and devices change nothing but the order of
float32 sums: losses agree to 1e-6, and so do gradients with their mean (by the norm over all parameters).
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import MemoryConfig, MeshConfig
from kimi_jax.nn.kimi import KimiK25, init_params
from kimi_jax.nn.param import unbox
from kimi_jax.packed_batch import padding
from kimi_jax.rl import losses, policy_loss
from kimi_jax.rl.objective import PolicyConfig, policy
from kimi_jax.rl.types import COLUMNS
from kimi_jax.train.step import gradients, make_layout
from tests.nn.tiny import QUICK
from tests.train.tiny import CONFIG, MODEL

S, ROLLOUTS = 24, 64
# The balance loss belongs to rows and not to tokens: it is off.
SMALL = dataclasses.replace(MODEL, vision=None, num_hidden_layers=2, initializer_range=0.1)
SETTINGS = PolicyConfig(alpha=0.5, beta=2.0, tau=0.1, temperature=0.8)
FIELDS = {"tokens": np.int32, "targets": np.int32, "loss_weights": np.float32, "logp_sampler": np.float32,
          "advantage": np.float32}  # fmt: skip


def rollouts():
    """Rollouts of 5 to 12 tokens: a prompt of 2, then generated ones, some of which are a tool's (weight 0)."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(ROLLOUTS):
        n = int(rng.integers(5, 13))
        tokens = rng.integers(10, 64, n + 1)
        generated = (np.arange(n) >= 1) & (rng.uniform(size=n) < 0.8)
        sampler = np.where(generated, rng.normal(-4.0, 0.7, n), -np.inf)  # what nobody generated may hold anything
        advantage = np.where(generated, rng.normal(1.0), np.nan)  # a mean of 0 would leave little but rounding
        out.append(dict(zip(FIELDS, (tokens[:-1], tokens[1:], generated, sampler, advantage), strict=True)))
    return out


def batch_of(rows):
    """rows[b]: the rollouts that row b holds."""
    batch = padding(len(rows), S, 1, 0, columns=COLUMNS)
    arrays = {name: batch.columns[name] if name in COLUMNS else getattr(batch, name) for name in FIELDS}
    for b, row in enumerate(rows):
        at = 0
        for number, rollout in enumerate(row, 1):
            here = np.s_[b, at : at + len(rollout["tokens"])]
            for name in FIELDS:
                arrays[name][here] = rollout[name]
            batch.segment_ids[here], batch.positions[here] = number, np.arange(len(rollout["tokens"]))
            at += len(rollout["tokens"])
    return batch


ALL = rollouts()
LAYOUTS = {"padded": [[each] for each in ALL], "packed": [list(pair) for pair in zip(ALL[::2], ALL[1::2], strict=True)]}


def settings(rows, parts):
    data = dataclasses.replace(CONFIG.data, sequence_length=S, num_packs=rows)
    optimizer = dataclasses.replace(CONFIG.optimizer, balance_loss_weight=0.0)
    memory = MemoryConfig(microbatches=parts)
    return dataclasses.replace(CONFIG, model=SMALL, data=data, optimizer=optimizer, memory=memory)


@functools.cache
def params():
    return jax.jit(lambda: unbox(init_params(SMALL, jax.random.key(0))), compiler_options=QUICK)()


@functools.cache
def found(name, parts, devices):
    """((loss, what is beside it), gradients) through the training step's own function, over a mesh of so many."""
    rows = LAYOUTS[name]
    config = settings(len(rows), parts)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    layout = make_layout(config, mesh)
    run = jax.jit(lambda p, b: gradients(p, b, config, layout, objective=policy(SETTINGS)), compiler_options=QUICK)
    put = jax.device_put(params(), sharding.replicated(mesh)), sharding.put_batch(batch_of(rows), mesh)
    return jax.device_get(run(*put))


WAYS = tuple(itertools.product(LAYOUTS, (1, 2, 4), (1, 8)))
TWO_WAYS = (("padded", 1, 1), ("packed", 2, 8))


@functools.cache
def mean_gradient(ways):
    """Of these ways, in float64: what float32 rounds in each of them differs, what it rounds to does not."""
    return jax.tree.map(
        lambda *every: np.mean(np.stack(every), axis=0, dtype=np.float64), *(found(*way)[1] for way in ways)
    )


def test_policy_step_is_the_same_padded_on_one_device_and_packed_in_parts_on_eight():
    check_division(*TWO_WAYS[1], ways=TWO_WAYS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parts", "devices"), WAYS)
def test_policy_step_does_not_depend_on_how_the_batch_is_divided(name, parts, devices):
    check_division(name, parts, devices, ways=WAYS)


def check_division(name, parts, devices, ways):
    (want_loss, want_out), _ = found("padded", 1, 1)
    (loss, out), grads = found(name, parts, devices)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(mean_gradient(ways)), strict=True))
    error = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs))
    norm = np.sqrt(sum(np.sum(b**2) for _, b in pairs))
    assert norm > 1e-3 and error <= 1e-6 * norm
    for key, metric in want_out["metrics"].items():
        np.testing.assert_allclose(out["metrics"][key], metric, rtol=1e-5, atol=1e-5)


def test_policy_step_is_policy_loss_of_the_models_own_log_probabilities():
    """Against `policy_loss` called by hand on log softmax(logits / T), with bounds that drop tokens on both sides."""
    batch = batch_of(LAYOUTS["padded"])
    (loss, out), _ = found("padded", 1, 1)
    logits = jax.jit(lambda p, b: KimiK25(SMALL).apply({"params": p}, b)[0], compiler_options=QUICK)(params(), batch)
    logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits / 0.8)), batch.targets[..., None], -1)[..., 0]
    mask = batch.loss_weights != 0
    given = map(jnp.asarray, (logp, batch.columns["logp_sampler"], batch.columns["advantage"], mask, mask.sum()))
    want, metrics = policy_loss(*given, alpha=0.5, beta=2.0, tau=0.1)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert metrics["below"] > 0.02 and metrics["above"] > 0.02
    for name, value in metrics.items():
        total, weight = out["metrics"][name]
        np.testing.assert_allclose(total / weight, value, rtol=1e-5, atol=1e-6)
        assert weight == mask.sum()


def test_policy_counts_tokens_and_not_means_of_means():
    """The control: dividing each half of an uneven batch by its own tokens gives another loss."""
    rows = LAYOUTS["padded"]
    whole, *halves = (jax.tree.map(jnp.asarray, batch_of(part)) for part in (rows, rows[:40], rows[40:]))
    objective, logp = policy(SETTINGS), jnp.full((64, S), -3.5)
    right, _ = objective.loss(logp, whole, objective.totals(whole))
    parts = [objective.loss(logp[: len(b.tokens)], b, objective.totals(whole))[0] for b in halves]
    np.testing.assert_allclose(sum(parts), right, rtol=1e-5, atol=1e-6)  # terms of both signs
    means = [objective.loss(logp[: len(b.tokens)], b, objective.totals(b))[0] for b in halves]
    assert abs(np.mean(means) - right) > 1e-2 * abs(right) + 1e-4


def test_policy_refuses_a_batch_without_the_samplers_numbers():
    batch = dataclasses.replace(batch_of(LAYOUTS["packed"]), columns={})
    with pytest.raises(ValueError, match="needs the column 'logp_sampler'"):
        gradients(params(), batch, settings(32, 1), objective=policy(SETTINGS))


@pytest.mark.parametrize("name, objective", [
    ("k2_5", losses.KimiK25Loss(0.5, 2.0, 0.1)), ("ppo", losses.PPO(0.2, 0.3)), ("gspo", losses.GSPO(0.2, 0.3)),
    ("cispo", losses.CISPO(2.0)), ("k1_5", losses.KimiK15Loss(0.1)),
])  # fmt: skip
def test_every_loss_of_the_settings_is_that_objective_over_the_packed_responses(name, objective):
    """Responses of a row are told apart by their segments, which GSPO and K1.5 need."""
    batch = jax.tree.map(jnp.asarray, batch_of(LAYOUTS["packed"]))
    config = PolicyConfig(name, alpha=0.5, beta=2.0, tau=0.1, low=0.2, high=0.3)
    logp = jnp.asarray(np.random.default_rng(1).normal(-4.0, 0.7, batch.targets.shape), jnp.float32)
    chosen = policy(config)
    totals = chosen.totals(batch)
    value, metrics = chosen.loss(logp, batch, totals)
    expected, _ = losses.objective_loss(
        objective, logp, batch.columns["logp_sampler"], batch.columns["advantage"],
        batch.loss_weights, totals["num_tokens"], sequences=batch.segment_ids,
    )  # fmt: skip
    assert value == expected and metrics["max_log_ratio"].value > 0


def test_loss_without_bounds_keeps_every_token():
    """The negative control of experiments: the gradient of a token that K2.5 drops is there."""
    batch = jax.tree.map(jnp.asarray, batch_of(LAYOUTS["padded"]))
    logp = batch.columns["logp_sampler"] + 3.0  # ratio 20

    def gradient(name):
        objective = policy(PolicyConfig(name, tau=0.0))
        return jax.grad(lambda x: objective.loss(x, batch, objective.totals(batch))[0])(logp)

    assert not gradient("k2_5").any() and gradient("none").any()
