"""Segment attention on TPU: the splash kernel that comes with JAX, forward with its log-sum-exp and backward from it.

Source: docs/architecture.md section 9 (the kernel refuses to be differentiated where it also returns the log-sum-exp,
so forward and backward are called one by one and `kernels.attention.segment` makes one `custom_vjp` of them). Blocks
above the diagonal are skipped; segments are masked inside blocks. Queries are scaled beforehand, in their own dtype.
Widths that the kernel does not take (it wants whole vectors of 128 values) are filled up with zeros.

B rows   T, K positions of queries and keys   H heads   d, v widths
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

BLOCKS = (512, 256, 128)  # positions a block: the largest that divides
LANES = 128
NOTHING = -1e30  # log-sum-exp of a query that sees no key, largest logit of a head without pairs


def _kernel(heads: int, queries: int, keys: int, causal: bool, interpret: bool) -> splash.SplashAttentionKernel:
    """Masks and block sizes; raises ValueError for lengths that are no whole blocks."""
    if queries % LANES or keys % LANES:
        raise ValueError(f"{queries} queries and {keys} keys must be multiples of {LANES}")
    q, k = (next(size for size in BLOCKS if length % size == 0) for length in (queries, keys))
    sizes = splash.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=k,
        block_q_dq=q, block_kv_dq=k,
    )  # fmt: skip
    mask = (masks.CausalMask if causal else masks.FullMask)((queries, keys))
    mask = masks.MultiHeadMask([mask] * heads)
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _segments(query_ids: Array, key_ids: Array) -> splash.SegmentIds:
    """Padding (0) looks at nothing: the kernel only compares."""
    return splash.SegmentIds(jnp.where(query_ids > 0, query_ids, -1), jnp.where(key_ids > 0, key_ids, -2))


def _rows(x: Array) -> Array:
    """[B, T, H, d] -> [B, H, T, whole vectors]."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0),) * 3 + ((0, -x.shape[-1] % LANES),))


def _settings(kernel: splash.SplashAttentionKernel) -> dict:
    kept = ("mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function", "attn_logits_soft_cap")
    return {name: kernel.kwargs.get(name) for name in (*kept, "interpret")}


def forward(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K H d"],
    v: Float[Array, "B K H v"],
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B K"],
    *,
    causal: bool,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H v"], Float[Array, "B H T"]]:
    """Output (0 for a query that sees nothing) and log-sum-exp (then NOTHING, float32)."""
    kernel = _kernel(q.shape[2], q.shape[1], k.shape[1], causal, interpret)

    def row(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array) -> tuple[Array, Array]:
        out, (lse,) = splash._splash_attention_forward(
            kernel.fwd_mask_info, q, k, v, _segments(query_ids, key_ids), None, save_residuals=True, **_settings(kernel)
        )
        return out, lse

    out, lse = jax.vmap(row)(_rows(q * scale), _rows(k), _rows(v), query_ids, key_ids)
    seen = lse > NOTHING / 2
    out = jnp.where(seen[..., None], out, 0)[..., : v.shape[-1]]
    return jnp.swapaxes(out, 1, 2).astype(q.dtype), jnp.where(seen, lse, NOTHING)


def backward(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K H d"],
    v: Float[Array, "B K H v"],
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B K"],
    out: Float[Array, "B T H v"],
    lse: Float[Array, "B H T"],
    grad: Float[Array, "B T H v"],
    *,
    causal: bool,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B K H d"], Float[Array, "B K H v"]]:
    """Gradients of q, k and v. out and lse may be those over more keys than these (the rest of a longer row)."""
    kernel = _kernel(q.shape[2], q.shape[1], k.shape[1], causal, interpret)

    def row(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array, out: Array, lse: Array, grad: Array):
        residuals = q, k, v, _segments(query_ids, key_ids), None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info
        settings = {**_settings(kernel), "save_residuals": False}
        return splash._splash_attention_bwd(res=residuals, do=grad, **settings)[3:6]

    seen = (lse > NOTHING / 2) & (query_ids > 0)[:, None]
    lse = jnp.where(seen, lse, 0.0)
    grad = jnp.where(jnp.swapaxes(seen, 1, 2)[..., None], grad, 0)
    dq, dk, dv = jax.vmap(row)(
        _rows(q * scale), _rows(k), _rows(v), query_ids, key_ids, _rows(out), lse, _rows(grad).astype(q.dtype)
    )
    dq, dk, dv = (jnp.swapaxes(x, 1, 2)[..., : y.shape[-1]] for x, y in ((dq, q), (dk, k), (dv, v)))
    return (dq * scale).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def largest(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K H d"],
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B K"],
    *,
    causal: bool,
    scale: float,
    block: int = 512,
) -> Float[Array, " H"]:
    """Each head's largest scaled logit over pairs that may look at each other, exactly; NOTHING if there are none.

    One head of one row and `block` queries at a time, so that [T, K] never exists.
    """
    block = next(size for size in (block, *BLOCKS, 1) if q.shape[1] % size == 0)

    def row(part: tuple) -> Array:
        q, k, query_ids, key_ids = part

        def chunk(start: Array) -> Array:
            rows = lax.dynamic_slice_in_dim(q, start, block)
            ids = lax.dynamic_slice_in_dim(query_ids, start, block)
            mask = (ids[:, None] == key_ids) & (ids[:, None] > 0)
            if causal:
                mask &= (start + jnp.arange(block))[:, None] >= jnp.arange(k.shape[0])

            def head(pair: tuple) -> Array:
                logits = jnp.matmul(pair[0], pair[1].T, preferred_element_type=jnp.float32) * scale
                return jnp.max(jnp.where(mask, logits, NOTHING))

            return lax.map(head, (jnp.swapaxes(rows, 0, 1), jnp.swapaxes(k, 0, 1)))

        return lax.map(chunk, jnp.arange(0, q.shape[0], block)).max(axis=0)

    return lax.map(row, (q, k, query_ids, key_ids)).max(axis=0)


def bounded(lse: Float[Array, "B H T"], exact: functools.partial, exact_above: float) -> Float[Array, " H"]:
    """A maximum is at most the log-sum-exp: while no head's exceeds `exact_above`, that bound stands for the maxima.

    Otherwise `exact()` computes them.
    """
    bound = lse.max(axis=(0, 2))
    return lax.cond(jnp.any(bound > exact_above), exact, lambda: bound)
