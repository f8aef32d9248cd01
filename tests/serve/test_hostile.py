"""The server against requests that are made to hurt it: size, time, memory, nesting, keys, errors."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import tracemalloc
from urllib.parse import urlsplit

import av
import numpy as np
import PIL.Image
import pytest

from kimi_jax.data import BadRecord
from kimi_jax.serve import guard
from kimi_jax.serve.body import MAX_LEVELS, MAX_VALUES, count_values
from kimi_jax.serve.budget import MemoryBudget
from kimi_jax.serve.protocol import ApiError, public_text
from kimi_jax.serve.worker import Overloaded
from tests.serve.server import PATIENCE, ScriptedEngine, client, image_uri, serving, video_bytes
from tests.serve.test_app import HELLO, TOKENIZER, config, get, post, script, user

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def address():
    with serving(ScriptedEngine(TOKENIZER, script), TOKENIZER, config(), max_body=4 << 20) as address:
        yield address


def ask(address, parts, **more):
    return post(address, CHAT, json.dumps({"messages": user(parts), **more}).encode())


def image(uri):
    return {"type": "image_url", "image_url": {"url": uri}}


def flat_png(width, height):
    file = io.BytesIO()
    PIL.Image.new("1", (width, height)).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def raw(address, data):
    """All that a server answers to these bytes before it closes the connection."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), PATIENCE) as connection:
        connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
        return answer


# --------------------------------------------------------------------------------------------------- text of strangers


@pytest.mark.parametrize("uri", [
    "data:" + "a" * 1_000_000, "data:a/b" + ";a=b" * 300_000, "data:;base64" + " " * 1_000_000,
    "data:" + ";" * 1_000_000,
    "data:a/b;base64," + "%" * 1_000_000, "data:," + "%41" * 1_000_000, "data:;base64," + "\n" * 1_000_000,
])  # fmt: skip
def test_data_uri_of_a_megabyte_is_refused(address, uri):
    """With the quadratic pattern of before, one of them took hours, under the lock of the interpreter."""
    status, error = ask(address, [image(uri)])
    assert (status, error["error"]["code"]) == (400, "broken_image")
    assert len(error["error"]["message"]) < 300


@pytest.mark.parametrize("change", [
    {"stop_token_ids": list(range(100_000))}, {"stop_token_ids": [1] * 257}, {"stop": ["x" * 257]},
    {"stop": ["x"] * 17},
    {"logit_bias": {str(i): 1 for i in range(50_000)}}, {"x" * 100_000: 1}, {"tools": [{}] * 1025},
    {"messages": [{"role": "user"}] * 16385},
], ids=lambda change: next(iter(change))[:20])  # fmt: skip
def test_field_of_great_length_is_refused(address, change):
    status, error = post(address, CHAT, json.dumps({"messages": HELLO, **change}).encode())
    assert status == 400
    assert len(json.dumps(error)) < 600


# --------------------------------------------------------------------------------------------------------------- media


def test_media_beyond_the_context_are_refused_before_they_are_decoded(address, monkeypatch):
    """28 KB of PNGs once became 2.9 GB, 232 KB of video 7.3 GB: here nothing is decoded at all."""

    def decode(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr("kimi_jax.data.media_plan.image_patches", decode)
    monkeypatch.setattr("kimi_jax.data.media_plan.read_video", decode)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 512
        frame = av.VideoFrame.from_ndarray(np.zeros((512, 512, 3), np.uint8), format="rgb24")
        for _ in range(60):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = "data:video/mp4;base64," + base64.b64encode(file.getvalue()).decode()
    bodies = [
        [image(flat_png(8000, 8000))],
        [image(flat_png(900, 900))] * 30,
        [{"type": "video_url", "video_url": video}],
    ]
    for parts in bodies:
        tracemalloc.start()
        status, error = ask(address, parts)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert status == 400
        assert "prompt and answer together have at most 4096" in error["error"]["message"]
        assert peak < 64 << 20  # bodies are under a megabyte, with the client's copies


def test_text_beyond_the_context_is_refused_before_it_is_encoded(address, monkeypatch):
    monkeypatch.setattr("kimi_jax.data.processor.token_spans", None)
    status, error = ask(address, "x" * 1_000_000)
    assert status == 400 and "characters" in error["error"]["message"]
    status, _ = post(address, "/v1/completions", json.dumps({"prompt": "x" * 1_000_000}).encode())
    assert status == 400


def test_pixels_stay_bytes_up_to_the_engine():
    engine = ScriptedEngine(TOKENIZER, script)
    video = {"type": "video_url", "video_url": "data:video/mp4;base64," + base64.b64encode(video_bytes()).decode()}
    with serving(engine, TOKENIZER, config()) as address:
        assert ask(address, [image(image_uri()), video])[0] == 200
    assert [item.patches.dtype for item in engine.requests[0].media] == [np.uint8] * 3


def test_memory_budget_is_shared_by_all_requests_and_given_back():
    """A request that alone needs too much gets 413; one that only has to wait gets 429 with Retry-After."""
    engine = ScriptedEngine(TOKENIZER, script, patient=True)
    uri = flat_png(600, 600)  # 16 bytes a pixel while it is decoded: 5.8 MB; 1936 patches, 484 tokens
    with serving(engine, TOKENIZER, config(), max_memory=9 << 20) as address:
        assert ask(address, [image(flat_png(800, 800))])[0] == 413
        running = threading.Thread(target=ask, args=(address, [image(uri)]))
        running.start()
        engine.wait(lambda: len(engine.left) == 1)
        held = float(get(address, "/metrics").split("\nkimi_memory_bytes ")[1].split()[0])
        assert 1936 * 588 < held < 3 << 20  # what decoding took in passing is free again
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE)
        connection.request("POST", CHAT, json.dumps({"messages": user([image(flat_png(660, 660))])}))
        answer = connection.getresponse()
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        connection.close()
        engine.permits.release(10_000)
        running.join(PATIENCE)
        assert "kimi_memory_bytes 0\n" in get(address, "/metrics")


