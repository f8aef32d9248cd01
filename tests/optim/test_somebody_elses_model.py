"""MuonClip alone, with the defaults of K2.5, on a Linen model that knows nothing of ours: 20 lines of flax layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import kimi_jax as kimi
from kimi_jax.optim import AdamW, Frozen, Muon, muonclip, param_groups, qk_clip
from kimi_jax.optim.schedules import wsd
from tests.optim import oracle

VOCAB, WIDTH, HEADS, LAYERS = 32, 32, 2, 2


class Model(nn.Module):
    """Causal attention and a GELU MLP; returns logits and the largest attention logit of each head [L, H]."""

    @nn.compact
    def __call__(self, tokens):
        x, largest, split = nn.Embed(VOCAB, WIDTH, name="embed")(tokens), [], (HEADS, WIDTH // HEADS)
        mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        for n in range(LAYERS):
            h = nn.RMSNorm(name=f"norm_{n}")(x)
            q, k, v = (nn.DenseGeneral(split, name=f"{part}_{n}")(h) for part in ("query", "key", "value"))
            logits = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) * split[1] ** -0.5, -1e9)
            largest.append(logits.max((0, 2, 3)))
            h = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), v)
            x = x + nn.DenseGeneral(WIDTH, (-2, -1), name=f"out_{n}")(h)
            h = nn.gelu(nn.Dense(4 * WIDTH, name=f"up_{n}")(nn.RMSNorm(name=f"mlp_norm_{n}")(x)))
            x = x + nn.Dense(WIDTH, name=f"down_{n}")(h)
        return nn.Dense(VOCAB, use_bias=False, name="head")(x), jnp.stack(largest)


RULES = {
    "embed.embedding": AdamW(), "head.kernel": AdamW(), "*.bias": AdamW(),
    "query_*.kernel": Muon(rows=1), "key_*.kernel": Muon(rows=1), "value_*.kernel": Muon(rows=1),
    "out_*.kernel": Muon(rows=2),
}  # fmt: skip
STEPS = 60
# the defaults are those of K2.5; the schedule has to fit into the run, and a tiny model takes a higher rate
CONFIG = kimi.OptimizerConfig(warmup_steps=5, peak_lr=5e-3, final_lr=5e-4)
NEXT = np.random.default_rng(0).permutation(VOCAB)


def batch(seed):
    """Rows that follow one permutation of the vocabulary from a random start."""
    rows = [np.random.default_rng(seed).integers(0, VOCAB, 8)]
    for _ in range(12):
        rows.append(NEXT[rows[-1]])
    return jnp.asarray(np.stack(rows, 1))


def loss(params, tokens):
    logits, largest = Model().apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), largest


@pytest.fixture(scope="module")
def params():
    return jax.jit(Model().init)(jax.random.key(0), batch(0))["params"]


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def train(params, config, tau=100.0, rules=RULES):
    """(losses, largest logits of each step, parameters): gradients, MuonClip, then QK-clip by hand."""
    tx = muonclip(config, STEPS, param_groups(params, rules))

    @jax.jit
    def step(params, state, tokens):
        (value, largest), grads = jax.value_and_grad(loss, has_aux=True)(params, tokens)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for n, gamma in enumerate(qk_clip.scale_factors(largest, tau)):
            for part in (f"query_{n}", f"key_{n}"):  # each takes the root, so that their product takes gamma
                kernel, bias = params[part]["kernel"], params[part]["bias"]
                root = jnp.sqrt(gamma)[:, None]
                params[part] = {"kernel": kernel * root, "bias": bias * root}
        return params, state, value, largest

    state, losses, logits = jax.jit(tx.init)(params), [], []
    for n in range(STEPS):
        params, state, value, largest = step(params, state, batch(n))
        losses.append(float(value))
        logits.append(float(largest.max()))
    return np.array(losses), np.array(logits), params


def test_defaults_are_those_of_k2_5():
    """Kimi K2 (arXiv 2507.20534) and Moonlight (2502.16982): tau 100, decay 0.1, RMS 0.2, momentum 0.95, Nesterov."""
    c = kimi.OptimizerConfig()
    assert (c.qk_clip_tau, c.weight_decay, c.update_rms) == (100, 0.1, 0.2)
    assert (c.muon_momentum, c.muon_nesterov, c.newton_schulz_steps) == (0.95, True, 5)


def test_update_is_that_of_the_second_implementation(params):
    """One step against NumPy in float64, every leaf; float32 and five Newton-Schulz steps leave 1e-4."""
    infos = param_groups(params, RULES)
    tokens = batch(3)
    grads = jax.jit(jax.grad(lambda p: loss(p, tokens)[0]))(params)
    tx = muonclip(CONFIG, STEPS, infos)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    wide = {name: np.asarray(x, np.float64) for name, x in flat(params).items()}
    reference = oracle.MuonClip(dict(wide), {name: info.group for name, info in flat(infos).items()}, CONFIG)
    reference.step({name: np.asarray(g, np.float64) for name, g in flat(grads).items()}, float(wsd(CONFIG, STEPS)(0)))
    for name, update in flat(updates).items():
        want = reference.params[name] - wide[name]
        assert np.abs(update - want).max() <= 1e-4 * np.abs(want).max() + 1e-9, name


def test_model_learns_and_without_a_learning_rate_does_not(params):
    losses, _, _ = train(params, CONFIG)
    assert losses[-5:].mean() < 0.3 and losses[0] > 3  # log 32 = 3.47
    still, _, _ = train(params, dataclasses.replace(CONFIG, peak_lr=1e-9, final_lr=1e-9))
    assert still[-5:].mean() > 3


def test_qk_clip_holds_the_logits_of_somebody_elses_attention(params):
    """Of a step's logits over tau the next step's are at most tau, up to what one update adds; without it they grow."""
    _, free, _ = train(params, CONFIG, tau=1e9)
    _, clipped, _ = train(params, CONFIG, tau=2.0)
    assert free[-10:].max() > 4.0 and clipped[-10:].max() < 3.0


def test_frozen_leaves_stay_and_have_no_state(params):
    rules = {"up_0.*": Frozen()} | RULES
    _, _, after = train(params, CONFIG, rules=rules)
    for name, leaf in flat(after).items():
        assert np.array_equal(leaf, flat(params)[name]) == name.startswith("up_0."), name
    tx = muonclip(CONFIG, STEPS, param_groups(params, rules))
    assert not [path for path in flat(tx.init(params)) if ".up_0." in path]
    updates, _ = tx.update(params, tx.init(params), params)
    assert not np.any(updates["up_0"]["kernel"])


def test_groups_of_what_cannot_be_guessed_have_to_be_named(params):
    with pytest.raises(TypeError, match=r"query_0\.kernel has 3 axes \(32, 2, 16\); say which are inputs with a rule"):
        param_groups(params, {"out_*.kernel": Muon(rows=2), "key_*": AdamW(), "value_*": AdamW()})
    with pytest.raises(ValueError, match=r"the rule 'embed\.embeding' matches no parameter \(did you mean 'embed\.emb"):
        param_groups(params, RULES | {"embed.embeding": AdamW()})
    infos = flat(param_groups(params, RULES))
    assert infos["up_1.kernel"].group == Muon() and infos["norm_0.scale"].group == AdamW()
    assert infos["query_0.bias"].group == AdamW() and infos["out_1.kernel"].group == Muon(rows=2)
