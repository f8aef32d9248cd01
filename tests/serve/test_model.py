"""The server on a real model and engine: a fixture checkpoint in the released layout, asked by the `openai` client.

The weights are random, so what it says means nothing; that the same question gets the same answer, alone or among 32
others, means that it is the model's.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import re
import urllib.request
from urllib.parse import urlsplit

import openai
import pytest

from kimi_jax.infer.engine import Engine
from tests.serve.server import PATIENCE, client, image_uri, load_checkpoint, serving
from tests.serve.test_app import WEATHER, user

SLOTS, LENGTH = 4, 512


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def address(model):
    engine = Engine(model.config, model.params, slots=SLOTS, max_sequence_length=LENGTH)
    with serving(engine, model.tokenizer, model.config, limit=SLOTS + 40) as address:
        yield address


@pytest.fixture(scope="module")
def ask(address):
    with client(address) as api:

        def ask(content, **more):
            settings = {"max_tokens": 8, "extra_body": {"return_token_ids": True}} | more
            return api.chat.completions.create(model="tiny", messages=user(content), **settings)

        yield ask


def tokens(answer):
    return [choice.token_ids for choice in answer.choices]


def metric(address, name):
    with urllib.request.urlopen(f"{address}/metrics", timeout=PATIENCE) as answer:
        return float(re.search(rf"(?m)^{name} (\S+)$", answer.read().decode())[1])


def test_greedy_is_model_generate(model, ask):
    answer = ask("hi", temperature=0)
    reply = model.generate(user("hi"), max_new_tokens=8, temperature=0)
    assert answer.choices[0].message.content == reply.content
    assert answer.choices[0].message.model_extra.get("reasoning_content", "") == reply.reasoning
    assert answer.usage.completion_tokens == len(answer.choices[0].token_ids) <= 8


def test_seeds_and_choices(ask):
    """Choice i of seed s is the first choice of seed s + i."""
    three = tokens(ask("hi", seed=5, n=3))
    assert tokens(ask("hi", seed=5, n=3)) == three
    assert tokens(ask("hi", seed=7)) == three[2:]
    assert three[0] != three[1] != three[2]


def test_image_is_seen(ask):
    """Same words, other colours, other answer; the same image, the same answer."""

    def about(value):
        image = {"type": "image_url", "image_url": {"url": image_uri(value=value)}}
        return ask([image, {"type": "text", "text": "?"}], seed=1, logprobs=True).choices[0].logprobs.content

    bright, dark = about(255), about(0)
    assert about(255) == bright
    assert [t.logprob for t in bright] != [t.logprob for t in dark]


def test_stream_with_tools_is_the_whole_answer(ask):
    call = {"tools": [WEATHER], "seed": 3, "logprobs": True, "top_logprobs": 2, "temperature": 0.5}
    whole = ask("weather?", **call)
    pieces = list(ask("weather?", stream=True, stream_options={"include_usage": True}, **call))
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens  # the second call finds its prompt cached
    ids = [i for piece in pieces[:-1] for i in getattr(piece.choices[0], "token_ids", None) or ()]
    assert [ids] == tokens(whole)
    streamed = [t for p in pieces[:-1] if p.choices[0].logprobs for t in p.choices[0].logprobs.content]
    for token, same in zip(streamed, whole.choices[0].logprobs.content, strict=True):
        assert token.bytes == same.bytes
        assert token.logprob == pytest.approx(same.logprob, abs=1e-4)  # a prompt in cache is summed in another order
        assert token.logprob <= token.top_logprobs[0].logprob
    message = whole.choices[0].message
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == message.content


def test_32_at_once_each_get_their_own_answer(address, ask):
    """More than there are slots; texts and images, streamed or not. Then everything is free again."""
    alone = [tokens(ask(f"question {i % 4}", seed=i % 4)) for i in range(4)]

    def one(i):
        if i % 8 == 7:
            image = {"type": "image_url", "image_url": {"url": image_uri(value=i)}}
            return tokens(ask([image], seed=i))
        if i % 2:
            pieces = list(ask(f"question {i % 4}", seed=i % 4, stream=True))
            return [[t for p in pieces for t in getattr(p.choices[0], "token_ids", None) or ()]]
        return tokens(ask(f"question {i % 4}", seed=i % 4))

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(32)))
    for i, answer in enumerate(answers):
        assert i % 8 == 7 or answer == alone[i % 4]
    assert metric(address, "kimi_admitted") == 0
    assert metric(address, "kimi_engine_running") == 0


def test_client_that_goes_away_frees_the_slot(address, ask):
    body = json.dumps({"messages": user("long"), "stream": True, "n": SLOTS, "temperature": 5, "stop_token_ids": []})
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE)
    connection.request("POST", "/v1/chat/completions", body)
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    answer.close()
    connection.close()
    assert tokens(ask("hi", seed=5))  # waits for a slot
    assert metric(address, "kimi_admitted") <= SLOTS


def test_usage_says_how_many_tokens_of_the_prompt_were_cached(ask):
    """A prompt of three pages of 64 tokens, twice; with two choices it still counts once."""
    first = ask("y" * 150, seed=1)
    assert first.usage.prompt_tokens_details.cached_tokens < 64
    for more in ({}, {"n": 2}):
        usage = ask("y" * 150, seed=1, **more).usage
        assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 64 * 64 > 0


def test_too_long_is_the_clients_fault(ask):
    with pytest.raises(openai.BadRequestError, match=f"at most {LENGTH}"):
        ask("x" * LENGTH)
    image = {"type": "image_url", "image_url": {"url": image_uri(width=1200, height=1200)}}
    with pytest.raises(openai.BadRequestError, match="the prompt has"):
        ask([image])
    answer = ask("x" * (LENGTH - 60), max_tokens=500, temperature=0)
    assert answer.usage.total_tokens <= LENGTH
