"""The engine gives what a full forward pass gives, token by token, whatever else it does at the time.

Greedy tokens must be equal to those of `Model.logits` repeated over the growing sequence (float32; the two ways differ
by 1e-6 of the largest logit, ties of random weights are not that close), log-probabilities to 1e-4.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest

import kimi_jax as kimi
from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.data.example import MediaItem
from kimi_jax.data.patches import num_features
from kimi_jax.infer.cache import PagePool
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import Request, Sampling
from kimi_jax.model import Model
from tests.environment import FIXTURES
from tests.nn import tiny

PAD = tiny.CONFIG.media_placeholder_token_id
LENGTH = 64
GREEDY = Sampling(temperature=0.0, max_new_tokens=5)
GRID = (2, 4, 6)  # of every image here, so that the tower is compiled once


@functools.cache
def model():
    params = tiny.params()
    head = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = head.at[:, PAD].set(0)  # a greedy pad would be a prompt that `logits` refuses
    return Model(tiny.CONFIG, params)


@functools.cache
def shared_engine():
    """Three slots, and fewer pages than they can want: 16 of 4 tokens."""
    return Engine(
        model().config, model().params, slots=3, page_size=4, num_pages=17, max_sequence_length=LENGTH, chunks=(4, 16)
    )


@pytest.fixture
def engine():
    """The engine that all tests share, as if new but for its compiled programs. Every page comes back in the end."""
    found = shared_engine()
    found.set_params(model().params)
    yield found
    assert found.idle
    assert found.stats()["free_pages"] == 16


def text(seed, n):
    return np.random.default_rng(seed).integers(10, tiny.CONFIG.vocab_size, n).astype(np.int32)


def make_image(seed):
    return MediaItem(np.random.default_rng(seed).integers(0, 256, (np.prod(GRID), 48)).astype(np.uint8), GRID)


def with_image(seed, before, item, after, sampling=GREEDY):
    pads = np.full(num_features(item.grid), PAD, np.int32)
    return Request(np.concatenate([text(seed, before), pads, text(seed + 1, after)]), (item,), sampling)


def next_logits(tokens, model, pixels=None, grids=None):
    """After the last of these tokens; padded behind to one length, so that one program does it."""
    padded = [tokens + [10] * (LENGTH - len(tokens))]
    return model.logits(padded, pixels, grids)[0, len(tokens) - 1].astype(np.float64)


def reference(request, of=None):
    """Greedy tokens and their log-probabilities by full forward passes of `of`, or of the model that tests share."""
    tokens, logprobs, of = list(request.token_ids), [], of or model()
    pixels = grids = None
    if request.media:
        raw = np.concatenate([item.patches for item in request.media]).astype(np.float32)
        pixels, grids = (raw / 127.5 - 1).reshape(-1, 3, 4, 4), [item.grid for item in request.media]
    for _ in range(request.sampling.max_new_tokens):
        row = next_logits(tokens, of, pixels, grids)
        tokens.append(int(row.argmax()))
        logprobs.append(row.max() - np.log(np.exp(row - row.max()).sum()) - row.max())
    return tuple(tokens[len(request.token_ids) :]), logprobs


def check(request, completion, model=None):
    tokens, logprobs = reference(request, model)
    assert completion.token_ids == tokens
    np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)
    assert completion.finish_reason == "length"
    assert completion.prompt_tokens == len(request.token_ids)


def drain(engine, events=()):
    """Steps to the end; the events of each request."""
    found = {}
    for event in events:
        found.setdefault(event.request_id, []).append(event)
    while not engine.idle:
        for event in engine.step():
            found.setdefault(event.request_id, []).append(event)
    return found


def ids(events):
    return tuple(event.token_id for event in events if event.token_id is not None)


def test_greedy_is_repeated_full_forward_for_text_and_images(engine):
    """Prompts of one token up to several chunks and pages, more of them than slots, answers of different lengths: so
    requests join and leave while others run. One image lies across chunks."""
    lengths = [(1, 7), (4, 2), (5, 5), (23, 1), (40, 4)]
    requests = [Request(text(n, n), sampling=Sampling(0.0, max_new_tokens=new)) for n, new in lengths]
    requests += [with_image(3, 5, make_image(1), 2), with_image(4, 14, make_image(2), 9)]
    for request, completion in zip(requests, engine.run(requests), strict=True):
        check(request, completion)
    assert engine.stats()["decode_tokens"] >= 20


def test_same_beside_others_that_come_and_go(engine):
    """Joined in the middle of others, one of which is cancelled while it runs, one while it waits."""
    one, two = (Request(text(n, n), sampling=Sampling(0.0, max_new_tokens=9)) for n in (6, 9))
    first = engine.submit(one)
    events = [event for _ in range(4) for event in engine.step()]
    leaver = engine.submit(Request(text(3, 5), sampling=Sampling(1.0, max_new_tokens=20)))
    events += [event for _ in range(5) for event in engine.step()]
    second, never = engine.submit(two), engine.submit(Request(text(4, 30), sampling=GREEDY))
    engine.cancel(leaver)
    engine.cancel(never)
    found = drain(engine, events)
    assert ids(found[first]) == reference(one)[0]
    assert ids(found[second]) == reference(two)[0]
    assert found[leaver][-1].finish_reason == "cancelled" and 0 < len(ids(found[leaver])) < 20
    assert [event.finish_reason for event in found[never]] == ["cancelled"]
    assert [event.finish_reason for event in found[first]] == [None] * 8 + ["length"]


def test_known_prefix_is_not_computed_again(engine):
    """The same prompt, then the next turn of the conversation: whole pages come from the cache, results stay."""
    request = Request(text(1, 22), sampling=GREEDY)
    (first,) = engine.run([request])
    (again,) = engine.run([request])
    assert (first.cached_tokens, again.cached_tokens) == (0, 20)
    assert again.token_ids == first.token_ids
    turn = Request(np.concatenate([request.token_ids, first.token_ids, text(2, 6)]).astype(np.int32), sampling=GREEDY)
    (completion,) = engine.run([turn])
    assert completion.cached_tokens == 24  # 26 tokens of the first turn were ever computed
    check(turn, completion)
    aligned = Request(request.token_ids[:20], sampling=GREEDY)  # known as a whole, but its last token must be computed
    (completion,) = engine.run([aligned])
    assert completion.cached_tokens == 16
    check(aligned, completion)
    assert engine.stats()["prefix_hit_tokens"] >= 60


def test_samples_of_one_prompt_share_it_while_they_run(engine):
    """The group of an RL prompt: only the first one reads it."""
    before = engine.stats()["prefill_tokens"]
    group = [Request(text(5, 18), sampling=Sampling(1.0, seed=i, max_new_tokens=6)) for i in range(3)]
    assert [c.cached_tokens for c in engine.run(group)] == [0, 16, 16]
    assert engine.stats()["prefill_tokens"] - before == 18 + 2 + 2


def test_prompt_that_shares_no_prefix_is_read_whole_and_gives_the_same_bits(engine):
    """Whatever was read before: a known prefix would be read in other pieces, which round otherwise."""
    apart = Request(text(9, 22), sampling=dataclasses.replace(GREEDY, shares_prefix=False))
    (first,) = engine.run([apart])
    engine.run([dataclasses.replace(apart, sampling=GREEDY)])
    (again,) = engine.run([apart])
    assert (first.cached_tokens, again.cached_tokens) == (0, 0)
    assert again.token_ids == first.token_ids and again.logprobs == first.logprobs


def test_another_image_is_no_prefix_hit(engine):
    one, other = with_image(7, 6, make_image(1), 5), with_image(7, 6, make_image(2), 5)
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    first, second, again = (engine.run([request])[0] for request in (one, other, one))
    assert (first.cached_tokens, second.cached_tokens, again.cached_tokens) == (0, 4, 16)
    check(one, first)
    check(other, second)
    assert first.logprobs != second.logprobs
    check(one, again)


def test_same_seed_same_tokens_whatever_else_runs(engine):
    request = Request(text(8, 7), sampling=Sampling(0.9, top_p=0.95, seed=3, max_new_tokens=8))
    (alone,) = engine.run([request])
    others = [Request(text(9 + i, 5 + 3 * i), sampling=Sampling(1.3, seed=i, max_new_tokens=6)) for i in range(3)]
    among = engine.run([others[0], others[1], request, others[2]])
    assert among[2].token_ids == alone.token_ids
    np.testing.assert_allclose(among[2].logprobs, alone.logprobs, atol=1e-5)
    seeds = {engine.run([Request(text(8, 7), sampling=Sampling(2.0, max_new_tokens=4))])[0].token_ids for _ in range(4)}
    assert len(seeds) > 1  # without a seed every request draws its own


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", [{"seed": 3}, {"logprobs": True, "temperature": 0.0}])
def test_seeded_tokens_and_log_probabilities_do_not_depend_on_earlier_answers(dtype, asked):
    """Bit for bit, in both dtypes: pages that decoding made are not their prefix. Others still share them."""
    config = dataclasses.replace(tiny.CONFIG, dtype=dtype, media_placeholder_token_id=tiny.CONFIG.vocab_size - 1)
    params = model().params
    engine = Engine(config, params, slots=2, page_size=4, max_sequence_length=LENGTH)
    (before,) = engine.run([Request(text(3, 3), sampling=Sampling(0.0, max_new_tokens=12))])
    longer = np.concatenate([text(3, 3), np.array(before.token_ids[:10], np.int32)])
    request = Request(longer, sampling=Sampling(max_new_tokens=8, **asked))
    (plain,) = engine.run([Request(longer, sampling=Sampling(0.0, max_new_tokens=1))])
    (warm,) = engine.run([request])
    engine.set_params(params)
    (cold,) = engine.run([request])
    assert plain.cached_tokens == 12 and warm.cached_tokens == 0
    assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)


def test_stop_ids_alternatives_and_log_probabilities(engine):
    request = Request(text(6, 6), sampling=GREEDY)
    tokens, _ = reference(request)
    stop = next(i for i in range(1, 5) if tokens[i] not in tokens[:i])
    sampling = Sampling(0.0, max_new_tokens=5, stop_ids=(63, tokens[stop]), top_logprobs=3)
    (completion,) = engine.run([Request(request.token_ids, sampling=sampling)])
    assert completion.finish_reason == "stop"
    assert completion.token_ids == tokens[: stop + 1]
    row = next_logits(request.token_ids.tolist(), model())
    wanted = row - row.max() - np.log(np.exp(row - row.max()).sum())
    listed, values = zip(*completion.top[0], strict=True)
    assert listed == tuple(np.argsort(-row)[:3])
    np.testing.assert_allclose(values, np.sort(wanted)[:-4:-1], atol=1e-4)
    assert completion.logprobs[0] == values[0]


def test_without_room_requests_wait_their_turn(engine):
    """Each needs 10 of 16 pages, so one runs after the other, in order."""
    numbers = [engine.submit(Request(text(i, 33), sampling=Sampling(0.0, max_new_tokens=4))) for i in range(3)]
    events = []
    while not engine.idle:
        events += engine.step()
        assert engine.stats()["running"] <= 1
    assert [event.request_id for event in events] == sorted(numbers * 4)


def test_answers_end_at_the_longest_sequence(engine):
    (completion,) = engine.run([Request(text(1, 61), sampling=Sampling(0.0, max_new_tokens=100))])
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(np.zeros(0, np.int32)), "at least one token"),
        (Request(np.zeros((2, 2), np.int32)), "at least one token"),
        (Request(np.array([1.5])), "must be ints"),
        (Request(np.array([64])), "vocabulary has 0..63"),
        (Request(np.array([-1])), "vocabulary has 0..63"),
        (Request(text(0, 64)), "at most 64"),
        (Request(np.array([PAD, 11])), "1 media pads .* 0 media items have 0 features"),
        (Request(np.array([PAD, 11]), (make_image(0),)), "have 6 features"),
        (Request(np.array([PAD]), (MediaItem(np.zeros((4, 12), np.uint8), (1, 2, 2)),)), "must be .4, 48."),
        (Request(np.array([PAD]), (MediaItem(np.zeros((3, 48), np.uint8), (1, 1, 3)),)), "even h, w"),
        (Request(text(0, 3), sampling=Sampling(temperature=-1)), "temperature"),
        (Request(text(0, 3), sampling=Sampling(temperature=float("nan"))), "temperature"),
        (Request(text(0, 3), sampling=Sampling(top_p=0.0)), "top_p"),
        (Request(text(0, 3), sampling=Sampling(max_new_tokens=0)), "max_new_tokens"),
        (Request(text(0, 3), sampling=Sampling(top_logprobs=21)), "top_logprobs"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_at_once(engine, request_, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)


def test_what_can_never_fit_is_refused(engine, monkeypatch):
    monkeypatch.setattr(engine, "_pool", PagePool(16))
    with pytest.raises(ValueError, match="60 tokens and up to 4 new ones need 16 pages, the cache has 15"):
        engine.submit(Request(text(0, 60)))


def test_request_that_fails_does_not_touch_the_others(engine, monkeypatch):
    """The tower fails for one image: not for another that waits behind it, nor for text that is being decoded."""
    see, cursed = engine._encoder.features, make_image(9)

    def broken(items):
        if any(np.array_equal(item.patches, cursed.patches) for item in items):
            raise MemoryError("no room for this image")
        return see(items)

    good, seen = Request(text(6, 6), sampling=Sampling(0.0, max_new_tokens=9)), with_image(3, 5, make_image(1), 2)
    wanted = reference(good)[0], reference(seen)[0]
    monkeypatch.setattr(engine._encoder, "features", broken)
    first = engine.submit(good)
    events = [event for _ in range(3) for event in engine.step()]
    bad, last = engine.submit(with_image(1, 2, cursed, 2)), engine.submit(seen)
    found = drain(engine, events)
    assert [event.finish_reason for event in found[bad]] == ["error"]
    assert found[bad][0].error == "vision: MemoryError: no room for this image"
    assert (ids(found[first]), ids(found[last])) == wanted
    with pytest.raises(RuntimeError, match="no room"):
        engine.run([with_image(1, 2, cursed, 2)])


def test_nothing_is_compiled_in_steady_state(engine, caplog):
    """After `warmup` no request makes jax compile anything: neither the engine's programs nor a stray operation."""
    engine.warmup()
    engine.run([with_image(2, 3, make_image(3), 3)])  # the tower's program for this size of image
    programs = engine.stats()["compilations"]
    assert programs == 3
    requests = [with_image(5, 9, make_image(4), 6)]
    for n in (1, 3, 7, 16, 17, 33, 50):
        sampling = Sampling(n % 3 / 2, 1 - n / 99, max_new_tokens=n % 4 + 1, top_logprobs=n % 2)
        requests.append(Request(text(n, n), sampling=sampling))
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        engine.run(requests)
        assert not [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]
        jax.jit(lambda x: x * 3 + 1)(np.ones(7))  # the log would have shown it
        assert [r for r in caplog.records if "ompil" in r.getMessage()]
    assert engine.stats()["compilations"] == programs


