"""The table of names: it has the totals of the released checkpoint and covers every parameter of every family."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.config import ConfigError, preset
from kimi_jax.hf.names import Tensor, leaf_shapes, tensors, transpose
from kimi_jax.hf.stream import BIAS, output_entries, pieces
from tests.hf import tiny


def test_released_checkpoint_to_the_last_byte():
    """208,550 tensors, 170,738,182,128 elements, 595,148,192,736 bytes (docs/released_model.md section 4)."""
    every = tensors(preset("kimi_k2_5"), "kimi_k25")
    entries = [e for t in every for e in output_entries(t, "F32" if t.leaf == BIAS else "BF16", ".experts." in t.leaf)]
    assert len({entry.name for entry in entries}) == len(entries) == 208_550
    assert sum(math.prod(entry.shape) for entry in entries) == 170_738_182_128
    assert sum(entry.nbytes for entry in entries) == 595_148_192_736


def test_moonlight_has_its_number_of_tensors():
    """5,344 in the released files, of which 27 are rotary buffers (one a layer) that no model needs."""
    assert len(tensors(preset("moonlight_16b_a3b"), "deepseek_v3")) == 5_344 - 27


@pytest.mark.parametrize("model_type", ["kimi_k25", "kimi_vl", "kimi_k2", "deepseek_v3"])
def test_every_place_of_every_leaf_is_filled_once(model_type):
    model = tiny.config(model_type)
    filled = {leaf: np.zeros(shape, int) for leaf, shape in leaf_shapes(model).items()}
    for tensor in tensors(model, model_type):
        for piece in pieces(tensor):
            filled[tensor.leaf][tensor.place(piece.first, piece.last)] += 1
    assert all((count == 1).all() for count in filled.values())


def test_prefixes_of_the_families():
    names = {kind: {t.name for t in tensors(tiny.config(kind), kind)} for kind in ("kimi_k25", "kimi_vl", "kimi_k2")}
    assert "language_model.model.layers.1.mlp.experts.2.up_proj.weight" in names["kimi_k25"]
    assert "mm_projector.proj.2.bias" in names["kimi_k25"]
    assert "multi_modal_projector.linear_2.bias" in names["kimi_vl"]
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names["kimi_vl"]
    assert "model.layers.0.self_attn.q_a_proj.weight" in names["kimi_k2"]


def test_family_without_vision_refuses_a_tower():
    with pytest.raises(ConfigError, match="vision tower"):
        tensors(tiny.config("kimi_k25"), "kimi_k2")
    with pytest.raises(ConfigError, match="did you mean 'kimi_k25'"):
        tensors(tiny.config("kimi_k25"), "kimi_k2.5")


@given(st.integers(1, 300), st.integers(1, 300))
def test_transpose_is_transpose(rows, columns):
    matrix = np.arange(rows * columns).reshape(rows, columns)
    out = transpose(matrix)
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, matrix.T)


def test_heads_of_a_projection():
    """Row h * d + i of the released matrix is place (h, i) of ours; the input comes first."""
    tensor = Tensor("q_b_proj.weight", (6, 4), "q", (), (4, 2, 3), 1)
    rows = np.arange(24).reshape(6, 4)
    ours = tensor.to_ours(rows)
    assert ours.shape == (4, 2, 3)
    assert ours[3, 1, 2] == rows[1 * 3 + 2, 3]
    np.testing.assert_array_equal(tensor.to_released(ours), rows)
    np.testing.assert_array_equal(tensor.to_ours(rows[3:]), ours[tensor.place(3, 6)])
