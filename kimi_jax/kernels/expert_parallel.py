"""The routed experts of many devices: tokens travel to their experts and back, none is dropped, memory is bounded.

Source: paper.md section 1.5 (the layer); design.md section 9 (rounds). Experts are dealt to the devices of one mesh
axis. A device sorts its assignments by expert, which is also by device, and knows from one small all-gather of counts
where each stretch of rows belongs at its receiver. The receiver's order is by expert, then by sender: rows arrive
ready for a grouped matmul. The receiver has room for W rows, a little more than the mean; one round moves the window
[r W, r W + W) of every receiver's order there and back, and there are as many rounds as the fullest device of the
whole mesh needs. The backward pass does the same rounds again from the inputs; nothing else is kept.

Banks may be INT4 or adapted (`kernels.banks`): words and scales lie, and are gathered, where the floats would be.

On TPU rows travel by `ragged_all_to_all`, which a CPU does not have: `_emulated` does there what its documentation
says, poisons what breaks its contract with NaN, and shares every other line.

B rows, S tokens a row of the whole batch   n tokens here   k choices   M = n*k assignments here   D, F widths
X devices of the expert axis   E experts   W room of a receiver
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
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.banks import finish_gradient, learned, zero_gradient
from kimi_jax.kernels.sorted_experts import Banks, sorted_swiglu, sorted_swiglu_grads

LANES = 128  # a number that travels beside its row takes a vector of the TPU, which moves nothing narrower


class Cut(NamedTuple):
    """How the arrays lie over the mesh; hashable.

    tokens: of [B, S, .]; banks: of gate, up and down, banks of specs; expert, tensor: mesh axes (None: not cut) of
    experts and of F. buffer: W over the mean number of rows. layer: which one of banks that are stacks [L, E, ...] is
    meant (None: they are none).
    """

    mesh: Mesh | AbstractMesh
    tokens: PartitionSpec
    banks: tuple[Any, Any, Any]
    expert: str | None
    tensor: str | None
    buffer: float
    layer: int | None = None


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

    Differentiable by x, gates and what of the banks is not frozen, unless they are stacks. Every mesh axis that cuts
    tokens must divide them.
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
    """A device's assignments in the order of their experts."""

    order: Int[Array, " M"]  # assignment of each sorted row
    rank: Int[Array, "n k"]  # sorted row of each assignment; M for those that go nowhere
    counts: Int[Array, " E"]


def _sort(experts: Array, num_experts: int) -> Sorted:
    ids = jnp.minimum(experts.reshape(-1), num_experts)
    order = jnp.argsort(ids)
    places = jnp.arange(ids.size, dtype=jnp.int32)
    rank = jnp.zeros(ids.size, jnp.int32).at[order].set(places, unique_indices=True)
    rank = jnp.where(ids < num_experts, rank, ids.size)
    edges = jnp.searchsorted(ids[order], jnp.arange(num_experts + 1, dtype=ids.dtype)).astype(jnp.int32)
    return Sorted(order, rank.reshape(experts.shape), jnp.diff(edges))


def _wire(rows: Array) -> Array:
    """[M, D] -> [M, p, D/p] as `ragged_all_to_all` wants rows on TPU, p values to a word of 32 bits.

    In any other form the compiler copies all operands and results, in every round.
    """
    packed = 4 // rows.dtype.itemsize
    return rows.reshape(rows.shape[0], packed if rows.shape[1] % (packed * LANES) == 0 else 1, -1)


def _plain(rows: Array) -> Array:
    return rows.reshape(rows.shape[0], -1)


def _scalars(values: Array) -> Array:
    """One number a row, as rows of the wire."""
    return _wire(jnp.broadcast_to(values[:, None], (values.size, LANES)))


def _buffer(rows: int, like: Array) -> Array:
    """Room for rows of the wire, as memory was: nobody reads a row that was not sent."""
    return lax.empty((rows, *like.shape[1:]), like.dtype)


def _take(rows: Array, index: Array) -> Array:
    """Rows of the wire of each assignment, [..., D] float32; zero for those that went nowhere."""
    found = rows.at[index].get(mode="fill", fill_value=0).astype(jnp.float32)
    return found.reshape(*index.shape, -1)


class Traffic(NamedTuple):
    """Who has how many rows for whom, known to all devices of an expert group."""

    counts: Int[Array, "X E"]  # rows of each sender for each expert
    source: Int[Array, "X E"]  # first of them in the sender's order
    target: Int[Array, "X E"]  # first of them in the order of the expert's device
    received: Int[Array, " X"]  # rows of each device