def test_new_weights_forget_what_was_known(engine):
    request = Request(text(1, 22), sampling=GREEDY)
    engine.run([request])
    other = Model(tiny.CONFIG, tiny.params(seed=5))
    engine.submit(request)
    with pytest.raises(RuntimeError, match="idle"):
        engine.set_params(other.params)
    drain(engine)
    engine.set_params(other.params)
    (completion,) = engine.run([request])
    assert completion.cached_tokens == 0
    check(request, completion, other)
    assert engine.stats()["compilations"] <= 3


def test_eight_devices_give_the_tokens_of_one():
    """Weights sharded over the mesh, slots and pages too: 8 slots, requests joining and leaving."""
    mesh = sharding.make_mesh(MeshConfig())
    engine = Engine(
        model().config,
        model().params,
        slots=8,
        page_size=4,
        num_pages=60,
        max_sequence_length=LENGTH,
        mesh=mesh,
        chunks=(4,),
    )
    requests = [Request(text(n, 1 + n % 7), sampling=Sampling(0.0, max_new_tokens=2 + n % 3)) for n in range(10)]
    completions = engine.run(requests)
    assert completions[0].cached_tokens == 0
    assert {pages.sharding.shard_shape(pages.shape)[0] for pages in engine._cache} == {8}  # of 64 pages
    gate = engine._weights.expert_weights.gate
    assert gate.sharding.shard_shape(gate.shape) != gate.shape
    for request, completion in zip(requests, completions, strict=True):
        check(request, completion)


@pytest.mark.parametrize("devices", [1, 8])
def test_int4_experts_are_decoded_as_they_are(devices):
    """On one device; over eight, where they stay and three slots' tokens are sent to them."""
    found = kimi.load(FIXTURES / "tiny_int4", experts="int4")
    mesh = None if devices == 1 else sharding.make_mesh(MeshConfig(expert=4))
    engine = Engine(
        found.config, found.params, slots=3, page_size=16, max_sequence_length=LENGTH, chunks=(16,), mesh=mesh
    )
    words = engine._weights.expert_weights.gate.words
    assert words.dtype == np.int32 and words.addressable_shards[0].data.size * devices == words.size
    prompt = np.random.default_rng(0).integers(0, 400, 20).astype(np.int32)
    request = Request(prompt, sampling=Sampling(0.0, max_new_tokens=4))
    check(request, engine.run([request])[0], found)


@pytest.mark.parametrize("settings", [{"page_size": 12}, {"slots": 0}, {"max_sequence_length": 1}, {"chunks": (16, 4)}])
def test_sizes_without_sense(settings):
    with pytest.raises(ValueError, match="must be"):
        Engine(model().config, model().params, **settings)
