"""MLA's attention over a mesh: rows and heads are dealt to devices, and so are the tokens of long rows.

Source: design.md section 9 (gather the latent, not keys and values: 302 MB a layer at 262,144 tokens). Every device of
the `context` axis has a stretch of each row. It gathers the latents of all stretches, makes keys and values of one
stretch at a time, and joins the pieces by their log-sum-exp: its own stretch causally, earlier ones wholly, later ones
not at all (so devices with late stretches work most, up to twice the mean). Backward goes over the same pieces with the
joint log-sum-exp, and the latents' gradient is scattered back. Without a context axis there is one piece.

B rows   S tokens   H heads   C latent with rotary key   L latent rank   d, v widths of keys and values
t tokens of a stretch   X stretches
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.segment_attention import Piece, attend, attend_grads


class Cut(NamedTuple):
    """Mesh axes of rows, of the tokens of a row and of heads (None: not cut); scale, exact_above: as in `Piece`."""

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...]
    context: str | None
    heads: str | None
    scale: float
    exact_above: float

    def specs(self) -> tuple[PartitionSpec, ...]:
        """Of queries, latents, the matrix and segment ids."""
        rows = self.rows or None
        return (
            PartitionSpec(rows, self.context, self.heads, None), PartitionSpec(rows, self.context, None),
            PartitionSpec(None, self.heads, None), PartitionSpec(rows, self.context),
        )  # fmt: skip


def join_heads(
    both: Float[Array, "B S H w"], k_rope: Float[Array, "B S r"], nope: int
) -> tuple[Float[Array, "B S H d"], Float[Array, "B S H v"]]:
    """Keys (`nope` columns, then the rotary part that all heads share) and values (the other columns)."""
    k_nope, v = jnp.split(both, [nope], axis=-1)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:-1], k_rope.shape[-1]))
    return jnp.concatenate([k_nope, k_rope], axis=-1), v


def expand(
    latent: Float[Array, "B S C"], kernel: Float[Array, "L H w"], d: int
) -> tuple[Float[Array, "B S H d"], Float[Array, "B S H v"]]:
    """Keys and values of all heads; w = d - (C - L) + v."""
    rank, heads, width = kernel.shape
    latent, k_rope = jnp.split(latent, [rank], axis=-1)
    exact = lax.Precision.HIGHEST if latent.dtype == jnp.float32 else None
    both = jnp.matmul(latent, kernel.reshape(rank, -1), precision=exact)
    return join_heads(both.reshape(*latent.shape[:-1], heads, width), k_rope, d - k_rope.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def latent_attention(
    cut: Cut,
    q: Float[Array, "B S H d"],
    latent: Float[Array, "B S C"],
    kernel: Float[Array, "L H w"],
    segment_ids: Int[Array, "B S"],
) -> tuple[Float[Array, "B S H v"], Float[Array, " H"]]:
    """`segment_attention`, causal, over `expand(latent, kernel)`: output and each head's largest scaled logit."""
    return _fwd(cut, q, latent, kernel, segment_ids)[0]


def _fwd(cut: Cut, q: Array, latent: Array, kernel: Array, segment_ids: Array) -> tuple:
    specs = cut.specs()
    lse_spec = PartitionSpec(specs[0][0], cut.heads, cut.context)
    out, lse, top = jax.shard_map(
        functools.partial(_forward, cut),
        mesh=cut.mesh,
        in_specs=specs,
        out_specs=(specs[0], lse_spec, PartitionSpec(cut.heads)),
        check_vma=False,
    )(q, latent, kernel, segment_ids)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")  # for policies of remat
    return (out, top), (q, latent, kernel, segment_ids, out, lse)


def _bwd(cut: Cut, residuals: tuple, grads: tuple) -> tuple[Any, ...]:
    specs = cut.specs()
    lse_spec = PartitionSpec(specs[0][0], cut.heads, cut.context)
    dq, dlatent, dkernel = jax.shard_map(
        functools.partial(_backward, cut),
        mesh=cut.mesh,
        in_specs=(*specs, specs[0], lse_spec, specs[0]),
        out_specs=specs[:3],
        check_vma=False,
    )(*residuals, grads[0])
    return dq, dlatent, dkernel, None


latent_attention.defvjp(_fwd, _bwd)

# ------------------------------------------------------------------------------------------------------- on each device


def _gather(cut: Cut, x: Array) -> Array:
    """[X, B, t, ...]: the stretches of all devices."""
    return lax.all_gather(x, cut.context) if cut.context else x[None]


def _mine(cut: Cut) -> Array | int:
    return lax.axis_index(cut.context) if cut.context else 0


def _forward(cut: Cut, q: Array, latent: Array, kernel: Array, ids: Array) -> tuple[Array, Array, Array]:
    latents, all_ids, me = _gather(cut, latent), _gather(cut, ids), _mine(cut)

    def piece(i: Array | int, causal: bool) -> tuple[Array, Array, Array]:
        k, v = expand(latents[i], kernel, q.shape[-1])
        return attend(Piece(causal, cut.scale, cut.exact_above), q, k, v, ids, all_ids[i])

    def join(i: Array, carry: tuple) -> tuple:
        out, lse, top = carry
        more, more_lse, more_top = piece(i, causal=False)
        total = jnp.logaddexp(lse, more_lse)

        def share(part: Array) -> Array:
            return jnp.swapaxes(jnp.exp(part - total), 1, 2)[..., None]

        return out * share(lse) + more * share(more_lse), total, jnp.maximum(top, more_top)

    out, lse, top = piece(me, causal=True)
    if cut.context:
        joined, lse, top = lax.fori_loop(0, me, join, (out.astype(jnp.float32), lse, top))
        out = joined.astype(q.dtype)
    others = tuple(axis for axis in cut.mesh.axis_names if axis != cut.heads)
    return out, lse, lax.pmax(top, others)


def _backward(
    cut: Cut, q: Array, latent: Array, kernel: Array, ids: Array, out: Array, lse: Array, grad: Array
) -> tuple[Array, Array, Array]:
    latents, all_ids, me = _gather(cut, latent), _gather(cut, ids), _mine(cut)

    def piece(i: Array | int, causal: bool) -> tuple[Array, Array, Array]:
        (k, v), pullback = jax.vjp(lambda x, w: expand(x, w, q.shape[-1]), latents[i], kernel)
        how = Piece(causal, cut.scale)
        dq, dk, dv = attend_grads(how, q, k, v, ids, all_ids[i], out, lse, grad)
        dlatent, dkernel = pullback((dk, dv))
        return dq.astype(jnp.float32), dlatent, dkernel.astype(jnp.float32)

    def add(i: Array, carry: tuple) -> tuple:
        dq, dlatents, dkernel = carry
        more, dlatent, more_kernel = piece(i, causal=False)
        return dq + more, dlatents.at[i].set(dlatent), dkernel + more_kernel

    dq, dlatent, dkernel = piece(me, causal=True)
    if cut.context:
        dlatents = jnp.zeros_like(latents).at[me].set(dlatent)
        dq, dlatents, dkernel = lax.fori_loop(0, me, add, (dq, dlatents, dkernel))
        dlatent = lax.psum_scatter(dlatents, cut.context, scatter_dimension=0)
    if cut.heads:  # every group of heads had the whole latent
        dlatent = lax.psum(dlatent, cut.heads)
    summed = (*cut.rows, *((cut.context,) if cut.context else ()))
    dkernel = lax.psum(dkernel, summed) if summed else dkernel
    return dq.astype(q.dtype), dlatent.astype(latent.dtype), dkernel.astype(kernel.dtype)
