"""Weights that change under answers: who drew which token, what is read again, and answers taken out and put back.

float32: greedy tokens equal, log-probabilities to 1e-4 of another program's.
"""

from __future__ import annotations

import dataclasses
import json
import weakref

import jax
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.data.example import MediaItem
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.forward import prepare
from kimi_jax.infer.request import Request, Sampling, completion
from kimi_jax.infer.unfinished import Unfinished
from kimi_jax.model import Model
from tests.infer.engines import SIZES, eight_a_call, fresh, one_by_one
from tests.infer.test_engine import GRID, check, drain, ids, make_image, model, text, with_image
from tests.nn import tiny

GREEDY = Sampling(0.0, max_new_tokens=9)


def other():
    return Model(tiny.CONFIG, tiny.params(seed=5))


def begun(engine, requests, count):
    """Numbers and events of requests, the first of which has `count` tokens."""
    numbers, events = [engine.submit(request) for request in requests], []
    while sum(event.request_id == numbers[0] for event in events) < count:
        events += engine.step(1)
    return numbers, events


def test_drain_completes_with_the_old_weights_and_begins_with_the_new():
    engine, request = fresh(one_by_one()), Request(text(1, 6), sampling=GREEDY)
    numbers, events = begun(engine, [request] * 4, 3)
    engine.set_params(other().params, version=7, running="drain")
    assert engine.version == 0
    found = drain(engine, events)
    assert engine.version == 7
    for number, version, weights in zip(numbers, (0, 0, 0, 7), (model(), model(), model(), other()), strict=True):
        answer = completion(found[number], 6)
        assert set(answer.versions) == {version}
        check(request, answer, weights)


def test_drain_that_nobody_waits_for_changes_the_weights_at_the_last_token():
    engine = fresh(one_by_one())
    _, _ = begun(engine, [Request(text(1, 6), sampling=GREEDY)], 3)
    engine.set_params(other().params, running="drain")
    drain(engine)
    assert engine.idle and engine.version == 1


def test_recompute_goes_on_as_the_new_weights_would():
    """The rest of every answer is what the new weights make of prompt and beginning, an image's new features too; one
    still reads its prompt, one waits."""
    engine = fresh(eight_a_call())
    requests = [with_image(3, 5, make_image(1), 9, GREEDY), Request(text(1, 6), sampling=GREEDY),
                Request(text(2, 9), sampling=GREEDY), Request(text(3, 30), sampling=GREEDY)]  # fmt: skip
    numbers, events = begun(engine, requests, 4)
    new = other()
    engine.set_params(new.params, version=2, running="recompute")
    found = drain(engine, events)
    for number, request in zip(numbers, requests, strict=True):
        answer = completion(found[number], len(request.token_ids))
        drawn = answer.versions.count(0)
        assert answer.versions == (0,) * drawn + (2,) * (9 - drawn)
        whole = np.array([*request.token_ids, *answer.token_ids[:drawn]], np.int32)
        rest = dataclasses.replace(GREEDY, max_new_tokens=9 - drawn)
        tail = dataclasses.replace(
            answer, token_ids=answer.token_ids[drawn:], logprobs=answer.logprobs[drawn:], prompt_tokens=len(whole)
        )
        check(Request(whole, request.media, rest), tail, new)
    assert 0 in completion(found[numbers[0]], 20).versions


def test_keep_goes_on_over_the_old_cache_which_nobody_else_sees():
    """Tokens carry both versions; the same prompt afterwards is read anew and answered by the new weights alone."""
    engine, request = fresh(one_by_one()), Request(text(1, 14), sampling=GREEDY)
    (number,), events = begun(engine, [request], 4)
    new = other()
    engine.set_params(new.params, running="keep")
    found = drain(engine, events)
    assert completion(found[number], 14).versions == (0,) * 4 + (1,) * 5
    (again,) = engine.run([request])
    assert again.cached_tokens == 0
    check(request, again, new)


