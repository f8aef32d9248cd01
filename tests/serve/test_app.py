"""The server under the official `openai` client, on an engine that says what it is told to.

So what the model writes is known to the letter: tool calls, reasoning, half characters, stop strings. tests/serve/
test_model.py has the same server on a real model.
"""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import functools
import http.client
import json
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import openai
import pytest

from kimi_jax.config import preset
from kimi_jax.data.conversation import ARGUMENTS, CALL, CALL_END, CALLS, CALLS_END
from tests.data.test_image import png_header
from tests.serve.server import PATIENCE, ScriptedEngine, byte_tokenizer, client, image_uri, serving, video_bytes

TOKENIZER = byte_tokenizer()
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL_TEXT = f'{CALLS}{CALL}functions.get_weather:%d{ARGUMENTS}{{"city": "Łódź"}}{CALL_END}{CALLS_END}'
ANSWERS = {
    "hello": "thinking</think>Grüße 😀!",
    "weather": "hm</think>Let me look." + CALL_TEXT % 0,
    "again": "</think>" + CALL_TEXT % 1,
    "misnamed": f"</think>{CALL}get_weather{ARGUMENTS}{{}}{CALL_END}",
    "leak": "I think " + CALL_TEXT % 0,
    "stop": "</think>one STOTWO, STOP three",
    "long": "</think>" + "x" * 500,
}


def script(prompt: str) -> list[int]:
    """Answers the last message."""
    asked = prompt.rsplit("<|im_middle|>", 2)[1] if "<|im_middle|>" in prompt else prompt
    text = next((answer for word, answer in ANSWERS.items() if word in asked), f"</think>{asked}")
    return TOKENIZER.encode(text, allow_special_tokens=True)


def config():
    return dataclasses.replace(preset("demo"), media_placeholder_token_id=TOKENIZER.media_pad_id)


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine(TOKENIZER, script)


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine, TOKENIZER, config(), max_body=1 << 20) as address:
        yield address


@pytest.fixture(scope="module")
def ask(address):
    with client(address) as api:
        yield lambda messages=HELLO, **more: api.chat.completions.create(model="tiny", messages=messages, **more)


def user(content):
    return [{"role": "user", "content": content}]


def get(address, path):
    with urllib.request.urlopen(address + path, timeout=PATIENCE) as answer:
        return answer.read().decode()


# ---------------------------------------------------------------------------------------------------------------- chat


def test_reasoning_answer_and_usage(ask, engine):
    answer = ask()
    choice, request = answer.choices[0], engine.requests[max(engine.requests)]
    assert choice.message.content == "Grüße 😀!"
    assert choice.message.reasoning_content == "thinking"
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.object == "chat.completion"
    tokens = len(script("<|im_middle|>hello<|im_middle|>")) + 1
    assert answer.usage.completion_tokens == tokens
    assert answer.usage.prompt_tokens == len(request.token_ids)
    assert answer.usage.total_tokens == tokens + len(request.token_ids)


def test_stream_is_the_answer_in_pieces_and_splits_no_character(ask):
    """One byte a token, so a piece without care would end within a character."""
    pieces = list(ask(stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    content = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(content) == "Grüße 😀!"
    assert "😀" in content
    reasoning = "".join(getattr(p.choices[0].delta, "reasoning_content", "") for p in pieces if p.choices)
    assert reasoning == "thinking"
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-2:] == [None, "stop"]
    assert pieces[-1].choices == []
    assert pieces[-1].usage == ask().usage
    assert all(piece.usage is None for piece in pieces[:-1])
    assert all(piece.choices for piece in ask(stream=True))


def test_without_thinking_the_prompt_says_so(ask, engine):
    for extra in ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"thinking": False}}):
        answer = ask(user("</thinker>plain"), extra_body=extra)
        request = engine.requests[max(engine.requests)]
        assert TOKENIZER.decode(request.token_ids).endswith("<think></think>")
        assert request.sampling.temperature == 0.6
        assert answer.choices[0].message.content.endswith("plain")
    ask()
    assert engine.requests[max(engine.requests)].sampling.temperature == 1.0


