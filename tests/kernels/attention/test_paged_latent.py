"""The TPU kernel of decoding's attention, interpreted with its copies checked for races, against the plain form.

bfloat16: probabilities are rounded before they meet values, 2^-9 of the largest of a sum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kimi_jax.kernels.attention import paged_latent

B, H, RANK, ROTARY, PAGE, WIDTH, PAGES = 5, 8, 128, 32, 16, 6, 31
SCALE = 0.1
# an idle row, one token, a block to its last token, one more than that, a whole table
LENGTHS = np.array([0, 1, 32, 33, PAGE * WIDTH], np.int32)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(B, H, RANK + ROTARY)), jnp.bfloat16)
    pages = jnp.asarray(rng.normal(size=(PAGES, PAGE, RANK + ROTARY)), jnp.bfloat16)
    table = rng.permutation(np.arange(1, PAGES))[: B * WIDTH].reshape(B, WIDTH).astype(np.int32)
    for row, length in enumerate(LENGTHS):
        table[row, -(-length // PAGE) :] = 0
    return q, pages, jnp.asarray(table)


def plain(q, pages, table, lengths):
    q, latents = np.asarray(q, np.float64), np.asarray(pages, np.float64)[np.asarray(table)].reshape(B, -1, q.shape[2])
    scores = SCALE * np.einsum("bhc,bkc->bhk", q, latents)
    seen = np.arange(latents.shape[1]) < np.maximum(lengths, 1)[:, None]
    probs = np.where(seen[:, None], np.exp(scores - scores.max(axis=2, keepdims=True)), 0)
    return np.einsum("bhk,bkr->bhr", probs / probs.sum(axis=2, keepdims=True), latents[..., :RANK])


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["short first", "long first"])
def test_kernel_equals_the_plain_form_without_races(order, monkeypatch):
    """Blocks of two pages; rows of different numbers of blocks, so that either buffer is a row's first."""
    monkeypatch.setattr(paged_latent, "BLOCK", 2 * PAGE)
    q, pages, table = inputs()
    q, table, lengths = q[order], table[order], LENGTHS[order]
    interpret = pltpu.InterpretParams(detect_races=True)
    got = paged_latent.attend(q, pages, table, jnp.asarray(lengths), RANK, SCALE, interpret=interpret)
    want = plain(q, pages, table, lengths)
    assert np.abs(np.asarray(got, np.float64) - want).max() <= 0.01 * np.abs(want).max()
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # the only place that tells

    assert interpreter.races is not None and not interpreter.races.races_found


def test_tpu_program_has_the_kernel():
    """In K2.5's sizes: lowered for a TPU, of which there need not be one."""
    shapes = [(64, 64, 576), (4097, 64, 576)], [(64, 64), (64,)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes[0]]
    arrays += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes[1]]
    call = jax.jit(lambda *a: paged_latent.attend(*a, 512, SCALE))
    text = call.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert "paged_latent_attention" in text
