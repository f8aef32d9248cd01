"""Every objective against its published gradient, and the properties that all of them share.

PPO is the negative control in the test of what K2.5 claims for itself.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kimi_jax.rl import losses
from kimi_jax.rl.losses import CISPO, GSPO, PPO, KimiK15Loss, KimiK25Loss, objective_loss

RATIOS = np.array([0.3, 0.7, 1, 1.3, 1.9, 5, 20])
OBJECTIVES = {
    "k2.5": KimiK25Loss(),
    "k2.5 kept": KimiK25Loss(tau=0.01, tau_on="kept"),
    "ppo": PPO(),
    "dual": PPO(dual_clip=3.0),
    "dapo": PPO(0.2, 0.28),
    "gspo": GSPO(0.1, 0.2),
    "gspo token": GSPO(0.1, 0.2, "token"),
    "cispo": CISPO(),
    "k1.5": KimiK15Loss(0.01),
}
EACH = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
VALUE_AND_GRADIENT = jax.jit(
    jax.value_and_grad(
        lambda logp, objective, old, a, mask, n, sequences, weight: objective_loss(
            objective, logp, old, a, mask, n, sequences=sequences, weight=weight
        ),
        has_aux=True,
    ),
    static_argnums=1,
)


def slopes(objective, ratios, advantage, weight=None, old=None):
    """d loss / d log pi of single-token responses with N = 1, one a row."""
    d = jnp.log(jnp.asarray(ratios, jnp.float32))[:, None]
    a, one = jnp.full(d.shape, advantage, jnp.float32), jnp.ones(d.shape)
    old = jnp.zeros(d.shape) if old is None else old
    return np.asarray(VALUE_AND_GRADIENT(d, objective, old, a, one, 1, None, weight)[1])[:, 0]


def icepop(ratios, advantage):
    """REINFORCE (the ratio to itself is 1) times IcePop's weight."""
    d = jnp.log(jnp.asarray(ratios, jnp.float32))[:, None]
    return slopes(PPO(), ratios, advantage, losses.icepop_weight(d, jnp.zeros_like(d)), old=d)


TABLE = [  # rows of d loss / d log pi for A = 1 and A = -1 at RATIOS; None: of the same size as for A = 1
    (functools.partial(slopes, PPO()), [-0.3, -0.7, -1, 0, 0, 0, 0], [0, 0, 1, 1.3, 1.9, 5, 20]),
    (functools.partial(slopes, PPO(dual_clip=3.0)), [-0.3, -0.7, -1, 0, 0, 0, 0], [0, 0, 1, 1.3, 1.9, 0, 0]),
    (functools.partial(slopes, PPO(0.2, 0.28)), [-0.3, -0.7, -1, 0, 0, 0, 0], [0, 0, 1, 1.3, 1.9, 5, 20]),
    (functools.partial(slopes, CISPO(5.0)), [-0.3, -0.7, -1, -1.3, -1.9, -5, -5], None),
    (icepop, [0, -0.7, -1, -1.3, -1.9, -5, 0], None),
    (functools.partial(slopes, KimiK25Loss(tau=0)), [0, -0.7, -1, -1.3, -1.9, 0, 0], None),
    (
        functools.partial(slopes, KimiK25Loss(tau=0.01)),
        [-0.024, -0.707, -1, -1.295, -1.887, 0.032, 0.060],
        [-0.024, 0.693, 1, 1.305, 1.913, 0.032, 0.060],
    ),
    (
        functools.partial(slopes, KimiK25Loss(tau=0.01, tau_on="kept")),
        [0, -0.707, -1, -1.295, -1.887, 0, 0],
        [0, 0.693, 1, 1.305, 1.913, 0, 0],
    ),
    # no factor rho: A - tau log rho
    (functools.partial(slopes, KimiK15Loss(0.01)), -1 + 0.01 * np.log(RATIOS), 1 + 0.01 * np.log(RATIOS)),
]
NAMES = ["ppo", "dual", "dapo", "cispo", "icepop", "k2.5 tau=0", "k2.5 tau=.01", "k2.5 tau=.01 kept", "k1.5"]


@pytest.mark.parametrize(("gradient", "plus", "minus"), TABLE, ids=NAMES)
def test_gradient_table(gradient, plus, minus):
    """The published table, which has three decimals: 6e-4. Of the ends of an interval only CISPO's bound is on it."""
    if gradient is icepop:  # rho = 5 lies on the bound itself, where float32 decides; just inside it
        ratios, plus = np.where(RATIOS == 5, 4.9999, RATIOS), plus
    else:
        ratios = RATIOS
    np.testing.assert_allclose(gradient(ratios, 1.0), plus, atol=6e-4)
    np.testing.assert_allclose(gradient(ratios, -1.0), np.negative(plus) if minus is None else minus, atol=6e-4)


