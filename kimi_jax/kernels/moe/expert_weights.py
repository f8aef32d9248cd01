"""What a stack of expert matrices may be: floats, INT4 words with their scales, or a frozen stack with adapters.

Source: docs/released_model.md section 4 (INT4 pack-quantized; the layout here is the released one transposed, so that
neighbours in memory are outputs). The blocked grouped matmul asks for one expert's matrix at a time (`matrix`) and
hands back what the backward pass found for it (`add_gradient`); on TPU `kernels.moe.int4_matmul` makes floats of one
tile at a time. Of a whole stack floats are never made.

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


class LoRAWeights(NamedTuple):
    """base[e] + a[e] @ b[e]: `base` is frozen (its gradient is zero), `a` and `b` learn."""

    base: Any  # Float[Array, "E C O"] | Int4
    a: Float[Array, "E C r"]
    b: Float[Array, "E r O"]


ExpertWeight: TypeAlias = Array | Int4 | LoRAWeights  # [E, C, O]


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


def matrix(expert_weight: ExpertWeight, e: Int[Array, ""], dtype: DTypeLike) -> Float[Array, "C O"]:
    """Expert e's matrix."""
    if isinstance(expert_weight, Int4):
        return dequantise(expert_weight.words[e], expert_weight.scales[e], dtype)
    if isinstance(expert_weight, LoRAWeights):
        low_rank = jnp.matmul(expert_weight.a[e], expert_weight.b[e], precision=lax.Precision.HIGHEST)
        return matrix(expert_weight.base, e, dtype) + low_rank.astype(dtype)
    return expert_weight[e]


def learned(expert_weight: Any) -> Any:
    """What of an expert weight has a gradient: floats, an adapter's (a, b), None of INT4. Its leaves may be specs as
    well."""
    if isinstance(expert_weight, Int4):
        return None
    if isinstance(expert_weight, LoRAWeights):
        return expert_weight.a, expert_weight.b
    return expert_weight


def zero_gradient(expert_weight: ExpertWeight) -> Any:
    """Where `add_gradient` begins: float32, in the form of `learned`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), learned(expert_weight))


def add_gradient(
    total: Any, expert_weight: ExpertWeight, e: Int[Array, ""], x: Float[Array, "b C"], dy: Float[Array, "b O"]
) -> Any:
    """`total` plus the gradient of a block of expert e: inputs x, gradient of its outputs dy."""
    if isinstance(expert_weight, Int4):
        return None
    if isinstance(expert_weight, LoRAWeights):
        a, b = expert_weight.a[e], expert_weight.b[e]  # float32: XLA:CPU has no product of bfloat16 this narrow
        da, db = total
        return da.at[e].add(_product(x.T, _product(dy, b.T))), db.at[e].add(_product(_product(x, a).T, dy))
    return total.at[e].add(_product(x.T, dy))


def finish_gradient(total: Any, expert_weight: ExpertWeight) -> Any:
    """The cotangent of the expert weight, in its dtypes."""
    total = jax.tree.map(lambda x, like: x.astype(like.dtype), total, learned(expert_weight))
    return LoRAWeights(None, *total) if isinstance(expert_weight, LoRAWeights) else total


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
