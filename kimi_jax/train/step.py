"""One training step: loss -> gradients -> MuonClip -> QK-clip -> router bias, a single jitted function.

Source: docs/paper_notes.md sections 2.4 and 2.5 (MuonClip), docs/released_model.md section 1.4 (router bias). Whatever
the step needs to know about the forward pass (max logits, expert load) comes back from it in `Aux`; what is minimised
is an `Objective` (`kimi_jax.train.objective`).

B rows, S tokens, L layers, Lm layers with experts, E experts, H heads
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from kimi_jax import sharding
from kimi_jax.config import ConfigError, TrainConfig
from kimi_jax.nn import lora, param
from kimi_jax.nn.decoder import merge_aux
from kimi_jax.nn.kimi import KimiK25
from kimi_jax.nn.layout import Layout
from kimi_jax.optim import newton_schulz, qk_clip, router_bias
from kimi_jax.optim.muonclip import MuonClip, muonclip, step_metrics
from kimi_jax.packed_batch import PackedBatch
from kimi_jax.train import flops, spikes
from kimi_jax.train import state as state_lib
from kimi_jax.train.objective import (
    Last,
    Max,
    Mean,
    Objective,
    Sum,
    Totals,
    check_columns,
    merge_microbatches,
    next_token,
)
from kimi_jax.train.state import TrainState


def make_optimizer(config: TrainConfig, mesh: Mesh | None = None) -> MuonClip:
    """MuonClip for this model's parameter groups.

    mesh: Newton-Schulz is distributed to its devices. The state is the same with and without.
    """
    layout = None if mesh is None else make_layout(config, mesh)
    dtype = newton_schulz.default_dtype(None if mesh is None else mesh.devices.flat[0].platform)
    return muonclip(config.optimizer, config.steps, _infos(config), dtype, layout)


def _infos(config: TrainConfig) -> Any:
    return state_lib.infos(config.model, config.lora, config.freeze)


def make_train_step(
    config: TrainConfig,
    mesh: Mesh | None = None,
    objective: Objective | None = None,
    optimizer: MuonClip | None = None,
) -> tuple[Callable[[], TrainState], Callable[[TrainState, PackedBatch], tuple[TrainState, dict[str, Any]]]]:
    """Returns (init_state, train_step).

    objective: what is minimised; `next_token()` unless another is given. optimizer: that of `make_optimizer`, where the
    caller has it already.

    init_state() makes the state of `config.seed` directly in its shardings; of `config.lora` without `frozen`, which
    the caller has (`train.adapters`). train_step(state, batch) returns (state, metrics) and gives up (donates) the
    state it is passed; `batch` is a packed batch, on the host or from `sharding.put_batch`. `metrics` are reductions
    by name (`objective.Metric`), and the plain arrays loss_total, finite, spike, skipped_in_row: what the loop acts on.
    Both are jitted; `train_step.lower` also takes a mesh of devices that are not there (kimi_jax.plan).
    Raises ShardingError if the packs of a batch do not divide evenly over the mesh, ValueError (when `train_step` is
    traced) for a batch without the columns of the objective.
    """
    objective = objective or next_token()
    mesh = mesh or sharding.make_mesh(config.mesh)
    sharding.check_packs(config.data.num_packs, mesh, config.memory.microbatches)
    layout = make_layout(config, mesh)
    tx = optimizer or make_optimizer(config, mesh)
    shardings = state_lib.shardings(config.model, tx, mesh, config.lora)
    fresh = dataclasses.replace(shardings, frozen=None)
    whole = sharding.replicated(mesh)
    init = jax.jit(lambda key: state_lib.create(config.model, tx, key, config.lora), out_shardings=fresh)
    step = jax.jit(
        lambda state, batch: _train_step(config, tx, layout, objective, state, batch),
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, whole),
    )
    return lambda: init(jax.random.key(config.seed)), step


def make_layout(config: TrainConfig, mesh: Mesh) -> Layout | None:
    """How model and optimizer lie over the mesh; None on one device.

    Raises ConfigError for a `memory.reduce_dtype` that is neither "float32" nor "bfloat16".
    """
    if config.memory.reduce_dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"config.memory.reduce_dtype is 'float32' or 'bfloat16', not {config.memory.reduce_dtype!r}")
    if mesh.size == 1:
        return None
    # maximum logits below tau need not be exact: nothing follows from them
    tau = config.optimizer.qk_clip_tau or math.inf
    memory = config.memory
    return sharding.layout(
        mesh, expert_capacity_factor=memory.expert_capacity_factor, exact_above=tau, reduce_dtype=memory.reduce_dtype
    )


def loss_fn(
    params: Any,
    batch: PackedBatch,
    config: TrainConfig,
    layout: Layout | None = None,
    whole: tuple[Totals, jax.Array] | None = None,
    frozen: Any = None,
    objective: Objective | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """The objective's loss of a batch plus the weighted balance loss.

    whole: (totals, rows with tokens) of the batch that this one is a part of; the result is then its summand.
    frozen: with `config.lora` the weights; `params` are then its adapters.
    Returns (float32 [], {"metrics": the objective's, "balance_loss": float32 [], "aux": the model's Aux}).
    """
    objective = objective or next_token()
    check_columns(objective, batch)
    model = KimiK25(config.model, layout)
    variables = lora.variables(params, frozen, config.lora)
    nll, aux = model.apply(variables, batch, objective.temperature, method=model.token_nll)
    totals, balance = objective.totals(batch), aux.balance_loss
    if whole is not None:
        totals, balance = whole[0], balance * _rows(batch) / whole[1]
    loss, metrics = objective.loss(-nll, batch, totals)
    loss = loss + config.optimizer.balance_loss_weight * balance
    return loss, {"metrics": metrics, "balance_loss": balance, "aux": aux}


def _rows(batch: PackedBatch) -> jax.Array:
    """How many rows hold a token; at least 1."""
    return jnp.maximum(jnp.any(batch.segment_ids > 0, axis=1).sum(), 1).astype(jnp.float32)


def gradients(
    params: Any,
    batch: PackedBatch,
    config: TrainConfig,
    layout: Layout | None = None,
    frozen: Any = None,
    objective: Objective | None = None,
) -> tuple[tuple[jax.Array, dict[str, Any]], Any]:
    """((loss, what `loss_fn` returns beside it), gradients) of a batch, in one go or by gradient accumulation.

    The gradients have None in place of what `config.freeze` names, for which nothing is computed.

    Every device takes the same number of its own packs in each microbatch; gradients are accumulated in float32.
    """
    parts, objective = config.memory.microbatches, objective or next_token()
    infos = _infos(config)
    learned, fixed = param.learned(params, infos), param.frozen(params, infos)

    def of_learned(learned: Any, batch: PackedBatch, whole: Any = None) -> tuple[jax.Array, dict[str, Any]]:
        return loss_fn(param.join(learned, fixed), batch, config, layout, whole, frozen, objective)

    fn = jax.value_and_grad(of_learned, has_aux=True)
    if parts == 1:
        return fn(learned, batch)
    whole = objective.totals(batch), _rows(batch)

    def add(total: Any, part: PackedBatch) -> tuple[Any, tuple[jax.Array, dict[str, Any]]]:
        out, grads = fn(learned, part, whole)
        # XLA:TPU would move the reduction of gradients out of this loop and gets it wrong (openxla/xla#49143)
        grads = lax.optimization_barrier(grads)
        return jax.tree.map(jnp.add, total, grads), out

    start = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), learned)
    grads, (loss, out) = lax.scan(add, start, microbatches(batch, parts, layout))
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, learned)
    merged = {
        "metrics": merge_microbatches(out["metrics"]),
        "balance_loss": out["balance_loss"].sum(axis=0),
        "aux": merge_aux(out["aux"]),
    }
    return (loss.sum(), merged), grads


def microbatches(batch: PackedBatch, parts: int, layout: Layout | None = None) -> PackedBatch:
    """Every array [G*n, ...] as [parts, G*n/parts, ...]; packs stay whole and on their device."""
    devices = layout.parts("batch") if layout is not None else 1

    def divide(x: jax.Array) -> jax.Array:
        x = x.reshape(devices, parts, -1, *x.shape[1:]).swapaxes(0, 1)
        x = x.reshape(parts, -1, *x.shape[3:])
        return x if layout is None else layout.constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(divide, batch)


def _train_step(
    config: TrainConfig,
    tx: MuonClip,
    layout: Layout | None,
    objective: Objective,
    state: TrainState,
    batch: PackedBatch,
) -> tuple[TrainState, dict[str, Any]]:
    options = config.optimizer
    (loss, out), grads = gradients(state.params, batch, config, layout, state.frozen, objective)
    aux = out["aux"]
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    infos = _infos(config)
    params = optax.apply_updates(param.learned(state.params, infos), updates)
    params = param.join(params, param.frozen(state.params, infos))
    clipped = jnp.int32(0)
    if config.lora is None and param.learns(infos, "attention"):
        params, clip = qk_clip.apply(params, aux.max_logits, options.qk_clip_tau)
        clipped = clip["clipped_heads"]
    if config.lora is None and param.learns(infos, "router"):
        params = router_bias.apply(params, aux.expert_load, options.router_bias_rate)

    optimizer = step_metrics(grads, updates, infos)
    finite = jnp.isfinite(loss) & jnp.isfinite(optimizer["grad_norm"])
    spike = finite & spikes.is_spike(config.recovery, state, loss)
    new = _advance(state, params, opt_state, loss, finite & ~spike)
    metrics = {
        **out["metrics"],
        **{name: Sum(count) for name, count in flops.batch_counts(batch).items()},
        "balance_loss": Mean(out["balance_loss"], jnp.float32(1)),
        "grad_norm": Mean(optimizer.pop("grad_norm"), jnp.float32(1)),
        **{name: Last(value) for name, value in optimizer.items()},
        # the optimizer counts the updates it made, not the batches it saw
        "lr": Last(tx.learning_rate(state.step - state.skipped)),
        "max_logit": Max(jnp.max(aux.max_logits, axis=-1)),
        "clipped_heads": Sum(clipped),
        "expert_load": Sum(aux.expert_load),
        "dropped": Sum(aux.dropped),
        "rounds": Max(aux.rounds),
        "imbalance": Max(aux.imbalance),
        "loss_total": loss,
        "finite": finite,
        "spike": spike,
        "skipped_in_row": new.skipped_in_row,
    }
    return new, metrics


def _advance(state: TrainState, params: Any, opt_state: Any, loss: jax.Array, healthy: jax.Array) -> TrainState:
    """The next state; weights and optimizer stay as they were when the update is not healthy."""

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(healthy, new, old)

    missed = 1 - healthy.astype(jnp.int32)
    loss_mean, loss_square = spikes.advance(state, loss)
    return TrainState(
        step=state.step + 1,
        skipped=state.skipped + missed,
        skipped_in_row=(state.skipped_in_row + missed) * missed,
        loss_mean=keep(loss_mean, state.loss_mean),
        loss_square=keep(loss_square, state.loss_square),
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        frozen=state.frozen,
    )