@given(st.floats(-6, 6), st.floats(1e-3, 5), st.sampled_from([-1, 1]))
def test_k25_has_no_policy_gradient_outside_and_rho_a_inside_but_ppo_has(d, size, sign):
    """Outside the bounds exactly 0 for both signs of A, inside -rho A; PPO with the same bounds fails the first."""
    d = float(np.float32(d))
    if min(abs(d - math.log(b)) for b in (0.5, 2.0)) < 1e-6:
        return  # float32 decides on which side it lies
    inside = math.log(0.5) < d < math.log(2.0)
    advantage = float(np.float32(sign * size))
    ours = slopes(KimiK25Loss(tau=0), [math.exp(d)], advantage)
    ppo = slopes(PPO(0.5, 1.0), [math.exp(d)], advantage)
    if inside:
        np.testing.assert_allclose(ours, -math.exp(d) * advantage, rtol=2e-5)
        np.testing.assert_allclose(ours, ppo, rtol=1e-6)
        return
    assert ours == 0.0
    outward = (d > 0) == (sign > 0)
    assert (ppo == 0.0) == outward, "PPO is one-sided: it keeps the gradient that leads back, however large"


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4))
@settings(max_examples=20)
def test_on_policy_all_objectives_are_reinforce_with_a_baseline(advantages):
    a = jnp.asarray(advantages, jnp.float32)[:, None]
    logp = jnp.full(a.shape, -1.5)
    for name, objective in OBJECTIVES.items():
        (_, metrics), grad = VALUE_AND_GRADIENT(
            logp, objective, logp, a, jnp.ones(a.shape), len(advantages), None, None
        )
        np.testing.assert_allclose(grad, -a / len(advantages), rtol=1e-6, err_msg=name)
        assert metrics["penalty"] == metrics["below"] == metrics["above"] == 0


@given(st.floats(0.7, 8), st.sampled_from([1e-3, 1e-2, 0.5]))
def test_tau_pulls_back_outside_linear_odd_and_against_the_drift(d, tau):
    """Outside [0.5, 2] only 2 tau d is left of the gradient (of the loss), so a step goes against d; none if masked."""
    d = float(np.float32(d))
    for sign in (1, -1):
        pull = slopes(KimiK25Loss(tau=tau), [math.exp(sign * d)], 1.0)
        np.testing.assert_allclose(pull, 2 * tau * sign * d, rtol=1e-5)
        assert slopes(KimiK25Loss(tau=tau, tau_on="kept"), [math.exp(sign * d)], 1.0) == 0.0


# --------------------------------------------------------------------------------------------------- rows and sequences


def responses(seed=0, lengths=(5, 3, 7, 1, 4, 6, 2, 5, 3, 3, 6, 1, 7, 2, 4, 5)):
    """Columns (logp, old, advantage, mask) of each response; about a quarter of the tokens is not the model's."""
    rng = np.random.default_rng(seed)
    out = []
    for n in lengths:
        old = -rng.exponential(1.0, n)
        mask = rng.random(n) < 0.75
        mask[-1] = True
        out.append([old + 0.5 * rng.normal(size=n), old, np.full(n, rng.normal()), mask])
    return out


def lay(parts, rows, width, per_row):
    """Responses in rows of `width`, `per_row` in each; sequences are numbered from 1 in a row, 0 is padding."""
    columns = [np.full((rows, width), v, np.float32) for v in (-np.inf, 0, np.nan)] + [np.zeros((rows, width), bool)]
    sequences = np.zeros((rows, width), np.int32)
    where = []
    for k, part in enumerate(parts):
        row, start = k // per_row, sum(len(p[0]) for p in parts[k - k % per_row : k])
        place = np.s_[row, start : start + len(part[0])]
        for column, values in zip(columns, part, strict=True):
            column[place] = values
        sequences[place] = k % per_row + 1
        where.append(place)
    return [*columns, sequences], where


def padded():
    return lay(responses(), 16, 8, 1)


def packed():
    return lay(responses(), 8, 16, 2)