def _traffic(cut: Cut, counts: Array) -> Traffic:
    every = lax.all_gather(counts, cut.expert) if cut.expert else counts[None]
    devices, experts = every.shape
    of_expert = every.sum(axis=0).reshape(devices, -1)
    first = (jnp.cumsum(of_expert, axis=1) - of_expert).reshape(experts)
    target = first + jnp.cumsum(every, axis=0) - every
    return Traffic(every, jnp.cumsum(every, axis=1) - every, target, of_expert.sum(axis=1))


class Window(NamedTuple):
    """One round. Arguments of `ragged_all_to_all` after the arrays, both ways, and rows of each expert here."""

    there: tuple[Array, Array, Array, Array]
    back: tuple[Array, Array, Array, Array]
    sizes: Int[Array, " E/X"]


def _window(cut: Cut, traffic: Traffic, turn: Array, room: int) -> Window:
    devices, experts = traffic.counts.shape
    me = lax.axis_index(cut.expert) if cut.expert else 0
    low = turn * room
    start = jnp.clip(traffic.target - low, 0, room)  # where each stretch begins in the window
    size = jnp.clip(traffic.target + traffic.counts - low, 0, room) - start
    source = traffic.source + jnp.maximum(low - traffic.target, 0)
    source = jnp.where(size > 0, source, 0)

    def mine(x: Array) -> Array:
        """What all senders have for the experts of this device."""
        each = experts // devices
        return lax.dynamic_slice_in_dim(x, me * each, each, axis=1)

    there = source[me], size[me], start[me], mine(size).reshape(-1)
    back = mine(start).reshape(-1), mine(size).reshape(-1), mine(source).reshape(-1), size[me]
    return Window(there, back, mine(size).sum(axis=0))


def _room(cut: Cut, assignments: int) -> int:
    """W, in whole tiles. Without an expert axis nothing travels and everything fits."""
    if cut.expert is None:
        return assignments
    tile = 512 if assignments >= 4096 else 8
    most = assignments * cut.mesh.shape[cut.expert]
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


