"""What a training step minimises, as a value, and how its metrics are reduced.

An `Objective` sees the log-probabilities of the targets and the packed batch, nothing of the model or the optimizer; so
pre-training and SFT (`next_token`) and reinforcement learning (`kimi_jax.rl.objective.policy`) share one step.

Losses and gradients are divided by `totals` of the *global* batch. Those of microbatches and devices therefore add up
to those of the whole batch, whatever it was divided into; a mean of means would weigh a token by the part it is in.

A metric says where it is made how it is reduced over microbatches, steps of a log interval and hosts: `Mean`, `Sum`,
`Max` or `Last`. `kimi_jax.train.metrics` makes rows of the log of them.

B rows   S tokens   M microbatches
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.packed_batch import PackedBatch

MODALITIES = ("text", "image", "video")
Totals = Mapping[str, jax.Array]  # sums over the global batch, float32 [] each

# -------------------------------------------------------------------------------------------------------------- metrics


class Mean(NamedTuple):
    """A mean by weight: totals and weights are summed and divided once, when a row is logged.

    Steps whose update was left out do not enter. A weight of 0 in all gives no value.
    """

    total: Any
    weight: Any

    def merged(self) -> Mean:
        """Of microbatches [M, ...], stacked."""
        return Mean(self.total.sum(axis=0), self.weight.sum(axis=0))

    def add(self, other: Mean) -> Mean:
        """With the same metric of the next step."""
        return Mean(self.total + other.total, self.weight + other.weight)


class Sum(NamedTuple):
    """A count, over all steps, with an update or without."""

    value: Any

    def merged(self) -> Sum:
        """Of microbatches [M, ...], stacked."""
        return Sum(self.value.sum(axis=0))

    def add(self, other: Sum) -> Sum:
        """With the same metric of the next step."""
        return Sum(self.value + other.value)


class Max(NamedTuple):
    """The largest of all steps, with an update or without."""

    value: Any

    def merged(self) -> Max:
        """Of microbatches [M, ...], stacked."""
        return Max(self.value.max(axis=0))

    def add(self, other: Max) -> Max:
        """With the same metric of the next step."""
        return Max(np.maximum(self.value, other.value))


class Last(NamedTuple):
    """The value of the last step, with an update or without."""

    value: Any

    def merged(self) -> Last:
        """Of microbatches [M, ...], stacked."""
        return Last(self.value[-1])

    def add(self, other: Last) -> Last:
        """With the same metric of the next step."""
        return other


Metric = Mean | Sum | Max | Last
Metrics = dict[str, Metric]


def merge_microbatches(metrics: Metrics) -> Metrics:
    """The metrics of a batch from those of its microbatches, stacked on axis 0."""
    return {name: metric.merged() for name, metric in metrics.items()}


# ------------------------------------------------------------------------------------------------------------ objective


class Objective(NamedTuple):
    """A loss of the targets' log-probabilities.

    columns:     names of the batch's `columns` that it reads.
    totals:      batch -> sums over the global batch by which `loss` divides.
    loss:        (log p(target) float32 [B, S], batch or part, totals of the global batch) -> (float32 [], metrics).
                 It must be a sum over tokens divided by totals, so that the losses of microbatches add up. Every
                 objective has a metric "loss", which is what the progress line shows.
    temperature: T > 0; log-probabilities are those of softmax(logits / T), as a sampler of temperature T draws.
    """

    columns: tuple[str, ...]
    totals: Callable[[PackedBatch], Totals]
    loss: Callable[[jax.Array, PackedBatch, Totals], tuple[jax.Array, Metrics]]
    temperature: float = 1.0


def check_columns(objective: Objective, batch: PackedBatch) -> None:
    """Raises ValueError if the batch lacks a column of the objective, or one is not float32 [B, S]."""
    shape = tuple(batch.targets.shape)
    for name in objective.columns:
        if name not in batch.columns:
            there = ", ".join(batch.columns) or "none"
            raise ValueError(f"the objective needs the column {name!r} in every batch; there are: {there}")
        found = batch.columns[name]
        if tuple(found.shape) != shape or found.dtype != jnp.float32:
            raise ValueError(f"column {name!r} of a batch must be float32 {shape}, not {found.dtype} {found.shape}")


def next_token() -> Objective:
    """Pre-training and SFT: the mean of -log p(target) by the batch's loss weights.

    Metrics: `loss`, and `loss_text`, `loss_image`, `loss_video` by the modality of the document, in nats a target.
    """

    def totals(batch: PackedBatch) -> Totals:
        return {"weight": jnp.sum(_by_modality(batch, batch.loss_weights))}

    def loss(logp: jax.Array, batch: PackedBatch, totals: Totals) -> tuple[jax.Array, Metrics]:
        weights = batch.loss_weights
        nll, weight = _by_modality(batch, weights * -logp), _by_modality(batch, weights)
        metrics: Metrics = {f"loss_{name}": Mean(nll[i], weight[i]) for i, name in enumerate(MODALITIES)}
        metrics["loss"] = Mean(jnp.sum(nll), jnp.sum(weight))
        # a batch without any target has loss 0, not 0/0
        return jnp.sum(nll) / jnp.maximum(totals["weight"], 1e-6), metrics

    return Objective((), totals, loss)


def _by_modality(batch: PackedBatch, values: jax.Array) -> jax.Array:
    """Sums [3] of [B, S]."""
    of_modality = batch.modality[None] == jnp.arange(len(MODALITIES))[:, None, None]
    return jnp.sum(jnp.where(of_modality, values, 0.0), axis=(1, 2))
