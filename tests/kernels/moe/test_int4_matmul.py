"""The INT4 kernel, interpreted, is megablox on the matrices that the words stand for, to the bit.

Same tiles, so the same sums in the same order; a single bit of a weight shows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

from kimi_jax.kernels.moe.expert_weights import Int4, dequantise
from kimi_jax.kernels.moe.int4_matmul import dequantised, int4_gmm, row_tile

GROUP = 16


def expert_weight(rng, num, inputs, outputs):
    """Any words; scales of either sign."""
    words = rng.integers(-(2**31), 2**31, (num, inputs // 8, outputs)).astype(np.int32)
    return Int4(jnp.asarray(words), jnp.asarray(rng.normal(0, 0.1, (num, inputs // GROUP, outputs)), jnp.bfloat16))


def floats(packed):
    return jax.jit(jax.vmap(lambda words, scales: dequantise(words, scales, jnp.bfloat16)))(*packed)


def test_every_code_and_any_scale_to_the_bit():
    rng = np.random.default_rng(0)
    packed = expert_weight(rng, 1, 256, 96)
    codes = (np.asarray(packed.words).view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    assert len(np.unique(codes)) == 16
    got = jax.jit(dequantised)(packed.words[0], packed.scales[0])
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, floats(packed)[0])


CASES = {  # rows, sizes, inputs, outputs, width of a tile
    "one tile": (128, (128,), 32, 48, 1024),
    "groups cross tiles": (384, (100, 1, 155, 128), 32, 16, 1024),
    "empty groups, rows beyond the last": (256, (0, 130, 0, 0, 7, 0), 64, 32, 1024),
    "no rows at all": (128, (0, 0), 32, 16, 1024),
    "rows that are no whole tile": (200, (90, 110), 32, 16, 1024),
    "several whole tiles": (256, (99, 157), 64, 96, 32),
    "edges of tiles": (256, (99, 157), 80, 40, 32),
}


@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("name", CASES)
def test_equals_megablox_of_the_dequantised(name, transpose):
    """For experts `first`.. of a larger stack."""
    height, sizes, inputs, outputs, width = CASES[name]
    rng = np.random.default_rng(1)
    first, num = 2, len(sizes)
    packed, sizes = expert_weight(rng, first + num + 1, inputs, outputs), jnp.asarray(sizes, jnp.int32)
    rows = jnp.asarray(rng.normal(size=(height, outputs if transpose else inputs)), jnp.bfloat16)
    used = int(sizes.sum())
    got = int4_gmm(rows, packed, sizes, first, transpose=transpose, interpret=True, width=width)
    assert got.shape == (height, inputs if transpose else outputs)
    tile = row_tile(height, num)
    want = gmm(
        jnp.pad(rows, ((0, -height % tile), (0, 0))), floats(packed)[first : first + num], sizes,
        tiling=(tile, width, width), transpose_rhs=transpose, interpret=True,
    )  # fmt: skip
    np.testing.assert_array_equal(got[:used], want[:used])
    assert used == 0 or np.abs(np.asarray(got[:used])).max() > 0


def test_results_in_bfloat16_are_the_sums_rounded_once():
    rng = np.random.default_rng(3)
    packed, sizes = expert_weight(rng, 2, 64, 32), jnp.asarray([60, 68], jnp.int32)
    rows = jnp.asarray(rng.normal(size=(128, 64)), jnp.bfloat16)
    got = int4_gmm(rows, packed, sizes, dtype=jnp.bfloat16, interpret=True, width=32)
    np.testing.assert_array_equal(got, int4_gmm(rows, packed, sizes, interpret=True, width=32).astype(jnp.bfloat16))


def test_what_does_not_fit_is_said():
    packed = expert_weight(np.random.default_rng(2), 2, 32, 16)
    sizes, rows = jnp.asarray([3, 5], jnp.int32), jnp.zeros((8, 32), jnp.bfloat16)
    with pytest.raises(ValueError, match="takes bfloat16 rows and scales, not float32"):
        int4_gmm(rows.astype(jnp.float32), packed, sizes)
    with pytest.raises(ValueError, match=r"rows \(8, 32\) and INT4 matrices \[32, 16\] .* do not fit together transp"):
        int4_gmm(rows, packed, sizes, transpose=True)
    with pytest.raises(ValueError, match="tiles of 24 whole groups"):
        int4_gmm(rows, packed, sizes, width=24)
