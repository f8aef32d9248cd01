"""Scores of given tokens are those that sampling them gave, and experts those that each token went to.

float32, log-probabilities to 1e-4 of another program's.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from kimi_jax.infer.request import Request, Sampling, completion
from tests.infer.engines import eight_a_call, fresh, one_by_one
from tests.infer.test_engine import drain, make_image, model, next_logits, text, with_image
from tests.nn import tiny

CONFIG = tiny.CONFIG


def scored(tokens, start, temperature=0.0, new=0, **more):
    return Request(np.array(tokens, np.int32), sampling=Sampling(temperature, 1.0, 1, new, score_from=start, **more))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("engine", [one_by_one, eight_a_call])
def test_scores_of_an_answer_are_its_log_probabilities(engine, temperature):
    """Prompt and answer as one prompt, behind a prefix that is known and before further tokens."""
    engine = fresh(engine())
    prompt = Request(text(1, 22), sampling=Sampling(temperature, seed=3, max_new_tokens=14))
    (drawn,) = engine.run([prompt])
    (found,) = engine.run([scored([*prompt.token_ids, *drawn.token_ids], 22, temperature, new=2)])
    np.testing.assert_allclose(found.prompt_logprobs, drawn.logprobs, atol=1e-4)
    assert found.cached_tokens == 20 and len(found.token_ids) == 2


def test_scores_of_a_whole_prompt_are_those_of_full_forward_passes():
    """Also of one as long as a sequence can be, with nothing drawn after it; its pages are known afterwards."""
    engine = fresh(eight_a_call())
    tokens = text(2, 64)
    (found,) = engine.run([scored(tokens, 1)])
    assert (found.token_ids, found.finish_reason, len(found.prompt_logprobs)) == ((), "length", 63)
    for i in (1, 17, 63):
        row = next_logits(tokens[:i].tolist(), model())
        want = row[tokens[i]] - row.max() - np.log(np.exp(row - row.max()).sum())
        assert abs(found.prompt_logprobs[i - 1] - want) < 1e-4
    (again,) = engine.run([scored(tokens, 50)])
    assert again.cached_tokens == 48
    np.testing.assert_allclose(again.prompt_logprobs, found.prompt_logprobs[49:], atol=1e-5)


@pytest.mark.parametrize("engine", [one_by_one, eight_a_call])
def test_experts_are_those_of_the_packed_model(engine):
    """Of prompt and answer, for an image too, with a prefix that another request recorded, and beside one that does
    not ask. The packed model, its experts pinned to the recorded ones, gives the log-probabilities of the answer, and
    other ones with another choice pinned."""
    engine = fresh(engine())
    sampling = Sampling(0.0, max_new_tokens=11, routed_experts=True)
    requests = [with_image(3, 5, make_image(1), 9, sampling), Request(text(5, 7), sampling=Sampling(0.0, seed=1))]
    requests.append(dataclasses.replace(requests[0], sampling=dataclasses.replace(sampling, seed=2)))
    first, plain, second = engine.run(requests)
    assert plain.experts is None and second.cached_tokens == 16
    assert first.experts.shape == (20 + 11 - 1, CONFIG.num_moe_layers, 2)
    np.testing.assert_array_equal(second.experts, first.experts)
    assert first.experts.min() >= 0 and first.experts.max() < 4
    pixels = (requests[0].media[0].patches.astype(np.float32) / 127.5 - 1).reshape(-1, 3, 4, 4)
    tokens = np.array([*requests[0].token_ids, *first.token_ids[:-1]])[None]
    for shift, same in ((0, True), (1, False)):
        routed_experts = ((first.experts + shift) % 4).swapaxes(0, 1)[None]
        logits = model().logits(tokens, pixels, [requests[0].media[0].grid], routed_experts=routed_experts)[0, 19:]
        want = jax.nn.log_softmax(logits)[np.arange(11), np.array(first.token_ids)]
        assert np.allclose(first.logprobs, want, atol=1e-4) == same


def test_experts_and_scores_of_a_group_are_those_of_its_reader():
    engine = fresh(eight_a_call())
    sampling = Sampling(1.0, max_new_tokens=4, routed_experts=True, score_from=1)
    numbers = engine.submit_group(Request(text(8, 10), sampling=sampling), [5, 6, 7, 5])
    found = drain(engine)
    answers = [completion(found[n], 10) for n in numbers]
    for answer in answers:
        assert answer.experts.shape == (13, CONFIG.num_moe_layers, 2)
        np.testing.assert_array_equal(answer.experts[:9], answers[0].experts[:9])
        assert len(answer.prompt_logprobs) == 9 and answer.prompt_logprobs == answers[0].prompt_logprobs
    np.testing.assert_array_equal(answers[0].experts, answers[3].experts)


def test_nothing_is_compiled_or_returned_for_who_does_not_ask():
    engine = fresh(eight_a_call())
    engine.warmup(groups=True, scores=True, experts=True)
    before = engine.stats()["compilations"]
    sampling = Sampling(0.0, max_new_tokens=3, score_from=2, routed_experts=True)
    for wanted in (
        sampling,
        dataclasses.replace(sampling, score_from=None),
        Sampling(0.0, score_from=1),
        Sampling(0.0),
    ):
        engine.run([Request(text(n, n), sampling=dataclasses.replace(wanted, max_new_tokens=3)) for n in (3, 9, 30)])
    assert engine.stats()["compilations"] == before
    (found,) = engine.run([Request(text(1, 5), sampling=Sampling(0.0, max_new_tokens=2))])
    assert found.prompt_logprobs == () and found.experts is None


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(score_from=0), "at least 1"),
        (Sampling(score_from=5), "has 5 tokens"),
        (Sampling(score_from=1, max_new_tokens=-1), "0 if the prompt"),
    ],
)
def test_scores_that_cannot_be_are_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        eight_a_call().submit(Request(text(1, 5), sampling=sampling))
