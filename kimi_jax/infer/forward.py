"""The decoder over the paged latent cache: one function for chunks of prompts and for decoding.

Source: docs/released_model.md section 3 (MLA); docs/architecture.md section 9 (decoding). All of the model's
mathematics is `kimi_jax.nn`'s; here stand the cache, the walk over its pages with a running softmax (its length is
data, so one program serves all lengths), and the absorbed form of attention: with kv_b = [K | V] a head,

    q . (K latent) = (K^T q) . latent        sum_k p_k (V latent_k) = V (sum_k p_k latent_k)

so that decoding reads the latents as they lie and never makes a key or a value (on a TPU by
`kernels.attention.paged_latent`, unless the pages are sharded over a mesh). A chunk of many queries is cheaper with
keys and values expanded: the chunk's own at once, then those before it a block of pages at a time.

Over a mesh the chunk's tokens are sent to the routed experts (`kernels.moe.expert_parallel`); the rest is the
compiler's.

B rows   T tokens of a row's chunk   L layers   P pages   s tokens a page   W pages in a row's table   D width   H heads
n, r, v  widths of a head without rotary, its rotary part, its values    R = kv_lora_rank    C = R + r    E experts
Z = `cache.page_width`
K tokens of the block of pages that is looked at together
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.config import ModelConfig
from kimi_jax.infer.cache import NULL_PAGE, Cache
from kimi_jax.kernels.attention import paged_latent
from kimi_jax.kernels.moe.expert_parallel import expert_parallel
from kimi_jax.kernels.moe.single_rows import single_rows_swiglu
from kimi_jax.nn.decoder import DENSE, MOE
from kimi_jax.nn.kimi import Embedding, Head
from kimi_jax.nn.layers import SwiGLU, precision, rms_norm
from kimi_jax.nn.layout import Layout
from kimi_jax.nn.mla import MLA
from kimi_jax.nn.moe import Experts, ExpertsOut, ExpertWeights, MoE, run_experts, shard_experts
from kimi_jax.nn.rope import softmax_scale

KEYS = 256  # most tokens of a block of pages; fewer where sequences are short, see `_attend`
SHARE = 8  # blocks that the longest sequence has at least: what a block holds beyond the context is computed in vain
FEW_ROWS = 4  # rows an expert's block has if there are few an expert: 8 or more cost half as much again
NEGATIVE = -1e30


class Weights(NamedTuple):
    """The language model's weights as decoding reads them. Made by `prepare`."""

    embed: dict[str, Any]
    layers: tuple[dict[str, Any], ...]  # each layer's own: norms, attention, dense MLP or router and shared experts
    expert_weights: (
        ExpertWeights | None
    )  # the routed experts of all layers, stacked [Lmoe, E, ...] as the model holds them
    final_norm: dict[str, Any]
    lm_head: dict[str, Any]


class Chunk(NamedTuple):
    """The next tokens of every row. Media, if not None, replaces the embeddings where `is_media`."""

    tokens: Int[Array, "B T"]
    start: Int[Array, " B"]  # position of the first one: a multiple of gcd(T, s)
    count: Int[Array, " B"]  # how many are real; the others are padding
    table: Int[Array, "B W"]  # the row's pages in order; unused entries NULL_PAGE
    media: Float[Array, "B T D"] | None = None
    is_media: Bool[Array, "B T"] | None = None


def prepare(config: ModelConfig, params: dict[str, Any], split: Callable | None = None) -> Weights:
    """Split the stacks of `params` (the plain tree of `nn.kimi`) into layers, once, in the activations' dtype.

    XLA would copy a layer out of its stack in every step. The routed experts' weights, most of the weights, are not
    split or copied (if they have the right dtype), nor are embedding and head; the other weights of the layers exist
    twice as long as the caller keeps `params`, which an engine does not. kv_b is also kept as its two halves,
    transposed for the absorbed form. The router stays as it is: it computes in float32. split: `split_layers` for this
    configuration, compiled by whoever calls this again and again; what is not split must stay outside, since jax copies
    what a compiled function passes through.
    """
    stacks = {}
    for name in (DENSE, MOE):
        if name in params:
            stacks[name] = {**params[name], "mlp": {k: v for k, v in params[name]["mlp"].items() if k != "experts"}}
    layers = (split or functools.partial(split_layers, config))(stacks)
    expert_weights = None
    if config.num_moe_layers:
        experts = params[MOE]["mlp"]["experts"]
        expert_weights = jax.vmap(lambda p: Experts(config).apply({"params": p}, method="expert_weights"))(experts)
    embed, norm, head = (_cast(params[name], config.dtype) for name in ("embed", "final_norm", "lm_head"))
    return Weights(embed, layers, expert_weights, norm, head)


