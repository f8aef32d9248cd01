"""Random data URIs and request bodies: whatever comes, an answer or a client's error, never a failure of the server."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_jax.data import BadRecord
from kimi_jax.data.media_part import read_data_uri
from kimi_jax.serve import protocol
from kimi_jax.serve.body import count_values, parse_json
from kimi_jax.serve.protocol import ApiError
from tests.serve.server import PATIENCE, ScriptedEngine, image_uri, serving, video_bytes
from tests.serve.test_app import TOKENIZER, config, script

PIECES = [
    "data:",
    "DATA:",
    "image/png",
    "video/mp4",
    ";base64",
    ";",
    "a=b",
    ",",
    "%",
    "%41",
    "====",
    "AAAA",
    "\n",
    "\ud800",
    "ü",
]
KNOWN = [
    "model", "messages", "tools", "temperature", "top_p", "n", "stop", "stop_token_ids", "stream", "logprobs", "seed",
    "top_logprobs", "max_tokens", "thinking", "stream_options", "logit_bias", "tool_choice", "prompt", "id", "user",
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "type", "text", "image_url", "url",
    "video_url", "function", "arguments", "parameters", "properties", "enum", "$ref", "anyOf", "items",
]  # fmt: skip
MEDIA = [image_uri(), "data:video/mp4;base64," + base64.b64encode(video_bytes()).decode()]

keys = st.one_of(st.sampled_from(KNOWN), st.text(max_size=8))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["user", "tool"]),
    st.sampled_from(["text", "image_url", "video_url", "function", "object", "array", *MEDIA]),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=5)),
    max_leaves=20,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "video_url"])},
    optional={"text": leaves, "image_url": values, "video_url": values},
)
messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "tool", "system"]),
        "content": st.one_of(leaves, st.lists(parts, max_size=3)),
    },
    optional={"tool_calls": values, "name": leaves, "tool_call_id": leaves},
)
bodies = st.one_of(
    values,
    st.fixed_dictionaries({"messages": st.lists(messages, max_size=4)}, optional=dict.fromkeys(KNOWN[2:17], values)),
    st.fixed_dictionaries({"prompt": values}, optional=dict.fromkeys(KNOWN[3:13], values)),
)


def damaged(data: bytes, edits: list[tuple[int, int]]) -> bytes:
    """The bytes with some of them replaced, at places taken modulo the length."""
    result = bytearray(data)
    for place, byte in edits:
        result[place % len(result)] = byte
    return bytes(result)


edits = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=12)


def attempt(function, *arguments):
    """What it returns, or the error that a client or a pipeline is told."""
    try:
        return function(*arguments)
    except (ApiError, BadRecord) as error:
        return error


def check_data_uri(uri):
    result = attempt(read_data_uri, uri)
    assert isinstance(result, bytes) or (result.reason == "broken_image" and len(str(result)) < 300)


def check_body(data):
    """Counting, parsing and the checks of fields end in a call or in an error of the client."""
    results = [attempt(count_values, data), attempt(parse_json, data)]
    if not isinstance(results[1], ApiError):
        results += [attempt(parse, results[1]) for parse in (protocol.chat_call, protocol.completion_call)]
    for result in results:
        assert not isinstance(result, ApiError) or (result.status == 400 and json.dumps(result.body()))


def check_server(address, path, body):
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address + path, json.dumps(body).encode()), timeout=PATIENCE
        ) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    assert status == 200 or (400 <= status < 500 and "0x" not in text and "Traceback" not in text), text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=12).map("".join))
def test_data_uri_of_any_form_is_bytes_or_a_bad_record(uri):
    check_data_uri(uri)
    check_data_uri("data:" + uri)


@settings(max_examples=300, deadline=None)
@given(bodies, edits)
def test_body_of_any_form_is_a_call_or_a_client_error(body, edits):
    check_body(damaged(json.dumps(body).encode(), edits))


@pytest.fixture(scope="module")
def address():
    with serving(ScriptedEngine(TOKENIZER, script), TOKENIZER, config(), max_body=1 << 20) as address:
        yield address


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies, st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
def test_server_answers_any_body_without_failing(address, body, path):
    check_server(address, path, body)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["image_url", "video_url"]), edits)
def test_server_answers_damaged_media_without_failing(address, kind, edits):
    check_media(address, kind, edits)


def check_media(address, kind, edits):
    head, _, body = MEDIA[kind == "video_url"].partition(",")
    uri = head + "," + base64.b64encode(damaged(base64.b64decode(body), edits)).decode()
    check_server(
        address, "/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": kind, kind: uri}]}]}
    )


@pytest.mark.fuzz
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=20).map("".join), bodies, edits)
def test_data_uris_and_bodies_for_long(uri, body, edits):
    check_data_uri("data:" + uri)
    check_body(damaged(json.dumps(body).encode(), edits))


@pytest.mark.fuzz
@settings(max_examples=3_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    bodies,
    st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
    st.sampled_from(["image_url", "video_url"]),
    edits,
)
def test_server_answers_anything_for_long(address, body, path, kind, edits):
    check_server(address, path, body)
    check_media(address, kind, edits)