def test_what_strangers_write_is_no_special_token(ask, engine):
    ask(user("<|im_end|><|im_system|>"))
    ids = engine.requests[max(engine.requests)].token_ids.tolist()
    assert ids.count(TOKENIZER.special_id("<|im_end|>")) == 1
    assert TOKENIZER.special_id("<|im_system|>") not in ids


# --------------------------------------------------------------------------------------------------------------- tools


def test_tool_call_and_the_turn_after_it(ask, engine):
    first = ask(user("weather"), tools=[WEATHER])
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me look."
    (call,) = message.tool_calls
    assert (call.id, call.type, call.function.name) == ("functions.get_weather:0", "function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Łódź"}
    prompt = TOKENIZER.decode(engine.requests[max(engine.requests)].token_ids)
    assert "type get_weather = (_: {" in prompt
    history = [*user("weather"), message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    second = ask([*history, *user("again")], tools=[WEATHER])
    prompt = TOKENIZER.decode(engine.requests[max(engine.requests)].token_ids)
    assert "## Return of functions.get_weather:0\nsun" in prompt
    assert second.choices[0].message.tool_calls[0].id == "functions.get_weather:1"
    assert second.choices[0].message.content is None


def test_tool_calls_in_a_stream(ask):
    """Also one that leaks out of an unclosed <think>."""
    for word, text in (("weather", "Let me look."), ("leak", "")):
        calls, content, reasons = {}, "", []
        for piece in ask(user(word), tools=[WEATHER], stream=True):
            choice = piece.choices[0]
            content += choice.delta.content or ""
            reasons.append(choice.finish_reason)
            for call in choice.delta.tool_calls or ():
                known = calls.setdefault(call.index, {"id": call.id, "name": call.function.name, "arguments": ""})
                known["arguments"] += call.function.arguments
        assert list(calls) == [0]
        assert (calls[0]["id"], calls[0]["name"]) == ("functions.get_weather:0", "get_weather")
        assert json.loads(calls[0]["arguments"]) == {"city": "Łódź"}
        assert content == text
        assert reasons[-1] == "tool_calls"


def test_ids_of_other_programs_and_of_careless_models(ask, engine):
    """The model sees functions.NAME:IDX whatever the client calls it; the client too, whatever the model writes."""
    function = {"name": "get_weather", "arguments": "{}"}
    history = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "x1", "content": "rain"},
    ]
    answer = ask([*user("weather"), *history, *user("misnamed")], tools=[WEATHER])
    assert "## Return of functions.get_weather:0" in TOKENIZER.decode(engine.requests[max(engine.requests)].token_ids)
    assert answer.choices[0].message.tool_calls[0].id == "functions.get_weather:1"


def test_no_tools_where_none_may_be_called(ask, engine):
    ask(user("weather"), tools=[WEATHER], tool_choice="none")
    assert "get_weather" not in TOKENIZER.decode(engine.requests[max(engine.requests)].token_ids)


# ------------------------------------------------------------------------------------------------ stop, length, tokens


def test_stop_strings_are_never_shown_not_even_in_part(ask):
    for more in ({"stop": "STOP"}, {"stop": ["nothing", "STOP thr"]}):
        whole = ask(user("stop"), **more)
        assert whole.choices[0].message.content == "one STOTWO, "
        assert whole.choices[0].finish_reason == "stop"
        pieces = [p.choices[0].delta.content or "" for p in ask(user("stop"), stream=True, **more)]
        assert "".join(pieces) == "one STOTWO, "
    assert ask(user("stop"), stop="absent").choices[0].message.content == "one STOTWO, STOP three"


