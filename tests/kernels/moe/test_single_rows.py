"""One row at a time gives what blocks of rows give: any routing, any dtype, any kind of expert weight, experts of a
larger stack.

Tolerances: float32 sums of 32 terms in another order; bfloat16 rounds each product once, a unit of the last of 8 bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.kernels.moe.expert_weights import Int4, LoRAWeights
from kimi_jax.kernels.moe.single_rows import single_rows_swiglu
from kimi_jax.nn.moe import ExpertWeights, run_experts

E, D, F, N, K, FIRST, HELD = 4, 32, 16, 5, 2, 4, 12
RNG = np.random.default_rng(0)


def floats(*shape):
    return jnp.asarray(RNG.normal(size=shape) * 0.3, jnp.float32)


def int4(inputs, outputs):
    words = RNG.integers(-(1 << 31), 1 << 31, (HELD, inputs // 8, outputs)).astype(np.int32)
    return Int4(jnp.asarray(words), jnp.abs(floats(HELD, inputs // 16, outputs)).astype(jnp.bfloat16))


SHAPES = (D, F), (D, F), (F, D)
BANKS = {
    "float32": lambda: ExpertWeights(*(floats(HELD, *shape) for shape in SHAPES)),
    "bfloat16": lambda: ExpertWeights(*(floats(HELD, *shape).astype(jnp.bfloat16) for shape in SHAPES)),
    "int4": lambda: ExpertWeights(*(int4(*shape) for shape in SHAPES)),
    "adapted": lambda: ExpertWeights(
        *(LoRAWeights(floats(HELD, i, o), floats(HELD, i, 2), floats(HELD, 2, o)) for i, o in SHAPES)
    ),
}
ROUTINGS = {
    "mixed": RNG.integers(0, E, (N, K)),
    "all to one": np.full((N, K), 2),
    "some nowhere": RNG.choice([0, 3, E], (N, K)),
    "all nowhere": np.full((N, K), E),
}


@pytest.mark.parametrize("name", BANKS)
def test_equals_blocks_of_rows(name):
    expert_weights, dtype = BANKS[name](), "bfloat16" if name == "bfloat16" else "float32"
    x, gates = floats(N, D).astype(dtype), jnp.abs(floats(N, K))
    blocks = jax.jit(lambda experts: run_experts(x, experts, gates, expert_weights, E, FIRST)[0])
    singly = jax.jit(lambda experts: single_rows_swiglu(x, experts, gates, tuple(expert_weights), E, FIRST))
    for routing in ROUTINGS.values():
        want = np.asarray(blocks(jnp.asarray(routing, jnp.int32)))
        got = singly(jnp.asarray(routing, jnp.int32))
        assert got.dtype == jnp.float32
        close = 1e-5 if dtype == "float32" else 2**-7
        np.testing.assert_allclose(got, want, atol=close * max(np.abs(want).max(), 1e-9), rtol=0)
