"""The engine as a sampler: many awaited together, weights changed between, tasks cancelled, failures told."""

from __future__ import annotations

import asyncio

import pytest

from kimi_jax.infer.engine import Engine
from kimi_jax.infer.local import LocalSampler, Sampler, SamplerFailed
from kimi_jax.infer.request import Request, Sampling
from tests.infer.engines import SIZES, eight_a_call, fresh
from tests.infer.test_engine import check, model, text
from tests.infer.test_weights import other

GREEDY = Sampling(0.0, max_new_tokens=6)


@pytest.fixture
def sampler():
    with LocalSampler(fresh(eight_a_call())) as found:
        yield found
    eight_a_call().take()


def test_local_sampler_answers_all_who_wait(sampler):
    contract: Sampler = sampler
    requests = [Request(text(n, n), sampling=GREEDY) for n in (1, 5, 9, 17, 30)]

    async def ask():
        return await asyncio.gather(*(contract.sample(request) for request in requests))

    for request, found in zip(requests, asyncio.run(ask()), strict=True):
        check(request, found)
        assert found.versions == (0,) * 6


def test_local_sampler_changes_weights_between_answers(sampler):
    request = Request(text(1, 5), sampling=GREEDY)
    check(request, asyncio.run(sampler.sample(request)), model())
    sampler.set_params(other().params, 4, "drain")
    found = asyncio.run(sampler.sample(request))
    assert sampler.version == 4 and found.versions == (4,) * 6
    check(request, found, other())


def test_local_sampler_answers_groups_and_resumes_what_was_stored(sampler):
    request = Request(text(1, 9), sampling=Sampling(1.0, max_new_tokens=40))

    async def ask():
        group = asyncio.create_task(sampler.sample_group(request, range(4)))
        while not (stored := sampler.unfinished()) and not group.done():
            await asyncio.sleep(0)
        return stored, await group

    stored, found = asyncio.run(ask())
    assert len({answer.token_ids for answer in found}) > 1
    assert stored, "all four were complete before anybody could look"
    for part in stored:
        assert asyncio.run(sampler.resume(part)).token_ids == found[part.request.sampling.seed].token_ids


def test_local_sampler_frees_the_slot_of_who_no_longer_waits(sampler):
    async def ask():
        long = asyncio.create_task(sampler.sample(Request(text(1, 5), sampling=Sampling(0.0, max_new_tokens=59))))
        while not sampler.unfinished():
            await asyncio.sleep(0)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return await sampler.sample(Request(text(2, 5), sampling=GREEDY))

    check(Request(text(2, 5), sampling=GREEDY), asyncio.run(ask()))
    assert sampler.stats()["running"] == 0


def test_local_sampler_tells_who_asks_what_is_wrong(sampler, monkeypatch):
    """A request that cannot be served is refused alone; an engine that fails ends all, and so does closing."""
    with pytest.raises(ValueError, match="at least one token"):
        asyncio.run(sampler.sample(Request(text(0, 0))))
    with pytest.raises(KeyError):
        sampler.set_params({}, 1, "drain")
    assert sampler.version == 0
    engine = Engine(model().config, model().params, **SIZES)
    broken = LocalSampler(engine)

    def burn(tokens=None):
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(engine, "step", burn)
    for _ in range(2):
        with pytest.raises(SamplerFailed, match="on fire"):
            asyncio.run(broken.sample(Request(text(1, 3))))
    broken.close()
    with pytest.raises(SamplerFailed):
        broken.stats()
