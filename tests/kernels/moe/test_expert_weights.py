"""INT4 and adapted expert weights are the float expert weights they stand for: to the bit forward and for the inputs'
gradient.

Adapters' gradients are compared with those through a float stack that holds the sum: float32, 3e-5 absolute on values
of size 1 to 10, sums in another order.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.hf import int4
from kimi_jax.kernels.moe import grouped_matmul as gm
from kimi_jax.kernels.moe.expert_weights import Int4, LoRAWeights, dequantise
from kimi_jax.nn import moe

E, D, F, K, GROUP, RANK = 4, 32, 16, 2, 16, 3


def packed(rng, inputs, outputs, num=E, dtype=jnp.bfloat16):
    """Any words; scales of either sign."""
    words = rng.integers(-(2**31), 2**31, (num, inputs // 8, outputs)).astype(np.int32)
    scales = rng.normal(0, 0.1, (num, inputs // GROUP, outputs)).astype(dtype)
    return Int4(jnp.asarray(words), jnp.asarray(scales))


def floats(expert_weight, dtype):
    """By the NumPy code that is held against compressed-tensors in tests/hf."""
    pairs = zip(np.asarray(expert_weight.words), np.asarray(expert_weight.scales), strict=True)
    return jnp.asarray(np.stack([int4.dequantise(w.T.copy(), s.T.copy()).T for w, s in pairs])).astype(dtype)


def case(seed=0, dtype=jnp.float32):
    """(x, gates, experts with some that are nowhere, INT4 expert weights)."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(23, D)), dtype)
    gates = jnp.asarray(rng.uniform(size=(23, K)), jnp.float32)
    experts = jnp.asarray(rng.integers(0, E + 1, (23, K)), jnp.int32)
    return x, gates, experts, (packed(rng, D, F), packed(rng, D, F), packed(rng, F, D))


def run(x, expert_weights, gates, experts):
    plan = gm.plan_blocks(experts, E)
    return gm.combine(gm.grouped_swiglu(gm.dispatch(x, plan), *expert_weights, plan), gates, plan)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from((ml_dtypes.bfloat16, np.float16, np.float32)))
def test_dequantised_as_the_released_weights(seed, dtype):
    """To the bit, under jit, where XLA would drop a rounding that it sees through."""
    expert_weight = packed(np.random.default_rng(seed), D, 5, dtype=dtype)
    got = DEQUANTISE(expert_weight)
    np.testing.assert_array_equal(got, floats(expert_weight, jnp.float32))


DEQUANTISE = jax.jit(jax.vmap(lambda expert_weight: dequantise(expert_weight.words, expert_weight.scales, jnp.float32)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_input_gradients_to_the_bit(dtype):
    x, gates, experts, expert_weights = case(dtype=dtype)
    plain = tuple(floats(expert_weight, dtype) for expert_weight in expert_weights)

    @jax.jit
    def value_and_grads(x, gates, expert_weights):
        return jax.value_and_grad(lambda x, g: jnp.sin(run(x, expert_weights, g, experts)).sum(), (0, 1))(x, gates)

    got, want = value_and_grads(x, gates, expert_weights), value_and_grads(x, gates, plain)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert np.abs(np.asarray(got[1][0], np.float32)).max() > 0


@pytest.mark.parametrize("base", ["float", "int4", "one of three"])
def test_adapters_learn_what_the_sum_would(base):
    """Value and gradients of a, b and x; the frozen base has none."""
    x, gates, experts, expert_weights = case()
    plain = tuple(floats(expert_weight, jnp.float32) for expert_weight in expert_weights)
    rng = np.random.default_rng(7)
    pairs = [
        tuple(jnp.asarray(rng.normal(0, 0.3, s), jnp.float32) for s in ((E, w.shape[1], RANK), (E, RANK, w.shape[2])))
        for w in plain
    ]
    bases = plain if base == "float" else expert_weights

    def adapted(pairs):
        if base == "one of three":
            return bases[0], LoRAWeights(bases[1], *pairs[1]), bases[2]
        return tuple(LoRAWeights(w, *pair) for w, pair in zip(bases, pairs, strict=True))

    def summed(pairs):
        changed = (1,) if base == "one of three" else (0, 1, 2)
        return tuple(w + jnp.einsum("edr,erf->edf", *pairs[i]) if i in changed else w for i, w in enumerate(plain))

    def results(banks_of):
        return jax.jit(
            jax.value_and_grad(lambda x, pairs: jnp.sin(run(x, banks_of(pairs), gates, experts)).sum(), (0, 1))
        )(x, pairs)

    with jax.default_matmul_precision("highest"):
        for a, b in zip(jax.tree.leaves(results(adapted)), jax.tree.leaves(results(summed)), strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-5)


def test_bank_is_never_made_of_floats():
    """Forward and backward of 64 experts need less room than one stack of bfloat16 would take (measured: a tenth)."""
    num, width, inner = 64, 256, 128
    rng = np.random.default_rng(0)
    expert_weights = packed(rng, width, inner, num), packed(rng, width, inner, num), packed(rng, inner, width, num)
    x, experts = jnp.ones((8, width)), jnp.asarray(rng.integers(0, num, (8, 2)), jnp.int32)

    def loss(x, expert_weights):
        plan = gm.plan_blocks(experts, num)
        rows = gm.grouped_swiglu(gm.dispatch(x, plan), *expert_weights, plan)
        return gm.combine(rows, jnp.ones((8, 2)), plan).sum()

    compiled = jax.jit(jax.grad(loss)).lower(x, expert_weights).compile()
    rows = (16 // gm.MIN_BLOCK + num) * gm.MIN_BLOCK * width * 4  # dispatched, padded to blocks, float32
    assert compiled.memory_analysis().temp_size_in_bytes - 4 * rows < num * width * inner * 2


def test_on_tpu_the_kernel_takes_the_words():
    """One device in bfloat16, experts of a larger stack, forward and backward: no matrix of floats in the program."""
    held, num, width, inner = 12, 4, 256, 128
    rng = np.random.default_rng(0)
    expert_weights = jax.eval_shape(
        lambda: tuple(packed(rng, *s, held) for s in ((width, inner), (width, inner), (inner, width)))
    )
    shapes = ((64, width), "bfloat16"), ((64, K), "int32"), ((64, K), "float32"), ((), "int32")
    x, experts, gates, first = (jax.ShapeDtypeStruct(*each) for each in shapes)

    def grads(x, experts, gates, expert_weights, first):
        return jax.grad(
            lambda x: moe.run_experts(x, experts, gates, moe.ExpertWeights(*expert_weights), num, first, 4)[0].sum()
        )(x)

    def text(x):
        traced = jax.jit(grads).trace(x, experts, gates, expert_weights, first)
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    floats = rf"({width}x{inner}|{inner}x{width})x(f32|bf16)>"
    assert "int4_gmm" in text(x) and not re.search(floats, text(x))
    wide = text(jax.ShapeDtypeStruct(x.shape, "float32"))  # which the kernel would multiply as bfloat16
    assert "int4_gmm" not in wide and re.search(floats, wide)
