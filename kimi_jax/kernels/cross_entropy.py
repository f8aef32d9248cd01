"""Token cross entropy of a large vocabulary without ever holding all logits.

Source: docs/architecture.md section 2 (kernel seam). Tokens are taken in chunks; the backward pass makes each
chunk's logits again.

N tokens   D width   V vocabulary   c tokens a chunk
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

CHUNK = 512


def chunked_cross_entropy(
    hidden: Float[Array, "N D"], kernel: Float[Array, "D V"], targets: Int[Array, " N"], chunk: int = CHUNK
) -> Float[Array, " N"]:
    """-log softmax(hidden @ kernel)[target] of each token, float32.

    The matmul takes its operands in the dtype of `hidden` and accumulates in float32.
    """
    count = hidden.shape[0]
    chunk = min(chunk, count)
    short = -count % chunk
    hidden = jnp.pad(hidden, ((0, short), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    targets = jnp.pad(targets, (0, short)).reshape(-1, chunk)
    return _nll(hidden, kernel.astype(hidden.dtype), targets).reshape(-1)[:count]


def _dot(a: Array, b: Array) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _nll(hidden: Array, kernel: Array, targets: Array) -> Array:
    return _nll_fwd(hidden, kernel, targets)[0]


def _nll_fwd(hidden: Array, kernel: Array, targets: Array) -> tuple[Array, tuple]:
    def one(part: tuple) -> tuple[Array, Array]:
        h, t = part
        logits = _dot(h, kernel)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return lse - jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0], lse

    nll, lse = lax.map(one, (hidden, targets))
    return nll, (hidden, kernel, targets, lse)


def _nll_bwd(residuals: tuple, grad: Array) -> tuple[Array, Array, None]:
    hidden, kernel, targets, lse = residuals
    vocabulary = jnp.arange(kernel.shape[1])

    def one(dkernel: Array, part: tuple) -> tuple[Array, Array]:
        h, t, lse, g = part
        probs = jnp.exp(_dot(h, kernel) - lse[:, None])
        dlogits = (g[:, None] * (probs - (t[:, None] == vocabulary))).astype(h.dtype)
        return dkernel + _dot(h.T, dlogits), _dot(dlogits, kernel.T).astype(h.dtype)

    dkernel, dhidden = lax.scan(one, jnp.zeros(kernel.shape, jnp.float32), (hidden, targets, lse, grad))
    return dhidden, dkernel.astype(kernel.dtype), None


_nll.defvjp(_nll_fwd, _nll_bwd)
