"""Prompts in one call are prompts one by one, whatever stands beside them and however they are cut into pieces.

float32: greedy tokens are equal, log-probabilities to 1e-4 (sums in another order; as in `test_engine`).
"""

from __future__ import annotations

import functools
import gc

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.infer.engine import Engine
from kimi_jax.infer.media import TOGETHER, VisionEncoder, encode_media
from kimi_jax.infer.request import Request, Sampling
from tests.infer.engines import SIZES, eight_a_call, fresh, one_by_one
from tests.infer.test_engine import GREEDY, check, drain, ids, make_image, model, text, with_image


@functools.cache
def alone(seed, length):
    """The completion of a prompt that nobody is beside."""
    return fresh(one_by_one()).run([Request(text(seed, length), sampling=GREEDY)])[0]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 3, 4, 5, 15, 16, 17, 33, 48, 52])), max_size=7))
def test_prefill_of_any_mixture_gives_the_same_tokens(prompts):
    """Short and long ones, more than slots, the same ones at once, with what earlier examples left in the cache."""
    requests = [Request(text(seed, n), sampling=GREEDY) for seed, n in prompts]
    for (seed, n), completion in zip(prompts, eight_a_call().run(requests), strict=True):
        assert completion.token_ids == alone(seed, n).token_ids
        np.testing.assert_allclose(completion.logprobs, alone(seed, n).logprobs, atol=1e-4)


def test_prefill_reads_many_prompts_in_one_step():
    """Three short ones at once; then a long one of four pieces, the last of which is not full."""
    engine = fresh(eight_a_call())
    for n in (1, 2, 4):
        engine.submit(Request(text(n, n), sampling=Sampling(0.0, max_new_tokens=1)))
    assert [event.finish_reason for event in engine.step()] == ["length"] * 3
    request = Request(text(5, 61), sampling=Sampling(0.0, max_new_tokens=2))
    number = engine.submit(request)
    assert len(engine.step()) == 1 and engine.stats()["prefill_tokens"] >= 68
    assert len(ids(drain(engine)[number])) == 1
    check(request, engine.run([request])[0])


def test_prefill_of_a_long_prompt_does_not_stop_those_who_decode():
    """Between any two pieces of it everybody else gets a token."""
    engine = fresh(one_by_one())
    first = engine.submit(Request(text(1, 3), sampling=Sampling(0.0, max_new_tokens=12)))
    engine.step()
    last = engine.submit(Request(text(2, 60), sampling=Sampling(0.0, max_new_tokens=2)))
    gaps, found = [], []
    while not any(event.request_id == last for event in found):
        before = engine.stats()["prefill_tokens"]
        found += engine.step()
        gaps.append(engine.stats()["prefill_tokens"] - before)
    assert max(gaps) == 16 and gaps.count(0) == 4
    assert sum(event.request_id == first for event in found) == 4
    drain(engine)


def test_prefill_of_equal_beginnings_waits_for_who_reads_them():
    """The second reads only what the first did not; a third with another beginning does not wait."""
    engine = fresh(eight_a_call())
    before = engine.stats()["prefill_tokens"]
    other = np.concatenate([text(1, 12), text(2, 6)])
    requests = [Request(tokens, sampling=GREEDY) for tokens in (text(1, 18), other, text(3, 17))]
    found = engine.run(requests)
    assert [completion.cached_tokens for completion in found] == [0, 12, 0]
    assert engine.stats()["prefill_tokens"] - before == 18 + 6 + 17
    for request, completion in zip(requests, found, strict=True):
        check(request, completion)


def test_images_of_many_requests_are_encoded_together_and_each_once(monkeypatch):
    """Nine different ones of one size and one twice: a call of eight and one of one; features as one by one."""
    encoder = VisionEncoder(model().config, model().params)
    calls = []
    real = encoder.features
    monkeypatch.setattr(encoder, "features", lambda items: (calls.append(len(items)), real(items))[1])
    items = {bytes([i]): make_image(i) for i in range(TOGETHER + 1)}
    found = encode_media(encoder, items)
    assert calls == [TOGETHER, 1]
    for key, item in items.items():
        (want,) = real([item])
        np.testing.assert_allclose(found[key], want, atol=1e-5 * np.abs(want).max())


def test_images_of_requests_that_come_together_are_encoded_once(monkeypatch):
    engine = fresh(eight_a_call())
    calls = []
    real = engine._encoder.features
    monkeypatch.setattr(engine._encoder, "features", lambda items: (calls.append(len(items)), real(items))[1])
    requests = [with_image(n, 3, make_image(1), 2) for n in range(3)]
    found = engine.run(requests)
    assert calls == [1]
    for request, completion in zip(requests, found, strict=True):
        check(request, completion)


@pytest.mark.slow
def test_thousands_of_tiny_requests_leave_everything_as_it_was():
    """2,000 requests, some of them cancelled: pages, slots, known pages' bound, programs and device memory."""
    engine = fresh(Engine(model().config, model().params, **SIZES, tokens_per_call=8, num_pages=40))
    engine.warmup()

    def burst(first, count):
        for i in range(first, first + count):
            n = engine.submit(
                Request(text(i % 50, 1 + i % 9), sampling=Sampling(1.0, seed=i, max_new_tokens=1 + i % 5))
            )
            if i % 7 == 0:
                engine.cancel(n)
        drain(engine)

    burst(0, 100)
    gc.collect()
    arrays, stats = len(jax.live_arrays()), engine.stats()
    burst(100, 1900)
    gc.collect()
    after = engine.stats()
    assert engine.idle and after["free_pages"] == stats["free_pages"] == 39
    assert after["compilations"] == stats["compilations"]
    assert len(jax.live_arrays()) == arrays
    assert len(engine._pool._key) <= 39 and not engine._prefilling and not engine._waiting