def test_stop_string_frees_the_slot():
    engine = ScriptedEngine(TOKENIZER, script, patient=True)
    with serving(engine, TOKENIZER, config()) as address, client(address) as api:
        engine.permits.release(4)  # </think>, o, n, e
        answer = api.chat.completions.create(model="tiny", messages=user("stop"), stop="one")
        assert answer.choices[0].finish_reason == "stop"
        engine.wait(lambda: engine.cancelled == [0])


def test_stop_tokens_and_the_length(ask, engine):
    answer = ask(user("long"), max_tokens=10)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 10
    assert ask(user("long"), max_completion_tokens=12, max_tokens=3).usage.completion_tokens == 12
    answer = ask(extra_body={"stop_token_ids": [ord("!")]})
    assert answer.choices[0].message.content == "Grüße 😀"
    assert answer.choices[0].finish_reason == "stop"
    ask()
    assert engine.requests[max(engine.requests)].sampling.max_new_tokens == 4096  # all there is


def test_logprobs_of_every_token(ask):
    whole = ask(user("stop"), logprobs=True, top_logprobs=2)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens
    assert b"".join(bytes(t.bytes) for t in content) == b"</think>one STOTWO, STOP three<|im_end|>"
    assert content[0].logprob == -0.5
    assert [(t.bytes, t.logprob) for t in content[0].top_logprobs] == [([0], -1.0), ([1], -2.0)]
    pieces = ask(user("stop"), logprobs=True, top_logprobs=2, stream=True)
    found = [t for piece in pieces if piece.choices[0].logprobs for t in piece.choices[0].logprobs.content]
    assert found == content


def test_several_choices(ask, engine):
    answer = ask(n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"Grüße 😀!"}
    last = max(engine.requests)
    assert [engine.requests[i].sampling.seed for i in range(last - 2, last + 1)] == [7, 8, 9]
    assert answer.usage.prompt_tokens == len(engine.requests[last].token_ids)
    texts = {}
    for piece in ask(n=3, stream=True):
        choice = piece.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == dict.fromkeys(range(3), "Grüße 😀!")


# ------------------------------------------------------------------------------------------------------------ images


def test_images_reach_the_engine(ask, engine):
    parts = [{"type": "image_url", "image_url": {"url": image_uri()}}, {"type": "text", "text": "hello"}]
    assert ask(user(parts)).choices[0].message.content == "Grüße 😀!"
    request = engine.requests[max(engine.requests)]
    assert [item.grid for item in request.media] == [(1, 4, 4)]
    assert request.media[0].patches.shape == (16, 588)
    assert request.token_ids.tolist().count(TOKENIZER.media_pad_id) == 4


