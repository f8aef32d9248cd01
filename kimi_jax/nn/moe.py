"""Mixture of experts: sigmoid router with a selection bias, dropless routed experts, shared experts.

Source: docs/released_model.md section 3 (router in float32, bias for selection only, combine in float32, then cast,
then the shared experts); docs/paper_notes.md section 1.5 (sequence-wise balance loss).

B rows   S tokens a row   N = B*S   D width   E experts   k choices   F inner width of an expert
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from kimi_jax.config import ModelConfig, MoEConfig
from kimi_jax.kernels.moe.expert_parallel import DispatchReport, ExpertSharding, expert_parallel
from kimi_jax.kernels.moe.expert_weights import CODES, ExpertWeight, Int4, LoRAWeights
from kimi_jax.kernels.moe.grouped_matmul import combine, dispatch, grouped_swiglu, plan_blocks
from kimi_jax.nn.layers import SwiGLU
from kimi_jax.nn.layout import Layout, ShardingError
from kimi_jax.nn.param import ADAPTERS, Frozen, Muon, RouterBias, declare


@struct.dataclass
class MoEAux:
    """What one MoE layer reports.

    expert_load [E] float32, balance_loss [] float32, dropped [] int32, rounds [] int32, imbalance [] float32.
    """

    expert_load: Any  # tokens sent to each expert, padding excluded
    balance_loss: Any  # sequence-wise, without its weight alpha
    dropped: Any  # choices of real tokens that no expert computed: 0 by construction, counted from the plan
    rounds: Any  # of the exchange between expert devices; 1 if all fits
    imbalance: Any  # rows of the fullest expert device over the mean of its group


class Routing(NamedTuple):
    """The router's verdict on each token."""

    experts: Int[Array, "*b k"]  # best first by score + bias
    gates: Float[Array, "*b k"]  # float32 weights of the chosen, from the scores without bias
    scores: Float[Array, "*b E"]  # float32 sigmoid scores of all


def route(
    x: Float[Array, "*b D"],
    kernel: Float[Array, "D E"],
    bias: Float[Array, " E"],
    moe: MoEConfig,
    expert_ids: Int[Array, "*b k"] | None = None,
) -> Routing:
    """Choose k experts a token, all in float32.

    expert_ids: forces the choice (replay of a sampler's routing, arXiv 2510.11370); the gates still come from these
    scores and have their gradient. Where they are negative the router chooses.
    """
    logits = jnp.matmul(x.astype(jnp.float32), kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    scores = jax.nn.sigmoid(logits)
    _, experts = lax.top_k(lax.stop_gradient(scores + bias.astype(jnp.float32)), moe.num_experts_per_tok)
    if expert_ids is not None:
        experts = jnp.where(expert_ids >= 0, expert_ids.astype(jnp.int32), experts)
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    if moe.norm_topk_prob and moe.num_experts_per_tok > 1:
        gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, gates * moe.routed_scaling_factor, scores)


def balance_loss(scores: Float[Array, "B S E"], segment_ids: Int[Array, "B S"], top_k: int) -> Float[Array, ""]:
    """Sequence-wise balance loss sum_i f_i P_i (1 if perfectly balanced), mean over the rows that hold tokens.

    A sequence is a packed row: its real tokens, whatever document they belong to. f_i counts how often expert i is
    among the best `top_k` scores (without bias, as the paper writes it) and has no gradient.
    """
    num_experts = scores.shape[-1]
    real = (segment_ids > 0).astype(jnp.float32)
    count = jnp.maximum(real.sum(axis=-1, keepdims=True), 1.0)
    smallest = lax.top_k(lax.stop_gradient(scores), top_k)[0][..., -1:]
    chosen = (lax.stop_gradient(scores) >= smallest).astype(jnp.float32)
    frequency = (chosen * real[..., None]).sum(axis=1) * num_experts / (top_k * count)
    share = scores / scores.sum(axis=-1, keepdims=True)
    probability = (share * real[..., None]).sum(axis=1) / count
    rows = jnp.maximum((real.sum(axis=-1) > 0).sum(), 1)
    return (frequency * probability).sum() / rows


