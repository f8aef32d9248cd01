"""Dispatch, blocked experts and combine equal the naive statement, in value and gradient, for any routing.

Tolerance 3e-5 absolute on values of size about 1 to 10, and 1e-5 relative for the few above: float32 sums of at most a
few hundred terms in another order (12.3394585 against 12.3394241 was seen with another number of threads).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.kernels.moe import grouped_matmul as gm

E, D, F, K = 4, 5, 6, 2


def _naive(x, gate, up, down, gates, experts):
    """Every expert for every token, then pick."""
    inside = jax.nn.silu(jnp.einsum("nd,edf->nef", x, gate)) * jnp.einsum("nd,edf->nef", x, up)
    every = jnp.einsum("nef,efd->ned", inside, down)
    every = jnp.concatenate([every, jnp.zeros_like(every[:, :1])], axis=1)  # expert E is nowhere
    picked = jnp.take_along_axis(every, experts[:, :, None], axis=1)
    return (gates[:, :, None] * picked).sum(axis=1)


def _blocked(x, gate, up, down, gates, experts, block):
    plan = gm.plan_blocks(experts, E, block)
    return gm.combine(gm.grouped_swiglu(gm.dispatch(x, plan), gate, up, down, plan), gates, plan)


def _inputs(experts):
    rng = np.random.default_rng(0)
    shapes = (experts.shape[0], D), (E, D, F), (E, D, F), (E, F, D), experts.shape
    return tuple(jnp.asarray(rng.normal(size=shape) * 0.7, jnp.float32) for shape in shapes)


PLAN = jax.jit(gm.plan_blocks, static_argnums=(1, 2))
ROUTINGS = {
    "mixed": lambda n: np.random.default_rng(1).integers(0, E, (n, K)),
    "all to one": lambda n: np.full((n, K), 2),
    "some empty": lambda n: np.random.default_rng(2).choice([0, 3], (n, K)),
    "some nowhere": lambda n: np.random.default_rng(3).integers(0, E + 1, (n, K)),
    "all nowhere": lambda n: np.full((n, K), E),
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("block", [None, 4])
def test_equals_naive_in_value_and_gradient(name, block):
    experts = jnp.asarray(ROUTINGS[name](23), jnp.int32)
    args = _inputs(experts)

    def run(fn):
        return jax.value_and_grad(lambda *a: jnp.sin(fn(*a)).sum(), range(5))

    naive, got = run(lambda *a: _naive(*a, experts)), run(lambda *a: _blocked(*a, experts, block))
    for a, b in zip(jax.tree.leaves(naive(*args)), jax.tree.leaves(jax.jit(got)(*args)), strict=True):
        np.testing.assert_allclose(b, a, atol=3e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, E), min_size=24, max_size=24), st.sampled_from([1, 3, 8]))
def test_every_assignment_has_exactly_one_row(ids, block):
    experts = np.array(ids, np.int32)[:, None]
    plan = jax.tree.map(np.asarray, PLAN(experts, E, block))
    routed = np.flatnonzero(experts[:, 0] < E)
    filled = plan.source[plan.source < len(ids)]
    assert sorted(filled) == list(routed)
    np.testing.assert_array_equal(plan.source[plan.row[routed, 0]], routed)
    np.testing.assert_array_equal(plan.expert[plan.row[routed, 0] // block], experts[routed, 0])
    np.testing.assert_array_equal(plan.counts, np.bincount(experts[routed, 0], minlength=E))
    assert plan.used == sum(-(-c // block) for c in plan.counts) <= len(plan.expert)


def test_accelerator_form_equals_the_blocked_form():
    """The `ragged_dot` branch is what other platforms run; here it runs on CPU, slowly but the same."""
    experts = jnp.asarray(ROUTINGS["some nowhere"](17), jnp.int32)
    x, *weights, _ = _inputs(experts)
    plan = gm.plan_blocks(experts, E, 4)
    rows = gm.dispatch(x, plan)
    live = (plan.source < experts.size)[:, None]  # other rows are unspecified
    ragged, blocked = (jnp.where(live, f(rows, *weights, plan), 0) for f in (gm._ragged, gm._blocked))
    np.testing.assert_allclose(ragged, blocked, atol=1e-5)
    grad = jnp.where(live, jnp.cos(blocked), 0)
    got, want = (f(rows, *weights, plan, grad) for f in (gm._ragged_grads, gm._blocked_grads))
    np.testing.assert_allclose(jnp.where(live, got[0], 0), jnp.where(live, want[0], 0), atol=1e-5)
    for a, b in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_block_size_follows_the_rows_an_expert():
    assert gm.block_size(8192, 8) == 256  # the demo
    assert gm.block_size(16, 384) == 8  # a decoding step
    assert gm.block_size(4096 * 8, 384) == 64
