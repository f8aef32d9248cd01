"""INT4 and FP8 weights: bit exact against the released checkpoint, and every word comes back with its own scale."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from kimi_jax.hf import fp8, int4
from tests.environment import FIXTURES

BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def released():
    """name -> (words, scales, bfloat16 weights as compressed-tensors dequantises them)."""
    stored = load_file(FIXTURES / "tiny_int4/model.safetensors")
    weights = load_file(FIXTURES / "int4_dequant_bf16.safetensors")
    out = {}
    for name, weight in weights.items():
        base = name.removeprefix("dequant.").removesuffix("weight")
        out[base] = stored[base + "weight_packed"], stored[base + "weight_scale"], weight
    assert len(out) == 48
    return out


def test_dequantised_as_released_to_the_bit(released):
    for words, scales, weight in released.values():
        ours = int4.dequantise(words, scales)
        assert ours.dtype == weight.dtype
        np.testing.assert_array_equal(ours.view(np.uint16), weight.view(np.uint16))


def test_quantising_with_the_released_scales_gives_back_every_word(released):
    for words, scales, weight in released.values():
        np.testing.assert_array_equal(int4.quantise(weight, scales), words)


def words_and_scales():
    """Any words, any positive or negative bfloat16 scale that is neither tiny nor huge."""
    exponent = st.integers(20, 220)  # biased; bfloat16 has float32's range

    @st.composite
    def draw(draw_from):
        rows, groups = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 2))
        rng = np.random.default_rng(draw_from(st.integers(0, 2**32)))
        words = rng.integers(-(2**31), 2**31, (rows, 4 * groups)).astype(np.int32)
        bits = (
            rng.integers(0, 2**7, (rows, groups)) | draw_from(exponent) << 7 | rng.integers(0, 2, (rows, groups)) << 15
        )
        return words, bits.astype(np.uint16).view(BF16)

    return draw()


@given(words_and_scales())
def test_words_survive_dequantisation(case):
    words, scales = case
    np.testing.assert_array_equal(int4.pack(int4.unpack(words)), words)
    np.testing.assert_array_equal(int4.quantise(int4.dequantise(words, scales), scales), words)
    assert int4.lost(words, scales) == 0


@given(st.integers(0, 2**32))
def test_new_scales_lose_at_most_half_a_step(seed):
    """Half a step, plus the rounding of the scale to bfloat16 (2^-8 of at most 8 steps)."""
    weights = np.random.default_rng(seed).standard_normal((3, 64), np.float32)
    scales = int4.minmax_scales(weights, 32, np.dtype(BF16))
    back = int4.dequantise(int4.quantise(weights, scales), scales.astype(np.float32))
    steps = np.abs(back - weights).reshape(3, 2, 32) / scales.astype(np.float32)[..., None]
    assert steps.max() <= 0.5 + 8 * 2**-8


def test_groups_without_a_usable_scale_are_counted():
    words = int4.pack(np.array([[1] * 32 + [0] * 32 + [3] * 32], np.int8))
    scales = np.array([[0.0, 0.0, 1.0]], BF16)
    assert int4.lost(words, scales) == 1  # codes 1 under scale 0; codes 0 under scale 0 come back
    assert int4.lost(words, np.array([[3e38, 1.0, 1.0]], BF16)) == 1  # -8 * 3e38 overflows
    assert not int4.dequantise(words, scales)[0, :64].any()


def test_little_end_first_and_offset_eight():
    word = np.array([[0x76543210]], np.int32)
    np.testing.assert_array_equal(int4.unpack(word), [[-8, -7, -6, -5, -4, -3, -2, -1]])
    with pytest.raises(ValueError, match="8 codes"):
        int4.pack(np.zeros((1, 12), np.int8))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 299))
def test_fp8_blocks(rows, columns, first):
    """Equal to multiplying with the repeated scales, whole or from any row on; edge blocks are partial."""
    rng = np.random.default_rng(rows * 301 + columns)
    weights = rng.standard_normal((rows, columns), np.float32).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.001, 2, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
    whole = np.repeat(np.repeat(scales, 128, 0)[:rows], 128, 1)[:, :columns] * weights.astype(np.float32)
    whole = whole.astype(BF16)
    first = first % rows
    np.testing.assert_array_equal(fp8.dequantise(weights[first:], scales, (128, 128), first), whole[first:])