class Router(nn.Module):
    """Owns the router's matrix and its selection bias (always float32, moved outside the gradient)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"], expert_ids: Int[Array, "*b k"] | None = None) -> Routing:
        """See `route`."""
        c, moe = self.config, self.config.moe
        if moe is None:
            raise ValueError("a router needs config.moe; this model is dense")
        experts = moe.n_routed_experts
        normal, parts = nn.initializers.normal(c.initializer_range), ("language", "router")
        kernel_init = declare(normal, ("embed", "router"), Muon(), parts)
        bias_init = declare(nn.initializers.zeros, ("router",), RouterBias(), parts)
        kernel = self.param("kernel", kernel_init, (c.hidden_size, experts), c.param_dtype)
        bias = self.param("bias", bias_init, (experts,), "float32")
        return route(x, kernel, bias, moe, expert_ids)


class Int4ExpertWeight(nn.Module):
    """The words and scales of E frozen matrices [inputs, outputs]; random ones until weights are loaded.

    Raises ValueError if the inputs are not whole groups of whole words.
    """

    shape: tuple[int, int, int]  # E, inputs, outputs
    axes: tuple[str, str, str]
    group: int
    init_std: float

    @nn.compact
    def __call__(self) -> Int4:
        """int32 [E, inputs/8, outputs] and bfloat16 [E, inputs/group, outputs]; other scales may be loaded."""
        num, inputs, outputs = self.shape
        if self.group % CODES or inputs % self.group:
            raise ValueError(f"{inputs} inputs of {self.name} cannot be INT4 in groups of {self.group}")
        constant = nn.initializers.constant(self.init_std / STD_OF_CODES)
        words = declare(_random_words, self.axes, Frozen(), EXPERT_PARTS)
        scales = declare(constant, self.axes, Frozen(), EXPERT_PARTS)
        return Int4(
            self.param("words", words, (num, inputs // CODES, outputs), "int32"),
            self.param("scales", scales, (num, inputs // self.group, outputs), "bfloat16"),
        )


def _random_words(key: jax.Array, shape: tuple[int, ...], dtype: str) -> Array:
    return jax.random.bits(key, shape, "uint32").view(dtype)


EXPERT_PARTS = ("language", "experts")
STD_OF_CODES = (255 / 12) ** 0.5  # of 16 equally likely neighbours


class ExpertWeights(NamedTuple):
    """The routed experts' matrices: gate and up [E, D, F], down [E, F, D], each of them what
    `kernels.moe.expert_weights` knows."""

    gate: ExpertWeight
    up: ExpertWeight
    down: ExpertWeight


# sum of gate * expert(x) in float32; tokens of each expert; rows computed
ExpertsOut = tuple[Float[Array, "N D"], Int[Array, " E"], Int[Array, ""]]


def run_experts(
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    expert_weights: ExpertWeights,
    num_experts: int,
    first: Int[Array, ""] | int = 0,
    block: int | None = None,
) -> ExpertsOut:
    """Expert e of 0..num_experts-1 is number first + e of the expert weights; expert number num_experts means nowhere.

    Expert weights may hold the experts of all layers one after the other: a layer's own are then used where they lie,
    where a slice of the stack would be a copy. block: rows computed together, see `plan_blocks`.
    """
    plan = plan_blocks(experts, num_experts, block, first)
    rows = grouped_swiglu(dispatch(x, plan), *expert_weights, plan)
    computed = (plan.source < experts.size).sum(dtype=jnp.int32)
    return combine(rows, gates, plan), plan.counts, computed


EXPERT_AXES = {
    "gate": ("expert", "embed", "expert_mlp"),
    "up": ("expert", "embed", "expert_mlp"),
    "down": ("expert", "expert_mlp", "embed"),
}


def shard_experts(
    layout: Layout, shape: tuple[int, int, int], expert_weights: ExpertWeights, layer: int | None = None
) -> ExpertSharding:
    """How tokens [B, S, D] and expert weights lie over the mesh. layer: of expert weights that are stacks of layers [L,
    E, ...].

    The tensor axis shards the inner width only if it divides it in all arrays, scales too; else it is not
    used.
    Raises ShardingError if the mesh shards the tokens or the experts into parts of different size.
    """
    tokens = layout.spec(("batch", "sequence", None), shape)
    arrays = [
        pair
        for axes, expert_weight in zip(EXPERT_AXES.values(), expert_weights, strict=True)
        for pair in _arrays(axes, expert_weight)
    ]
    if layer is not None:
        arrays = [(("layers", *axes), array) for axes, array in arrays]
    num = arrays[0][1].shape[arrays[0][0].index("expert")]
    for name, size in zip(("batch", "sequence", "expert"), (*shape[:2], num), strict=True):
        if size % layout.parts(name):
            raise ShardingError(f"{name} of {size} cannot be sharded into {layout.parts(name)} equal parts by the mesh")
    expert, tensor = next(iter(layout.axes("expert")), None), "tensor" if layout.mesh.shape["tensor"] > 1 else None
    inner = [array.shape[axes.index("expert_mlp")] for axes, array in arrays if "expert_mlp" in axes]
    if any(size % layout.mesh.shape["tensor"] for size in inner):
        tensor = None
        layout = dataclasses.replace(layout, rules=tuple((n, tuple(a for a in axes if a != "tensor"))
                                                         for n, axes in layout.rules))  # fmt: skip
    specs = [layout.spec(axes, array.shape) for axes, array in arrays]
    weight_specs = jax.tree.unflatten(jax.tree.structure(tuple(expert_weights)), specs)
    return ExpertSharding(
        layout.mesh, tokens, weight_specs, expert, tensor, layout.expert_capacity_factor, layer, layout.reduce_dtype
    )


def _arrays(axes: tuple[str, str, str], expert_weight: ExpertWeight) -> list[tuple[tuple[str, ...], Array]]:
    """The arrays of an expert weight with their logical axes, in the order of its leaves."""
    expert, inputs, outputs = axes
    if isinstance(expert_weight, Int4):
        return [(axes, expert_weight.words), (axes, expert_weight.scales)]
    if isinstance(expert_weight, LoRAWeights):
        pair = [((expert, inputs, "lora"), expert_weight.a), ((expert, "lora", outputs), expert_weight.b)]
        return [*_arrays(axes, expert_weight.base), *pair]
    return [(axes, expert_weight)]


class Experts(nn.Module):
    """The routed experts' three stacks of matrices; with adapters, where the collection "lora" holds some."""

    config: ModelConfig
    layout: Layout | None = None

    def _expert_weight(self, name: str, shape: tuple[int, int, int], stored: bool) -> ExpertWeight:
        c, axes = self.config, EXPERT_AXES[name]
        expert_weight: ExpertWeight
        if c.moe.int4_group_size:
            expert_weight = Int4ExpertWeight(shape, axes, c.moe.int4_group_size, c.initializer_range, name=name)()
        else:
            init = declare(nn.initializers.normal(c.initializer_range), axes, Muon(batch=1), EXPERT_PARTS)
            expert_weight = self.param(name, init, shape, c.param_dtype)
            expert_weight = (
                expert_weight if stored and not self.has_variable(ADAPTERS, name) else expert_weight.astype(c.dtype)
            )
        if self.has_variable(ADAPTERS, name):
            expert_weight = LoRAWeights(expert_weight, **self.get_variable(ADAPTERS, name))
        return expert_weight

    @nn.compact
    def expert_weights(self, stored: bool = False) -> ExpertWeights:
        """The matrices, in the activations' dtype if they are floats; stored: that of learned parameters."""
        c = self.config
        num, inner = c.moe.n_routed_experts, c.moe.moe_intermediate_size
        gate = self._expert_weight("gate", (num, c.hidden_size, inner), stored)
        up = self._expert_weight("up", (num, c.hidden_size, inner), stored)
        down = self._expert_weight("down", (num, inner, c.hidden_size), stored)
        return ExpertWeights(gate, up, down)

    def __call__(
        self, x: Float[Array, "B S D"], experts: Int[Array, "B S k"], gates: Float[Array, "B S k"]
    ) -> tuple[Float[Array, "B S D"], DispatchReport]:
        """See `run_experts`; over the devices of a layout, `expert_parallel`."""
        c, expert_weights = self.config, self.expert_weights(stored=self.layout is not None)
        x = x.astype(c.dtype)
        if self.layout is not None:
            sharding = shard_experts(self.layout, x.shape, expert_weights)
            return expert_parallel(sharding, x, experts, gates, tuple(expert_weights))
        run = functools.partial(run_experts, expert_weights=expert_weights, num_experts=c.moe.n_routed_experts)
        return _flat(run, x, experts, gates)


