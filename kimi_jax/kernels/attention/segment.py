"""Softmax attention inside segments: packed documents (causal) and packed images (full), memory bounded.

Source: docs/released_model.md section 2 (vision: inside an item), section 3 (text: causal inside a document); the
per-head maximum logit is what QK-clip needs (docs/paper_notes.md section 2.4). Two forms with one result:
`dense_attention` is the plain statement, `segment_attention` walks over chunks of queries, never holds [T, T], and
recomputes the probabilities in its own backward pass from the stored log-sum-exp. Its causal chunks skip the keys of
later chunks. On CPU rows are taken one at a time so that a chunk's scores stay in cache (three times faster than the
dense form at T = 512); elsewhere all at once. Probabilities enter the product with v unnormalised, in the dtype of v;
the sum divides the result. On TPU bfloat16 goes to `kernels.attention.splash`.

`attend` and `attend_grads` are one piece of attention each way: some queries, some keys. `kernels.attention.mla`
joins pieces over devices.

B rows   T positions   H heads   d query/key width   v value width   c queries a chunk   K keys that a chunk sees
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.attention import splash

CHUNK = 64  # queries a chunk: 4 heads x 64 x 512 float32 scores are 0.5 MB
MAX_SPANS = 4  # unrolled spans of chunks with their own key range; more would save little and compile longer
NEGATIVE = splash.NOTHING  # masked logit; finite, so that rows without any key stay finite


def _mask(query_ids: Array, key_ids: Array, query_start: Array | int, causal: bool) -> Array:
    """[.., q, k] True where a query may look: same segment, not padding (id 0), not later."""
    mask = (query_ids[..., :, None] == key_ids[..., None, :]) & (query_ids[..., :, None] > 0)
    if causal:
        queries = query_start + jnp.arange(query_ids.shape[-1])
        mask &= queries[:, None] >= jnp.arange(key_ids.shape[-1])
    return mask


def dense_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T H d"],
    v: Float[Array, "B T H v"],
    segment_ids: Int[Array, "B T"],
    *,
    causal: bool,
    scale: float,
) -> tuple[Float[Array, "B T H v"], Float[Array, " H"]]:
    """The reference: the same contract as `segment_attention` with [B, H, T, T] in memory and automatic gradients."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32, precision=_precision(q)) * scale
    mask = _mask(segment_ids, segment_ids, 0, causal)[:, None]
    logits = jnp.where(mask, logits, NEGATIVE)
    probs = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0.0).astype(q.dtype)
    out = jnp.einsum("bhqk,bkhv->bqhv", probs, v, precision=_precision(q))
    return out, lax.stop_gradient(logits.max(axis=(0, 2, 3)))


def segment_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T H d"],
    v: Float[Array, "B T H v"],
    segment_ids: Int[Array, "B T"],
    *,
    causal: bool,
    scale: float,
    exact_above: float = -math.inf,
) -> tuple[Float[Array, "B T H v"], Float[Array, " H"]]:
    """Attention inside segments; softmax in float32.

    segment_ids: 0 is padding, which sees nothing and gets 0.
    Returns the output (dtype of q) and, without gradient, each head's largest scaled logit over the pairs that may
    look at each other (float32; NEGATIVE if there are none). Where none exceeds `exact_above`, bounds below it may
    stand for the maxima (TPU: it makes them from what the kernel returns anyway).
    """
    spec = AttentionSpec(causal, scale, exact_above)
    short = -q.shape[1] % spec.chunk(q.shape[1])
    if short:  # padding is segment 0: it changes nothing
        q, k, v = (jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))) for x in (q, k, v))
    ids = jnp.pad(segment_ids, ((0, 0), (0, short)))
    out, max_logits = _attention(spec, q, k, v, ids)
    return out[:, : segment_ids.shape[1]], max_logits


class AttentionSpec(NamedTuple):
    """What is known of a call of `attend` when it is compiled; see `segment_attention`."""

    causal: bool
    scale: float
    exact_above: float = -math.inf

    def chunk(self, length: int) -> int:
        """Queries a chunk; lengths are whole chunks."""
        return min(CHUNK, length)


