"""The objective against equation 1 in NumPy, its gradient against the published form, and the traps around it.

PPO is the negative control: what is claimed of the two-sided mask must fail for it.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kimi_jax as kimi
from kimi_jax.rl import policy_loss

ALPHA, BETA = 0.5, 2.0
RATIOS = (0.3, 0.7, 1.0, 1.3, 1.9, 5.0, 20.0)


@contextlib.contextmanager
def float64():
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def reference(logp, logp_sampler, advantage, mask, num_tokens, alpha=ALPHA, beta=BETA, tau=1e-3):
    """Equation 1 as it is printed (clipping the ratio), over the generated tokens one by one, in float64."""
    total = 0.0
    for new, old, a in zip(*(np.float64(x)[mask != 0] for x in (logp, logp_sampler, advantage)), strict=True):
        ratio = np.exp(min(new - old, 700.0))
        total += np.clip(ratio, alpha, beta) * a - tau * (new - old) ** 2
    return -total / num_tokens


def ppo(d, advantage, low=0.8, high=1.2):
    """min(rho A, clip(rho) A), to be minimised, summed."""
    ratio = jnp.exp(d)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, low, high) * advantage).sum()


def one(d, advantage, **settings):
    """The loss of tokens with these log-ratios, N = 1: so its gradient is one token's."""
    d = jnp.atleast_2d(jnp.asarray(d))
    a = jnp.broadcast_to(jnp.asarray(advantage, d.dtype), d.shape)
    return policy_loss(d, jnp.zeros_like(d), a, jnp.ones_like(d), 1, **settings)[0]


SETTINGS = ("alpha", "beta", "tau")
GRADIENT = jax.jit(jax.grad(one), static_argnames=SETTINGS)
VALUE_AND_GRADIENT = jax.jit(jax.value_and_grad(policy_loss, has_aux=True), static_argnames=SETTINGS)


def slope(d, advantage, **settings):
    return np.asarray(GRADIENT(jnp.asarray(d, jnp.float32), advantage, **settings))


def batch(seed=0, rows=4, tokens=16, spread=1.0):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(2.0, (rows, tokens))
    new = old + spread * rng.normal(size=old.shape)
    advantage = np.repeat(rng.normal(size=(rows, 1)), tokens, 1)
    mask = rng.random(old.shape) < 0.7
    return [x.astype(np.float32) for x in (new, old, advantage)] + [mask]


def on_device(parts):
    return [jnp.asarray(p) for p in parts]


def test_it_is_in_the_public_surface():
    assert kimi.rl.policy_loss is policy_loss


@pytest.mark.parametrize(("alpha", "beta", "tau"), [(0.5, 2.0, 1e-3), (0.2, 5.0, 0.0), (0.8, 1.28, 0.1)])
def test_value_is_equation_one(alpha, beta, tau):
    """float32 against float64: rounding of the sum of about 45 tokens, 1e-5."""
    parts = batch()
    n = int(parts[3].sum())
    loss, metrics = policy_loss(*on_device(parts), n, alpha=alpha, beta=beta, tau=tau)
    want = reference(*parts, n, alpha, beta, tau)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["policy"] + metrics["penalty"], want, rtol=1e-5)
    ratio = np.exp((parts[0] - parts[1])[parts[3]])
    np.testing.assert_allclose(metrics["below"], (ratio < alpha).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["above"], (ratio > beta).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["ratio"], np.clip(ratio, alpha, beta).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mismatch_kl"], (ratio - 1 - np.log(ratio)).mean(), rtol=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("tau", [0.0, 0.01])
def test_gradient_table(sign, tau):
    """d loss / d log pi = 2 tau d - rho A inside the bounds and 2 tau d outside, for both signs of A."""
    d = np.log(np.array(RATIOS))
    inside = (np.array(RATIOS) >= ALPHA) & (np.array(RATIOS) <= BETA)
    want = 2 * tau * d - inside * np.array(RATIOS) * sign
    np.testing.assert_allclose(slope(d, sign, tau=tau), want, rtol=1e-5, atol=1e-7)


def test_published_row_of_the_table():
    """tau = 0.01, A = 1 and -1, to three decimals."""
    plus = [-0.024, -0.707, -1, -1.295, -1.887, 0.032, 0.060]
    minus = [-0.024, 0.693, 1, 1.305, 1.913, 0.032, 0.060]
    np.testing.assert_allclose(slope(np.log(RATIOS), 1.0, tau=0.01), plus, atol=6e-4)
    np.testing.assert_allclose(slope(np.log(RATIOS), -1.0, tau=0.01), minus, atol=6e-4)


@given(st.floats(-20, 20), st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3))
def test_no_policy_gradient_outside_whatever_the_sign(d, advantage):
    d = float(np.float32(d))
    inside = np.log(ALPHA) <= d <= np.log(BETA)
    if min(abs(d - np.log(ALPHA)), abs(d - np.log(BETA))) < 1e-6:
        return  # on the bound float32 and float64 may disagree about the side
    want = -np.exp(d) * advantage if inside else 0.0
    np.testing.assert_allclose(slope(d, advantage, tau=0.0), want, rtol=1e-5)