SPLITS = list(itertools.product((padded, packed), (1, 2, 4), (1, 8)))
REDUCED = [(name, *split) for name in ("k2.5", "gspo") for split in SPLITS]
REDUCED += [(name, packed, 2, 8) for name in OBJECTIVES if name not in ("k2.5", "gspo")]


@pytest.mark.parametrize(("name", "layout", "parts", "devices"), REDUCED)
def test_reducer_is_the_same_for_microbatches_packing_padding_and_devices(name, layout, parts, devices):
    """Loss, metrics and every token's gradient are those of the whole padded batch on one device: 1e-6.

    Relative to the largest gradient of a token; a second division (by rows, by microbatches) would be far off.
    """
    objective = OBJECTIVES[name]
    whole, places = padded()
    n = int(whole[3].sum())

    def evaluate(columns):
        logp, old, a, mask, sequences = columns
        weight = losses.sequence_mean_weight(mask, n, len(places), sequences)
        return VALUE_AND_GRADIENT(logp, objective, old, a, mask, n, sequences, weight)

    (loss, metrics), grad = evaluate([jnp.asarray(c) for c in whole])
    columns, other_places = layout()
    pieces = [np.split(c, parts) for c in columns]
    # at least one row a device
    pieces = [[np.pad(x, ((0, -len(x) % devices), (0, 0))) for x in piece] for piece in pieces]
    rows = len(columns[0]) // parts
    if devices > 1:
        mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data", "context")))
    else:
        place = jnp.asarray
    results = [evaluate([place(x) for x in piece]) for piece in zip(*pieces, strict=True)]
    np.testing.assert_allclose(sum(float(r[0][0]) for r in results), loss, rtol=1e-6, atol=1e-6)
    for key, value in metrics.items():
        np.testing.assert_allclose(sum(float(r[0][1][key]) for r in results), value, rtol=2e-6, atol=1e-6)
    joined = np.concatenate([np.asarray(r[1])[:rows] for r in results])
    for here, there in zip(places, other_places, strict=True):
        np.testing.assert_allclose(joined[there], grad[here], rtol=1e-6, atol=1e-6 * np.abs(grad).max())


ODD = st.sampled_from([np.nan, np.inf, -np.inf, 1e30, 0.0])


@given(st.data())
@settings(max_examples=20)
def test_masked_tokens_change_nothing_whatever_they_hold(data):
    """Prompt, tool results, images, padding: the same bits as with zeros, for every objective, weights included."""
    columns, _ = packed()
    mask, sequences = columns[3], jnp.asarray(columns[4])
    odd = [np.where(mask, c, np.float32(data.draw(ODD))) for c in columns[:3]]
    weight = np.where(mask, np.float32(1.5), np.float32(data.draw(ODD)))
    zeros = [np.where(mask, c, np.float32(0)) for c in (*columns[:3], weight)]
    for name, objective in OBJECTIVES.items():
        args = [jnp.asarray(x) for x in (*odd, weight)], [jnp.asarray(x) for x in zeros]
        got, want = (
            VALUE_AND_GRADIENT(p, objective, old, a, jnp.asarray(mask), 50, sequences, w) for p, old, a, w in args
        )
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=name), got, want)
        assert not np.asarray(got[1])[~mask].any()


@EACH
@pytest.mark.parametrize("d", [1e4, -1e4, 100.0, -100.0, 20.0])
def test_far_tokens_stay_finite(objective, d):
    """|d| up to 1e4 with advantages of 1e6, beside ordinary tokens of the same response."""
    logp = jnp.asarray([[-1.0, d, -2.0, -0.5]])
    for a in (1e6, -1e6):
        advantage = jnp.full(logp.shape, a)
        old = jnp.asarray([[-1.1, 0.0, -1.9, -0.5]])
        out = VALUE_AND_GRADIENT(logp, objective, old, advantage, jnp.ones(logp.shape), 4, None, None)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