def split_layers(config: ModelConfig, stacks: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The layers of the stacks, dense ones first; the routed experts are not among them."""
    layers = []
    for stack in (stacks[name] for name in (DENSE, MOE) if name in stacks):
        for i in range(jax.tree.leaves(stack["input_norm"])[0].shape[0]):
            layers.append(_layer(config, jax.tree.map(lambda a, i=i: a[i], stack)))
    return tuple(layers)


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda a: a.astype(dtype), tree)


def _layer(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    mlp = {k: v if k == "router" else _cast(v, config.dtype) for k, v in params["mlp"].items()}
    rest = _cast({k: v for k, v in params.items() if k != "mlp"}, config.dtype)
    keys, values = jnp.split(rest["attention"]["kv_b"]["kernel"], [config.qk_nope_head_dim], axis=-1)
    absorbed = {"keys": keys.transpose(1, 2, 0), "values": values.transpose(1, 0, 2)}  # [H, n, R] and [H, R, v]
    return {**rest, "mlp": mlp, "absorbed": absorbed}


def forward(
    config: ModelConfig,
    weights: Weights,
    cache: Cache,
    chunk: Chunk,
    *,
    absorbed: bool,
    layout: Layout | None = None,
    chosen: list[Array] | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Final-normed hidden states of the chunk, and the cache that now holds its tokens too.

    Every row's earlier tokens must be in the pages of its table. absorbed: the form of attention; same result. Padding
    goes to no expert, and to places in the cache that are not read before they are written again. layout: how the
    weights lie over a mesh. chosen: a list that the experts [B, T, k] of each MoE layer are added to; those of padding
    are number E. Raises ShardingError if the layout does not distribute the experts evenly.
    """
    c, size = config, chunk.tokens.shape[1]
    positions = chunk.start[:, None] + jnp.arange(size, dtype=jnp.int32)
    real = (jnp.arange(size) < chunk.count[:, None]).astype(jnp.int32)
    x = Embedding(c).apply({"params": weights.embed}, chunk.tokens)
    if chunk.media is not None:
        x = jnp.where(jnp.expand_dims(chunk.is_media, -1), chunk.media.astype(x.dtype), x)
    attention, written = MLA(c), []
    for number, layer in enumerate(weights.layers):
        own = {"params": layer["attention"]}
        normed = rms_norm(x, layer["input_norm"]["scale"], c.rms_norm_eps)
        q_nope, q_rope, latent = attention.apply(own, normed, positions, method="project")
        written.append(write(cache[number], latent, chunk))
        keys = _Keys(latent, written[-1], chunk)
        if absorbed:
            out = _absorbed(c, layer["absorbed"], q_nope, q_rope, keys, whole=layout is None)
        else:
            expand = lambda latent, own=own: attention.apply(own, latent, method="expand")  # noqa: E731
            out = _expanded(c, expand, q_nope, q_rope, keys)
        x = x + attention.apply(own, out, method=lambda mla, y: mla.o(y))
        normed = rms_norm(x, layer["post_attention_norm"]["scale"], c.rms_norm_eps)
        x = x + _mlp(c, weights, number, normed, real, layout, chosen)
    return rms_norm(x, weights.final_norm["scale"], c.rms_norm_eps), tuple(written)


def logits(config: ModelConfig, weights: Weights, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
    """Float32 logits of final-normed hidden states."""
    return Head(config).apply({"params": weights.lm_head}, hidden)


def write(pages: Float[Array, "P s Z"], latent: Float[Array, "B T C"], chunk: Chunk) -> Float[Array, "P s Z"]:
    """Put the chunk's latents where its rows' tables say, by windows within a page; beyond the table: NULL_PAGE."""
    num, size, width = pages.shape
    rows, length = chunk.tokens.shape
    window = math.gcd(length, size)
    first = chunk.start[:, None] + window * jnp.arange(length // window, dtype=jnp.int32)
    page = jnp.take_along_axis(chunk.table, first // size, axis=1, mode="fill", fill_value=NULL_PAGE)
    view = pages.reshape(num, size // window, window, width)
    latent = jnp.pad(latent, ((0, 0), (0, 0), (0, width - latent.shape[2])))
    return view.at[page, first % size // window].set(latent.reshape(rows, -1, window, width)).reshape(pages.shape)


# ------------------------------------------------------------------------------------------------------------ attention


class _Keys(NamedTuple):
    """What the queries of a chunk look at in a layer: its own latents, and those before it by the rows' tables."""

    latent: Float[Array, "B T C"]
    pages: Float[Array, "P s Z"]
    chunk: Chunk


def _absorbed(
    config: ModelConfig, halves: dict[str, Array], q_nope: Array, q_rope: Array, keys: _Keys, whole: bool
) -> Array:
    """[B, T, H, v]; keys are the latents themselves, values their first R numbers.

    whole: all pages are on the device, so that a TPU can read them where they lie.
    """
    dot = precision(config.dtype)
    q_latent = jnp.einsum("bthn,hnr->bhtr", q_nope, halves["keys"], precision=dot)
    q = jnp.concatenate([q_latent, q_rope.swapaxes(1, 2)], axis=-1)
    plain = functools.partial(_attend_latents, config)
    if whole and q.shape[2] == 1 and paged_latent.supports(config.kv_lora_rank, q.dtype, keys.pages.shape[1]):
        out = lax.platform_dependent(q, keys, tpu=functools.partial(_attend_pages, config), default=plain)
    else:
        out = plain(q, keys)
    return jnp.einsum("bhtr,hrv->bthv", out, halves["values"], precision=dot)


def _attend_latents(config: ModelConfig, q: Array, keys: _Keys) -> Array:
    look = lambda latent: (latent, latent[..., : config.kv_lora_rank])  # noqa: E731
    return _attend(config, q, look, "bkd", config.kv_lora_rank, keys)


def _attend_pages(config: ModelConfig, q: Array, keys: _Keys, interpret: Any = False) -> Array:
    """The same for one token a row, whose own latent lies in the pages already."""
    table, lengths, rank = keys.chunk.table, keys.chunk.start + 1, config.kv_lora_rank
    q = jnp.pad(q[:, :, 0], ((0, 0), (0, 0), (0, keys.pages.shape[2] - q.shape[3])))
    return paged_latent.attend(q, keys.pages, table, lengths, rank, softmax_scale(config), interpret)[:, :, None]


def _expanded(config: ModelConfig, expand: Callable, q_nope: Array, q_rope: Array, keys: _Keys) -> Array:
    """[B, T, H, v]; every head has its own keys and values."""
    q = jnp.concatenate([q_nope, q_rope], axis=-1).swapaxes(1, 2)
    return _attend(config, q, expand, "bkhd", config.v_head_dim, keys).swapaxes(1, 2)


def _attend(config: ModelConfig, q: Array, look: Callable, axes: str, width: int, keys: _Keys) -> Array:
    """Causal attention [B, H, T, width] of q [B, H, T, d] over the chunk, then over as many blocks of pages as the
    longest row needs.

    look: latents [B, K, C] -> (keys, values), both with these axes. Softmax in float32.
    """
    size, length = keys.pages.shape[1], q.shape[2]
    start, table = keys.chunk.start, keys.chunk.table
    together = max(min(KEYS, table.shape[1] * size // SHARE) // size, 1)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % together)), constant_values=NULL_PAGE)
    block = together * size
    scale, dot = softmax_scale(config), precision(config.dtype)

    def add(latent: Array, seen: Bool[Array, "B 1 #T K"], carry: tuple[Array, Array, Array]) -> tuple:
        top, total, out = carry
        k, v = look(latent)
        scores = jnp.einsum(f"bhtd,{axes}->bhtk", q, k, precision=dot, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(seen, scores, NEGATIVE)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        probs = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        part = jnp.einsum(f"bhtk,{axes}->bhtd", probs.astype(v.dtype), v, precision=dot,
                          preferred_element_type=jnp.float32)  # fmt: skip
        return new_top, total * shrink + probs.sum(axis=-1), out * shrink[..., None] + part

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple:
        here = lax.dynamic_slice_in_dim(table, i * together, together, axis=1)
        latent = keys.pages[here].reshape(q.shape[0], block, -1)[..., : keys.latent.shape[2]]
        seen = i * block + jnp.arange(block) < start[:, None]
        return add(latent, seen[:, None, None], carry)

    rows = jnp.full(q.shape[:3], NEGATIVE, jnp.float32)
    nothing = rows, jnp.zeros_like(rows), jnp.zeros((*q.shape[:3], width), jnp.float32)
    own = add(keys.latent, jnp.tri(length, dtype=bool)[None, None], nothing)
    _, total, out = lax.fori_loop(0, -(-start.max() // block), step, own)
    return (out / total[..., None]).astype(q.dtype)


# ------------------------------------------------------------------------------------------------------------------ MLP


def _mlp(
    config: ModelConfig, weights: Weights, number: int, x: Array, real: Array, layout: Layout | None,
    chosen: list[Array] | None,
) -> Array:  # fmt: skip
    """Layer `number`'s MLP; adds its experts to `chosen`."""
    own, moe = {"params": weights.layers[number]["mlp"]}, config.moe
    if moe is None or number < config.num_dense_layers:
        return SwiGLU(config, config.intermediate_size).apply(own, x)
    expert_weights, layer = cast(ExpertWeights, weights.expert_weights), number - config.num_dense_layers
    run = (
        _on_one_device(expert_weights, layer, moe.n_routed_experts)
        if layout is None
        else _over(layout, expert_weights, layer)
    )
    if chosen is not None:
        run = _recorded(run, chosen, x.shape[:2])
    return MoE(config).apply(own, x, real, None, run)[0]


def _recorded(run: RunExperts, chosen: list[Array], shape: tuple[int, ...]) -> RunExperts:
    def experts(rows: Array, ids: Array, gates: Array) -> ExpertsOut:
        chosen.append(ids.reshape(*shape, -1))
        return run(rows, ids, gates)

    return experts


RunExperts = Callable[[Array, Array, Array], ExpertsOut]  # rows [N, D], their choices and gates [N, k]


def _on_one_device(expert_weights: ExpertWeights, layer: int, num: int) -> RunExperts:
    """All layers' experts are one stack, a view of the stack, and the layer's a range of it."""
    expert_weights = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), expert_weights)
    first = num * layer

    def blocks(rows: Array, chosen: Array, gates: Array) -> ExpertsOut:
        block = FEW_ROWS if chosen.size < FEW_ROWS * num else None
        return run_experts(rows, chosen, gates, expert_weights, num, first, block)

    def singly(rows: Array, chosen: Array, gates: Array) -> ExpertsOut:
        load = jnp.bincount(chosen.reshape(-1), length=num).astype(jnp.int32)
        return single_rows_swiglu(rows, chosen, gates, expert_weights, num, first), load, load.sum()

    def experts(rows: Array, chosen: Array, gates: Array) -> ExpertsOut:
        if chosen.size > num:
            return blocks(rows, chosen, gates)
        return lax.platform_dependent(rows, chosen, gates, cpu=singly, default=blocks)

    return experts


def _over(layout: Layout, expert_weights: ExpertWeights, layer: int) -> RunExperts:
    """The rows, wherever they lie, are distributed to all devices evenly, so that a piece of one prompt is everyone's
    too."""
    parts, num = layout.parts("batch"), jax.tree.leaves(expert_weights)[0].shape[1]

    def experts(rows: Array, chosen: Array, gates: Array) -> ExpertsOut:
        count = rows.shape[0]

        def distribute(a: Array, fill: int = 0) -> Array:
            padding = -count % (parts * layout.parts("sequence"))
            return jnp.pad(a, ((0, padding), (0, 0)), constant_values=fill).reshape(parts, -1, a.shape[1])

        x = distribute(rows)
        sharding = shard_experts(layout, x.shape, expert_weights, layer)
        y, report = expert_parallel(sharding, x, distribute(chosen, num), distribute(gates), tuple(expert_weights))
        return y.reshape(-1, rows.shape[1])[:count], report.load, report.computed

    return experts