def attend(
    spec: AttentionSpec,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K H d"],
    v: Float[Array, "B K H v"],
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B K"],
) -> tuple[Float[Array, "B T H v"], Float[Array, "B H T"], Float[Array, " H"]]:
    """Output, log-sum-exp (NEGATIVE and output 0 where a query sees nothing) and largest logits. Causal: T = K.

    No gradient is defined: that is `attend_grads`. T must be whole chunks.
    """
    chunk = spec.chunk(q.shape[1])

    def row(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array) -> tuple:
        q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q, k, v))
        out, lse, top = _row_forward(spec.causal, spec.scale, chunk, q, k, v, query_ids, key_ids)
        return jnp.swapaxes(out, 0, 1), lse, top

    def chunks(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array) -> tuple:
        out, lse, top = _rows(row, q, k, v, query_ids, key_ids)
        return out, lse, top.max(axis=0)

    def kernel(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array) -> tuple:
        out, lse = splash.forward(q, k, v, query_ids, key_ids, causal=spec.causal, scale=spec.scale)
        exact = functools.partial(splash.largest, q, k, query_ids, key_ids, causal=spec.causal, scale=spec.scale)
        return out, lse, splash.bounded(lse, exact, spec.exact_above)

    tpu = kernel if _for_kernel(q, k) else chunks
    return lax.platform_dependent(q, k, v, query_ids, key_ids, tpu=tpu, default=chunks)


def attend_grads(
    spec: AttentionSpec,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K H d"],
    v: Float[Array, "B K H v"],
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B K"],
    out: Float[Array, "B T H v"],
    lse: Float[Array, "B H T"],
    grad: Float[Array, "B T H v"],
) -> tuple[Float[Array, "B T H d"], Float[Array, "B K H d"], Float[Array, "B K H v"]]:
    """Gradients of q, k and v; out and lse may be those over more keys than these (the rest of a longer row)."""
    chunk = spec.chunk(q.shape[1])

    def row(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array, out: Array, lse: Array, grad: Array):
        q, k, v, out, grad = (jnp.swapaxes(x, 0, 1) for x in (q, k, v, out, grad))
        arrays = q, k, v, query_ids, key_ids, out, lse, grad
        return tuple(jnp.swapaxes(x, 0, 1) for x in _row_backward(spec.causal, spec.scale, chunk, *arrays))

    tpu = functools.partial(_rows, row)
    if _for_kernel(q, k):
        tpu = functools.partial(splash.backward, causal=spec.causal, scale=spec.scale)
    arrays = q, k, v, query_ids, key_ids, out, lse, grad
    return lax.platform_dependent(*arrays, tpu=tpu, default=functools.partial(_rows, row))


def _for_kernel(q: Array, k: Array) -> bool:
    """The kernel multiplies float32 as bfloat16, which float32 is not chosen for, and wants whole blocks."""
    return q.dtype == jnp.bfloat16 and q.shape[1] % splash.LANES == 0 and k.shape[1] % splash.LANES == 0


# ------------------------------------------------------------------------------------------------------ chunked, by row


def _precision(x: Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision=_precision(a))


def _rows(fn: Callable, *args: Array) -> tuple[Array, ...]:
    """fn over the leading axis: one row after the other on CPU, all together elsewhere."""
    return lax.platform_dependent(*args, cpu=lambda *a: lax.map(lambda row: fn(*row), a), default=jax.vmap(fn))


