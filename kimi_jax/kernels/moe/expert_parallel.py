"""The routed experts of many devices: an all-to-all to their experts and back, dropless, in bounded memory.

Source: docs/paper_notes.md section 1.5 (the layer); docs/architecture.md section 9 (rounds). Experts are sharded
over one mesh axis. A device sorts its assignments by expert, which is also by device, and knows from one small
all-gather of dispatch counts where each run of rows belongs at its receiver. The receiver's order is by expert, then by
sender: rows arrive ready for a grouped matmul. The receiver has a capacity of W rows, a little more than the mean
(`memory.expert_capacity_factor`); one round is an all-to-all of rows [r W, r W + W) of every receiver's order, there
and back, and there are as many rounds as the fullest device of the whole mesh needs. The backward pass recomputes the
same rounds from the inputs; nothing else is kept.

Rows are sent in tiles of 8, the rows of one tile of a TPU's memory: what arrives is then a matrix as the kernels take
it, where single rows would have to be copied into that form and back. Runs are padded to whole tiles with rows that
count for nothing.

Expert weights may be INT4 or adapted (`kernels.moe.expert_weights`): words and scales lie, and are gathered, where the
floats would be.

On TPU rows are sent by `ragged_all_to_all`, which a CPU does not have: `_emulated` does there what its documentation
says, poisons what breaks its contract with NaN, and shares every other line.

B rows, S tokens a row of the whole batch   n tokens here   k choices   M = n*k assignments here   D, F widths
X devices of the expert axis   E experts   W capacity of a receiver   g rows a tile   N sorted rows here, whole tiles
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.kernels.fsdp import all_gather, all_reduce, names, reduce_scatter
from kimi_jax.kernels.moe.expert_weights import ExpertWeight, finish_gradient, learned, zero_gradient
from kimi_jax.kernels.moe.sorted_swiglu import ExpertWeights, sorted_swiglu, sorted_swiglu_grads

LANES = 128  # numbers that are sent beside their tile take a vector of the TPU, which moves nothing narrower
TILE = 8
FEWEST = 64  # rows that an expert has from a device on the mean, below which tiles would be mostly padding


class ExpertSharding(NamedTuple):
    """How the arrays lie over the mesh; hashable.

    tokens: of [B, S, .]; expert weights: of gate, up and down, expert weights of specs; expert, tensor: mesh axes
    (None: not sharded) of experts and of F. buffer: W over the mean number of rows. layer: which one of weights that
    are stacks [L, E, ...] is meant (None: they are none). reduce_dtype: of sums over devices.
    """

    mesh: Mesh | AbstractMesh
    tokens: PartitionSpec
    expert_weights: tuple[Any, Any, Any]
    expert: str | None
    tensor: str | None
    buffer: float
    layer: int | None = None
    reduce_dtype: str = "float32"


class DispatchReport(NamedTuple):
    """Of the whole mesh. load: tokens of each expert; computed: rows that an expert computed; rounds: of the exchange;
    imbalance: rows of the fullest expert device over the mean of its group."""

    load: Int[Array, " E"]
    computed: Int[Array, ""]
    rounds: Int[Array, ""]
    imbalance: Float[Array, ""]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_parallel(
    sharding: ExpertSharding,
    x: Float[Array, "B S D"],
    experts: Int[Array, "B S k"],
    gates: Float[Array, "B S k"],
    expert_weights: ExpertWeights,
) -> tuple[Float[Array, "B S D"], DispatchReport]:
    """Sum over a token's choices of gate * expert(token), float32. An expert number of E means nowhere (padding).

    Differentiable by x, gates and what of the expert weights is not frozen, unless they are stacks. Matrices of floats
    are used in the dtype of x; their gradients, summed in `sharding.reduce_dtype` over devices, have their own. Every
    mesh axis that shards tokens must divide them.
    """
    specs = (sharding.tokens,) * 3 + (sharding.expert_weights,)
    out = sharding.tokens, DispatchReport(*(PartitionSpec(),) * 4)
    return jax.shard_map(
        functools.partial(_forward, sharding), mesh=sharding.mesh, in_specs=specs, out_specs=out, check_vma=False
    )(x, experts, gates, expert_weights)


def _fwd(
    sharding: ExpertSharding, x: Array, experts: Array, gates: Array, expert_weights: ExpertWeights
) -> tuple[Any, tuple]:
    if sharding.layer is not None:
        raise ValueError(
            "expert_parallel has no gradient by expert weights that are stacks of layers; give it one layer's own"
        )
    return expert_parallel(sharding, x, experts, gates, expert_weights), (x, experts, gates, expert_weights)


def _bwd(sharding: ExpertSharding, residuals: tuple, grads: tuple) -> tuple[Any, ...]:
    specs = (sharding.tokens,) * 3 + (sharding.expert_weights, sharding.tokens)
    dx, dgates, totals = jax.shard_map(
        functools.partial(_backward, sharding),
        mesh=sharding.mesh,
        in_specs=specs,
        out_specs=(sharding.tokens, sharding.tokens, tuple(map(learned, sharding.expert_weights))),
        check_vma=False,
    )(*residuals, grads[0])
    return dx, None, dgates, tuple(map(finish_gradient, totals, residuals[3]))


expert_parallel.defvjp(_fwd, _bwd)

# ------------------------------------------------------------------------------------------------------- on each device


class Sorted(NamedTuple):
    """A device's assignments in the order of their experts, each expert's padded to whole tiles."""

    source: Int[Array, " N"]  # assignment of each sorted row; any for those that fill up
    filled: Bool[Array, " N"]  # False for those
    rank: Int[Array, "n k"]  # sorted row of each assignment; N for those that go nowhere
    counts: Int[Array, " E"]  # of assignments


def _tile_rows(sharding: ExpertSharding, assignments: int, num_experts: int) -> int:
    """g."""
    return TILE if sharding.expert is not None and assignments >= FEWEST * num_experts else 1


def _sort(experts: Array, num_experts: int, tile_rows: int) -> Sorted:
    ids = jnp.minimum(experts.reshape(-1), num_experts)
    total = ids.size if tile_rows == 1 else -(-(ids.size + num_experts * (tile_rows - 1)) // tile_rows) * tile_rows
    order = jnp.argsort(ids)
    in_order = ids[order]
    edges = jnp.searchsorted(in_order, jnp.arange(num_experts + 1, dtype=ids.dtype)).astype(jnp.int32)
    counts = jnp.diff(edges)
    ends = jnp.cumsum(-(-counts // tile_rows) * tile_rows)
    shift = jnp.concatenate([jnp.zeros(1, jnp.int32), ends]) - edges  # how far filling has moved an expert's rows
    places = jnp.where(in_order < num_experts, jnp.arange(ids.size, dtype=jnp.int32) + shift[in_order], total)
    rank = jnp.zeros(ids.size, jnp.int32).at[order].set(places, unique_indices=True)
    source = jnp.full(total, ids.size, jnp.int32).at[places].set(order.astype(jnp.int32), mode="drop")
    return Sorted(jnp.minimum(source, ids.size - 1), source < ids.size, rank.reshape(experts.shape), counts)


def _as_tiles(rows: Array, tile_rows: int) -> Array:
    """[N, D] -> [N/g, g, D]: what `ragged_all_to_all` moves. On TPU the same bytes, if g is 8."""
    return rows.reshape(-1, tile_rows, rows.shape[1])


def _plain(tiles: Array) -> Array:
    return tiles.reshape(-1, tiles.shape[-1])


def _scalars(values: Array, tile_rows: int) -> Array:
    """One number a row, as a vector a tile: [N] -> [N/g, 1, LANES]."""
    return jnp.pad(values.reshape(-1, 1, tile_rows), ((0, 0), (0, 0), (0, LANES - tile_rows)))


def _numbers(vectors: Array, tile_rows: int) -> Array:
    return vectors[:, 0, :tile_rows].reshape(-1)


def _buffer(tiles: int, like: Array) -> Array:
    """Room for tiles, as memory was: nobody reads a row that was not sent."""
    return lax.empty((tiles, *like.shape[1:]), like.dtype)


def _own_buffer(like: Array) -> Array:
    """The same, made anew in every layer: jax takes what depends on nothing out of the scan over layers, and a buffer
    that all of them share is copied in each. Both branches are the same."""
    empty = functools.partial(_buffer, like.shape[0], like)
    return lax.cond(like[0, 0, 0] == 0, empty, empty)


def _take(rows: Array, index: Array) -> Array:
    """Rows of each assignment, float32; zero for those that went nowhere."""
    return rows.at[index].get(mode="fill", fill_value=0).astype(jnp.float32)


class DispatchCounts(NamedTuple):
    """Who has how much for whom, in tiles but for `rows`, known to all devices of an expert group."""

    rows: Int[Array, "X E"]  # assignments of each sender to each expert
    counts: Int[Array, "X E"]
    source: Int[Array, "X E"]  # first of them in the sender's order
    target: Int[Array, "X E"]  # first of them in the order of the expert's device
    received: Int[Array, " X"]  # of each device


def _dispatch_counts(sharding: ExpertSharding, counts: Array, tile_rows: int) -> DispatchCounts:
    rows = lax.all_gather(counts, sharding.expert) if sharding.expert else counts[None]
    every = -(-rows // tile_rows)
    devices, experts = every.shape
    of_expert = every.sum(axis=0).reshape(devices, -1)
    first = (jnp.cumsum(of_expert, axis=1) - of_expert).reshape(experts)
    target = first + jnp.cumsum(every, axis=0) - every
    return DispatchCounts(rows, every, jnp.cumsum(every, axis=1) - every, target, of_expert.sum(axis=1))


class Round(NamedTuple):
    """One round. Arguments of `ragged_all_to_all` after the arrays, both ways; rows of each expert here, filled up;
    assignments among them."""

    there: tuple[Array, Array, Array, Array]
    back: tuple[Array, Array, Array, Array]
    sizes: Int[Array, " E/X"]
    computed: Int[Array, ""]


def _round(sharding: ExpertSharding, dispatch: DispatchCounts, number: Array, capacity: int, tile_rows: int) -> Round:
    """room: W in tiles."""
    devices, experts = dispatch.counts.shape
    me = lax.axis_index(sharding.expert) if sharding.expert else 0
    low = number * capacity
    start = jnp.clip(dispatch.target - low, 0, capacity)  # where each run begins in the round
    size = jnp.clip(dispatch.target + dispatch.counts - low, 0, capacity) - start
    before = jnp.maximum(low - dispatch.target, 0)  # what earlier rounds have taken of a run
    source = jnp.where(size > 0, dispatch.source + before, 0)

    def mine(x: Array) -> Array:
        """What all senders have for the experts of this device."""
        each = experts // devices
        return lax.dynamic_slice_in_dim(x, me * each, each, axis=1)

    there = source[me], size[me], start[me], mine(size).reshape(-1)
    back = mine(start).reshape(-1), mine(size).reshape(-1), mine(source).reshape(-1), size[me]
    computed = jnp.clip(dispatch.rows - tile_rows * before, 0, tile_rows * size)
    return Round(there, back, tile_rows * mine(size).sum(axis=0), mine(computed).sum())


def _capacity(sharding: ExpertSharding, assignments: int, rows: int) -> int:
    """W, in whole tiles. Without an expert axis nothing is sent and everything fits."""
    if sharding.expert is None:
        return rows
    tile = 512 if assignments >= 4096 else 8
    most = rows * sharding.mesh.shape[sharding.expert]
    return min(-(-math.ceil(assignments * sharding.buffer) // tile) * tile, -(-most // tile) * tile)


def _rounds(sharding: ExpertSharding, dispatch: DispatchCounts, capacity: int) -> Array:
    """As many as the fullest device of the mesh needs: collectives want every device in every round."""
    if sharding.expert is None:
        return jnp.int32(1)
    return lax.pmax(-(-jnp.max(dispatch.received) // capacity), tuple(sharding.mesh.axis_names))


def _repeat(sharding: ExpertSharding, rounds: Array, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    if sharding.expert is None:
        return body(jnp.int32(0), carry)
    return lax.fori_loop(0, rounds, body, carry)


class DispatchPlan(NamedTuple):
    """What both passes begin with. room: W in tiles."""

    order: Sorted
    dispatch: DispatchCounts
    token: Int[Array, " N"]  # of each sorted row
    capacity: int
    tile_rows: int


def _plan(sharding: ExpertSharding, experts: Int[Array, "n k"], num_experts: int) -> DispatchPlan:
    tile_rows = _tile_rows(sharding, experts.size, num_experts)
    order = _sort(experts, num_experts, tile_rows)
    capacity = _capacity(sharding, experts.size, order.source.size) // tile_rows
    return DispatchPlan(
        order,
        _dispatch_counts(sharding, order.counts, tile_rows),
        order.source // experts.shape[1],
        capacity,
        tile_rows,
    )


def _forward(
    sharding: ExpertSharding, x: Array, experts: Array, gates: Array, expert_weights: ExpertWeights
) -> tuple[Array, DispatchReport]:
    shape = x.shape
    x, experts, gates = (a.reshape(-1, a.shape[-1]) for a in (x, experts, gates))
    order, dispatch, token, capacity, tile_rows = _plan(sharding, experts, _num_experts(sharding, expert_weights))
    expert_weights, first = _here(sharding, expert_weights, x.dtype)
    rows = _as_tiles(x[token], tile_rows)

    def one_round(i: Array, carry: tuple) -> tuple:
        results, computed = carry
        this_round = _round(sharding, dispatch, i, capacity, tile_rows)
        received = _exchange(sharding, rows, _buffer(capacity, rows), this_round.there)
        out = sorted_swiglu(_plain(received), this_round.sizes, expert_weights, first)
        return _exchange(sharding, _as_tiles(out, tile_rows), results, this_round.back), computed + this_round.computed

    rounds = _rounds(sharding, dispatch, capacity)
    start = _own_buffer(rows), jnp.int32(0)
    results, computed = _repeat(sharding, rounds, one_round, start)
    y = jnp.einsum("knd,kn->nd", _take(_plain(results), order.rank.T), gates.astype(jnp.float32).T)
    y = all_reduce(y, (sharding.tensor,), sharding.reduce_dtype).astype(jnp.float32)
    return y.reshape(shape), _report(sharding, dispatch, order.counts, computed, rounds)


def _report(
    sharding: ExpertSharding, dispatch: DispatchCounts, counts: Array, computed: Array, rounds: Array
) -> DispatchReport:
    token_axes = tuple(axis for part in sharding.tokens for axis in names(part))
    received = dispatch.rows.sum(axis=0).reshape(dispatch.received.shape[0], -1).sum(axis=1)
    mean = jnp.maximum(jnp.mean(received.astype(jnp.float32)), 1.0)
    imbalance = lax.pmax(jnp.max(received) / mean, tuple(sharding.mesh.axis_names))
    return DispatchReport(_sum(counts, token_axes), _sum(computed, token_axes), rounds, imbalance)


def _backward(
    sharding: ExpertSharding, x: Array, experts: Array, gates: Array, expert_weights: ExpertWeights, grad: Array
) -> tuple[Any, ...]:
    shape, choices = x.shape, experts.shape
    x, experts, gates, grad = (a.reshape(-1, a.shape[-1]) for a in (x, experts, gates, grad))
    order, dispatch, token, capacity, tile_rows = _plan(sharding, experts, _num_experts(sharding, expert_weights))
    stored, (expert_weights, _) = expert_weights, _here(sharding, expert_weights, x.dtype)
    rows, grad_rows = _as_tiles(x[token], tile_rows), _as_tiles(grad.astype(x.dtype)[token], tile_rows)
    gate_rows = jnp.where(order.filled, gates.reshape(-1)[order.source].astype(jnp.float32), 0.0)
    gate_rows = _scalars(gate_rows, tile_rows)

    def one_round(i: Array, carry: tuple) -> tuple:
        drows, dgates, totals = carry
        this_round = _round(sharding, dispatch, i, capacity, tile_rows)
        got, got_grad, got_gates = (
            _exchange(sharding, sent, _buffer(capacity, sent), this_round.there)
            for sent in (rows, grad_rows, gate_rows)
        )
        here, dscale, totals = sorted_swiglu_grads(
            _plain(got), _numbers(got_gates, tile_rows), this_round.sizes, expert_weights, _plain(got_grad), totals
        )
        drows = _exchange(sharding, _as_tiles(here, tile_rows), drows, this_round.back)
        return drows, _exchange(sharding, _scalars(dscale, tile_rows), dgates, this_round.back), totals

    totals = tuple(map(zero_gradient, expert_weights))
    start = _buffer(rows.shape[0], rows), _buffer(rows.shape[0], gate_rows), totals
    drows, dgates, totals = _repeat(sharding, _rounds(sharding, dispatch, capacity), one_round, start)
    dx = _take(_plain(drows), order.rank.T).sum(axis=0)
    dx = all_reduce(dx, (sharding.tensor,), sharding.reduce_dtype).astype(x.dtype)
    dgates = _take(_numbers(dgates, tile_rows), order.rank)
    dgates = all_reduce(dgates, (sharding.tensor,), sharding.reduce_dtype).astype(gates.dtype)
    totals = jax.tree.map(
        lambda total, expert_weight: total.astype(expert_weight.dtype),
        _parts(sharding, totals),
        tuple(map(learned, stored)),
    )
    return dx.reshape(shape), dgates.reshape(choices), totals


# -------------------------------------------------------------------------------------------------- between the devices


def _exchange(
    sharding: ExpertSharding, operand: Array, output: Array, this_round: tuple[Array, Array, Array, Array]
) -> Array:
    """The rows that the window names, each at its place in the output of its receiver; the rest of output stays."""
    if sharding.expert is None:
        return operand
    all_to_all = functools.partial(lax.ragged_all_to_all, axis_name=sharding.expert)
    stand_in = functools.partial(_emulated, sharding.expert)
    return lax.platform_dependent(operand, output, *this_round, tpu=all_to_all, default=stand_in)


def _emulated(
    axis: str, operand: Array, output: Array, input_offsets: Array, send: Array, output_offsets: Array, receive: Array
) -> Array:
    """`lax.ragged_all_to_all` by its documentation, with an all-gather of everything."""
    devices, me = lax.axis_size(axis), lax.axis_index(axis)
    slices = send.shape[0] // devices
    table = lax.all_gather(jnp.stack([input_offsets, send, output_offsets]), axis)  # [X, 3, X * slices]
    table = lax.dynamic_slice_in_dim(table, me * slices, slices, axis=2).swapaxes(1, 2).reshape(-1, 3)
    first, size, place = table.T
    at = jnp.arange(output.shape[0])[:, None] - place
    hit = (at >= 0) & (at < size)
    sender = jnp.arange(table.shape[0]) // slices
    index = jnp.where(hit, sender * operand.shape[0] + first + at, 0).sum(axis=1)
    every = lax.all_gather(operand, axis).reshape(-1, *operand.shape[1:])
    out = jnp.where(hit.any(axis=1)[:, None, None], every[index], output)
    inside = (first + size <= operand.shape[0]) & (place + size <= output.shape[0])
    kept = jnp.all(size == receive) & jnp.all(inside | (size == 0)) & jnp.all(hit.sum(axis=1) <= 1)
    return jnp.where(kept, out, jnp.nan)


def _sum(x: Array, axes: tuple[str | None, ...]) -> Array:
    axes = tuple(axis for axis in axes if axis is not None)
    return lax.psum(x, axes) if axes else x


def _num_experts(sharding: ExpertSharding, expert_weights: ExpertWeights) -> int:
    held = jax.tree.leaves(expert_weights)[0].shape[0 if sharding.layer is None else 1]
    return held * (sharding.mesh.shape[sharding.expert] if sharding.expert else 1)


def _here(sharding: ExpertSharding, expert_weights: ExpertWeights, dtype: DTypeLike) -> tuple[ExpertWeights, int]:
    """The experts of this device, gathered from those who keep a part of them; the number of its first one.

    Of stacks nothing is copied if there is nothing to gather: the layers' experts are one stack as they lie.
    """
    if sharding.layer is None:
        gate, up, down = (_cast(expert_weight, dtype) for expert_weight in expert_weights)
        return _whole(sharding, (gate, up, down)), 0
    kept = sharding.expert, sharding.tensor
    if any(
        axis not in kept for spec in jax.tree.leaves(sharding.expert_weights) for part in spec for axis in names(part)
    ):
        own = _whole(sharding, jax.tree.map(lambda expert_weight: expert_weight[sharding.layer, None], expert_weights))
        return jax.tree.map(lambda expert_weight: expert_weight[0], own), 0
    each = jax.tree.leaves(expert_weights)[0].shape[1]
    return jax.tree.map(
        lambda expert_weight: expert_weight.reshape(-1, *expert_weight.shape[2:]), expert_weights
    ), sharding.layer * each


def _cast(expert_weight: ExpertWeight, dtype: DTypeLike) -> ExpertWeight:
    """Matrices of floats in the dtype of the tokens, before they are gathered; INT4 and adapters as they are."""
    return expert_weight.astype(dtype) if isinstance(expert_weight, jax.Array) else expert_weight


def _whole(sharding: ExpertSharding, expert_weights: ExpertWeights) -> ExpertWeights:
    return jax.tree.map(
        lambda expert_weight, spec: all_gather(expert_weight, spec, (sharding.expert, sharding.tensor)),
        expert_weights,
        sharding.expert_weights,
    )


def _parts(sharding: ExpertSharding, totals: tuple[Any, ...]) -> tuple[Any, ...]:
    """The reverse for gradients: summed over all devices that did a part of the work, everyone keeps its part.

    Of F every device of the tensor axis has a part, and so has an adapter's gradient that F is summed over in.
    """
    axes = (axis for part in (*sharding.tokens, sharding.tensor) for axis in names(part))
    token_axes = [axis for axis in axes if axis != sharding.expert]

    def part(total: Array, spec: PartitionSpec) -> Array:
        own = {sharding.tensor} & {axis for entry in spec for axis in names(entry)}
        summed = tuple(axis for axis in token_axes if axis not in own)
        return reduce_scatter(total, spec, (sharding.expert, sharding.tensor), summed, sharding.reduce_dtype)

    return jax.tree.map(part, totals, tuple(map(learned, sharding.expert_weights)))