def test_keep_makes_a_group_read_its_prompt_again():
    engine = fresh(one_by_one())
    numbers = engine.submit_group(Request(text(1, 14), sampling=GREEDY), range(5))
    events = []
    while len(events) < 4:
        events += engine.step()
    new = other()
    engine.set_params(new.params, running="keep")
    found = drain(engine, events)
    check(Request(text(1, 14), sampling=GREEDY), completion(found[numbers[4]], 14), new)


def test_new_weights_are_the_vision_towers_too():
    """The decoder's stay, the tower's change: another answer's log-probabilities, those of the model with both."""
    engine, request = fresh(one_by_one()), with_image(3, 5, make_image(1), 2, GREEDY)
    (before,) = engine.run([request])
    mixed = model().params | {"vision": other().params["vision"]}
    engine.set_params(mixed)
    (after,) = engine.run([request])
    assert after.logprobs != before.logprobs
    check(request, after, Model(tiny.CONFIG, mixed))
    check(request, before, model())


def test_new_weights_compile_nothing_and_old_ones_are_freed():
    engine = fresh(one_by_one())
    request = with_image(3, 5, make_image(1), 2, GREEDY)
    engine.run([request])
    engine.set_params(jax.tree.map(lambda a: a + 0, model().params))
    engine.run([request])
    programs, arrays = engine.stats()["compilations"], len(jax.live_arrays())
    for _ in range(3):
        engine.set_params(jax.tree.map(lambda a: a + 0, model().params))
        engine.run([request])
    assert engine.stats()["compilations"] == programs
    assert len(jax.live_arrays()) == arrays


def test_engine_keeps_no_stack_of_layers_beside_its_own():
    """Only the routed experts, the embedding and the head, which are not split."""
    engine, params = fresh(one_by_one()), jax.tree.map(lambda a: a + 0, model().params)
    layers = [stack["attention"] for stack in (params["dense_layers"], params["moe_layers"])]
    stacks = [weakref.ref(leaf) for leaf in jax.tree.leaves(layers)]
    engine.set_params(params)
    del params, layers
    assert stacks and not any(stack() is not None for stack in stacks)


def test_compiled_cutting_of_weights_gives_the_same_layers():
    engine = fresh(one_by_one())
    engine.set_params(other().params)
    for got, want in zip(jax.tree.leaves(engine._weights), jax.tree.leaves(prepare(tiny.CONFIG, other().params)),
                         strict=True):  # fmt: skip
        np.testing.assert_array_equal(got, want)


def test_weights_that_are_none_change_nothing():
    engine, request = fresh(one_by_one()), Request(text(1, 6), sampling=GREEDY)
    (number,), events = begun(engine, [request], 3)
    with pytest.raises(KeyError):
        engine.set_params({}, running="keep")
    answer = completion(drain(engine, events)[number], 6)
    assert engine.version == 0 and set(answer.versions) == {0}
    check(request, answer)


def test_ways_to_treat_answers_that_nobody_knows_are_refused():
    """By the check of types, where it is on; by the engine's own elsewhere."""
    with pytest.raises(Exception, match="recompute"):
        fresh(one_by_one()).set_params(model().params, running="stop")


