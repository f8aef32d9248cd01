"""MLA's attention over a mesh: rows and heads are distributed to devices, and so are the tokens of long rows.

Source: docs/architecture.md section 9 (gather the latent, not keys and values: 302 MB a layer at 262,144 tokens). Every
device of the `context` axis has a sequence shard of each row. It gathers all latents, makes keys and values
of one shard at a time, and joins the pieces by their log-sum-exp: its own shard causally, earlier ones wholly,
later ones not at all (so devices with late shards work most, up to twice the mean). Backward goes over the same
pieces with the joint log-sum-exp, and the latents' gradient is scattered back. Without a context axis there is one
piece.

Queries, keys and values are made here as well, one product each, so that on TPU a kernel can take them as they come
(`kernels.attention.mla_flash`); elsewhere, and where it does not fit, heads are slices of them. What turns a query, x
cos + x' sin, has x' from columns of its own: the matrix' columns are swapped, not the lanes of all queries.

B rows   S tokens   H heads   I input of queries   C latent with rotary key   L its rank   d, v widths of keys, values
r rotary width   p = r / 2   n = d - r   w = n + 2 r and u = n + v columns of a head   t tokens of a sequence shard
X sequence shards
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.attention import mla_flash
from kimi_jax.kernels.attention.segment import AttentionSpec, attend, attend_grads
from kimi_jax.kernels.fsdp import all_gather, all_reduce, dot, reduce_scatter


class AttentionSharding(NamedTuple):
    """Mesh axes of rows, of the tokens of a row and of heads (None: not sharded); how the two matrices lie; scale,
    exact_above: as in `AttentionSpec`; reduce_dtype: of sums over devices."""

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...]
    context: str | None
    heads: str | None
    query: PartitionSpec
    kernel: PartitionSpec
    scale: float
    exact_above: float
    reduce_dtype: str

    def inputs(self) -> tuple[PartitionSpec, ...]:
        """Of x, the query matrix, cos, sin, latents, the matrix of keys and values, segment ids."""
        rows = self.rows or None
        tokens = PartitionSpec(rows, self.context, None)
        return tokens, self.query, tokens, tokens, tokens, self.kernel, PartitionSpec(rows, self.context)

    def outputs(self) -> tuple[PartitionSpec, ...]:
        """Of the output, its log-sum-exp and the largest logits."""
        rows = self.rows or None
        return (
            PartitionSpec(rows, self.context, self.heads, None), PartitionSpec(rows, self.heads, self.context),
            PartitionSpec(self.heads),
        )  # fmt: skip

    def summed(self) -> tuple[str, ...]:
        """Mesh axes along which gradients of matrices are summed."""
        return (*self.rows, *((self.context,) if self.context else ()))


def join_heads(
    both: Float[Array, "B S H u"], k_rope: Float[Array, "B S r"], nope: int
) -> tuple[Float[Array, "B S H d"], Float[Array, "B S H v"]]:
    """Keys (`nope` columns, then the rotary part that all heads share) and values (the other columns)."""
    k_nope, v = jnp.split(both, [nope], axis=-1)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:-1], k_rope.shape[-1]))
    return jnp.concatenate([k_nope, k_rope], axis=-1), v


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def latent_attention(
    sharding: AttentionSharding,
    x: Float[Array, "B S I"],
    query: Float[Array, "I H d"],
    cos: Float[Array, "B S p"],
    sin: Float[Array, "B S p"],
    latent: Float[Array, "B S C"],
    kernel: Float[Array, "L H u"],
    segment_ids: Int[Array, "B S"],
) -> tuple[Float[Array, "B S H v"], Float[Array, " H"]]:
    """Causal `segment_attention` of the queries x @ query, rotated by cos and sin, over the keys and values of latents.

    Returns the output and each head's largest scaled logit. Differentiable by x, latent and both matrices, which are
    used in the dtype of x; their gradients are float32 products, summed in `sharding.reduce_dtype`, and have their own.
    """
    return _fwd(sharding, x, query, cos, sin, latent, kernel, segment_ids)[0]


def _fwd(sharding: AttentionSharding, *args: Array) -> tuple:
    out, lse, top = jax.shard_map(
        functools.partial(_forward, sharding),
        mesh=sharding.mesh,
        in_specs=sharding.inputs(),
        out_specs=sharding.outputs(),
        check_vma=False,
    )(*args)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")  # for policies of remat
    return (out, top), (*args, out, lse)


def _bwd(sharding: AttentionSharding, residuals: tuple, grads: tuple) -> tuple[Any, ...]:
    inputs, (out, lse, _) = sharding.inputs(), sharding.outputs()
    dx, dquery, dlatent, dkernel = jax.shard_map(
        functools.partial(_backward, sharding),
        mesh=sharding.mesh,
        in_specs=(*inputs, out, lse, out),
        out_specs=(inputs[0], sharding.query, inputs[4], sharding.kernel),
        check_vma=False,
    )(*residuals, grads[0])
    return dx, dquery, None, None, dlatent, dkernel, None


latent_attention.defvjp(_fwd, _bwd)

# ------------------------------------------------------------------------------------------------------- on each device


def _product(x: Float[Array, "B t I"], matrix: Float[Array, "I H w"]) -> Float[Array, "B t Hw"]:
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, matrix.reshape(matrix.shape[0], -1), precision=exact)


def _queries(x: Float[Array, "B t I"], query: Float[Array, "I H d"], nope: int) -> Float[Array, "B t Hw"]:
    """Of each head: columns without rotary; first, then second members of the pairs; the same swapped, -second first.

    As `nn.rope.apply_rope` orders them.
    """
    return _product(x, _columns(query, nope))


def _columns(query: Float[Array, "I H d"], nope: int) -> Float[Array, "I H w"]:
    plain, a, b = query[..., :nope], query[..., nope::2], query[..., nope + 1 :: 2]
    return jnp.concatenate([plain, a, b, -b, a], axis=-1)


def _product_grads(x: Array, matrix: Array, grad: Array) -> tuple[Array, Array]:
    """Gradients of `_product`, both in float32: they are summed further, over pieces or devices."""
    flat = matrix.reshape(matrix.shape[0], -1)
    return dot("bto,io->bti", grad, flat), dot("bti,bto->io", x, grad).reshape(matrix.shape)


def _keys(latent: Array, kernel: Array) -> tuple[Float[Array, "B t Hu"], Float[Array, "B t r"]]:
    """Keys without rotary and values of each head; the rotated key."""
    latent, rope = jnp.split(latent, [kernel.shape[0]], axis=-1)
    return _product(latent, kernel), rope


class _Call(NamedTuple):
    """What is static in one piece of attention."""

    spec: AttentionSpec
    heads: int
    nope: int

    def heads_of(self, q: Array, cos: Array, sin: Array, kv: Array, rope: Array) -> tuple[Array, Array, Array]:
        """q, k, v [B, t, H, .] from the products, queries rotated."""
        q, kv = (a.reshape(*a.shape[:2], self.heads, -1) for a in (q, kv))
        plain, straight, swapped = jnp.split(q, [self.nope, self.nope + rope.shape[-1]], axis=-1)
        cos, sin = (jnp.concatenate([a, a], axis=-1)[:, :, None] for a in (cos, sin))
        q = jnp.concatenate([plain, straight * cos + swapped * sin], axis=-1)
        return q, *join_heads(kv, rope, self.nope)

    def flash(self, q: Array, kv: Array, rope: Array) -> mla_flash.Shape:
        """The same for the kernel."""
        value = kv.shape[-1] // self.heads - self.nope
        widths = self.heads, self.nope, 2 * rope.shape[-1], value
        return mla_flash.Shape(*widths, q.shape[1], kv.shape[1], self.spec.scale, self.spec.causal)

    def turn(self, cos: Array, sin: Array, rope: Array) -> tuple[Array, Array]:
        """How the kernel wants the rotation and the rotated key."""
        turn = jnp.concatenate([cos, cos, sin, sin], axis=-1).astype(jnp.float32) * self.spec.scale
        return turn, jnp.concatenate([rope, rope], axis=-1)


def _attend(call: _Call, *args: Array) -> tuple[Array, Array, Array]:
    """One piece: q, cos, sin, kv, rope and the ids of queries and keys to output [B, t, H, v], log-sum-exp, maxima."""

    def plain(*args: Array) -> tuple[Array, Array, Array]:
        return attend(call.spec, *call.heads_of(*args[:5]), *args[5:])

    def kernel(q: Array, cos: Array, sin: Array, kv: Array, rope: Array, query_ids: Array, key_ids: Array) -> tuple:
        turn, rope_twice = call.turn(cos, sin, rope)
        arrays = q, turn, kv, rope_twice, query_ids, key_ids
        out, lse, top = mla_flash.forward(call.flash(q, kv, rope), *arrays)
        return out.reshape(*q.shape[:2], call.heads, -1), lse, top.max(axis=(0, 2))

    return lax.platform_dependent(*args, tpu=kernel if _supports(call, *args) else plain, default=plain)


def _attend_grads(call: _Call, *args: Array) -> tuple[Array, Array, Array]:
    """Gradients of q, kv and rope in the same form; args: those of `_attend`, then output, log-sum-exp and gradient."""

    def plain(q: Array, cos: Array, sin: Array, kv: Array, rope: Array, *others: Array) -> tuple:
        heads, pullback = jax.vjp(lambda q, kv, rope: call.heads_of(q, cos, sin, kv, rope), q, kv, rope)
        return pullback(attend_grads(call.spec, *heads, *others))

    def kernel(
        q: Array, cos: Array, sin: Array, kv: Array, rope: Array, query_ids: Array, key_ids: Array,
        out: Array, lse: Array, grad: Array,
    ) -> tuple:  # fmt: skip
        turn, rope_twice = call.turn(cos, sin, rope)
        out, grad = (a.reshape(*a.shape[:2], -1) for a in (out, grad))
        arrays = q, turn, kv, rope_twice, query_ids, key_ids, out, lse, grad.astype(q.dtype)
        dq, dkv, drope = mla_flash.backward(call.flash(q, kv, rope), *arrays)
        first, second = jnp.split(drope, 2, axis=-1)
        return dq, dkv, (first + second).astype(rope.dtype)

    return lax.platform_dependent(*args, tpu=kernel if _supports(call, *args) else plain, default=plain)


def _supports(call: _Call, q: Array, cos: Array, sin: Array, kv: Array, rope: Array, *_: Array) -> bool:
    return mla_flash.supports(call.flash(q, kv, rope), q.dtype)


def _gather(sharding: AttentionSharding, x: Array) -> Array:
    """[X, B, t, ...]: the sequence shards of all devices."""
    return lax.all_gather(x, sharding.context) if sharding.context else x[None]


def _mine(sharding: AttentionSharding) -> Array | int:
    return lax.axis_index(sharding.context) if sharding.context else 0


def _forward(
    sharding: AttentionSharding,
    x: Array,
    query: Array,
    cos: Array,
    sin: Array,
    latent: Array,
    kernel: Array,
    ids: Array,
) -> tuple[Array, Array, Array]:
    query, kernel = _matrices(sharding, query, kernel, x.dtype)
    latents, all_ids, me = _gather(sharding, latent), _gather(sharding, ids), _mine(sharding)
    nope = query.shape[-1] - 2 * cos.shape[-1]
    q = _queries(x, query, nope)

    def piece(i: Array | int, causal: bool) -> tuple[Array, Array, Array]:
        call = _Call(AttentionSpec(causal, sharding.scale, sharding.exact_above), query.shape[1], nope)
        return _attend(call, q, cos, sin, *_keys(latents[i], kernel), ids, all_ids[i])

    def join(i: Array, carry: tuple) -> tuple:
        out, lse, top = carry
        more, more_lse, more_top = piece(i, causal=False)
        total = jnp.logaddexp(lse, more_lse)

        def share(part: Array) -> Array:
            return jnp.swapaxes(jnp.exp(part - total), 1, 2)[..., None]

        return out * share(lse) + more * share(more_lse), total, jnp.maximum(top, more_top)

    out, lse, top = piece(me, causal=True)
    if sharding.context:
        joined, lse, top = lax.fori_loop(0, me, join, (out.astype(jnp.float32), lse, top))
        out = joined.astype(q.dtype)
    others = tuple(axis for axis in sharding.mesh.axis_names if axis != sharding.heads)
    return out, lse, lax.pmax(top, others)


def _backward(
    sharding: AttentionSharding, x: Array, query: Array, cos: Array, sin: Array, latent: Array, kernel: Array, ids:
    Array,
    out: Array, lse: Array, grad: Array,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    stored = query.dtype, kernel.dtype
    query, kernel = _matrices(sharding, query, kernel, x.dtype)
    latents, all_ids, me = _gather(sharding, latent), _gather(sharding, ids), _mine(sharding)
    nope = query.shape[-1] - 2 * cos.shape[-1]
    columns = _columns(query, nope)
    q = _product(x, columns)

    def piece(i: Array | int, causal: bool) -> tuple[Array, Array, Array]:
        call = _Call(AttentionSpec(causal, sharding.scale), query.shape[1], nope)
        keys = _keys(latents[i], kernel)
        dq, dkv, drope = _attend_grads(call, q, cos, sin, *keys, ids, all_ids[i], out, lse, grad)
        dranked, dkernel = _product_grads(latents[i][..., : kernel.shape[0]], kernel, dkv)
        return dq, jnp.concatenate([dranked, drope.astype(jnp.float32)], axis=-1), dkernel

    def add(i: Array, carry: tuple) -> tuple:
        dq, dlatents, dkernel = carry
        more, dlatent, more_kernel = piece(i, causal=False)
        return dq + more, dlatents.at[i].set(dlatent.astype(dlatents.dtype)), dkernel + more_kernel

    dq, dlatent, dkernel = piece(me, causal=True)
    if sharding.context:
        dlatents = jnp.zeros(latents.shape, sharding.reduce_dtype).at[me].set(dlatent.astype(sharding.reduce_dtype))
        start = dq.astype(jnp.float32), dlatents, dkernel
        dq, dlatents, dkernel = lax.fori_loop(0, me, add, start)
        dlatent = lax.psum_scatter(dlatents, sharding.context, scatter_dimension=0)
    dx, dcolumns = _product_grads(x, columns, dq.astype(q.dtype))
    straight = jax.linear_transpose(
        functools.partial(_columns, nope=nope), jax.ShapeDtypeStruct(query.shape, jnp.float32)
    )
    (dquery,) = straight(dcolumns)
    # every group of heads had the whole latent, and the whole input of queries
    dlatent, dx = (all_reduce(total, (sharding.heads,), sharding.reduce_dtype) for total in (dlatent, dx))
    dquery, dkernel = (
        reduce_scatter(total, spec, (sharding.heads,), sharding.summed(), sharding.reduce_dtype)
        for total, spec in ((dquery, sharding.query), (dkernel, sharding.kernel))
    )
    return dx.astype(x.dtype), dquery.astype(stored[0]), dlatent.astype(latent.dtype), dkernel.astype(stored[1])


def _matrices(sharding: AttentionSharding, query: Array, kernel: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """Both, cast and then gathered along all mesh axes but that of heads."""
    pairs = (query, sharding.query), (kernel, sharding.kernel)
    gathered = [all_gather(matrix.astype(dtype), spec, (sharding.heads,)) for matrix, spec in pairs]
    return gathered[0], gathered[1]
