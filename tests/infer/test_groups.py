"""Answers to one prompt share it to its last token, and are the answers that each would have got alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import Request, Sampling, completion
from tests.infer.engines import SIZES, eight_a_call, fresh, one_by_one
from tests.infer.test_engine import PAD, drain, ids, make_image, model, text, with_image

SAMPLED = Sampling(1.0, 0.9, max_new_tokens=6)


@pytest.mark.parametrize("length", [1, 4, 5, 18])
def test_group_gives_the_answers_of_single_requests_and_reads_once(length):
    """More members than slots; prompts that end with a page, one token after it, and within one."""
    engine = fresh(eight_a_call())
    before = engine.stats()
    request = Request(text(length, length), sampling=SAMPLED)
    numbers = engine.submit_group(request, range(5))
    found = drain(engine)
    after = engine.stats()
    assert after["prefill_tokens"] - before["prefill_tokens"] == length
    assert [found[n][0].cached_tokens for n in numbers] == [0] + [length - 1] * 4
    assert after["free_pages"] == 48 and not engine._pages._groups
    single = [dataclasses.replace(request, sampling=dataclasses.replace(SAMPLED, seed=i)) for i in range(5)]
    for number, want in zip(numbers, fresh(one_by_one()).run(single), strict=True):
        got = completion(found[number], length)
        assert (got.token_ids, got.finish_reason) == (want.token_ids, want.finish_reason)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_group_encodes_its_image_once(monkeypatch):
    engine = fresh(eight_a_call())
    calls = []
    real = engine._encoder.features
    monkeypatch.setattr(engine._encoder, "features", lambda items: (calls.append(len(items)), real(items))[1])
    request = with_image(3, 2, make_image(1), 1, SAMPLED)
    numbers = engine.submit_group(request, range(4))
    found = drain(engine)
    assert calls == [1]
    singles = [dataclasses.replace(request, sampling=dataclasses.replace(SAMPLED, seed=i)) for i in range(4)]
    for number, want in zip(numbers, fresh(one_by_one()).run(singles), strict=True):
        assert ids(found[number]) == want.token_ids


def test_group_whose_prompt_ends_with_an_image_is_answered_as_single_requests():
    """Its last token is a feature, which no member may take for a token."""
    engine = fresh(eight_a_call())
    item = make_image(2)
    tokens = np.concatenate([text(1, 3), np.full(6, PAD, np.int32)])
    request = Request(tokens, (item,), dataclasses.replace(SAMPLED, temperature=0.0))
    found = drain(engine, engine.step()) if engine.submit_group(request, [0, 1]) else {}
    (want,) = fresh(one_by_one()).run([request])
    assert [ids(events) for events in found.values()] == [want.token_ids] * 2


def test_group_goes_on_when_its_reader_is_cancelled():
    """Before its prompt is read, while it is read, and after; members that never begin leave no pages held."""
    request = Request(text(2, 40), sampling=SAMPLED)
    engine = fresh(one_by_one())
    for steps in (0, 1, 5):
        numbers = engine.submit_group(request, range(5))
        events = [event for _ in range(steps) for event in engine.step()]
        engine.cancel(numbers[0])
        engine.cancel(numbers[4])
        found = drain(engine, events)
        assert [len(ids(found[n])) for n in numbers[1:4]] == [6, 6, 6]
        assert engine.stats()["free_pages"] == 48 and not engine._pages._groups
        engine.set_params(model().params)


def test_group_in_a_cache_with_room_for_one_runs_one_by_one():
    """The pages held for those who still have to begin do not keep them from beginning."""
    engine = Engine(model().config, model().params, **SIZES | {"slots": 2}, num_pages=11)
    numbers = engine.submit_group(Request(text(2, 33), sampling=Sampling(0.0, max_new_tokens=7)), range(3))
    found = drain(engine)
    assert len({ids(found[n]) for n in numbers}) == 1
    assert engine.stats()["free_pages"] == 10
