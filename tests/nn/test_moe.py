"""The mixture of experts against its plain statement: every expert for every token, weighted by its gate or by zero.

Tolerance 1e-5 of the largest entry: float32 sums in another order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.nn.moe import MoE, balance_loss, route
from tests.nn import tiny

MOE = tiny.CONFIG.moe
E, K = MOE.n_routed_experts, MOE.num_experts_per_tok


def _layer(bias=None):
    params = jax.tree.map(lambda a: a[0], tiny.params()["moe_layers"]["mlp"])
    if bias is not None:
        params["router"] = {**params["router"], "bias": jnp.asarray(bias, jnp.float32)}
    return params


def _inputs():
    x = jax.random.normal(jax.random.key(3), (2, 19, tiny.CONFIG.hidden_size))
    ids = np.ones((2, 19), np.int32)
    ids[0, 10:], ids[1, 16:] = 2, 0
    return x, jnp.asarray(ids)


def _swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def _dense(params, x, ids, picked=None):
    """All experts for all tokens; padding tokens get the shared expert only. picked: in place of the router's."""
    router, experts, shared = (params[k] for k in ("router", "experts", "shared"))
    scores = jax.nn.sigmoid(x @ router["kernel"])
    picked = jnp.argsort(-(scores + router["bias"]), axis=-1)[..., :K] if picked is None else picked
    chosen = jax.nn.one_hot(picked, E).sum(axis=-2)
    gates = scores * chosen
    gates = gates / gates.sum(axis=-1, keepdims=True) * MOE.routed_scaling_factor * (ids > 0)[..., None]
    outputs = jnp.stack([_swiglu(x, *(experts[k][e] for k in ("gate", "up", "down"))) for e in range(E)], axis=-2)
    return (gates[..., None] * outputs).sum(axis=-2) + _swiglu(
        x, *(shared[k]["kernel"] for k in ("gate", "up", "down"))
    )


@pytest.mark.parametrize(
    "bias",
    [None, [9, 9, -9, -9], [0, 9, -9, -9.5], [0, 0, 0, 9]],
    ids=["free", "two experts", "one always", "one first"],
)
def test_equals_every_expert_for_every_token(bias):
    """Value and gradient; with adversarial biases all tokens go to the same experts and others stay empty."""
    params, (x, ids) = _layer(bias), _inputs()

    def blocked(params, x):
        y, aux = MoE(tiny.CONFIG).apply({"params": params}, x, ids)
        return jnp.sin(y).sum(), (y, aux)

    def naive(params, x):
        y = _dense(params, x, ids)
        return jnp.sin(y).sum(), y

    run, run_naive = (jax.value_and_grad(f, (0, 1), has_aux=True) for f in (blocked, naive))
    (_, (y, aux)), grads = jax.jit(run, compiler_options=tiny.QUICK)(params, x)
    (_, want), want_grads = jax.jit(run_naive, compiler_options=tiny.QUICK)(params, x)
    tiny.assert_trees_close(y, want, 1e-5)
    tiny.assert_trees_close(grads, want_grads, 1e-5)
    assert aux.expert_load.sum() == (ids > 0).sum() * K and aux.dropped == 0
    if bias and bias[2] < 0:
        assert not aux.expert_load[2:].any()


def test_forced_experts_equal_the_plain_statement_with_their_gates():
    """Replay: two experts of each token as given, gates and their gradient from this router's scores of them; tokens
    of -1 go where the router sends them. Against `_dense`, whose choice is written in by hand."""
    params, (x, ids) = _layer([0, 9, -9, -9.5]), _inputs()
    given = np.random.default_rng(0).permuted(np.tile(np.arange(E), (*ids.shape, 1)), axis=-1)[..., :K]
    free = np.random.default_rng(1).uniform(size=ids.shape) < 0.3
    scores = jax.nn.sigmoid(x @ params["router"]["kernel"]) + params["router"]["bias"]
    picked = np.where(free[..., None], np.argsort(-np.asarray(scores), axis=-1)[..., :K], given)
    forced = jnp.asarray(np.where(free[..., None], -1, given), jnp.int32)

    def replayed(params, x):
        y, aux = MoE(tiny.CONFIG).apply({"params": params}, x, ids, forced)
        return jnp.sin(y).sum(), (y, aux)

    def naive(params, x):
        y = _dense(params, x, ids, picked)
        return jnp.sin(y).sum(), y

    run, run_naive = (jax.value_and_grad(f, (0, 1), has_aux=True) for f in (replayed, naive))
    (_, (y, aux)), grads = jax.jit(run, compiler_options=tiny.QUICK)(params, x)
    (_, want), want_grads = jax.jit(run_naive, compiler_options=tiny.QUICK)(params, x)
    tiny.assert_trees_close(y, want, 1e-5)
    tiny.assert_trees_close(grads, want_grads, 1e-5)
    assert np.abs(grads[0]["router"]["kernel"]).max() > 1e-3
    np.testing.assert_array_equal(aux.expert_load, np.bincount(picked[np.asarray(ids) > 0].ravel(), minlength=E))
    assert aux.dropped == 0
    _, own = MoE(tiny.CONFIG).apply({"params": params}, x, ids)  # the balance loss is of the scores, not of the choice
    np.testing.assert_allclose(aux.balance_loss, own.balance_loss, rtol=1e-6)


def test_bias_selects_but_does_not_weigh():
    x, kernel = jax.random.normal(jax.random.key(0), (5, 8)), jax.random.normal(jax.random.key(1), (8, E))
    routing = route(x, kernel, jnp.array([0.0, 0.0, 5.0, 6.0]), MOE)
    np.testing.assert_array_equal(routing.experts, np.tile([3, 2], (5, 1)))
    scores = np.asarray(jax.nn.sigmoid(x @ kernel))[:, [3, 2]]
    np.testing.assert_allclose(routing.gates, scores / scores.sum(-1, keepdims=True) * 1.5, rtol=1e-5)


def test_router_is_float32_whatever_the_activations():
    """Inputs, matrix and product: the lowered program must hold a float32 dot at the highest precision."""
    x, kernel = jnp.zeros((5, 8), jnp.bfloat16), jnp.zeros((8, E), jnp.bfloat16)
    routing = route(x, kernel, jnp.zeros(E), MOE)
    assert routing.gates.dtype == routing.scores.dtype == jnp.float32
    text = jax.jit(route, static_argnums=3).lower(x, kernel, jnp.zeros(E), MOE).as_text()
    dot = next(line for line in text.splitlines() if "dot_general" in line)
    assert "precision = [HIGHEST, HIGHEST]" in dot and "bf16" not in dot, dot


def test_balance_loss_is_the_papers():
    """f_i and P_i written out in NumPy, a row at a time; a row without tokens does not count. Tolerance: float32."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.1, 1, (3, 7, E)).astype(np.float32)
    ids = np.ones((3, 7), np.int32)
    ids[0, 5:], ids[2] = 0, 0
    rows = []
    for row in range(2):
        s = scores[row][ids[row] > 0].astype(np.float64)
        best = np.argsort(-s, axis=-1)[:, :K]
        f = np.bincount(best.reshape(-1), minlength=E) * E / (K * len(s))
        rows.append((f * (s / s.sum(-1, keepdims=True)).mean(axis=0)).sum())
    got = balance_loss(jnp.asarray(scores), jnp.asarray(ids), K)
    np.testing.assert_allclose(got, np.mean(rows), rtol=1e-5)