def test_memory_budget_counts_and_refuses():
    budget = MemoryBudget(100)
    with budget.reservation() as one, budget.reservation() as two:
        one.change(60)
        with pytest.raises(Overloaded):
            two.change(50)
        with pytest.raises(ApiError) as error:
            one.change(41)
        assert error.value.status == 413
        one.change(-30)
        two.change(50)
        assert budget.used == 80
    assert budget.used == 0
    with pytest.raises(Overloaded):
        two.change(1)  # a helper thread that outlives its client takes nothing


def test_icon_with_another_image_inside_is_refused(address):
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64)).save(file, "ico", sizes=[(64, 64)])
    data = bytearray(file.getvalue())
    data[6:8] = 16, 16
    status, error = ask(address, [image("data:image/x-icon;base64," + base64.b64encode(data).decode())])
    assert (status, error["error"]["code"]) == (400, "broken_image")


# ---------------------------------------------------------------------------------------------------- body and headers


@pytest.mark.parametrize("data", [
    b"[" * 100_000, b'{"a":' * (MAX_LEVELS + 1), b"[" + b"{}," * MAX_VALUES + b"{}]", b'["\\"", ' + b"[" * 200,
])  # fmt: skip
def test_json_of_many_levels_or_values_is_refused_before_it_is_parsed(data):
    with pytest.raises(ApiError):
        count_values(data)


@pytest.mark.parametrize("data", [
    b'"' + b'\\"' * 500_000, b'"' + b"\\" * 999_999, b'"[{",' * 300_000, b'{"a": "' + b"[" * 500_000 + b'"}',
    b"\\" * 500_000,
])  # fmt: skip
def test_json_strings_count_as_one_value_in_linear_time(data):
    """Unterminated strings full of escapes: a search that began anew at each quote would be quadratic."""
    assert count_values(data) < MAX_VALUES