def test_ppo_is_one_sided_and_fails_what_holds_here():
    """The control: a token 20 times as likely as when sampled, with A < 0, is pushed by PPO with all its ratio."""
    d = jnp.log(jnp.array([20.0]))
    assert slope(d, -1.0, tau=0.0) == 0.0
    np.testing.assert_allclose(jax.grad(ppo)(d, -1.0), 20.0, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ppo)(jnp.log(jnp.array([0.1])), 1.0), -0.1, rtol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_differs_from_ppo_just_where_ppo_pulls_back(sign):
    """Bounds 1 -+ eps, tau = 0: equal but for {A > 0, rho < 1 - eps} and {A < 0, rho > 1 + eps}."""
    ratio = np.array([0.3, 0.75, 0.85, 1.0, 1.15, 1.25, 4.0], np.float32)
    d = jnp.log(jnp.asarray(ratio))
    ours, theirs = slope(d, sign, alpha=0.8, beta=1.2, tau=0.0), np.asarray(jax.grad(ppo)(d, sign))
    pulled = ratio < 0.8 if sign > 0 else ratio > 1.2
    np.testing.assert_allclose(ours[~pulled], theirs[~pulled], rtol=1e-6)
    assert not ours[pulled].any() and theirs[pulled].all()


def test_on_policy_it_is_reinforce_with_a_baseline():
    """At ratio 1 the mask keeps every token (the sign trap: bounds of the log-ratio above 0 would drop them all)."""
    advantage = jnp.asarray([[1.0, -2.0, 0.5]])
    zero = jnp.zeros((1, 3))
    grad = jax.grad(lambda x: policy_loss(x, zero, advantage, jnp.ones((1, 3)), 3)[0])(zero)
    np.testing.assert_allclose(grad, -advantage / 3, rtol=1e-6)
    metrics = policy_loss(zero, zero, advantage, jnp.ones((1, 3)), 3)[1]
    assert metrics["below"] == metrics["above"] == metrics["mismatch_kl"] == metrics["penalty"] == 0


@pytest.mark.parametrize(
    "bounds",
    [
        {"alpha": 1.2}, {"beta": 0.9}, {"alpha": 0.0}, {"alpha": -0.7, "beta": 0.7}, {"beta": float("inf")},
        {"alpha": 1.0, "beta": 1.0}, {"alpha": float("nan")},
    ],
)  # fmt: skip
def test_bounds_that_do_not_contain_one_are_refused(bounds):
    with pytest.raises(ValueError, match="bound the ratio of probabilities"):
        one([0.0], 1.0, **bounds)


@pytest.mark.parametrize("tau", [-1e-3, float("nan"), float("inf")])
def test_negative_tau_is_refused(tau):
    with pytest.raises(ValueError, match="tau"):
        one([0.0], 1.0, tau=tau)