def _flat(run: Callable[[Array, Array, Array], ExpertsOut], x: Array, experts: Array, gates: Array) -> tuple:
    """All rows one after the other, on what is one device or looks like it."""
    y, load, computed = run(*(a.reshape(-1, a.shape[-1]) for a in (x, experts, gates)))
    return y.reshape(x.shape), DispatchReport(load, computed, jnp.int32(1), jnp.float32(1.0))


class MoE(nn.Module):
    """Routed experts plus shared experts; the MLP of every layer but the first dense ones."""

    config: ModelConfig
    layout: Layout | None = None

    def setup(self) -> None:
        """Parameters router, experts, shared."""
        moe = self.config.moe
        self.router = Router(self.config)
        self.experts = Experts(self.config, self.layout)
        if moe.n_shared_experts:
            inner = moe.moe_intermediate_size * moe.n_shared_experts
            self.shared = SwiGLU(self.config, inner, self.layout, "shared_experts")

    def __call__(
        self,
        x: Float[Array, "B S D"],
        segment_ids: Int[Array, "B S"],
        expert_ids: Int[Array, "B S k"] | None = None,
        experts: Callable[[Array, Array, Array], ExpertsOut] | None = None,
    ) -> tuple[Float[Array, "B S D"], MoEAux]:
        """Same shape, in the activations' dtype. Padding (segment 0) is routed nowhere.

        expert_ids: see `route`. experts: stands in for the layer's own `Experts`, see `run_experts`.
        """
        moe = self.config.moe
        routing = self.router(x, expert_ids)
        real = segment_ids > 0
        chosen = jnp.where(real[..., None], routing.experts, moe.n_routed_experts)
        run = functools.partial(_flat, experts) if experts else self.experts
        y, report = run(x, chosen, routing.gates)
        y = y.astype(self.config.dtype)
        if moe.n_shared_experts:
            y = y + self.shared(x)
        dropped = real.sum(dtype=jnp.int32) * moe.num_experts_per_tok - report.computed
        loss = balance_loss(routing.scores, segment_ids, moe.num_experts_per_tok)
        return y, MoEAux(report.load.astype(jnp.float32), loss, dropped, report.rounds, report.imbalance)