def test_body_is_refused_by_its_announced_length_before_it_is_sent(address):
    """No byte of the body follows, so an answer proves that none was waited for."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\nexpect: 100-continue\r\n\r\n"
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), PATIENCE) as connection:
        connection.sendall(head)
        assert b" 413 " in connection.recv(4096)


def test_full_server_refuses_before_the_body_is_sent():
    engine = ScriptedEngine(TOKENIZER, script, slots=1, patient=True)
    with serving(engine, TOKENIZER, config(), limit=1) as address:
        running = threading.Thread(target=ask, args=(address, "long"))
        running.start()
        engine.wait(lambda: len(engine.left) == 1)
        place = urlsplit(address)
        with socket.create_connection((place.hostname, place.port), PATIENCE) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
            answer = connection.recv(4096)
            assert b" 429 " in answer and b"retry-after: 1" in answer
        engine.permits.release(10_000)
        running.join(PATIENCE)


def test_body_that_does_not_arrive_in_time_is_refused(monkeypatch):
    monkeypatch.setattr(guard, "DRAIN_SECONDS", 0.1)
    with serving(ScriptedEngine(TOKENIZER, script), TOKENIZER, config(), body_seconds=0.2) as address:
        answer = raw(address, b'POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"mess')
        assert b" 408 " in answer
        assert "kimi_admitted 0" in get(address, "/metrics")
        assert "kimi_memory_bytes 0\n" in get(address, "/metrics")


@pytest.mark.parametrize(
    "data", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\na: ", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGE"]
)
def test_connection_whose_headers_do_not_end_is_closed(data, monkeypatch):
    """Slowloris: a new connection that is silent or slow, and a second request that never ends."""
    monkeypatch.setattr(guard.Connection, "header_seconds", 0.2)
    with serving(ScriptedEngine(TOKENIZER, script), TOKENIZER, config()) as address:
        answer = raw(address, data)
        assert answer.count(b"HTTP/1.1 200") == (1 if data.endswith(b"GE") else 0)


def test_headers_are_limited_in_number_and_size(address):
    many = b"".join(b"a%d: b\r\n" % i for i in range(guard.MAX_HEADERS + 1))
    assert b" 431 " in raw(address, b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + many + b"\r\n")
    large = b"a: " + b"b" * guard.MAX_HEADER_BYTES + b"\r\n\r\n"
    assert raw(address, b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + large).split()[1] in (b"400", b"431")


def test_client_that_does_not_read_its_answer_loses_its_slot(monkeypatch):
    monkeypatch.setattr(guard.Connection, "stalled_seconds", 0.2)
    tokens = TOKENIZER.encode("</think>" + "x" * 20_000, allow_special_tokens=True)
    engine = ScriptedEngine(TOKENIZER, lambda prompt: tokens, patient=True)
    engine.permits.release(1500)  # of 4096 tokens for each choice: some 8 MB, more than sockets hold
    with serving(engine, TOKENIZER, config()) as address:
        place = urlsplit(address)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((place.hostname, place.port))
            body = json.dumps(
                {"messages": HELLO, "stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}
            ).encode()
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
            )
            connection.sendall(body)
            engine.wait(lambda: len(engine.cancelled) == 4)


# -------------------------------------------------------------------------------------------------- keys, errors, nulls


def test_api_key_is_asked_for_on_every_route_but_health():
    with serving(ScriptedEngine(TOKENIZER, script), TOKENIZER, config(), api_key="sesame") as address:
        assert json.loads(get(address, "/health")) == {"status": "ok"}
        routes = [
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("POST", CHAT),
            ("POST", "/v1/completions"),
            ("GET", "/x"),
        ]
        for method, path in routes:
            for headers in ({}, {"authorization": "Bearer sesam"}, {"authorization": "Basic sesame"},
                            {"authorization": "sesame"}, {"authorization": "Bearer "}):  # fmt: skip
                connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE)
                connection.request(method, path, b"x" * 100_000 if method == "POST" else None, headers)
                answer = connection.getresponse()
                assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
                assert json.loads(answer.read())["error"]["code"] == "invalid_api_key"
                connection.close()
        with client(address).with_options(api_key="sesame") as api:
            assert api.chat.completions.create(model="tiny", messages=HELLO).choices


def test_api_key_comes_from_flag_file_or_environment(tmp_path):
    file = tmp_path / "key"
    file.write_text("of-the-file\n")
    assert guard.read_api_key("flag", str(file), "environment") == "flag"
    assert guard.read_api_key("", str(file), "environment") == "of-the-file"
    assert guard.read_api_key("", "", "environment") == "environment"
    assert guard.read_api_key("", "", "") == ""
    file.write_text("\n")
    for flag, path in (("a b", ""), ("ü", ""), ("a\nb", ""), ("", str(file))):
        with pytest.raises(ValueError, match="API key"):
            guard.read_api_key(flag, path, "")


def test_errors_name_no_memory_address_and_no_folder(address):
    for uri in (
        "data:image/png;base64,AAAA",
        "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode(),
    ):
        message = ask(address, [image(uri)])[1]["error"]["message"]
        assert "0x" not in message and "object at" not in message
    assert public_text("cannot open <_io.BytesIO object at 0x7f12ab>") == "cannot open <_io.BytesIO>"
    assert public_text("no file '/srv/secret/a.png': /etc/x") == "no file 'a.png': x"
    assert public_text("see https://host/a/b") == "see https://host/a/b"
    assert len(public_text("/" * 1_000_000)) <= 1000


def test_model_is_described_by_its_id(address):
    with client(address) as api:
        assert api.models.retrieve("tiny").id == "tiny"
    status, error = missing(address, "/v1/models/other/one")
    assert (status, error["error"]["code"]) == (404, "model_not_found")
    assert missing(address, "/v2")[1]["error"]["type"] == "invalid_request_error"


def missing(address, path):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_null_counts_as_absent(address):
    function = {"name": "f", "arguments": None, "description": None, "parameters": None}
    tool = {"type": "function", "function": function}
    history = [
        {"role": "user", "content": "hello", "name": None, "id": None},
        {"role": "assistant", "content": None, "reasoning_content": None, "tool_calls": [{"id": None, **tool}]},
        {"role": "tool", "content": "x", "tool_call_id": None},
        {"role": "assistant", "content": "y", "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    nulls = dict.fromkeys(
        ("id", "stop", "stop_token_ids", "n", "seed", "stream", "stream_options", "thinking", "tool_choice", "logprobs",
         "top_logprobs", "temperature", "top_p", "max_tokens", "model", "response_format", "unknown")
    )  # fmt: skip
    status, answer = post(address, CHAT, json.dumps({"messages": history, "tools": [tool], **nulls}).encode())
    assert status == 200, answer


def test_usage_says_how_many_tokens_were_cached(address):
    usage = ask(address, "hello")[1]["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_record_whose_data_uri_is_bad_names_no_content():
    from kimi_jax.data.media_part import read_data_uri

    with pytest.raises(BadRecord) as error:
        read_data_uri("data:;base64," + "ü" * 1000, "key")
    assert len(str(error.value)) < 100
