"""JSON by a schema and forced tool calls, on random weights: what they say is the grammar's doing alone.

The model has random weights and draws at temperature 1.5 or above, so without a grammar nothing that it says is JSON:
the control. Schemas bound every length, so that each answer comes to its end.
"""

from __future__ import annotations

import asyncio
import json

import jsonschema
import numpy as np
import openai
import pytest

from kimi_jax.data.conversation import CALLS, END, THINK_END
from kimi_jax.data.reply import parse_reply
from kimi_jax.data.tokenizer import train_tokenizer
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import GrammarError
from kimi_jax.serve import grammar as grammars
from kimi_jax.serve.protocol import ApiError, chat_call
from tests.serve.server import PATIENCE, byte_tokenizer, client, load_checkpoint, serving
from tests.serve.test_app import HELLO, user

INSTANT = {"thinking": {"type": "disabled"}}
PLACE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "kind": {"enum": ["city", "lake", 'the "sea"', "Łódź"]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        "population": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9999}, {"type": "null"}]},
        "near": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "code", "population", "near"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}, "land": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "find_place", "description": "Finds.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "wait", "parameters": {
        "type": "object", "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 30}},
        "required": ["days"], "additionalProperties": False}}},
]  # fmt: skip
BY_NAME = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


def of_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    model = load_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    engine = Engine(model.config, model.params, slots=8, page_size=16, max_sequence_length=2048, chunks=(128,))
    with serving(engine, model.tokenizer, model.config) as address, client(address) as api:
        yield api


def ask(api, messages=HELLO, n=8, **more):
    settings = {"seed": 1, "temperature": 1.5, "top_p": 1.0, "max_tokens": 600, "extra_body": INSTANT} | more
    return api.chat.completions.create(model="tiny", messages=messages, n=n, **settings)


def is_json(text):
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def test_every_answer_is_json_of_the_schema_and_none_without_it(api):
    for choice in ask(api, response_format=of_schema(PLACE)).choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PLACE)
    control = ask(api, max_tokens=100).choices
    assert not any(is_json(choice.message.content) for choice in control)


def test_json_object_is_an_object_whatever_is_in_it(api):
    """At a high temperature, so that an object ends: each answer that came to its end parses."""
    found = ask(api, n=16, temperature=20.0, max_tokens=200, response_format={"type": "json_object"}).choices
    ended = [choice.message.content for choice in found if choice.finish_reason == "stop"]
    assert len(ended) >= 2
    assert all(map(is_json, ended))
    assert all(choice.message.content.lstrip().startswith("{") for choice in found)


def test_stream_of_a_schema_is_the_whole_answer(api):
    (whole,) = ask(api, n=1, response_format=of_schema(PLACE)).choices
    pieces = ask(api, n=1, response_format=of_schema(PLACE), stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.message.content


def check_calls(choice):
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    for call in choice.message.tool_calls:
        jsonschema.validate(json.loads(call.function.arguments), BY_NAME[call.function.name])
    return [call.function.name for call in choice.message.tool_calls]


def test_required_tool_choice_calls_tools_with_arguments_of_their_schemas(api):
    """Without it no answer is: random weights do write a marker now and then."""
    found = ask(api, n=5, tools=TOOLS, tool_choice="required", max_tokens=1200).choices
    names = [check_calls(choice) for choice in found]
    assert {name for each in names for name in each} == set(BY_NAME)
    assert max(map(len, names)) > 1
    assert {choice.message.tool_calls[0].id[-2:] for choice in found} == {":0"}
    for choice in ask(api, tools=TOOLS, max_tokens=60).choices:
        assert not any(call.function.name in BY_NAME for call in choice.message.tool_calls or ())


@pytest.mark.parametrize(
    "more",
    [
        {"tool_choice": {"type": "function", "function": {"name": "wait"}}},
        {"tool_choice": "required", "parallel_tool_calls": False},
    ],
)
def test_named_tool_or_no_parallel_calls_is_one_call(api, more):
    """In a conversation that had a call, the next one has the next number."""
    call = {"id": "functions.wait:0", "type": "function", "function": {"name": "wait", "arguments": '{"days": 1}'}}
    history = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "functions.wait:0", "content": "done"}]  # fmt: skip
    for choice in ask(api, history, tools=TOOLS, **more).choices:
        (name,) = check_calls(choice)
        assert choice.message.tool_calls[0].id == f"functions.{name}:1"
        assert name == "wait" or isinstance(more["tool_choice"], str)


