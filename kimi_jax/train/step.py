"""One training step: loss -> gradients -> MuonClip -> QK-clip -> router bias, a single jitted function.

Paper sections 2.4 and 2.5 (MuonClip), reference.md section 1.4 (router bias). Whatever the step needs to know about the
forward pass (max logits, expert load) comes back from it in `Aux`.

B rows, S tokens, L layers, Lm layers with experts, E experts, H heads, 3 modalities (text, image, video)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kimi_jax import sharding
from kimi_jax.config import TrainConfig
from kimi_jax.nn.kimi import KimiK25
from kimi_jax.optim import qk_clip, router_bias, schedules
from kimi_jax.optim.muonclip import muonclip, step_metrics
from kimi_jax.train import flops, spikes
from kimi_jax.train import state as state_lib
from kimi_jax.train.state import TrainState

MODALITIES = ("text", "image", "video")
Metrics = dict[str, Any]


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """MuonClip for this model's parameter groups."""
    return muonclip(config.optimizer, config.steps, state_lib.infos(config.model))


def make_train_step(
    config: TrainConfig, mesh: Mesh | None = None
) -> tuple[Callable[[], TrainState], Callable[[TrainState, Any], tuple[TrainState, Metrics]]]:
    """Returns (init_state, train_step).

    init_state() makes the state of `config.seed` directly in its shardings. train_step(state, batch) returns (state,
    metrics) and gives up (donates) the state it is passed; `batch` is a packed batch, on the host or from
    `sharding.put_batch`.
    Both are jitted. Raises ShardingError if the groups of a batch cannot be cut evenly over the mesh.
    """
    mesh = mesh or sharding.make_mesh(config.mesh)
    sharding.check_groups(config.data.num_groups, mesh)
    tx = make_optimizer(config)
    shardings = state_lib.shardings(config.model, tx, mesh)
    whole = sharding.replicated(mesh)
    init = jax.jit(lambda key: state_lib.create(config.model, tx, key), out_shardings=shardings)
    step = jax.jit(
        lambda state, batch: _train_step(config, tx, state, batch),
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, whole),
    )
    return lambda: init(jax.random.key(config.seed)), step


def loss_fn(params: Any, batch: dict[str, Any], config: TrainConfig) -> tuple[jax.Array, Metrics]:
    """Next-token loss of a batch, normalised by its global weight, plus the weighted balance loss.

    Returns (float32 [], {"nll_sum" [3], "weight_sum" [3]: by modality, "balance_loss" [], "aux": the model's Aux}).
    """
    model = KimiK25(config.model)
    nll, aux = model.apply({"params": params}, batch, num_groups=config.data.num_groups, method=model.token_nll)
    weights = batch["loss_weights"]
    of_modality = batch["modality"][None] == jnp.arange(len(MODALITIES))[:, None, None]  # [3, B, S]
    nll_sum = jnp.sum(jnp.where(of_modality, weights * nll, 0.0), axis=(1, 2))
    weight_sum = jnp.sum(jnp.where(of_modality, weights, 0.0), axis=(1, 2))
    # a batch without any target has loss 0, not 0/0
    loss = jnp.sum(nll_sum) / jnp.maximum(jnp.sum(weight_sum), 1e-6)
    total = loss + config.optimizer.balance_loss_weight * aux.balance_loss
    return total, {"nll_sum": nll_sum, "weight_sum": weight_sum, "balance_loss": aux.balance_loss, "aux": aux}


def _train_step(
    config: TrainConfig, tx: optax.GradientTransformation, state: TrainState, batch: dict[str, Any]
) -> tuple[TrainState, Metrics]:
    options = config.optimizer
    (loss, out), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, config)
    aux = out.pop("aux")
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, clip = qk_clip.apply(params, aux.max_logits, options.qk_clip_tau)
    if config.model.moe is not None:
        params = router_bias.apply(params, aux.expert_load, options.router_bias_rate)

    optimizer = step_metrics(grads, updates, state_lib.infos(config.model))
    finite = jnp.isfinite(loss) & jnp.isfinite(optimizer["grad_norm"])
    spike = finite & spikes.is_spike(config.recovery, state, loss)
    new = _advance(state, params, opt_state, loss, finite & ~spike)
    metrics = {
        **out,
        **flops.batch_counts(batch),
        **optimizer,
        "loss_total": loss,
        "finite": finite,
        "spike": spike,
        "skipped_in_row": new.skipped_in_row,
        "max_logits": jnp.max(aux.max_logits, axis=-1),
        "clipped_heads": clip["clipped_heads"],
        "expert_load": aux.expert_load,
        "dropped": aux.dropped,
        # the optimizer counts the updates it made, not the batches it saw
        "lr": schedules.wsd(options, config.steps)(state.step - state.skipped),
    }
    return new, metrics


def _advance(state: TrainState, params: Any, opt_state: Any, loss: jax.Array, sound: jax.Array) -> TrainState:
    """The next state; weights and optimizer stay as they were when the update is not sound."""

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(sound, new, old)

    missed = 1 - sound.astype(jnp.int32)
    loss_mean, loss_square = spikes.advance(state, loss)
    return TrainState(
        step=state.step + 1,
        skipped=state.skipped + missed,
        skipped_in_row=(state.skipped_in_row + missed) * missed,
        loss_mean=keep(loss_mean, state.loss_mean),
        loss_square=keep(loss_square, state.loss_square),
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
    )