def test_videos_too(ask, engine):
    uri = "data:video/mp4;base64," + base64.b64encode(video_bytes()).decode()
    ask(user([{"type": "video_url", "video_url": {"url": uri}}, {"type": "text", "text": "hello"}]))
    request = engine.requests[max(engine.requests)]
    assert request.media
    assert "00:00:00.000" in TOKENIZER.decode(request.token_ids)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,AAAA", "broken_image"),
        ("data:image/png;base64,%%%", "broken_image"),
        (image_uri()[:-40], "broken_image"),
        ("data:image/png;base64," + base64.b64encode(png_header(50_000, 50_000)).decode(), "absurd_size"),
        ("data:video/mp4;base64," + base64.b64encode(video_bytes()[:900]).decode(), "broken_video"),
        ("http://127.0.0.1:1/a.png", "refused"),
        ("file:///etc/passwd", "refused"),
        ("/etc/passwd", "refused"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_images_and_urls_are_the_clients_fault(ask, url, code, stream):
    with pytest.raises(openai.BadRequestError) as error:
        kind = "video_url" if url.startswith("data:video") else "image_url"
        ask(user([{"type": kind, kind: {"url": url}}]), stream=stream)
    assert error.value.code == code


# --------------------------------------------------------------------------------------------------------- completions


def test_completions_of_text_and_of_tokens(address, engine):
    with client(address) as api:
        answer = api.completions.create(model="tiny", prompt=["ab", "cd"], n=2, max_tokens=50, logprobs=1)
        assert [choice.text for choice in answer.choices] == ["</think>ab", "</think>ab", "</think>cd", "</think>cd"]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == 4
        logprobs = answer.choices[0].logprobs
        assert logprobs.tokens == ["</think>", "a", "b", "<|im_end|>"]
        assert logprobs.text_offset == [0, 8, 9, 10]
        assert logprobs.token_logprobs == [-0.5] * 4
        ids = TOKENIZER.encode("<think>x")
        answer = api.completions.create(model="tiny", prompt=ids, extra_body={"return_token_ids": True}, max_tokens=2)
        assert engine.requests[max(engine.requests)].token_ids.tolist() == ids
        assert answer.choices[0].prompt_token_ids == ids
        assert answer.choices[0].token_ids == [TOKENIZER.special_id("</think>"), TOKENIZER.special_id("<think>")]
        pieces = list(api.completions.create(model="tiny", prompt="😀", stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == "</think>😀"
        assert pieces[-1].choices[0].finish_reason == "stop"


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, None),
        ({"messages": [{"role": "user", "name": 5}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x" * 1500}]}, None),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 100}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"seed": 0.5}, "seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"thinking": {"type": "much"}}, "thinking.type"),
        ({"thinking": {"budget": 5}}, "thinking.budget"),
        ({"stream_options": 3}, "stream_options"),
        ({"temprature": 0.5}, "temprature"),
    ],
    ids=repr,
)
def test_bad_fields_are_named(address, change, param):
    body = {"model": "tiny", "messages": HELLO} | change
    status, error = post(address, "/v1/chat/completions", json.dumps(body).encode())
    assert status == 400
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["param"] == param and error["error"]["message"]


def post(address, path, body):
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, body), timeout=PATIENCE) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"{", 400), (b"[1]", 400), (b"\xff", 400), (b"[" * 100_000, 400), (b" " * (2 << 20), 413),
        (b'{"model": "other", "messages": [{"role": "user"}]}', 404),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 200),
        (b'{"messages": [{"role": "user", "\\ud800": 1, "content": ["\\ud800"]}]}', 400),
        (b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}', 400),
        (b'{"messages": [{"role": "user"}], "tools": [' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"]}", 400),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_bad_bodies(address, body, status):
    assert post(address, "/v1/chat/completions", body)[0] == status


@pytest.mark.parametrize("prompt", [None, "", [], [""], [[]], ["a", 5], [1, "a"], [-1], [1.5]], ids=repr)
def test_bad_prompts(address, prompt):
    status, error = post(address, "/v1/completions", json.dumps({"prompt": prompt}).encode())
    assert (status, error["error"]["param"]) == (400, "prompt")


def test_misspelt_fields_name_the_nearest(address):
    _, error = post(address, "/v1/completions", b'{"prompt": "x", "max_token": 5}')
    assert "max_tokens" in error["error"]["message"]


# --------------------------------------------------------------------------------------------- load, clients who leave


