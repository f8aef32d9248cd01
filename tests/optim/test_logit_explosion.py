"""Training whose attention logits explode without QK-clip, and stay at tau = 100 plus one step's growth with it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kimi_jax.config import OptimizerConfig
from kimi_jax.nn.kimi import KimiK25
from kimi_jax.optim import muonclip, qk_clip
from tests.optim import tiny

STEPS = 200
# One layer, so that clipping a head changes nothing that another measured head sees. Muon's steps have a fixed length
# however small the gradient, and nothing decays here: the weights grow and the logits with their product.
MODEL = dataclasses.replace(tiny.CONFIG, num_hidden_layers=1, moe=None)
RECIPE = OptimizerConfig(peak_lr=0.15, final_lr=0.15, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0)


@functools.cache
def start():
    """(parameters, optimizer state, compiled training step without QK-clip)."""
    params, infos = tiny.build(MODEL, std=0.02)
    batch = tiny.text_batch(4, 16, MODEL.vocab_size)
    optimizer = muonclip(RECIPE, STEPS, infos)

    def loss(params):
        nll, aux = KimiK25(MODEL).apply({"params": params}, batch, method="token_nll")
        weights = batch.loss_weights
        return jnp.sum(weights * nll) / jnp.sum(weights), aux.max_logits

    @jax.jit
    def step(params, state):
        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        growth = tiny.max_logits(MODEL, params, batch) - logits
        return params, state, logits, growth, value

    return params, optimizer.init(params), step


def train(tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Max logits [STEPS,H] in each forward pass, their growth by each update before clipping [STEPS,H], losses."""
    params, state, step = start()
    clip = jax.jit(functools.partial(qk_clip.apply, tau=tau))
    history = []
    for _ in range(STEPS):
        params, state, logits, growth, value = step(params, state)
        params, _ = clip(params, logits)
        history.append((logits[0], growth[0], value))
    return tuple(np.asarray(x, np.float64) for x in zip(*history, strict=True))


def test_logits_explode_without_qk_clip_and_stay_at_tau_with_it():
    free, _, free_losses = train(tau=0.0)
    assert free.max() > 1000
    assert free_losses[-1] < 0.5 * free_losses[0]  # it was a training run, not only noise

    held, growth, losses = train(tau=100.0)
    # The clip uses the logits of the forward pass before the update, as in the paper; so the next pass sees
    # gamma (S + growth) <= tau + growth. 1e-3 relative: rounding of two differently compiled forward passes.
    assert np.all(held[1:] <= (100.0 + np.maximum(growth[:-1], 0.0)) * (1 + 1e-3))
    assert held.max() < 150
    assert np.isfinite(losses).all() and losses[-1] < 0.5 * losses[0]