def test_schema_with_tools_is_an_answer_or_calls(api):
    for choice in ask(api, n=4, tools=TOOLS, response_format=of_schema(PLACE), max_tokens=1200).choices:
        if choice.message.tool_calls:
            check_calls(choice)
        else:
            jsonschema.validate(json.loads(choice.message.content), PLACE)


def test_answer_that_is_cut_says_so(api):
    (choice,) = ask(api, n=1, response_format=of_schema(PLACE), max_tokens=20).choices
    assert choice.finish_reason == "length"


# ------------------------------------------------------------------------------------------------------- the grammars


def tokenizers(folder):
    texts = ['{"name": "city", "kind": "lake"}', "functions.find_place", "The sea near Łódź"] * 20
    return {"tiktoken": byte_tokenizer(), "tokenizers": train_tokenizer(texts, 320, folder / "tokenizer.json")}


def compiled(text, tokenizer):
    async def run():
        found = grammars.Grammars(tokenizer)
        try:
            return await found.compile(text)
        finally:
            found.close()

    return asyncio.run(asyncio.wait_for(run(), PATIENCE))


def call_of(**more):
    return chat_call({"messages": HELLO, **more})


def allowed(matcher):
    return np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little"))


def written(matcher, tokenizer, seed):
    """A random answer: any allowed token is as likely as any other."""
    rng, ids = np.random.default_rng(seed), []
    while not ids or ids[-1] != tokenizer.special_id(END):
        ids.append(int(rng.choice(allowed(matcher))))
        matcher.accept(ids[-1])
    return ids


@pytest.mark.parametrize("kind", ["tiktoken", "tokenizers"])
def test_both_tokenizers_are_masked_by_their_bytes(tmp_path, kind):
    tokenizer = tokenizers(tmp_path)[kind]
    text = grammars.grammar_text(call_of(response_format=of_schema(PLACE), **INSTANT), tokenizer)
    found = compiled(text, tokenizer)
    for seed in range(5):
        ids = written(found.start(), tokenizer, seed)
        jsonschema.validate(json.loads(tokenizer.decode(ids[:-1])), PLACE)
    text = grammars.grammar_text(call_of(tools=TOOLS, tool_choice="required", **INSTANT), tokenizer)
    found = compiled(text, tokenizer)
    for seed in range(5):
        reply = parse_reply(written(found.start(), tokenizer, seed), tokenizer, thinking=False)
        assert reply.finished and not reply.problems and reply.tool_calls
        assert not any(call.error for call in reply.tool_calls)
        for call in reply.tool_calls:
            jsonschema.validate(call.parsed, BY_NAME[call.name])


def test_reasoning_is_free_and_holds_no_marker_but_its_end():
    tokenizer = byte_tokenizer()
    text = grammars.grammar_text(call_of(response_format={"type": "json_object"}), tokenizer)
    matcher = compiled(text, tokenizer).start()
    for token in tokenizer.encode("Let me think: {"):
        matcher.accept(token)
    inside = set(allowed(matcher).tolist())
    special = {i for i in inside if i >= 256}
    assert special == {tokenizer.special_id(THINK_END)}
    assert set(tokenizer.encode('abc {}\n"')) <= inside
    matcher.accept(tokenizer.special_id(THINK_END))
    assert tokenizer.special_id(CALLS) not in allowed(matcher)
    assert set(tokenizer.decode(allowed(matcher))) <= set("{ \n\r\t")


def test_no_grammar_where_nobody_asks():
    tokenizer = byte_tokenizer()
    for more in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {"response_format": {"type": "text"}}):
        assert grammars.grammar_text(call_of(**more), tokenizer) is None


# ------------------------------------------------------------------------------------------------------- hostile ones


