"""Newton-Schulz orthogonalisation of a stack of matrices: the inner step of Muon.

Source: paper section 2.4 (Moonlight's constants). The iteration pushes every singular value of a matrix towards 1 and
keeps its singular vectors; with these coefficients it stops near 1 (about 0.7 to 1.2), which is what Muon is tuned for.

Shape letters: N matrices, R rows, C columns.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7  # added to the Frobenius norm, so that a zero matrix stays zero


def default_dtype() -> jnp.dtype:
    """Dtype of the iteration on this backend: bfloat16 as in the paper, float32 on a CPU, where bfloat16 is slower."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def orthogonalize(
    matrices: Float[Array, "N R C"], steps: int = 5, dtype: DTypeLike | None = None
) -> Float[Array, "N R C"]:
    """Each matrix with its singular values moved to about 1, in the dtype of the input; a zero matrix gives zeros.

    The Gram matrix is formed on the shorter side, so a step costs 4 min(R,C)^2 max(R,C) + 2 min(R,C)^3 FLOPs a matrix.
    `dtype` is that of the iteration (default: `default_dtype()`; pass it when compiling for another backend). The norm
    is always float32. Source: paper section 2.4, "Muon details".
    """
    dtype = jnp.dtype(dtype) if dtype is not None else default_dtype()
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    # Left to itself, a TPU multiplies float32 matrices in bfloat16.
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None)

    x = matrices.astype(jnp.float32)
    x = (x / (jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True)) + EPSILON)).astype(dtype)
    for _ in range(steps):  # unrolled: XLA:CPU runs the chains of different parameters side by side, loops one by one
        transposed = jnp.swapaxes(x, 1, 2)
        gram = matmul(x, transposed) if wide else matmul(transposed, x)
        poly = b * gram + c * matmul(gram, gram)
        x = a * x + (matmul(poly, x) if wide else matmul(x, poly))
    return x.astype(matrices.dtype)
