"""The routed experts of many devices: tokens travel to their experts and back, none is dropped, memory is bounded.

Source: docs/paper_notes.md section 1.5 (the layer); docs/architecture.md section 9 (rounds). Experts are dealt to the
devices of one mesh axis. A device sorts its assignments by expert, which is also by device, and knows from one small
all-gather of counts where each stretch of rows belongs at its receiver. The receiver's order is by expert, then by
sender: rows arrive ready for a grouped matmul. The receiver has room for W rows, a little more than the mean; one round
moves the window [r W, r W + W) of every receiver's order there and back, and there are as many rounds as the fullest
device of the whole mesh needs. The backward pass does the same rounds again from the inputs; nothing else is kept.

Rows travel by bundles of 8, the rows of one tile of a TPU's memory: what arrives is then a matrix as the kernels take
it, where single rows would have to be copied into that form and back. Stretches are filled up to whole bundles with
rows that count for nothing.

Banks may be INT4 or adapted (`kernels.banks`): words and scales lie, and are gathered, where the floats would be.

On TPU rows travel by `ragged_all_to_all`, which a CPU does not have: `_emulated` does there what its documentation
says, poisons what breaks its contract with NaN, and shares every other line.

B rows, S tokens a row of the whole batch   n tokens here   k choices   M = n*k assignments here   D, F widths
X devices of the expert axis   E experts   W room of a receiver   g rows a bundle   N sorted rows here, whole bundles
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

from kimi_jax.kernels.banks import Bank, finish_gradient, learned, zero_gradient
from kimi_jax.kernels.sorted_experts import Banks, sorted_swiglu, sorted_swiglu_grads
from kimi_jax.kernels.spread import all_reduce, names, part_of_sum, whole

LANES = 128  # numbers that travel beside their bundle take a vector of the TPU, which moves nothing narrower
BUNDLE = 8
FEWEST = 64  # rows that an expert has from a device on the mean, below which bundles would be mostly filling


class Cut(NamedTuple):
    """How the arrays lie over the mesh; hashable.

    tokens: of [B, S, .]; banks: of gate, up and down, banks of specs; expert, tensor: mesh axes (None: not cut) of
    experts and of F. buffer: W over the mean number of rows. layer: which one of banks that are stacks [L, E, ...] is
    meant (None: they are none). reduce_dtype: of sums over devices.
    """

    mesh: Mesh | AbstractMesh
    tokens: PartitionSpec
    banks: tuple[Any, Any, Any]
    expert: str | None
    tensor: str | None
    buffer: float
    layer: int | None = None
    reduce_dtype: str = "float32"


class Report(NamedTuple):
    """Of the whole mesh. load: tokens of each expert; computed: rows that an expert computed; rounds: of the exchange;
    imbalance: rows of the fullest expert device over the mean of its group."""

    load: Int[Array, " E"]
    computed: Int[Array, ""]
    rounds: Int[Array, ""]
    imbalance: Float[Array, ""]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_parallel(
    cut: Cut, x: Float[Array, "B S D"], experts: Int[Array, "B S k"], gates: Float[Array, "B S k"], banks: Banks
) -> tuple[Float[Array, "B S D"], Report]:
    """Sum over a token's choices of gate * expert(token), float32. An expert number of E means nowhere (padding).

    Differentiable by x, gates and what of the banks is not frozen, unless they are stacks. Matrices of floats are used
    in the dtype of x; their gradients, summed in `cut.reduce_dtype` over devices, have their own. Every mesh axis that
    cuts tokens must divide them.
    """
    specs = (cut.tokens,) * 3 + (cut.banks,)
    out = cut.tokens, Report(*(PartitionSpec(),) * 4)
    return jax.shard_map(
        functools.partial(_forward, cut), mesh=cut.mesh, in_specs=specs, out_specs=out, check_vma=False
    )(x, experts, gates, banks)


def _fwd(cut: Cut, x: Array, experts: Array, gates: Array, banks: Banks) -> tuple[Any, tuple]:
    if cut.layer is not None:
        raise ValueError("expert_parallel has no gradient by banks that are stacks of layers; give it one layer's own")
    return expert_parallel(cut, x, experts, gates, banks), (x, experts, gates, banks)


def _bwd(cut: Cut, residuals: tuple, grads: tuple) -> tuple[Any, ...]:
    specs = (cut.tokens,) * 3 + (cut.banks, cut.tokens)
    dx, dgates, totals = jax.shard_map(
        functools.partial(_backward, cut),
        mesh=cut.mesh,
        in_specs=specs,
        out_specs=(cut.tokens, cut.tokens, tuple(map(learned, cut.banks))),
        check_vma=False,
    )(*residuals, grads[0])
    return dx, None, dgates, tuple(map(finish_gradient, totals, residuals[3]))


expert_parallel.defvjp(_fwd, _bwd)

# ------------------------------------------------------------------------------------------------------- on each device


class Sorted(NamedTuple):
    """A device's assignments in the order of their experts, each expert's filled up to whole bundles."""

    source: Int[Array, " N"]  # assignment of each sorted row; any for those that fill up
    filled: Bool[Array, " N"]  # False for those
    rank: Int[Array, "n k"]  # sorted row of each assignment; N for those that go nowhere
    counts: Int[Array, " E"]  # of assignments


def _bundle(cut: Cut, assignments: int, num_experts: int) -> int:
    """g."""
    return BUNDLE if cut.expert is not None and assignments >= FEWEST * num_experts else 1


def _sort(experts: Array, num_experts: int, bundle: int) -> Sorted:
    ids = jnp.minimum(experts.reshape(-1), num_experts)
    total = ids.size if bundle == 1 else -(-(ids.size + num_experts * (bundle - 1)) // bundle) * bundle
    order = jnp.argsort(ids)
    in_order = ids[order]
    edges = jnp.searchsorted(in_order, jnp.arange(num_experts + 1, dtype=ids.dtype)).astype(jnp.int32)
    counts = jnp.diff(edges)
    ends = jnp.cumsum(-(-counts // bundle) * bundle)
    shift = jnp.concatenate([jnp.zeros(1, jnp.int32), ends]) - edges  # how far filling has moved an expert's rows
    places = jnp.where(in_order < num_experts, jnp.arange(ids.size, dtype=jnp.int32) + shift[in_order], total)
    rank = jnp.zeros(ids.size, jnp.int32).at[order].set(places, unique_indices=True)
    source = jnp.full(total, ids.size, jnp.int32).at[places].set(order.astype(jnp.int32), mode="drop")
    return Sorted(jnp.minimum(source, ids.size - 1), source < ids.size, rank.reshape(experts.shape), counts)


def _wire(rows: Array, bundle: int) -> Array:
    """[N, D] -> [N/g, g, D]: what `ragged_all_to_all` moves. On TPU the same bytes, if g is 8."""
    return rows.reshape(-1, bundle, rows.shape[1])


def _plain(bundles: Array) -> Array:
    return bundles.reshape(-1, bundles.shape[-1])


def _scalars(values: Array, bundle: int) -> Array:
    """One number a row, as a vector a bundle: [N] -> [N/g, 1, LANES]."""
    return jnp.pad(values.reshape(-1, 1, bundle), ((0, 0), (0, 0), (0, LANES - bundle)))


def _numbers(vectors: Array, bundle: int) -> Array:
    return vectors[:, 0, :bundle].reshape(-1)


def _buffer(bundles: int, like: Array) -> Array:
    """Room for bundles, as memory was: nobody reads a row that was not sent."""
    return lax.empty((bundles, *like.shape[1:]), like.dtype)


def _own_buffer(like: Array) -> Array:
    """The same, made anew in every layer: jax takes what depends on nothing out of the scan over layers, and a buffer
    that all of them share is copied in each. Both branches are the same."""
    empty = functools.partial(_buffer, like.shape[0], like)
    return lax.cond(like[0, 0, 0] == 0, empty, empty)


def _take(rows: Array, index: Array) -> Array:
    """Rows of each assignment, float32; zero for those that went nowhere."""
    return rows.at[index].get(mode="fill", fill_value=0).astype(jnp.float32)


class Traffic(NamedTuple):
    """Who has how much for whom, in bundles but for `rows`, known to all devices of an expert group."""

    rows: Int[Array, "X E"]  # assignments of each sender to each expert
    counts: Int[Array, "X E"]
    source: Int[Array, "X E"]  # first of them in the sender's order
    target: Int[Array, "X E"]  # first of them in the order of the expert's device
    received: Int[Array, " X"]  # of each device


def _traffic(cut: Cut, counts: Array, bundle: int) -> Traffic:
    rows = lax.all_gather(counts, cut.expert) if cut.expert else counts[None]
    every = -(-rows // bundle)
    devices, experts = every.shape
    of_expert = every.sum(axis=0).reshape(devices, -1)
    first = (jnp.cumsum(of_expert, axis=1) - of_expert).reshape(experts)
    target = first + jnp.cumsum(every, axis=0) - every
    return Traffic(rows, every, jnp.cumsum(every, axis=1) - every, target, of_expert.sum(axis=1))


class Window(NamedTuple):
    """One round. Arguments of `ragged_all_to_all` after the arrays, both ways; rows of each expert here, filled up;
    assignments among them."""

    there: tuple[Array, Array, Array, Array]
    back: tuple[Array, Array, Array, Array]
    sizes: Int[Array, " E/X"]
    computed: Int[Array, ""]


def _window(cut: Cut, traffic: Traffic, turn: Array, room: int, bundle: int) -> Window:
    """room: W in bundles."""
    devices, experts = traffic.counts.shape
    me = lax.axis_index(cut.expert) if cut.expert else 0
    low = turn * room
    start = jnp.clip(traffic.target - low, 0, room)  # where each stretch begins in the window
    size = jnp.clip(traffic.target + traffic.counts - low, 0, room) - start
    before = jnp.maximum(low - traffic.target, 0)  # what earlier rounds have taken of a stretch
    source = jnp.where(size > 0, traffic.source + before, 0)

    def mine(x: Array) -> Array:
        """What all senders have for the experts of this device."""
        each = experts // devices
        return lax.dynamic_slice_in_dim(x, me * each, each, axis=1)

    there = source[me], size[me], start[me], mine(size).reshape(-1)
    back = mine(start).reshape(-1), mine(size).reshape(-1), mine(source).reshape(-1), size[me]
    computed = jnp.clip(traffic.rows - bundle * before, 0, bundle * size)
    return Window(there, back, bundle * mine(size).sum(axis=0), mine(computed).sum())


def _room(cut: Cut, assignments: int, rows: int) -> int:
    """W, in whole tiles. Without an expert axis nothing travels and everything fits."""
    if cut.expert is None:
        return rows
    tile = 512 if assignments >= 4096 else 8
    most = rows * cut.mesh.shape[cut.expert]
    return min(-(-math.ceil(assignments * cut.buffer) // tile) * tile, -(-most // tile) * tile)


def _rounds(cut: Cut, traffic: Traffic, room: int) -> Array:
    """As many as the fullest device of the mesh needs: collectives want every device in every round."""
    if cut.expert is None:
        return jnp.int32(1)
    return lax.pmax(-(-jnp.max(traffic.received) // room), tuple(cut.mesh.axis_names))


def _repeat(cut: Cut, rounds: Array, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    if cut.expert is None:
        return body(jnp.int32(0), carry)
    return lax.fori_loop(0, rounds, body, carry)


class Plan(NamedTuple):
    """What both passes begin with. room: W in bundles."""

    order: Sorted
    traffic: Traffic
    token: Int[Array, " N"]  # of each sorted row
    room: int
    bundle: int


def _plan(cut: Cut, experts: Int[Array, "n k"], num_experts: int) -> Plan:
    bundle = _bundle(cut, experts.size, num_experts)
    order = _sort(experts, num_experts, bundle)
    room = _room(cut, experts.size, order.source.size) // bundle
    return Plan(order, _traffic(cut, order.counts, bundle), order.source // experts.shape[1], room, bundle)


def _forward(cut: Cut, x: Array, experts: Array, gates: Array, banks: Banks) -> tuple[Array, Report]:
    shape = x.shape
    x, experts, gates = (a.reshape(-1, a.shape[-1]) for a in (x, experts, gates))
    order, traffic, token, room, bundle = _plan(cut, experts, _num_experts(cut, banks))
    banks, first = _here(cut, banks, x.dtype)
    rows = _wire(x[token], bundle)

    def turn(i: Array, carry: tuple) -> tuple:
        results, computed = carry
        window = _window(cut, traffic, i, room, bundle)
        received = _exchange(cut, rows, _buffer(room, rows), window.there)
        out = sorted_swiglu(_plain(received), window.sizes, banks, first)
        return _exchange(cut, _wire(out, bundle), results, window.back), computed + window.computed

    rounds = _rounds(cut, traffic, room)
    start = _own_buffer(rows), jnp.int32(0)
    results, computed = _repeat(cut, rounds, turn, start)
    y = jnp.einsum("knd,kn->nd", _take(_plain(results), order.rank.T), gates.astype(jnp.float32).T)
    y = all_reduce(y, (cut.tensor,), cut.reduce_dtype).astype(jnp.float32)
    return y.reshape(shape), _report(cut, traffic, order.counts, computed, rounds)


def _report(cut: Cut, traffic: Traffic, counts: Array, computed: Array, rounds: Array) -> Report:
    cutting = tuple(axis for part in cut.tokens for axis in names(part))
    received = traffic.rows.sum(axis=0).reshape(traffic.received.shape[0], -1).sum(axis=1)
    mean = jnp.maximum(jnp.mean(received.astype(jnp.float32)), 1.0)
    imbalance = lax.pmax(jnp.max(received) / mean, tuple(cut.mesh.axis_names))
    return Report(_sum(counts, cutting), _sum(computed, cutting), rounds, imbalance)


def _backward(cut: Cut, x: Array, experts: Array, gates: Array, banks: Banks, grad: Array) -> tuple[Any, ...]:
    shape, picks = x.shape, experts.shape
    x, experts, gates, grad = (a.reshape(-1, a.shape[-1]) for a in (x, experts, gates, grad))
    order, traffic, token, room, bundle = _plan(cut, experts, _num_experts(cut, banks))
    stored, (banks, _) = banks, _here(cut, banks, x.dtype)
    rows, grad_rows = _wire(x[token], bundle), _wire(grad.astype(x.dtype)[token], bundle)
    gate_rows = jnp.where(order.filled, gates.reshape(-1)[order.source].astype(jnp.float32), 0.0)
    gate_rows = _scalars(gate_rows, bundle)

    def turn(i: Array, carry: tuple) -> tuple:
        drows, dgates, totals = carry
        window = _window(cut, traffic, i, room, bundle)
        got, got_grad, got_gates = (
            _exchange(cut, sent, _buffer(room, sent), window.there) for sent in (rows, grad_rows, gate_rows)
        )
        here, dscale, totals = sorted_swiglu_grads(
            _plain(got), _numbers(got_gates, bundle), window.sizes, banks, _plain(got_grad), totals
        )
        drows = _exchange(cut, _wire(here, bundle), drows, window.back)
        return drows, _exchange(cut, _scalars(dscale, bundle), dgates, window.back), totals

    totals = tuple(map(zero_gradient, banks))
    start = _buffer(rows.shape[0], rows), _buffer(rows.shape[0], gate_rows), totals
    drows, dgates, totals = _repeat(cut, _rounds(cut, traffic, room), turn, start)
    dx = _take(_plain(drows), order.rank.T).sum(axis=0)
    dx = all_reduce(dx, (cut.tensor,), cut.reduce_dtype).astype(x.dtype)
    dgates = _take(_numbers(dgates, bundle), order.rank)
    dgates = all_reduce(dgates, (cut.tensor,), cut.reduce_dtype).astype(gates.dtype)
    totals = jax.tree.map(
        lambda total, bank: total.astype(bank.dtype), _parts(cut, totals), tuple(map(learned, stored))
    )
    return dx.reshape(shape), dgates.reshape(picks), totals


# -------------------------------------------------------------------------------------------------- between the devices


def _exchange(cut: Cut, operand: Array, output: Array, window: tuple[Array, Array, Array, Array]) -> Array:
    """The rows that the window names, each at its place in the output of its receiver; the rest of output stays."""
    if cut.expert is None:
        return operand
    travel = functools.partial(lax.ragged_all_to_all, axis_name=cut.expert)
    stand_in = functools.partial(_emulated, cut.expert)
    return lax.platform_dependent(operand, output, *window, tpu=travel, default=stand_in)


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


def _num_experts(cut: Cut, banks: Banks) -> int:
    held = jax.tree.leaves(banks)[0].shape[0 if cut.layer is None else 1]
    return held * (cut.mesh.shape[cut.expert] if cut.expert else 1)


def _here(cut: Cut, banks: Banks, dtype: DTypeLike) -> tuple[Banks, int]:
    """The experts of this device, gathered from those who keep a part of them; the number of its first one.

    Of stacks nothing is copied if there is nothing to gather: the layers' experts are one bank as they lie.
    """
    if cut.layer is None:
        gate, up, down = (_cast(bank, dtype) for bank in banks)
        return _whole(cut, (gate, up, down)), 0
    kept = cut.expert, cut.tensor
    if any(axis not in kept for spec in jax.tree.leaves(cut.banks) for part in spec for axis in names(part)):
        own = _whole(cut, jax.tree.map(lambda bank: bank[cut.layer, None], banks))
        return jax.tree.map(lambda bank: bank[0], own), 0
    each = jax.tree.leaves(banks)[0].shape[1]
    return jax.tree.map(lambda bank: bank.reshape(-1, *bank.shape[2:]), banks), cut.layer * each


def _cast(bank: Bank, dtype: DTypeLike) -> Bank:
    """Matrices of floats in the dtype of the tokens, before they are gathered; INT4 and adapters as they are."""
    return bank.astype(dtype) if isinstance(bank, jax.Array) else bank


def _whole(cut: Cut, banks: Banks) -> Banks:
    return jax.tree.map(lambda bank, spec: whole(bank, spec, (cut.expert, cut.tensor)), banks, cut.banks)


def _parts(cut: Cut, totals: tuple[Any, ...]) -> tuple[Any, ...]:
    """The reverse for gradients: summed over all devices that did a part of the work, everyone keeps its part.

    Of F every device of the tensor axis has a part, and so has an adapter's gradient that F is summed over in.
    """
    dealt = [axis for part in (*cut.tokens, cut.tensor) for axis in names(part) if axis != cut.expert]

    def part(total: Array, spec: PartitionSpec) -> Array:
        own = {cut.tensor} & {axis for entry in spec for axis in names(entry)}
        return part_of_sum(total, spec, (cut.expert, cut.tensor), tuple(axis for axis in dealt if axis not in own),
                           cut.reduce_dtype)  # fmt: skip

    return jax.tree.map(part, totals, tuple(map(learned, cut.banks)))
