"""Decoder layers, their scan over stacked weights, and the two maps by which the optimizer reaches single layers.

Source: docs/released_model.md section 3 (layer, dense first); docs/architecture.md section 3 (aux is returned, stacked
by the scan; QK-clip and the bias update index the tree explicitly).

B rows   S tokens   D width   H heads   E experts   L layers = dense + MoE
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kimi_jax.config import ConfigError, ModelConfig, nearest
from kimi_jax.nn.layers import RMSNorm, SwiGLU
from kimi_jax.nn.layout import Layout
from kimi_jax.nn.mla import MLA
from kimi_jax.nn.moe import MoE, MoEAux
from kimi_jax.nn.param import ADAPTERS

DENSE, MOE = "dense_layers", "moe_layers"  # the two stacks, in this order


@struct.dataclass
class Aux:
    """What the step needs beside the output.

    max_logits   [L, H] float32: largest scaled attention logit of each head over the batch, dense layers first
    expert_load  [Lmoe, E] float32: tokens sent to each expert, padding excluded
    balance_loss [] float32: sequence-wise balance loss, mean over MoE layers and rows, without its weight alpha
    dropped      [] int32: choices of tokens that were not computed (0)
    rounds       [] int32: of the exchange between expert devices, most of any layer
    imbalance    [] float32: rows of the fullest expert device over the mean of its group, worst layer
    """

    max_logits: Any
    expert_load: Any
    balance_loss: Any
    dropped: Any
    rounds: Any
    imbalance: Any


# What `config.remat_policy` keeps of a layer beside its input: names given below and in `kernels.attention.segment`.
REMAT_POLICIES: dict[str, tuple[str, ...]] = {
    "layer_inputs": (),  # the least memory; everything is recomputed
    "attention_sum": ("expert_inputs",),  # what the MLP's norm takes: the output projection runs once
    "attention_output": ("attention",),  # with its log-sum-exp: attention itself runs once
    "expert_inputs": ("attention", "expert_inputs"),  # both
    "offload_layer_inputs": (),  # inputs wait in the host's memory (TPU)
}


def remat_policy(name: str) -> Callable[..., Any]:
    """The `jax.checkpoint` policy of that name. Raises ConfigError with the nearest name for an unknown one."""
    if name not in REMAT_POLICIES:
        known = ", ".join(REMAT_POLICIES)
        raise ConfigError(f"no remat policy {name!r}{nearest(name, REMAT_POLICIES)}; there are: {known}")
    if name == "offload_layer_inputs":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_inputs"],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    return jax.checkpoint_policies.save_only_these_names(*REMAT_POLICIES[name])


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    config: ModelConfig
    routed: bool
    layout: Layout | None = None

    def setup(self) -> None:
        """Parameters input_norm, attention, post_attention_norm, mlp."""
        c, parts = self.config, ("language", "norm")
        self.input_norm = RMSNorm(c.rms_norm_eps, c.param_dtype, parts)
        self.attention = MLA(c, self.layout)
        self.post_attention_norm = RMSNorm(c.rms_norm_eps, c.param_dtype, parts)
        self.mlp = MoE(c, self.layout) if self.routed else SwiGLU(c, c.intermediate_size, self.layout)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        expert_ids: Int[Array, "B S k"] | None = None,
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, " H"], MoEAux | None]]:
        """The new x and (max logits of each head, the MoE's report or None). `expert_ids`: see `moe.route`."""
        x = checkpoint_name(x, "layer_inputs")
        attended, max_logits = self.attention(self.input_norm(x), positions, segment_ids)
        x = checkpoint_name(x + attended, "expert_inputs")
        normed = self.post_attention_norm(x)
        y, report = self.mlp(normed, segment_ids, expert_ids) if self.routed else (self.mlp(normed), None)
        x = x + y
        if self.layout is not None:  # what the scan carries and remat keeps
            x = self.layout.constrain(x, "batch", "sequence", None)
        return x, (max_logits, report)


def stacked(
    layer: type[nn.Module],
    length: int,
    inputs: int,
    *,
    scan: bool,
    remat: Callable[..., Any] | None,
    per_layer: int = 0,
) -> type[nn.Module]:
    """`length` copies of a layer `(x, *inputs) -> (x, aux)` over weights stacked on axis 0.

    inputs: how many arguments every layer sees whole; per_layer: how many more are sliced along axis 0 (or None).
    scan=False unrolls the loop over the same stacked weights; remat recomputes each layer in the backward pass, but for
    what this policy keeps (None: keep everything).
    """
    if remat is not None:
        layer = nn.remat(layer, prevent_cse=not scan, policy=remat)
    return nn.scan(
        layer,
        variable_axes={"params": 0, ADAPTERS: 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * inputs + (0,) * per_layer,
        length=length,
        unroll=1 if scan else length,
        metadata_params={},
    )


def layer_stack(config: ModelConfig, *, routed: bool, layout: Layout | None = None) -> nn.Module:
    """The dense or the MoE layers as one module `(x, positions, segment_ids, expert_ids) -> (x, stacked aux)`.

    expert_ids [L, B, S, k] forces the experts of the MoE layers where it is not negative; None lets the router choose.
    """
    length = config.num_moe_layers if routed else config.num_dense_layers
    remat = remat_policy(config.remat_policy) if config.remat else None
    cls = stacked(DecoderLayer, length, 2, scan=config.scan_layers, remat=remat, per_layer=1)
    return cls(config, routed=routed, layout=layout)


def gather_aux(dense: Any, routed: Any) -> Aux:
    """One `Aux` from the stacked outputs of the two stacks (None for a stack without layers)."""
    max_logits = jnp.concatenate([stack[0] for stack in (dense, routed) if stack is not None])
    if routed is None:
        zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return Aux(max_logits, jnp.zeros((0, 0), jnp.float32), zero, none, none, zero)
    report = routed[1]
    return Aux(
        max_logits, report.expert_load, report.balance_loss.mean(), report.dropped.sum(), report.rounds.max(),
        report.imbalance.max(),
    )  # fmt: skip


def merge_aux(parts: Aux) -> Aux:
    """The `Aux` of a batch from those of its microbatches, stacked on axis 0; the balance loss is a sum of summands."""
    return Aux(
        parts.max_logits.max(axis=0), parts.expert_load.sum(axis=0), parts.balance_loss.sum(), parts.dropped.sum(),
        parts.rounds.max(), parts.imbalance.max(),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- single layers' weights


def map_attention(
    params: dict[str, Any], fn: Callable[[dict[str, Any], Array], dict[str, Any]], stats: Float[Array, "L H"]
) -> dict[str, Any]:
    """The parameter tree with `fn(attention params, stats row)` applied to every layer, dense layers first.

    Raises KeyError if the tree has no decoder layers or a layer has no attention, ValueError if the number of rows of
    `stats` is not the number of layers.
    """
    stacks = [name for name in (DENSE, MOE) if name in params]
    if not stacks:
        raise KeyError(f"neither {DENSE!r} nor {MOE!r} in the parameter tree; it has {sorted(params)}")
    lengths = [jax.tree.leaves(params[name]["attention"])[0].shape[0] for name in stacks]
    if sum(lengths) != stats.shape[0]:
        raise ValueError(f"{stats.shape[0]} rows of statistics for {dict(zip(stacks, lengths, strict=True))} layers")
    out, start = dict(params), 0
    for name, length in zip(stacks, lengths, strict=True):
        rows = stats[start : start + length]
        out[name] = {**params[name], "attention": jax.vmap(fn)(params[name]["attention"], rows)}
        start += length
    return out


def map_router_bias(
    params: dict[str, Any], fn: Callable[[Array, Array], Array], load: Float[Array, "Lmoe E"]
) -> dict[str, Any]:
    """The parameter tree with `fn(bias [E], load [E])` in place of every router's selection bias.

    Raises KeyError if there is no router, ValueError if the number of rows of `load` is not the number of MoE layers.
    """
    layers = params[MOE]
    router = layers["mlp"]["router"]
    if router["bias"].shape[0] != load.shape[0]:
        raise ValueError(f"{load.shape[0]} rows of load for {router['bias'].shape[0]} MoE layers")
    router = {**router, "bias": jax.vmap(fn)(router["bias"], load)}
    return {**params, MOE: {**layers, "mlp": {**layers["mlp"], "router": router}}}