@pytest.mark.parametrize("name", ["k2.5", "ppo", "gspo"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_of_either_precision(name, dtype):
    """The gradient on logits in bfloat16 is that of the same numbers in float32, rounded once: 2^-8 of the largest."""
    rng = np.random.default_rng(3)
    logits = jnp.asarray(4 * rng.normal(size=(2, 6, 11)), dtype)
    tokens = jnp.asarray(rng.integers(11, size=(2, 6, 1)))
    old = jnp.asarray(-rng.exponential(2.0, (2, 6)), jnp.float32)
    a = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)

    def loss(x):
        logp = jnp.take_along_axis(jax.nn.log_softmax(x.astype(jnp.float32)), tokens, -1)[..., 0]
        return objective_loss(OBJECTIVES[name], logp, old, a, jnp.ones((2, 6)), 12)[0]

    gradient = jax.jit(jax.grad(loss))
    grad, want = gradient(logits), gradient(logits.astype(jnp.float32))
    assert grad.dtype == dtype and np.isfinite(np.asarray(grad, np.float32)).all()
    np.testing.assert_allclose(np.asarray(grad, np.float32), want, atol=2**-8 * float(jnp.abs(want).max()))


# ------------------------------------------------------------------------------------------------ sequence level, GRPO


def test_gspo_is_the_papers_for_each_response():
    """1/J sum_j s_j A_j: the gradient at each token is s A / |y| / J, none for a response that left its bounds."""
    columns, _ = packed()
    logp, old, a, mask, sequences = columns
    counts = [(row, s, np.flatnonzero((sequences[row] == s) & mask[row])) for row in range(8) for s in (1, 2)]
    want = np.zeros(logp.shape)
    total = 0.0
    for row, _, at in counts:
        s, advantage = np.exp((logp[row] - old[row])[at].mean()), a[row, at[0]]
        bounded = np.clip(s, 0.9, 1.2)
        total += min(s * advantage, bounded * advantage) / len(counts)
        if s * advantage <= bounded * advantage:
            want[row, at] = -s * advantage / len(at) / len(counts)
    n = int(mask.sum())
    weight = losses.sequence_mean_weight(jnp.asarray(mask), n, len(counts), jnp.asarray(sequences))
    for objective in (GSPO(0.1, 0.2), GSPO(0.1, 0.2, "token")):
        arguments = [jnp.asarray(x) for x in (old, a, mask)]
        (loss, _), grad = VALUE_AND_GRADIENT(
            jnp.asarray(logp), objective, *arguments, n, jnp.asarray(sequences), weight
        )
        np.testing.assert_allclose(loss, -total, rtol=1e-5)
        np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-8)


def test_k15_is_the_squared_log_ratio_of_the_response():
    """A sum log pi - tau/2 D^2: at each token -(A - tau D) / N; and K2's square has that times 2 tau."""
    columns, _ = padded()
    logp, old, a, mask = (jnp.asarray(c) for c in columns[:4])
    n, tau = 50, 0.1
    _, grad = VALUE_AND_GRADIENT(logp, KimiK15Loss(tau), old, a, mask, n, None, None)
    d = np.where(mask, np.where(mask, columns[0], 0) - columns[1], 0).sum(1, keepdims=True)
    np.testing.assert_allclose(grad, np.where(mask, -(columns[2] - tau * d) / n, 0), rtol=1e-4, atol=1e-8)

    def square(logp):
        total = jnp.where(mask, logp - old, 0).sum(1)
        return ((jnp.nanmean(jnp.where(mask, a, jnp.nan), axis=1) - tau * total) ** 2).sum() / n

    clean = jnp.where(mask, logp, 0)
    np.testing.assert_allclose(jax.grad(square)(clean), 2 * tau * np.asarray(grad), rtol=1e-4, atol=1e-8)


def test_grpo_mean_is_a_weight():
    """Mean over responses of each one's token mean, in NumPy; without the weight it is the mean over tokens."""
    columns, places = packed()
    logp, old, a, mask, sequences = columns
    n = int(mask.sum())
    ratio = np.exp(np.where(mask, np.where(mask, logp, 0) - old, 0))
    token = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    means = [token[place][mask[place]].mean() for place in places]
    weight = losses.sequence_mean_weight(jnp.asarray(mask), n, len(places), jnp.asarray(sequences))
    arguments = [jnp.asarray(x) for x in (logp, old, a, mask)]
    grpo = objective_loss(PPO(), *arguments, n, weight=weight)[0]
    np.testing.assert_allclose(grpo, -np.mean(means), rtol=1e-5)
    np.testing.assert_allclose(objective_loss(PPO(), *arguments, n)[0], -token[mask].mean(), rtol=1e-5)


# ------------------------------------------------------------------------------------------------- mismatch and metrics