@given(st.floats(-8, 8).map(np.float32), st.sampled_from((1e-3, 1e-2, 1.0)))
def test_tau_pulls_every_token_back_alike(d, tau):
    """2 tau d, inside and outside the bounds, odd in d: the part of the gradient that does not depend on A."""
    np.testing.assert_allclose(slope(d, 0.0, tau=tau), 2 * tau * d, rtol=1e-5, atol=1e-30)


def test_wide_bounds_are_plain_importance_sampling():
    d = np.linspace(-6, 6, 25).astype(np.float32)
    np.testing.assert_allclose(slope(d, 1.5, alpha=1e-8, beta=1e8, tau=0.0), -1.5 * np.exp(d), rtol=1e-5)


ODD = st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0])


@given(*(arrays(np.float32, (3, 5), elements=ODD) for _ in range(3)), arrays(np.bool_, (3, 5)))
def test_masked_tokens_count_for_exactly_nothing(new, old, advantage, mask):
    """Padding may hold -inf (a prompt's forbidden token), NaN (uninitialised) or anything: same bits as with zeros."""
    clean = [x[:3, :5] for x in batch(1, 3, 5)[:3]]
    odd = [np.where(mask, c, o) for c, o in zip(clean, (new, old, advantage), strict=True)]
    zeros = [np.where(mask, c, np.float32(0)) for c in clean]
    (loss, metrics), grad = VALUE_AND_GRADIENT(*on_device([*odd, mask]), 7)
    (want, want_metrics), want_grad = VALUE_AND_GRADIENT(*on_device([*zeros, mask]), 7)
    np.testing.assert_array_equal(loss, want)
    np.testing.assert_array_equal(grad, want_grad)
    assert not np.asarray(grad)[~mask].any()
    assert metrics == want_metrics


@pytest.mark.parametrize("d", [1e4, -1e4, 100.0, -100.0, 88.8])
@pytest.mark.parametrize("advantage", [1e6, -1e6])
def test_far_tokens_have_finite_values_and_gradients(d, advantage):
    """exp(100) is infinite in float32, and clip(exp(d)) has a NaN gradient there: shown beside ours."""
    grad = slope(d, advantage)
    np.testing.assert_allclose(grad, 2e-3 * d, rtol=1e-5)
    x = jnp.asarray([[d]])
    values = policy_loss(x, jnp.zeros_like(x), x * 0 + advantage, x == x, 1)
    assert all(np.isfinite(v) for v in jax.tree.leaves(values))
    if d > 88:
        assert np.isnan(jax.grad(lambda d: jnp.clip(jnp.exp(d), ALPHA, BETA))(d))


