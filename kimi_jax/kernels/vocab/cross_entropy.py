"""Token cross entropy of a large vocabulary without ever holding all logits.

Source: docs/architecture.md section 2 (kernel seam). Tokens are taken in chunks; the backward pass makes each
chunk's logits again.

N tokens   D width   V vocabulary   c tokens a chunk
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

CHUNK = 512


def chunked_cross_entropy(
    hidden: Float[Array, "N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, " N"],
    chunk: int = CHUNK,
    temperature: float = 1.0,
) -> Float[Array, " N"]:
    """-log softmax(hidden @ kernel / temperature)[target] of each token, float32.

    The matmul takes its operands in the dtype of `hidden` and accumulates in float32; the float32 logits are divided.
    """
    return _nll(hidden, kernel, targets, chunk, temperature)


def cross_entropy_and_lse(
    hidden: Float[Array, "N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, " N"],
    chunk: int = CHUNK,
    temperature: float = 1.0,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """`chunked_cross_entropy` and each token's log-sum-exp of logits, float32; no gradient of its own."""

    def one(part: tuple) -> tuple[Array, Array]:
        h, t = part
        logits = _scaled(_dot(h, kernel), temperature)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return lse - jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0], lse

    nll, lse = lax.map(one, tuple(_chunks(a, chunk) for a in (hidden, targets)))
    return nll.reshape(-1)[: hidden.shape[0]], lse.reshape(-1)[: hidden.shape[0]]


def cross_entropy_grads(
    hidden: Float[Array, "N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, " N"],
    lse: Float[Array, " N"],
    grad: Float[Array, " N"],
    chunk: int = CHUNK,
    temperature: float = 1.0,
) -> tuple[Float[Array, "N D"], Float[Array, "D V"]]:
    """Gradients by hidden, in its dtype, and by kernel, summed over all tokens in float32 and left so."""
    vocabulary = jnp.arange(kernel.shape[1])

    def one(dkernel: Array, part: tuple) -> tuple[Array, Array]:
        h, t, lse, g = part
        probs = jnp.exp(_scaled(_dot(h, kernel), temperature) - lse[:, None])
        dlogits = _scaled(g[:, None] * (probs - (t[:, None] == vocabulary)), temperature).astype(h.dtype)
        return dkernel + _dot(h.T, dlogits), _dot(dlogits, kernel.T).astype(h.dtype)

    parts = tuple(_chunks(a, chunk) for a in (hidden, targets, lse, grad))
    dkernel, dhidden = lax.scan(one, jnp.zeros(kernel.shape, jnp.float32), parts)
    return dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], dkernel


def _chunks(x: Array, chunk: int) -> Array:
    """[N, ...] as [N/c, c, ...], zeros at the end: their gradient is zero, and so is what they add to the kernel's."""
    chunk = min(chunk, x.shape[0])
    padded = jnp.pad(x, ((0, -x.shape[0] % chunk), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(-1, chunk, *x.shape[1:])


def _scaled(x: Array, temperature: float) -> Array:
    return x if temperature == 1.0 else x / temperature


def _dot(a: Array, b: Array) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _nll(hidden: Array, kernel: Array, targets: Array, chunk: int, temperature: float) -> Array:
    return _nll_fwd(hidden, kernel, targets, chunk, temperature)[0]


def _nll_fwd(hidden: Array, kernel: Array, targets: Array, chunk: int, temperature: float) -> tuple[Array, tuple]:
    nll, lse = cross_entropy_and_lse(hidden, kernel.astype(hidden.dtype), targets, chunk, temperature)
    return nll, (hidden, kernel, targets, lse)


def _nll_bwd(chunk: int, temperature: float, residuals: tuple, grad: Array) -> tuple[Array, Array, None]:
    hidden, kernel, targets, lse = residuals
    cast = kernel.astype(hidden.dtype)
    dhidden, dkernel = cross_entropy_grads(hidden, cast, targets, lse, grad, chunk, temperature)
    return dhidden, dkernel.astype(kernel.dtype), None


_nll.defvjp(_nll_fwd, _nll_bwd)
