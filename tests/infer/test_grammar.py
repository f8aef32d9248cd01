"""Masks of tokens in the sampler and the engine: what is forbidden is never drawn, and nobody else notices.

The grammar here is a rule in Python; those of schemas are in tests/serve/test_grammar.py.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import GrammarError, Request, Sampling, completion
from kimi_jax.infer.sampler import nucleus, sample
from tests.infer.engines import eight_a_call, fresh, one_by_one
from tests.infer.test_engine import drain, make_image, model, text, with_image
from tests.infer.test_sampler import V, logits, rows, softmax
from tests.nn import tiny

VOCABULARY = tiny.CONFIG.vocab_size
STOP = 7
DRAWN = Sampling(temperature=2.0, seed=3, max_new_tokens=9, stop_ids=(STOP,))


def packed(inside):
    bits = np.zeros(-(-len(inside) // 32) * 32, np.uint8)
    bits[: len(inside)] = inside
    return np.packbits(bits, bitorder="little").view(np.uint32)


@dataclasses.dataclass(frozen=True)
class Rising:
    """Every token is larger than the one before, then comes STOP; after `fails` tokens no mask can be computed."""

    fails: int = 1000

    def start(self):
        return _Matcher(self)


class _Matcher:
    def __init__(self, grammar):
        self.grammar, self.seen = grammar, []

    def allowed(self):
        if len(self.seen) >= self.grammar.fails:
            raise GrammarError("too hard")
        ids = np.arange(VOCABULARY)
        least = self.seen[-1] if self.seen else 9
        return packed((ids > least) if least < VOCABULARY - 1 else (ids == STOP))

    def accept(self, token):
        self.seen.append(token)


def rises(tokens):
    body = [token for token in tokens if token != STOP]
    return body == sorted(set(body)) and list(tokens[: len(body)]) == body


# ------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_masked_draws_have_the_frequencies_of_what_is_allowed(top_p):
    """4096 positions, within five standard deviations; the nucleus is that of the allowed tokens, the log-probability
    that of the whole distribution."""
    n, one = 4096, logits(seed=4)
    inside = np.arange(V) % 3 == 0
    settings = rows(n, top_p=top_p)._replace(
        position=np.arange(n, dtype=np.int32), allowed=np.tile(packed(inside), (n, 1))
    )
    drawn = jax.jit(sample)(np.tile(one, (n, 1)), settings)
    wanted = np.where(inside, softmax(one[0]), 0)
    wanted = np.log(np.maximum(wanted / wanted.sum(), 1e-300)).astype(np.float32)
    wanted = softmax(np.asarray(jax.jit(nucleus)(wanted[None], np.float32([top_p])))[0])
    found = np.bincount(drawn.tokens, minlength=V) / n
    np.testing.assert_allclose(found, wanted, atol=5 * np.sqrt(0.25 / n))
    assert not found[~inside].any()
    np.testing.assert_allclose(drawn.logprobs, np.log(softmax(one[0]))[np.asarray(drawn.tokens)], atol=1e-5)


def test_masked_greedy_is_the_best_of_what_is_allowed_and_other_rows_are_untouched():
    two = logits(seed=1, count=2)
    inside = np.ones((2, V), bool)
    inside[0, two[0].argmax()] = False
    settings = rows(2, temperature=0.0)._replace(allowed=np.stack([packed(row) for row in inside]))
    drawn = jax.jit(sample)(two, settings)
    assert drawn.tokens.tolist() == [np.where(inside[0], two[0], -np.inf).argmax(), two[1].argmax()]


# -------------------------------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize("make", [one_by_one, eight_a_call])
def test_answers_follow_their_grammar_and_neighbours_do_not_notice(make):
    """An image in the prompt, a prompt of one token, one that is cached; beside them answers without a grammar, which
    get the tokens that they get alone."""
    free = [Request(text(i, 6 + i), sampling=dataclasses.replace(DRAWN, seed=i)) for i in range(3)]
    alone = fresh(make()).run(free)
    engine = fresh(make())
    prompts = [Request(text(9, 14)), Request(text(8, 1)), with_image(3, 5, make_image(1), 2)]
    bound = [dataclasses.replace(prompt, sampling=DRAWN, grammar=Rising()) for prompt in prompts]
    found = engine.run([bound[0], free[0], bound[1], free[1], bound[2], free[2]])
    assert [each.token_ids for each in found[1::2]] == [each.token_ids for each in alone]
    assert all(rises(each.token_ids) for each in found[::2])
    assert not any(rises(each.token_ids) for each in alone)
    (again,) = engine.run([bound[0]])
    assert again.cached_tokens == 12
    assert again.token_ids == found[0].token_ids


def test_log_probabilities_are_those_without_grammar():
    """Those of a full forward pass over the same tokens: what a trainer computes."""
    request = Request(text(9, 14), sampling=dataclasses.replace(DRAWN, temperature=1.0), grammar=Rising())
    (done,) = fresh(one_by_one()).run([request])
    whole = np.array([*request.token_ids, *done.token_ids], np.int32)
    logits = model().logits(whole[None])[0].astype(np.float64)
    rest = logits[len(request.token_ids) - 1 : -1]
    wanted = rest - np.log(np.exp(rest - rest.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    wanted = (wanted - rest.max(axis=1, keepdims=True))[np.arange(len(done.token_ids)), list(done.token_ids)]
    np.testing.assert_allclose(done.logprobs, wanted, atol=1e-4)


def test_one_program_more_is_compiled_for_a_grammar_and_none_without():
    engine = fresh(eight_a_call())
    engine.warmup(grammars=True)
    before = engine.stats()["compilations"]
    engine.run([Request(text(1, 5), sampling=DRAWN, grammar=Rising()), Request(text(2, 20), sampling=DRAWN)])
    assert engine.stats()["compilations"] == before
    small = Engine(
        model().config, model().params, slots=1, page_size=4, max_sequence_length=16, chunks=(4,), tokens_per_call=2
    )
    small.warmup()
    before = small.stats()["compilations"]
    small.run([Request(text(1, 5), sampling=DRAWN)])
    assert small.stats()["compilations"] == before
    small.run([Request(text(1, 5), sampling=DRAWN, grammar=Rising())])
    assert small.stats()["compilations"] == before + 1


def test_grammar_that_fails_ends_its_answer_alone():
    engine = fresh(one_by_one())
    good = engine.submit(Request(text(1, 5), sampling=DRAWN, grammar=Rising()))
    bad = engine.submit(Request(text(2, 5), sampling=DRAWN, grammar=Rising(fails=2)))
    events = drain(engine)
    assert rises(completion(events[good], 5).token_ids)
    assert [event.finish_reason for event in events[bad]] == [None, None, "error"]
    assert events[bad][-1].error == "grammar: too hard"


def test_answer_with_a_grammar_goes_on_after_new_weights_and_in_another_engine():
    """The matcher has seen what was drawn before, and each member of a group has its own."""
    request = Request(text(1, 9), sampling=DRAWN, grammar=Rising())
    (whole,) = fresh(one_by_one()).run([request])
    engine = fresh(one_by_one())
    number = engine.submit(request)
    events = [event for _ in range(4) for event in engine.step()]
    engine.set_params(model().params, version=1, running="recompute")
    events += engine.step()
    taken = engine.take()[number]
    assert 0 < len(taken.token_ids) < len(whole.token_ids)
    with pytest.raises(ValueError, match="grammar cannot be stored"):
        taken.to_json()
    other = fresh(eight_a_call())
    resumed = other.resume(taken)
    rest = completion(drain(other)[resumed], 9).token_ids
    assert taken.token_ids + rest[-len(whole.token_ids) + len(taken.token_ids) :] == whole.token_ids
    numbers = other.submit_group(request, [3, 4, 5])
    found = drain(other)
    answers = [completion(found[each], 9).token_ids for each in numbers]
    assert answers[0] == whole.token_ids
    assert all(map(rises, answers)) and len(set(answers)) == 3


def test_prompt_that_ends_with_an_image_cannot_have_a_grammar():
    request = dataclasses.replace(with_image(3, 5, make_image(1), 0, DRAWN), grammar=Rising())
    with pytest.raises(ValueError, match="ends with an image"):
        fresh(one_by_one()).submit(request)
    assert fresh(one_by_one()).idle
