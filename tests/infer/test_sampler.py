"""Sampled tokens follow the distribution that was asked for, and a row's draw does not depend on the other rows."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kimi_jax.infer.request import Sampling
from kimi_jax.infer.sampler import Settings, nucleus, sample

V = 16
run = jax.jit(sample)


def rows(count, temperature=1.0, top_p=1.0, seed=0, position=0, top_logprobs=0):
    full = functools.partial(np.full, count)
    return Settings(
        full(temperature, dtype=np.float32), full(top_p, dtype=np.float32), full(seed, dtype=np.uint32),
        full(position, dtype=np.int32), full(top_logprobs, dtype=np.int32),
    )  # fmt: skip


def logits(seed=0, count=1):
    return 2 * np.random.default_rng(seed).standard_normal((count, V)).astype(np.float32)


def softmax(x):
    weights = np.exp(x.astype(np.float64) - x.max())
    return weights / weights.sum()


def test_frequencies_are_the_probabilities():
    """4096 positions: each frequency within five standard deviations of its probability (seeds are fixed)."""
    n, one = 4096, logits()
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7)):
        wanted = softmax(one[0] / np.float32(temperature))
        if top_p < 1:
            order = np.argsort(-wanted)
            inside = order[: np.searchsorted(np.cumsum(wanted[order]), top_p) + 1]
            wanted = np.where(np.isin(np.arange(V), inside), wanted, 0) / wanted[inside].sum()
        settings = rows(n, temperature, top_p)._replace(position=np.arange(n, dtype=np.int32))
        found = np.bincount(run(np.repeat(one, n, 0), settings).tokens, minlength=V) / n
        np.testing.assert_array_less(np.abs(found - wanted), 5 * np.sqrt(wanted * (1 - wanted) / n) + 1e-9)


def test_row_does_not_see_the_others():
    """Bit for bit: the same row beside other logits, other settings, at another place."""
    x, settings = logits(1, 4), rows(4, seed=7, position=3)
    alone = run(x, settings)
    mixed = settings._replace(
        temperature=np.array([0, 1, 1, 0.1], np.float32), top_p=np.array([1, 0.2, 1, 0.5], np.float32),
        seed=np.array([1, 2, 7, 3], np.uint32), top_logprobs=np.array([5, 0, 0, 0], np.int32),
    )  # fmt: skip
    among = run(np.stack([x[1], x[3], x[0], x[2]]), mixed)
    assert among.tokens[2] == alone.tokens[0]
    assert among.logprobs[2] == alone.logprobs[0]


def test_seed_and_position_change_the_draw():
    x = np.zeros((64, V), np.float32)
    base = run(x, rows(64)._replace(position=np.arange(64, dtype=np.int32))).tokens
    assert len(set(base.tolist())) > V // 2
    other = run(x, rows(64, seed=1)._replace(position=np.arange(64, dtype=np.int32))).tokens
    assert (base != other).mean() > 0.5


def test_greedy_and_listed_alternatives():
    """Log-probabilities are of the tempered distribution before the nucleus; to 1e-5 of float32 sums."""
    x = logits(3, 2)
    out = run(x, rows(2, top_logprobs=V)._replace(temperature=np.array([0, 0.25], np.float32)))
    assert out.tokens[0] == x[0].argmax()
    for row, temperature in ((0, 1), (1, 0.25)):
        wanted = np.log(softmax(x[row] / np.float32(temperature)))
        np.testing.assert_allclose(out.logprobs[row], wanted[out.tokens[row]], atol=1e-5)
        np.testing.assert_array_equal(out.top_tokens[row], np.argsort(-wanted))
        np.testing.assert_allclose(out.top_logprobs[row], np.sort(wanted)[::-1], atol=1e-5)
    narrow = run(x, rows(2, top_p=1e-6, seed=5))
    np.testing.assert_array_equal(narrow.tokens, x.argmax(-1))
    np.testing.assert_allclose(narrow.logprobs[0], np.log(softmax(x[0]).max()), atol=1e-5)


@settings(max_examples=40)
@given(arrays(np.float32, (V,), elements=st.floats(-30, 30, width=32)), st.floats(0.015625, 1, width=32))
def test_nucleus_is_the_smallest_sufficient_set(x, top_p):
    """Without its least probable members the mass falls short of top_p (1e-6: float32 sums); nothing inside is less
    probable than anything outside."""
    p = softmax(x)
    kept = np.isfinite(compiled_nucleus(np.log(p)[None].astype(np.float32), np.array([top_p], np.float32))[0])
    assert kept[p.argmax()]
    if top_p == 1:
        assert kept.all()
        return
    least = p[kept].min()
    assert p[kept].sum() >= top_p - 1e-6
    assert p[~kept].max(initial=0) <= least * (1 + 1e-6)
    assert p[kept & (p > least * (1 + 1e-6))].sum() < top_p + 1e-6


compiled_nucleus = jax.jit(nucleus)


def test_tiny_temperatures_are_greedy_with_finite_log_probabilities():
    """Below MIN_TEMPERATURE the distribution is that of temperature 0, exactly; float32 has no 1e-50."""
    x = logits(5, 3)
    greedy = run(x, rows(3, 0.0, top_logprobs=2))
    for temperature in (9e-6, 1e-8, 1e-10, 1e-30, 1e-38, 1e-40, 1e-50):
        tiny = run(x, rows(3, temperature, 0.9, top_logprobs=2))
        np.testing.assert_array_equal(tiny.tokens, x.argmax(-1))
        for mine, wanted in zip(tiny, greedy, strict=True):
            np.testing.assert_array_equal(mine, wanted)
    for temperature in (1e-5, 1e-3):
        found = run(x, rows(3, temperature, 0.9, top_logprobs=2))
        assert np.isfinite(found.logprobs).all() and np.isfinite(found.top_logprobs).all()
        np.testing.assert_array_equal(found.tokens, x.argmax(-1))


def test_log_probabilities_are_at_most_zero():
    """A vocabulary of 512 and one token that takes it all: XLA:CPU gave 3e-8."""
    x = np.random.default_rng(0).normal(size=(1, 512)).astype(np.float32)
    found = run(x, rows(1, 1e-3, 0.95, top_logprobs=2))
    assert found.logprobs[0] <= 0 and (np.asarray(found.top_logprobs) <= 0).all()
    assert found.logprobs[0] > -1e-6


@pytest.mark.parametrize("temperature", [-1e-9, float("nan"), float("inf"), 1e39])
def test_temperatures_that_are_no_float32_are_refused(temperature):
    assert "temperature" in str(Sampling(temperature).problem())


def test_top_p_below_float32_keeps_the_most_probable_token():
    x = logits(6, 2)
    np.testing.assert_array_equal(run(x, rows(2, 1.0, 1e-50)).tokens, x.argmax(-1))
