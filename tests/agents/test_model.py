"""The endpoint model: what it sends, how it reads answers and refusals; hostile answers end in typed errors."""

import json

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.agents.events import Usage
from kimi_jax.agents.model import (
    Call,
    EndpointModel,
    ModelError,
    ModelRequest,
    Prices,
    RateLimited,
    Unavailable,
    read_answer,
)  # fmt: skip
from tests.agents.endpoint import endpoint, message

REQUEST = ModelRequest(
    "root",
    [{"role": "user", "content": "Q?"}],
    [{"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}],
    77,
)


def ask(answer, request=REQUEST):
    async def main(url):
        model = EndpointModel(url, "tiny", timeout=20.0)
        try:
            return await model.complete(request)
        finally:
            await model.aclose()

    with endpoint(answer) as url:
        return anyio.run(main, url)


def test_model_sends_the_conversation_and_reads_text_calls_and_usage():
    seen = []

    def answer(body):
        seen.append(body)
        status, headers, value = message("thinking aloud", ("look", {"x": 1}))
        value["choices"][0]["message"]["reasoning_content"] = "hm"
        return status, headers, value

    response = ask(answer)
    assert (response.text, response.reasoning, response.finish) == ("thinking aloud", "hm", "stop")
    assert response.calls == (Call("c0", "look", '{"x": 1}'),) and response.usage == Usage(50, 10)
    assert seen[0]["max_tokens"] == 77 and seen[0]["model"] == "tiny" and len(seen) == 1
    assert seen[0]["tools"] == [{"type": "function", "function": REQUEST.tools[0]}]
    assert response.message()["tool_calls"][0]["function"]["name"] == "look"


@pytest.mark.parametrize(
    "status, headers, error, retry_after",
    [
        (429, {"Retry-After": "7"}, RateLimited, 7.0),
        (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, RateLimited, 0.0),
        (503, {}, RateLimited, 0.0),
        (500, {}, Unavailable, 0.0),
        (400, {}, ModelError, None),
        (401, {}, ModelError, None),
    ],
)
def test_model_refusal_says_whether_to_ask_again(status, headers, error, retry_after):
    calls = []

    def answer(body):
        calls.append(body)
        return status, headers, {"error": {"message": "no"}}

    with pytest.raises(error, match=f"status {status}") as caught:
        ask(answer)
    assert type(caught.value) is error and len(calls) == 1, "the client itself repeats nothing"
    assert getattr(caught.value, "retry_after", None) == retry_after


def test_model_that_cannot_be_reached_may_be_asked_again():
    async def main():
        await EndpointModel("http://127.0.0.1:9/v1", "tiny").complete(REQUEST)

    with pytest.raises(Unavailable, match="no answer from"):
        anyio.run(main)


def test_model_answer_that_is_too_large_is_refused_while_it_is_read():
    with pytest.raises(ModelError, match="larger than"):
        ask(lambda body: (200, {}, b'{"choices": "' + b"x" * (1 << 24) + b'"}'))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": {"0": 1}}',
        b'{"choices": [{"message": {"content": 3}}]}',
        b'{"choices": [{"message": {"content": "x", "tool_calls": [{}]}}]}',
        b'{"choices": [{"message": {"tool_calls": [{"function": {"name": {}}}]}}]}',
        b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)  # fmt: skip
def test_model_answer_of_another_form_is_an_error(body):
    with pytest.raises(ModelError):
        read_answer(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "tool_calls", "function", "name", "arguments"]), inner, max_size=3
        )
    ),
    max_leaves=10,
)


@given(JSON, JSON)
def test_model_answer_is_read_or_an_error_whatever_it_holds(answer, usage):
    data = json.dumps({"choices": [{"message": answer}], "usage": usage}).encode()
    try:
        response = read_answer(data)
    except ModelError:
        return
    assert isinstance(response.text, str) and 0 <= response.usage.tokens < 1 << 42


def test_model_prices_are_for_a_million_tokens():
    assert Prices(0.6, 2.5).cost(1_000_000, 2_000_000) == pytest.approx(5.6)
    with pytest.raises(ValueError):
        Prices(-1.0, 0.0)