def _spans(length: int, keys: int, chunk: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, last query + 1, keys) of each span; a span is a whole number of chunks."""
    if not causal:
        return [(0, length, keys)]
    chunks = length // chunk
    spans = max(min(chunks // 2, MAX_SPANS), 1)  # never of one chunk: XLA:CPU inlines such a loop, its exp is 5x slower
    bounds = [chunk * (chunks * i // spans) for i in range(spans + 1)]
    return [(a, b, b) for a, b in itertools.pairwise(bounds)]


def _chunks(x: Array, axis: int, chunk: int) -> Array:
    """Split `axis` into chunks and bring the chunk index to the front."""
    shape = (*x.shape[:axis], x.shape[axis] // chunk, chunk, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _whole(x: Array) -> Array:
    """[n, H, c, ...] -> [H, n*c, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _logits(q: Array, k: Array, query_ids: Array, key_ids: Array, start: Array, causal: bool, scale: float) -> Array:
    mask = _mask(query_ids, key_ids, start, causal)
    return jnp.where(mask, _dot("hqd,hkd->hqk", q, k) * scale, NEGATIVE)


def _row_forward(
    causal: bool, scale: float, chunk: int, q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array
) -> tuple:
    """One row, [H, T, .]: output, log-sum-exp [H, T], maximum [H]."""

    def one(span_k: Array, span_v: Array, key_ids: Array, part: tuple) -> tuple:
        q_c, ids_c, start = part
        logits = _logits(q_c, span_k, ids_c, key_ids, start, causal, scale)
        top = logits.max(axis=-1)
        safe = jnp.maximum(top, NEGATIVE / 2)  # a row without keys: exp(NEGATIVE - NEGATIVE/2) = 0
        weights = jnp.exp(logits - safe[..., None])
        total = weights.sum(axis=-1)
        out = _dot("hqk,hkv->hqv", weights.astype(v.dtype), span_v)
        out = out / jnp.maximum(total, 1e-30)[..., None]
        lse = jnp.where(total > 0, safe + jnp.log(jnp.maximum(total, 1e-30)), NEGATIVE)
        return out.astype(q.dtype), lse, top.max(axis=-1)

    results = []
    for a, b, keys in _spans(q.shape[1], k.shape[1], chunk, causal):
        parts = (_chunks(q[:, a:b], 1, chunk), _chunks(query_ids[a:b], 0, chunk), jnp.arange(a, b, chunk))
        fn = functools.partial(one, k[:, :keys], v[:, :keys], key_ids[:keys])
        out, lse, top = lax.map(fn, parts)
        results.append((_whole(out), _whole(lse), top.max(axis=0)))
    out, lse, top = zip(*results, strict=True)
    return jnp.concatenate(out, axis=1), jnp.concatenate(lse, axis=1), jnp.stack(top).max(axis=0)


def _row_backward(
    causal: bool,
    scale: float,
    chunk: int,
    q: Array,
    k: Array,
    v: Array,
    query_ids: Array,
    key_ids: Array,
    out: Array,
    lse: Array,
    grad: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of one row. With P the probabilities: dS = P * (grad v^T - rowsum(grad * out))."""
    lse = jnp.where(lse > NEGATIVE / 2, lse, 0.0)  # a query without keys: exp(NEGATIVE - 0) = 0
    delta = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)

    def one(span_k: Array, span_v: Array, key_ids: Array, carry: tuple, part: tuple) -> tuple:
        dk, dv = carry
        q_c, ids_c, start, lse_c, delta_c, grad_c = part
        logits = _logits(q_c, span_k, ids_c, key_ids, start, causal, scale)
        probs = jnp.exp(logits - lse_c[..., None])
        dv += _dot("hqk,hqv->hkv", probs.astype(v.dtype), grad_c)
        ds = probs * (_dot("hqv,hkv->hqk", grad_c, span_v) - delta_c[..., None]) * scale
        ds = ds.astype(q.dtype)
        dk += _dot("hqk,hqd->hkd", ds, q_c)
        return (dk, dv), _dot("hqk,hkd->hqd", ds, span_k)

    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dq = []
    for a, b, keys in _spans(q.shape[1], k.shape[1], chunk, causal):
        parts = (
            _chunks(q[:, a:b], 1, chunk), _chunks(query_ids[a:b], 0, chunk), jnp.arange(a, b, chunk),
            _chunks(lse[:, a:b], 1, chunk), _chunks(delta[:, a:b], 1, chunk), _chunks(grad[:, a:b], 1, chunk),
        )  # fmt: skip
        fn = functools.partial(one, k[:, :keys], v[:, :keys], key_ids[:keys])
        (dk_span, dv_span), dq_span = lax.scan(fn, (dk[:, :keys], dv[:, :keys]), parts)
        dk, dv = dk.at[:, :keys].set(dk_span), dv.at[:, :keys].set(dv_span)
        dq.append(_whole(dq_span))
    return jnp.concatenate(dq, axis=1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: AttentionSpec, q: Array, k: Array, v: Array, ids: Array) -> tuple[Array, Array]:
    return _attention_fwd(spec, q, k, v, ids)[0]


def _attention_fwd(spec: AttentionSpec, q: Array, k: Array, v: Array, ids: Array) -> tuple:
    out, lse, top = attend(spec, q, k, v, ids, ids)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")  # for policies of remat
    return (out, top), (q, k, v, ids, out, lse)


def _attention_bwd(spec: AttentionSpec, residuals: tuple, grads: tuple) -> tuple:
    q, k, v, ids, out, lse = residuals
    return (*attend_grads(spec, q, k, v, ids, ids, out, lse, grads[0]), None)


_attention.defvjp(_attention_fwd, _attention_bwd)
