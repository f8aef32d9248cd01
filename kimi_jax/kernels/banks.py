"""What a bank of expert matrices may be: floats, INT4 words with their scales, or a frozen bank with adapters.

Source: docs/released_model.md section 4 (INT4 pack-quantized; the layout here is the released one transposed, so that
neighbours in memory are outputs). The blocked grouped matmul asks for one expert's matrix at a time (`matrix`) and
hands back what the backward pass found for it (`add_gradient`); on TPU `kernels.int4_matmul` makes floats of one tile
at a time. Of a whole bank floats are never made.

E experts   C inputs   O outputs   C8 = C / 8 words   G = C / group scales   r rank of an adapter   b rows of a block
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

CODES = 8  # in a word, least significant first, offset by 8


class Int4(NamedTuple):
    """Frozen matrices of 4.5 bits a weight (bfloat16 scales, groups of 32). weight = code * scale, rounded once to the
    dtype of the scales: to the bit what compressed-tensors dequantises. Has no gradient."""

    words: Int[Array, "*E C8 O"]  # int32
    scales: Float[Array, "*E G O"]  # group = C / G


class Adapted(NamedTuple):
    """base[e] + a[e] @ b[e]: `base` is frozen (its gradient is zero), `a` and `b` learn."""

    base: Any  # Float[Array, "E C O"] | Int4
    a: Float[Array, "E C r"]
    b: Float[Array, "E r O"]


Bank: TypeAlias = Array | Int4 | Adapted  # [E, C, O]


def dequantise(words: Int[Array, "C8 O"], scales: Float[Array, "G O"], dtype: DTypeLike) -> Float[Array, "8*C8 O"]:
    """One matrix in `dtype`, by way of the dtype of the scales."""
    shifts = 4 * jnp.arange(CODES, dtype=jnp.uint32)[:, None]
    unsigned = lax.bitcast_convert_type(words, jnp.uint32)[:, None]  # so that the shift brings in zeros
    codes = ((unsigned >> shifts) & 15).astype(jnp.int32) - 8
    outputs = words.shape[1]
    wide = codes.reshape(scales.shape[0], -1, outputs).astype(jnp.float32) * scales.astype(jnp.float32)[:, None]
    kind = jnp.finfo(scales.dtype)
    # A cast to bfloat16 and back would be left out by XLA, which allows itself excess precision.
    wide = lax.reduce_precision(wide, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)
    return wide.reshape(-1, outputs).astype(dtype)


def matrix(bank: Bank, e: Int[Array, ""], dtype: DTypeLike) -> Float[Array, "C O"]:
    """Expert e's matrix."""
    if isinstance(bank, Int4):
        return dequantise(bank.words[e], bank.scales[e], dtype)
    if isinstance(bank, Adapted):
        low_rank = jnp.matmul(bank.a[e], bank.b[e], precision=lax.Precision.HIGHEST)
        return matrix(bank.base, e, dtype) + low_rank.astype(dtype)
    return bank[e]


def learned(bank: Any) -> Any:
    """What of a bank has a gradient: floats, an adapter's (a, b), None of INT4. Its leaves may be specs as well."""
    if isinstance(bank, Int4):
        return None
    if isinstance(bank, Adapted):
        return bank.a, bank.b
    return bank


def zero_gradient(bank: Bank) -> Any:
    """Where `add_gradient` begins: float32, in the form of `learned`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), learned(bank))


def add_gradient(total: Any, bank: Bank, e: Int[Array, ""], x: Float[Array, "b C"], dy: Float[Array, "b O"]) -> Any:
    """`total` plus the gradient of a block of expert e: inputs x, gradient of its outputs dy."""
    if isinstance(bank, Int4):
        return None
    if isinstance(bank, Adapted):
        a, b = bank.a[e], bank.b[e]  # float32: XLA:CPU has no product of bfloat16 this narrow
        da, db = total
        return da.at[e].add(_product(x.T, _product(dy, b.T))), db.at[e].add(_product(_product(x, a).T, dy))
    return total.at[e].add(_product(x.T, dy))


def finish_gradient(total: Any, bank: Bank) -> Any:
    """The cotangent of the bank, in its dtypes."""
    total = jax.tree.map(lambda x, like: x.astype(like.dtype), total, learned(bank))
    return Adapted(None, *total) if isinstance(bank, Adapted) else total


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