def test_mismatch_weights_by_value():
    kappa = np.array([[0.1, 0.5, 1.0, 1.9, 2.5, 7.0]])
    d, zero = jnp.log(jnp.asarray(kappa, jnp.float32)), jnp.zeros((1, 6))
    np.testing.assert_allclose(losses.tis_weight(d, zero), np.minimum(kappa, 2), rtol=1e-6)
    popped = losses.icepop_weight(d, zero, 0.4, 5.0)
    np.testing.assert_allclose(popped, np.where((kappa >= 0.4) & (kappa <= 5), kappa, 0), rtol=1e-6)
    for weigh in (losses.tis_weight, losses.icepop_weight):
        grad = jax.grad(lambda x, weigh=weigh: weigh(x, zero).sum())(jnp.where(d > 1, 200.0, d))
        assert not np.asarray(grad).any()


@EACH
def test_mismatch_is_an_orthogonal_factor(objective):
    """A constant weight c scales the policy part of the gradient by c and leaves the penalty alone."""
    columns, _ = packed()
    logp, old, a, mask, sequences = (jnp.asarray(c) for c in columns)
    weight = jnp.full(logp.shape, 3.0)
    (_, once), grad = VALUE_AND_GRADIENT(logp, objective, old, a, mask, 50, sequences, None)
    (_, thrice), heavy = VALUE_AND_GRADIENT(logp, objective, old, a, mask, 50, sequences, weight)
    _, still = VALUE_AND_GRADIENT(logp, objective, old, a, mask, 50, sequences, 0 * weight)
    np.testing.assert_allclose(thrice["policy"], 3 * once["policy"], rtol=1e-5)  # a sum of about 45 terms in float32
    np.testing.assert_allclose(thrice["penalty"], once["penalty"], rtol=1e-5)
    np.testing.assert_allclose(heavy - still, 3 * (grad - still), rtol=1e-4, atol=1e-7)


def test_metrics_tell_sides_and_kept_from_masked():
    """Shares below and above apart; k1 and k3 of kept and masked tokens; the largest |d|; entropy if given."""
    d = np.log(np.array([[0.3, 0.9, 1.5, 2.5, 4.0, 1.0]]))
    mask = jnp.asarray([[1, 1, 1, 1, 1, 0]])
    zero, entropy = jnp.zeros((1, 6)), jnp.arange(6.0)[None]
    _, m = objective_loss(KimiK25Loss(), jnp.asarray(d, jnp.float32), zero, zero, mask, 5, entropy=entropy)
    kept, d = np.array([0, 1, 1, 0, 0], bool), d[0, :5]
    k3 = np.expm1(d) - d
    want = {
        "below": 1 / 5, "above": 2 / 5, "mismatch_kl": k3.mean(), "k3_masked": k3[~kept].sum() / 5,
        "k1_kept": -d[kept].sum() / 5, "k1_masked": -d[~kept].sum() / 5, "entropy": 2.0,
    }  # fmt: skip
    for name, value in want.items():
        np.testing.assert_allclose(m[name], value, rtol=1e-5, err_msg=name)
    far = losses.max_log_ratio(jnp.log(jnp.asarray([[0.3, 9.0]])), jnp.zeros((1, 2)), mask[:, -2:])
    np.testing.assert_allclose(far, -math.log(0.3), rtol=1e-6)
    assert losses.max_log_ratio(zero, zero, 0 * mask) == 0


@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4), st.floats(0.1, 4))
def test_group_mean_without_deviation(rewards, scale):
    """Equal rewards: no policy gradient. A constant on all changes nothing, a factor scales the gradient with it."""
    columns, _ = padded()
    logp, old, _, mask = (jnp.asarray(c[:4]) for c in columns[:4])

    def gradient(r):
        a = jnp.asarray((r - r.mean())[:, None], jnp.float32) * jnp.ones(logp.shape)
        return np.asarray(VALUE_AND_GRADIENT(logp, KimiK25Loss(tau=0), old, a, mask, 20, None, None)[1])

    r = np.array(rewards)
    base = gradient(r)
    assert not gradient(np.full(4, r[0])).any()
    np.testing.assert_allclose(gradient(r + 7), base, atol=2e-6)
    np.testing.assert_allclose(gradient(scale * r), scale * base, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: KimiK25Loss(tau_on="some"), "tau_on"),
        (lambda: KimiK25Loss(alpha=1.1), "bound the ratio"),
        (lambda: PPO(low=1.0), "clipped to"),
        (lambda: PPO(high=float("nan")), "clipped to"),
        (lambda: PPO(dual_clip=1.1), "dual_clip"),
        (lambda: GSPO(low=0.0), "clipped to"),
        (lambda: GSPO(level="word"), "level"),
        (lambda: CISPO(0.2), "ratio_max"),
        (lambda: KimiK15Loss(-1.0), "tau"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
