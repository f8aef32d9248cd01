"""Callers of the server: who they are taken for, and that none of them has all the room."""

from __future__ import annotations

import contextlib
import http.client
import json
from urllib.parse import urlsplit

from tests.serve.server import PATIENCE, ScriptedEngine, client, serving
from tests.serve.test_app import HELLO, TOKENIZER, config, script, user


def test_caller_is_the_address_and_the_user_that_a_call_names():
    engine = ScriptedEngine(TOKENIZER, script)
    with serving(engine, TOKENIZER, config()) as address, client(address) as api:
        for more in ({}, {"user": "ann"}, {"extra_body": {"safety_identifier": "bob"}}, {"user": "c" * 1000, "n": 2}):
            api.chat.completions.create(model="tiny", messages=HELLO, **more)
        api.completions.create(model="tiny", prompt="x", user="ann")
    names = ["", "ann", "bob", "c" * 256, "c" * 256, "ann"]
    assert list(engine.callers.values()) == [("127.0.0.1", name) for name in names]


def test_one_address_leaves_room_for_another():
    """Of 18 places an address gets 16, whatever users it names; another one is served meanwhile, and so is the first
    when something of it has ended. Linux answers on all of 127.0.0.0/8."""
    engine = ScriptedEngine(TOKENIZER, script, patient=True)
    with serving(engine, TOKENIZER, config(), limit=18) as address, contextlib.ExitStack() as stack:

        def ask(source, name=""):
            connection = http.client.HTTPConnection(
                urlsplit(address).netloc, timeout=PATIENCE, source_address=(source, 0)
            )
            stack.callback(connection.close)
            body = {"messages": user("long"), "stream": True, "user": name}
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            return connection.getresponse()

        greedy = [ask("127.0.0.1", str(i)) for i in range(18)]
        assert [answer.status for answer in greedy] == [200] * 16 + [429] * 2
        assert "16 requests of yours" in greedy[-1].read().decode()
        other = ask("127.0.0.2")
        assert other.status == 200
        engine.permits.release(100_000)
        assert other.read().endswith(b"data: [DONE]\n\n")
        assert all(answer.read().endswith(b"data: [DONE]\n\n") for answer in greedy[:16])
        assert ask("127.0.0.1").status == 200