def test_unfinished_answers_go_on_elsewhere_as_if_nothing_had_happened():
    """Through JSON, into another engine: sampled tokens, log-probabilities, versions, scores, experts, an image."""
    sampling = Sampling(1.0, 0.9, max_new_tokens=9, top_logprobs=2, routed_experts=True, score_from=2)
    requests = [with_image(3, 5, make_image(1), 9, sampling), Request(text(1, 6), sampling=Sampling(max_new_tokens=9)),
                Request(text(2, 9), sampling=GREEDY), Request(text(3, 30), sampling=sampling)]  # fmt: skip
    engine = fresh(eight_a_call())
    numbers, _ = begun(engine, requests, 4)
    stored = json.dumps([each.to_json() for each in engine.take().values()])
    assert engine.idle and engine.stats()["free_pages"] == 48 and engine.step() == []
    parts = [Unfinished.from_json(value) for value in json.loads(stored)]
    assert len(numbers) == len(parts) and len(parts[0].token_ids) == 4
    second = fresh(one_by_one())
    second.set_params(model().params, version=3)
    resumed = [second.resume(part) for part in parts]
    answers = dict(zip(resumed, second._waiting, strict=True))
    drain(second)
    seeds = [part.request.sampling.seed for part in parts]
    wanted = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, seed=seed))
              for r, seed in zip(requests, seeds, strict=True)]  # fmt: skip
    for number, part, want in zip(resumed, parts, fresh(one_by_one()).run(wanted), strict=True):
        got = completion(answers[number].events, want.prompt_tokens)
        assert got.token_ids == want.token_ids
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
        np.testing.assert_allclose(got.prompt_logprobs, want.prompt_logprobs, atol=1e-4)
        assert got.versions == (0,) * len(part.token_ids) + (3,) * (9 - len(part.token_ids))
        assert [len(top) for top in got.top] == [len(top) for top in want.top]
        assert (got.experts is None) == (want.experts is None)
        if want.experts is not None:
            np.testing.assert_array_equal(got.experts, want.experts)


def test_snapshot_of_unfinished_answers_disturbs_nobody():
    engine, request = fresh(one_by_one()), Request(text(1, 6), sampling=GREEDY)
    (number,), events = begun(engine, [request], 3)
    (found,) = engine.unfinished().values()
    assert found.token_ids == ids(events)
    check(request, completion(drain(engine, events)[number], 6))


def unfinished(**changes):
    one = Unfinished(Request(text(1, 4), sampling=GREEDY), (11, 12), (-1.0, -2.0), ((), ()), (0, 0))
    return dataclasses.replace(one, **changes)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (unfinished(logprobs=(-1.0,)), "for every token"),
        (unfinished(token_ids=(11, 64)), "outside the vocabulary"),
        (unfinished(token_ids=(11,) * 9, logprobs=(0.0,) * 9, top=((),) * 9, versions=(0,) * 9), "finished"),
        (unfinished(request=Request(text(1, 4), sampling=dataclasses.replace(GREEDY, stop_ids=(12,)))), "finished"),
        (unfinished(prompt_logprobs=(0.0,)), "score_from"),
        (unfinished(experts=np.zeros((3, 1, 2), np.int32)), "must be"),
    ],
)
def test_answers_that_cannot_be_resumed_are_refused_and_leave_nothing(part, message):
    engine = fresh(one_by_one())
    with pytest.raises(ValueError, match=message):
        engine.resume(part)
    assert engine.idle


@pytest.mark.parametrize(
    "change", [{"prompt": "x"}, {"media": [1]}, {"sampling": {"a": 1}}, {"top": [[1]]}, {"experts": {"dtype": "O"}},
               {"experts": {"dtype": "<i4", "shape": [3], "data": "AAAA"}}, {"versions": None}],
)  # fmt: skip
def test_json_that_is_no_unfinished_answer_is_refused(change):
    media = (MediaItem(np.zeros((int(np.prod(GRID)), 48), np.uint8), GRID),)
    value = unfinished(request=Request(text(1, 4), media, GREEDY)).to_json()
    assert Unfinished.from_json(value).request.media[0].grid == GRID
    with pytest.raises(ValueError):
        Unfinished.from_json(value | change)


def test_eight_devices_take_new_weights_where_the_old_ones_lay():
    """The compiled cut leaves every layer's shards on the devices where the first ones were."""
    engine = Engine(
        model().config, model().params, **SIZES | {"chunks": (4,), "slots": 8}, mesh=sharding.make_mesh(MeshConfig())
    )
    first = jax.tree.map(lambda a: a.sharding, engine._weights)
    engine.set_params(other().params)
    second = jax.tree.map(lambda a: a.sharding, engine._weights)
    same = jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), first, second, engine._weights)
    assert all(jax.tree.leaves(same))