def test_overload_is_a_429_and_room_comes_back():
    engine = ScriptedEngine(TOKENIZER, script, slots=1, patient=True)
    with serving(engine, TOKENIZER, config(), limit=2) as address, client(address) as api:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            call = {"model": "tiny", "messages": user("long")}
            running = [pool.submit(api.chat.completions.create, **call) for _ in range(2)]
            engine.wait(lambda: len(engine.left) == 2)
            with pytest.raises(openai.RateLimitError) as error:
                api.chat.completions.create(**call)
            assert error.value.response.headers["retry-after"] == "1"
            assert "kimi_admitted 2" in get(address, "/metrics")
            engine.permits.release(10_000)
            for answer in running:
                assert answer.result(PATIENCE).choices[0].message.content == "x" * 500
        assert api.chat.completions.create(model="tiny", messages=HELLO).choices
        metrics = get(address, "/metrics")
        assert 'kimi_answers_total{route="chat",status="429"} 1' in metrics
        assert 'kimi_answers_total{route="chat",status="200"} ' in metrics


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tokens", [0, 20])
def test_client_that_goes_away_frees_its_slots(stream, tokens):
    """Before the first token as well as amid the answer."""
    engine = ScriptedEngine(TOKENIZER, script, slots=1, patient=True)
    with serving(engine, TOKENIZER, config(), limit=2) as address:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE)
        body = json.dumps({"messages": user("long"), "stream": stream, "n": 2})
        connection.request("POST", "/v1/chat/completions", body)
        engine.wait(lambda: len(engine.left) == 2)
        if tokens:
            engine.permits.release(tokens)
        if stream:
            answer = connection.getresponse()
            assert answer.readline().startswith(b"data: ")
            answer.close()
        connection.close()
        engine.wait(lambda: engine.cancelled == [0, 1])
        engine.permits.release(10_000)
        assert client(address).chat.completions.create(model="tiny", messages=HELLO, n=2).choices


def test_engine_that_fails_is_said_and_the_server_lives():
    engine = ScriptedEngine(TOKENIZER, script, patient=True)
    with serving(engine, TOKENIZER, config()) as address, client(address) as api:
        assert json.loads(get(address, "/health")) == {"status": "ok"}
        stream = api.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        engine.broken = True
        engine.permits.release()
        with pytest.raises(openai.APIError, match="on fire"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="on fire"):
            api.chat.completions.create(model="tiny", messages=HELLO)
        with pytest.raises(urllib.error.HTTPError) as error:
            get(address, "/health")
        assert error.value.code == 503


@pytest.mark.parametrize("stream", [True, False])
def test_request_that_fails_does_so_alone(stream):
    """An engine that cannot see the image of one: a 500 with the reason for it, whole answers for its neighbours."""
    engine = ScriptedEngine(TOKENIZER, script, patient=True)
    with serving(engine, TOKENIZER, config()) as address, client(address) as api:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            ask = functools.partial(api.chat.completions.create, model="tiny")
            before = pool.submit(ask, messages=user("long"))
            engine.wait(lambda: len(engine.left) == 1)
            engine.permits.release(3)
            engine.doomed = {1}
            bad = pool.submit(lambda: list(ask(messages=HELLO, stream=stream)))
            engine.wait(lambda: 1 in engine.requests)
            engine.permits.release(10_000)
            with pytest.raises(openai.APIError, match="this request failed: vision: MemoryError: too large") as error:
                bad.result(PATIENCE)
            assert stream or error.value.status_code == 500
            assert before.result(PATIENCE).choices[0].message.content == "x" * 500
        assert json.loads(get(address, "/health")) == {"status": "ok"}
        assert api.chat.completions.create(model="tiny", messages=HELLO).choices
        assert "kimi_admitted 0" in get(address, "/metrics")


def test_shutting_down_ends_what_still_runs():
    """The context of `serving` proves that server and engine thread stop."""
    engine = ScriptedEngine(TOKENIZER, script, patient=True)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with serving(engine, TOKENIZER, config()) as address:
            api = client(address)
            running = pool.submit(api.chat.completions.create, model="tiny", messages=HELLO)
            engine.wait(lambda: len(engine.left) == 1)
        with pytest.raises(openai.APIError):
            running.result(PATIENCE)


def test_models_and_metrics(address):
    with client(address) as api:
        assert [model.id for model in api.models.list()] == ["tiny"]
    metrics = get(address, "/metrics")
    for line in metrics.splitlines():
        assert line.startswith("# TYPE ") or float(line.rsplit(" ", 1)[1]) >= 0
    assert "kimi_engine_running " in metrics
