"""The closed form of model FLOPs against XLA's own count, against the released model, and against counting by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from kimi_jax.config import preset
from kimi_jax.nn.kimi import KimiK25, abstract_params, count_params
from kimi_jax.nn.param import unbox
from kimi_jax.train import flops
from tests.train.tiny import MODEL, make_batch

# no experts: how many rows the blocked expert matmul pads depends on routing, and padding is not work
DENSE = dataclasses.replace(
    MODEL, moe=None, scan_layers=False, hidden_size=128, intermediate_size=384, kv_lora_rank=64, q_lora_rank=64,
    vocab_size=512, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    vision=dataclasses.replace(MODEL.vision, hidden_size=64, intermediate_size=192),
)  # fmt: skip


def full_counts(batch):
    """What the CPU computes: every position and every pair of a row or bin, masked or not."""
    rows, length = batch.tokens.shape
    bins, patches = batch.vision[0].segment_ids.shape
    return {
        "tokens": rows * length, "token_pairs": rows * length**2, "patches": bins * patches,
        "patch_pairs": bins * patches**2, "features": bins * patches // 4,
    }  # fmt: skip


def xla_flops(model, batch):
    params = unbox(abstract_params(model))
    run = jax.jit(lambda p, b: KimiK25(model).apply({"params": p}, b)[0])
    return run.lower(params, batch).compile().cost_analysis()["flops"]


def test_forward_against_xla_on_an_unrolled_model():
    """XLA also counts what is not a matmul (norms, softmax, rotary): a few per cent at this width.

    One row, because attention on CPU loops over rows and XLA counts the body of a loop once.
    """
    batch = make_batch(0, groups=1)
    ours, theirs = flops.forward_flops(DENSE, full_counts(batch)), xla_flops(DENSE, batch)
    assert 0.96 * theirs < ours < 1.0 * theirs


def test_each_term_against_xla():
    """One width at a time: the *difference* of two models leaves only that term, so the tolerance can be tighter."""
    batch = make_batch(0, groups=1)
    for change in ({"intermediate_size": 768}, {"num_attention_heads": 4}):
        wide = dataclasses.replace(DENSE, **change)
        counts = full_counts(batch)
        ours = flops.forward_flops(wide, counts) - flops.forward_flops(DENSE, counts)
        theirs = xla_flops(wide, batch) - xla_flops(DENSE, batch)
        assert abs(ours / theirs - 1) < 0.02, change


@pytest.mark.parametrize("name", ["demo", "small", "moonlight_16b_a3b", "kimi_vl_a3b", "kimi_k2_5"])
def test_matmul_weights_of_a_token_are_the_active_ones(name):
    """Active parameters less the embedding are what a token is multiplied with, but for norms and router bias."""
    model = preset(name)
    matmul, counted = flops.text_matmul_params(model), count_params(model)
    active = counted["text_active"] - model.vocab_size * model.hidden_size
    assert matmul <= active < matmul * 1.002
    if model.vision:
        assert flops.vision_matmul_params(model) <= counted["vision"]
        assert (
            flops.projector_matmul_params(model) <= counted["projector"] < flops.projector_matmul_params(model) * 1.05
        )


def test_released_model_a_token():
    """6 x active parameters, as the field quotes it: 32.86 B active; without the embedding look-up 31.7 B."""
    model = preset("kimi_k2_5")
    counts = dict.fromkeys(flops.COUNTS, 0) | {"tokens": 1}
    assert flops.train_flops(model, counts) == pytest.approx(6 * (32.86e9 - 163840 * 7168), rel=2e-3)


def test_attention_is_192_wide_for_scores_and_128_for_values():
    model = preset("kimi_k2_5")
    counts = dict.fromkeys(flops.COUNTS, 0) | {"token_pairs": 1}
    assert flops.forward_flops(model, counts) == 2 * 61 * 64 * (192 + 128)


def test_counts_of_a_packed_batch_by_hand():
    batch = make_batch(3)
    want = dict.fromkeys(flops.COUNTS, 0.0)
    for row in batch.segment_ids:
        for n in np.unique(row[row > 0], return_counts=True)[1]:
            want["tokens"] += n
            want["token_pairs"] += n * (n + 1) / 2
    for row in batch.vision[0].segment_ids:
        for n in np.unique(row[row > 0], return_counts=True)[1]:
            want["patches"] += n
            want["patch_pairs"] += n * n
    want["features"] = (batch.feature_index >= 0).sum()
    assert {k: float(v) for k, v in flops.batch_counts(batch).items()} == want