def _forward(cut: Cut, x: Array, experts: Array, gates: Array, banks: Banks) -> tuple[Array, Report]:
    shape, picks = x.shape, experts.shape[-1]
    x, experts, gates = (a.reshape(-1, a.shape[-1]) for a in (x, experts, gates))
    num_experts = _num_experts(cut, banks)
    banks, first = _here(cut, banks)
    order = _sort(experts, num_experts)
    traffic = _traffic(cut, order.counts)
    room = _room(cut, x.shape[0] * picks)
    rows = _wire(x)[order.order // picks]

    def turn(i: Array, carry: tuple) -> tuple:
        results, computed = carry
        window = _window(cut, traffic, i, room)
        received = _exchange(cut, rows, _buffer(room, rows), window.there)
        out = sorted_swiglu(_plain(received), window.sizes, banks, first)
        return _exchange(cut, _wire(out), results, window.back), computed + window.sizes.sum()

    rounds = _rounds(cut, traffic, room)
    results, computed = _repeat(cut, rounds, turn, (_buffer(rows.shape[0], rows), jnp.int32(0)))
    y = jnp.einsum("nkd,nk->nd", _take(results, order.rank), gates.astype(jnp.float32))
    return _sum(y, (cut.tensor,)).reshape(shape), _report(cut, traffic, order.counts, computed, rounds)


def _report(cut: Cut, traffic: Traffic, counts: Array, computed: Array, rounds: Array) -> Report:
    cutting = tuple(axis for part in cut.tokens for axis in _names(part))
    mean = jnp.maximum(jnp.mean(traffic.received.astype(jnp.float32)), 1.0)
    imbalance = lax.pmax(jnp.max(traffic.received) / mean, tuple(cut.mesh.axis_names))
    return Report(_sum(counts, cutting), _sum(computed, cutting), rounds, imbalance)


def _backward(cut: Cut, x: Array, experts: Array, gates: Array, banks: Banks, grad: Array) -> tuple[Any, ...]:
    shape, picks = x.shape, experts.shape
    x, experts, gates, grad = (a.reshape(-1, a.shape[-1]) for a in (x, experts, gates, grad))
    num_experts = _num_experts(cut, banks)
    banks, _ = _here(cut, banks)
    order = _sort(experts, num_experts)
    traffic = _traffic(cut, order.counts)
    room = _room(cut, x.shape[0] * picks[-1])
    token = order.order // picks[-1]
    rows, grad_rows = _wire(x)[token], _wire(grad.astype(x.dtype))[token]
    gate_rows = _scalars(gates.reshape(-1)[order.order].astype(jnp.float32))

    def turn(i: Array, carry: tuple) -> tuple:
        drows, dgates, totals = carry
        window = _window(cut, traffic, i, room)
        got, got_grad, got_gates = (
            _exchange(cut, sent, _buffer(room, sent), window.there) for sent in (rows, grad_rows, gate_rows)
        )
        here, dscale, totals = sorted_swiglu_grads(
            _plain(got), got_gates[:, 0, 0], window.sizes, banks, _plain(got_grad), totals
        )
        drows = _exchange(cut, _wire(here), drows, window.back)
        return drows, _exchange(cut, _scalars(dscale), dgates, window.back), totals

    totals = tuple(map(zero_gradient, banks))
    start = _buffer(rows.shape[0], rows), _buffer(rows.shape[0], gate_rows), totals
    drows, dgates, totals = _repeat(cut, _rounds(cut, traffic, room), turn, start)
    # as a weighted sum: a plain one the compiler makes in the form of the wire, four times as slow
    sent = (order.rank < gates.size).astype(jnp.float32)
    dx = jnp.einsum("nkd,nk->nd", _take(drows, order.rank), sent)
    dx = _sum(dx, (cut.tensor,)).astype(x.dtype)
    dgates = _sum(_take(dgates[:, :, :1], order.rank)[..., 0], (cut.tensor,)).astype(gates.dtype)
    totals = jax.tree.map(lambda total, bank: total.astype(bank.dtype), totals, tuple(map(learned, banks)))
    return dx.reshape(shape), dgates.reshape(picks), _parts(cut, totals)


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


def _names(part: Any) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _sum(x: Array, axes: tuple[str | None, ...]) -> Array:
    axes = tuple(axis for axis in axes if axis is not None)
    return lax.psum(x, axes) if axes else x


def _spread(cut: Cut, part: Any) -> tuple[str, ...]:
    """The axes that cut a bank only to need less room: not those on which the work is dealt."""
    return tuple(axis for axis in _names(part) if axis not in (cut.expert, cut.tensor))


def _num_experts(cut: Cut, banks: Banks) -> int:
    held = jax.tree.leaves(banks)[0].shape[0 if cut.layer is None else 1]
    return held * (cut.mesh.shape[cut.expert] if cut.expert else 1)


def _here(cut: Cut, banks: Banks) -> tuple[Banks, int]:
    """The experts of this device, gathered from those who keep a part of them; the number of its first one.

    Of stacks nothing is copied if there is nothing to gather: the layers' experts are one bank as they lie.
    """
    if cut.layer is None:
        return _whole(cut, banks), 0
    if any(_spread(cut, part) for spec in jax.tree.leaves(cut.banks) for part in spec):
        own = _whole(cut, jax.tree.map(lambda bank: bank[cut.layer, None], banks))
        return jax.tree.map(lambda bank: bank[0], own), 0
    each = jax.tree.leaves(banks)[0].shape[1]
    return jax.tree.map(lambda bank: bank.reshape(-1, *bank.shape[2:]), banks), cut.layer * each


def _whole(cut: Cut, banks: Banks) -> Banks:
    def gather(bank: Array, spec: PartitionSpec) -> Array:
        for dim, part in enumerate(spec):
            if axes := _spread(cut, part):
                bank = lax.all_gather(bank, axes, axis=dim, tiled=True)
        return bank

    return jax.tree.map(gather, banks, cut.banks)


def _parts(cut: Cut, totals: tuple[Any, ...]) -> tuple[Any, ...]:
    """The reverse for gradients: summed over all devices that did a part of the work, everyone keeps its part.

    Of F every device of the tensor axis has a part, and so has an adapter's gradient that F is summed over in.
    """
    dealt = [axis for part in (*cut.tokens, cut.tensor) for axis in _names(part) if axis != cut.expert]

    def scatter(total: Array, spec: PartitionSpec) -> Array:
        done = {cut.tensor} & {axis for part in spec for axis in _names(part)}
        for dim, part in enumerate(spec):
            if axes := _spread(cut, part):
                total = lax.psum_scatter(total, axes, scatter_dimension=dim, tiled=True)
                done.update(axes)
        return _sum(total, tuple(axis for axis in dealt if axis not in done))

    return jax.tree.map(scatter, totals, tuple(map(learned, cut.banks)))