def chain(count):
    """Definitions that refer to each other: little text, and over a minute of work."""
    link = {"type": "object", "required": ["a"]}
    found = {f"d{i}": {**link, "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(count)}
    return {"$defs": {**found, f"d{count}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


HOSTILE = {
    "time, references": chain(800),
    "time, multiples": {"anyOf": [{"type": "integer", "multipleOf": 99991 - i} for i in range(40)]},
    "memory or states": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
    "product of choices": {"allOf": [
        {"anyOf": [{"properties": {f"a{i}": {"type": "integer"}}}, {"properties": {f"b{i}": {"type": "string"}}}]}
        for i in range(24)
    ]},
    "large enumeration": {"enum": [f"v{i}" for i in range(20_000)]},
    "circle": {"allOf": [{"$ref": "#"}, {"type": "object"}]},
    "address": {"$ref": "http://127.0.0.1:1/schema.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "look-ahead": {"type": "string", "pattern": "^(?=a)b$"},
    "nested pattern": {"type": "string", "pattern": "(" * 400 + "a" + ")*" * 400},
    "empty": {"type": "integer", "minimum": 5, "maximum": 3},
    "unknown keyword": {"type": "array", "uniqueItems": True},
    "no type": {"type": "nonsense"},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schema_is_a_400_and_the_server_lives(api, name):
    with pytest.raises(openai.BadRequestError) as error:
        ask(api, n=1, response_format=of_schema(HOSTILE[name]))
    assert error.value.code == "invalid_schema"
    assert "root:" not in error.value.message
    jsonschema.validate(json.loads(ask(api, n=1, response_format=of_schema(PLACE)).choices[0].message.content), PLACE)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a|a)*b(a|b){1000}$"},
        {"type": "string", "pattern": "^[ab]*a[ab]{40}$"},
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
        {"type": "integer", "minimum": 1, "maximum": 10**300},
    ],
    ids=["exponential", "ambiguous", "long", "many", "large"],
)
def test_schema_of_endless_answers_is_cut_at_the_length(api, schema):
    """They are small grammars of large languages: each step is quick, and max_tokens ends them."""
    (choice,) = ask(api, n=1, response_format=of_schema(schema), max_tokens=100).choices
    assert choice.finish_reason in ("length", "stop")


def test_answer_whose_masks_take_too_long_fails_alone(api, monkeypatch):
    monkeypatch.setattr(grammars, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(grammars, "TOKEN_SECONDS", 0.0)
    with pytest.raises(openai.InternalServerError, match="grammar: it took"):
        ask(api, n=1, response_format=of_schema(PLACE))
    monkeypatch.undo()
    assert ask(api, n=1, response_format=of_schema(PLACE)).choices[0].finish_reason == "stop"
    matcher = compiled('start: "ab"', byte_tokenizer()).start()
    matcher.accept(ord("a"))
    with pytest.raises(GrammarError):
        matcher.accept(ord("x"))


def test_names_and_strings_of_strangers_are_no_grammar():
    """Quotes and rules in descriptions, values and keys stay JSON; a function's name has to be plain."""
    tokenizer = byte_tokenizer()
    schema = {"type": "object", "description": "}\nstart: /.*/", "required": ['a"}\nb: c'],
              "additionalProperties": False,
              "properties": {'a"}\nb: c': {"const": "%json {} <[1]>"}}, "x-guidance": {"lenient": True}}  # fmt: skip
    text = grammars.grammar_text(call_of(response_format=of_schema(schema), **INSTANT), tokenizer)
    found = compiled(text, tokenizer)
    ids = written(found.start(), tokenizer, 0)
    assert json.loads(tokenizer.decode(ids[:-1])) == {'a"}\nb: c': "%json {} <[1]>"}
    tool = {"type": "function", "function": {"name": 'x" | /.*/', "parameters": {}}}
    with pytest.raises(ApiError, match="not of letters"):
        grammars.grammar_text(call_of(tools=[tool], tool_choice="required"), tokenizer)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "swim"}}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": "required", "tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": "required", "tools": [{"function": {"name": "f", "parameters": "x"}}]}, "tools[0]"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
    ids=repr,
)
def test_field_that_asks_for_no_grammar_is_named(body, param):
    with pytest.raises(ApiError) as caught:
        chat_call({"messages": HELLO, **body})
    assert (caught.value.status, caught.value.param) == (400, param)


def test_partial_message_cannot_follow_a_schema():
    messages = [*user("x"), {"role": "assistant", "content": "{", "partial": True}]
    with pytest.raises(ApiError, match="partial"):
        grammars.grammar_text(
            chat_call({"messages": messages, "response_format": {"type": "json_object"}}), byte_tokenizer()
        )
