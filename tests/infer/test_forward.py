"""The walk over pages gives the model's own hidden states: both forms of attention, any cut into chunks, any pages.

float32, tolerance 2e-5 of the largest value: three layers whose sums are in another order (5e-6 seen).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.infer import forward as decoder
from kimi_jax.infer.cache import empty_cache, page_width
from kimi_jax.infer.forward import Chunk, forward, prepare
from kimi_jax.nn.kimi import KimiK25
from kimi_jax.packed_batch import padding
from tests.nn import tiny

SIZE, PAGES, LENGTH = 4, 16, 24
CONFIGS = {
    "low-rank queries": tiny.CONFIG,
    "direct queries, dense": tiny.replace(q_lora_rank=None, moe=None, num_hidden_layers=2),
}


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)


@functools.cache
def whole(config):
    """Tokens of two rows and their hidden states by the packed model."""
    tokens = np.random.default_rng(0).integers(10, config.vocab_size, (2, LENGTH)).astype(np.int32)
    batch = padding(2, LENGTH, 2, 0)
    batch.tokens[:], batch.positions[:], batch.segment_ids[:] = tokens, np.arange(LENGTH), 1
    run = jax.jit(
        lambda params: KimiK25(config).apply({"params": params}, batch, method="hidden")[0],
        compiler_options=tiny.QUICK,
    )
    return tokens, np.asarray(run(tiny.params(config)))


def stepper(config):
    step = jax.jit(
        functools.partial(forward, config), static_argnames="absorbed", donate_argnums=1, compiler_options=tiny.QUICK
    )
    return functools.partial(step, prepare(config, tiny.params(config)))


def tables():
    """Pages of two rows, in no order; the last entry of each is unused."""
    order = np.random.default_rng(1).permutation(np.arange(1, PAGES))
    return np.pad(order[:12].reshape(2, 6), ((0, 0), (0, 1))).astype(np.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_naive_is_absorbed_is_the_model(name):
    """Prompts in two chunks of 8 (the second with padding in one row), then single tokens, rows at different places.

    The cache begins with 1e30 everywhere: nothing that was not written may be seen.
    """
    config = CONFIGS[name]
    (tokens, want), step, table = whole(config), stepper(config), tables()
    for absorbed in (False, True):
        cache = tuple(jnp.full_like(pages, 1e30) for pages in empty_cache(config, PAGES, SIZE))
        hidden, cache = step(cache, Chunk(tokens[:, :8], np.zeros(2, np.int32), np.full(2, 8, np.int32), table),
                             absorbed=absorbed)  # fmt: skip
        close(hidden, want[:, :8])
        count = np.array([8, 5], np.int32)
        hidden, cache = step(cache, Chunk(tokens[:, 8:16], np.full(2, 8, np.int32), count, table), absorbed=absorbed)
        close(hidden[0], want[0, 8:16])
        close(hidden[1, :5], want[1, 8:13])
        start = np.array([16, 13], np.int32)
        for _ in range(5):
            now = np.take_along_axis(tokens, start[:, None], 1)
            hidden, cache = step(cache, Chunk(now, start, np.ones(2, np.int32), table), absorbed=absorbed)
            close(hidden[:, 0], want[np.arange(2), start])
            start += 1


def test_idle_rows_change_nothing():
    """An idle row writes to page 0 only, and the other row's result is the same to the bit whatever is beside it."""
    config = tiny.CONFIG
    (tokens, _), step, table = whole(config), stepper(config), tables()
    cache = empty_cache(config, PAGES, SIZE)
    _, cache = step(cache, Chunk(tokens[:, :8], np.zeros(2, np.int32), np.full(2, 8, np.int32), table), absorbed=False)
    before = np.asarray(cache)
    table[1] = 0
    chunk = Chunk(tokens[:, 8:9], np.array([8, 0], np.int32), np.array([1, 0], np.int32), table)
    hidden, after = step(tuple(map(jnp.asarray, before)), chunk, absorbed=True)
    changed = np.unique(np.nonzero((np.asarray(after) != before).any(axis=(0, 2, 3)))[0])
    assert set(changed.tolist()) <= {0, int(table[0, 2])}
    beside = np.array([chunk.tokens[0], [11]], np.int32)
    again, _ = step(tuple(map(jnp.asarray, before)), chunk._replace(tokens=beside), absorbed=True)
    np.testing.assert_array_equal(hidden[0], again[0])


def test_tpu_reads_the_pages_by_its_kernel_which_gives_the_same():
    """Rows of no token, one page and some, and all pages; over a mesh, where pages are sharded, there is no kernel.

    bfloat16: probabilities are rounded before they meet values, in blocks that differ.
    """
    config, rows, page = tiny.replace(kv_lora_rank=128, dtype="bfloat16"), 3, 16
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    start = jnp.asarray([0, 17, 47], jnp.int32)
    table = jnp.asarray(np.arange(1, 10).reshape(rows, 3)[::-1].copy(), jnp.int32)
    chunk = Chunk(jnp.zeros((rows, 1), jnp.int32), start, jnp.ones(rows, jnp.int32), table)
    latent = draw(rows, 1, 136)
    keys = decoder._Keys(latent, decoder.write(draw(10, page, page_width(config)), latent, chunk), chunk)
    q = draw(rows, 2, 1, 136)
    got = np.asarray(decoder._attend_pages(config, q, keys, interpret=True), np.float32)
    want = np.asarray(decoder._attend_latents(config, q, keys), np.float32)
    assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()
    halves = {"keys": draw(2, 8, 128), "values": draw(2, 128, 8)}
    for whole in (True, False):
        run = jax.jit(lambda *a, whole=whole: decoder._absorbed(config, halves, *a, whole=whole))
        lowered = run.trace(draw(rows, 1, 2, 8), draw(rows, 1, 2, 8), keys).lower(lowering_platforms=("tpu",))
        assert ("paged_latent_attention" in lowered.as_text()) == whole