def test_half_precision_log_probabilities():
    """Computed in float32: the loss is that of the rounded numbers, not rounded again."""
    parts = batch(2)
    half = [jnp.asarray(p, jnp.bfloat16) for p in parts[:3]]
    loss, metrics = policy_loss(*half, jnp.asarray(parts[3]), 40)
    assert loss.dtype == jnp.float32 and {v.dtype for v in metrics.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, reference(*(np.float32(h) for h in half), parts[3], 40), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_microbatches_add_up(count):
    """N is global: the sum over microbatches is the whole, in value, gradient and metrics; padding changes nothing."""
    parts = batch(3)
    n = int(parts[3].sum())
    (want, metrics), grad = VALUE_AND_GRADIENT(*on_device(parts), n)
    padded = [np.pad(p, ((0, 0), (0, 3)), constant_values=v) for p, v in zip(parts, (-np.inf, 0, 0, 0), strict=True)]
    pieces = [VALUE_AND_GRADIENT(*on_device(p), n) for p in zip(*(np.split(p, count) for p in padded), strict=True)]
    np.testing.assert_allclose(sum(float(p[0][0]) for p in pieces), want, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([p[1] for p in pieces])[:, :-3], grad, rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(sum(float(p[0][1][name]) for p in pieces), value, rtol=1e-5, err_msg=name)


def test_on_a_mesh_it_is_the_same():
    parts = batch(4, rows=8)
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    sharded = [jax.device_put(p, NamedSharding(mesh, PartitionSpec("data", "context"))) for p in parts]
    n = jnp.asarray(parts[3].sum())
    (want, _), want_grad = VALUE_AND_GRADIENT(*on_device(parts), n)
    (loss, _), grad = VALUE_AND_GRADIENT(*sharded, n)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-6)


def test_equal_rewards_leave_only_the_leash():
    """Advantage 0 for a whole group; scaling rewards scales the policy part (no deviation divides it)."""
    new, old, advantage, mask = on_device(batch(5))
    assert policy_loss(new, old, advantage * 0, mask, 40)[1]["policy"] == 0
    once = policy_loss(new, old, advantage, mask, 40)[1]
    thrice = policy_loss(new, old, 3 * advantage, mask, 40)[1]
    np.testing.assert_allclose(thrice["policy"], 3 * once["policy"], rtol=1e-6)
    assert thrice["penalty"] == once["penalty"]


def test_two_actions_in_closed_form():
    """A softmax over two actions: the descent direction on its logits is rho A (onehot - p) - 2 tau d (onehot - p)."""
    logits, old, tau = jnp.asarray([0.4, -0.3]), jnp.log(jnp.asarray([[0.45]])), 0.05

    def loss(logits):
        chosen = jax.nn.log_softmax(logits)[0].reshape(1, 1)
        return policy_loss(chosen, old, jnp.ones((1, 1)), jnp.ones((1, 1)), 1, tau=tau)[0]

    p = np.asarray(jax.nn.softmax(logits))
    d = np.log(p[0] / 0.45)
    want = -(np.exp(d) - 2 * tau * d) * (np.array([1.0, 0.0]) - p)
    np.testing.assert_allclose(jax.grad(loss)(logits), want, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.3, 0.499, 0.501, 1.0, 1.999, 2.001, 8.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_finite_differences_on_both_sides_of_the_bounds(ratio, advantage):
    """float64, step 1e-6, not on the bound itself: there the function has two slopes."""
    with float64():
        d, h = np.log(ratio), 1e-6
        up, down = (float(one(np.float64(d + s), advantage, tau=0.01)) for s in (h, -h))
        grad = jax.grad(lambda x: one(x, advantage, tau=0.01))(jnp.float64(d))
        assert grad.dtype == jnp.float64
        np.testing.assert_allclose(grad, (up - down) / (2 * h), rtol=1e-6, atol=1e-9)


def test_bounds_belong_to_the_interval():
    """A token exactly on a bound is kept, on both ends."""
    ends = jnp.log(jnp.asarray([ALPHA, BETA], jnp.float32))
    np.testing.assert_allclose(slope(ends, 1.0, tau=0.0), [-0.5, -2.0], rtol=1e-5)


def test_biased_sampler_shows():
    """The share of dropped tokens and the KL rise with a bias between sampler and trainer; without one they are 0."""
    new, _, advantage, mask = on_device(batch(6, spread=0.0))
    noise = 0.3 * np.random.default_rng(0).normal(size=new.shape).astype(np.float32)
    n = int(mask.sum())
    seen = [policy_loss(new, new - noise - b, advantage, mask, n)[1] for b in (0.0, 0.3, 0.6, 0.9)]
    dropped, kl = [float(m["below"] + m["above"]) for m in seen], [float(m["mismatch_kl"]) for m in seen]
    assert dropped == sorted(dropped) and dropped[-1] > dropped[0]
    assert kl == sorted(kl)
    assert float(policy_loss(new, new, advantage, mask, n)[1]["mismatch_kl"]) < 1e-6


def test_nothing_flows_into_sampler_advantage_or_metrics():
    parts = on_device(batch(7))[:3]
    mask = jnp.ones(parts[0].shape)
    grads = jax.grad(lambda *p: policy_loss(*p, mask, 64)[0], argnums=(1, 2))(*parts)
    assert not any(np.asarray(g).any() for g in grads)
    assert not np.asarray(jax.grad(lambda x: sum(policy_loss(x, *parts[1:], mask, 64)[1].values()))(parts[0])).any()
    none = policy_loss(*parts, 0 * mask, 0)
    assert none[0] == 0
