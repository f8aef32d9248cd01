"""The check of tool calls: cases of the public format, written by hand, and what models may send instead of calls."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.agents import bfcl
from kimi_jax.agents.bfcl import Case, CaseError, check, evaluate, from_message, load_cases
from kimi_jax.data.reply import ToolCall

WEATHER = {
    "name": "weather.get",
    "description": "The weather of a city.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string", "description": "Name."},
            "days": {"type": "integer", "description": "How many."},
            "hours": {"type": "array", "items": {"type": "integer"}, "description": "Which."},
            "limit": {"type": "float", "description": "Degrees."},
            "options": {"type": "dict", "description": "More.", "properties": {"unit": {"type": "string"}}},
            "spans": {"type": "array", "items": {"type": "dict"}, "description": "From and to."},
            "deep": {"type": "boolean", "description": "All of it."},
            "code": {"type": "any", "description": "Anything."},
        },
        "required": ["city"],
    },
}
TIME = {
    "name": "clock",
    "parameters": {"type": "dict", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
}


def case(*expected, declarations=(WEATHER, TIME)) -> Case:
    return Case("x", ({"role": "user", "content": "?"},), declarations, expected)


def weather(right: dict) -> dict:
    return {"weather.get": {"city": ["Oslo", "Oslo, Norway"], **right}}


def call(name: str = "weather_get", **arguments) -> ToolCall:
    return ToolCall(f"functions.{name}:0", name, json.dumps(arguments))


@pytest.mark.parametrize(
    ("right", "arguments", "ok"),
    [
        ({}, {"city": "Oslo"}, True),
        ({}, {"city": "OSLO NORWAY"}, True),
        ({}, {"city": "Bergen"}, False),
        ({}, {}, False),
        ({}, {"city": 7}, False),
        ({}, {"city": "Oslo", "days": 3}, False),
        ({}, {"city": "Oslo", "town": "Oslo"}, False),
        ({"days": [3, 4]}, {"city": "Oslo", "days": 4}, True),
        ({"days": [3]}, {"city": "Oslo", "days": 3.0}, False),
        ({"days": [3]}, {"city": "Oslo", "days": "3"}, False),
        ({"days": [1]}, {"city": "Oslo", "days": True}, False),
        ({"days": [3]}, {"city": "Oslo"}, False),
        ({"days": [3, ""]}, {"city": "Oslo"}, True),
        ({"limit": [3.0]}, {"city": "Oslo", "limit": 3}, True),
        ({"limit": [2.5]}, {"city": "Oslo", "limit": 2.5}, True),
        ({"hours": [[1, 2]]}, {"city": "Oslo", "hours": [1, 2]}, True),
        ({"hours": [[1, 2]]}, {"city": "Oslo", "hours": [2, 1]}, False),
        ({"hours": [[1, 2]]}, {"city": "Oslo", "hours": ["1", 2]}, False),
        ({"options": [{"unit": ["C", "celsius"]}]}, {"city": "Oslo", "options": {"unit": "Celsius"}}, True),
        ({"options": [{"unit": ["C"]}]}, {"city": "Oslo", "options": {"unit": "F"}}, False),
        ({"options": [{"unit": ["C"]}]}, {"city": "Oslo", "options": {}}, False),
        ({"options": [{"unit": ["C", ""]}]}, {"city": "Oslo", "options": {}}, True),
        ({"options": [{"unit": ["C"]}]}, {"city": "Oslo", "options": {"unit": "C", "more": 1}}, False),
        ({"spans": [[{"a": [1]}, {"a": [2]}]]}, {"city": "Oslo", "spans": [{"a": 1}, {"a": 2}]}, True),
        ({"spans": [[{"a": [1]}, {"a": [2]}]]}, {"city": "Oslo", "spans": [{"a": 2}, {"a": 1}]}, False),
        ({"spans": [[{"a": [1]}]]}, {"city": "Oslo", "spans": [{"a": 1}, {"a": 1}]}, False),
        ({"deep": [True]}, {"city": "Oslo", "deep": True}, True),
        ({"deep": [True]}, {"city": "Oslo", "deep": 1}, False),
        ({"days": ["n_days"]}, {"city": "Oslo", "days": "n_days"}, True),
    ],
)  # fmt: skip
def test_one_call(right, arguments, ok):
    assert (check(case(weather(right)), [call(**arguments)]) == "") is ok


def test_function_has_to_be_the_right_one_with_or_without_its_dot():
    assert check(case(weather({})), [call("weather.get", city="Oslo")]) == ""
    assert "is called, not weather.get" in check(case(weather({})), [call("clock", zone="Oslo")])


def test_parallel_calls_may_come_in_any_order_and_each_counts_once():
    expected = case(weather({}), {"clock": {"zone": ["CET"]}}, {"clock": {"zone": ["GMT"]}})
    calls = [call("clock", zone="GMT"), call(city="Oslo"), call("clock", zone="CET")]
    assert check(expected, calls) == "" and check(expected, calls[::-1]) == ""
    assert check(expected, [calls[0], calls[1], calls[0]])
    assert check(expected, calls[:2]) == "2 calls instead of 3"
    assert check(expected, [*calls, calls[0]]) == "4 calls instead of 3"


def test_tools_are_in_the_form_that_endpoints_take():
    tool = case(weather({})).tools[0]["function"]
    assert tool["name"] == "weather_get"
    schema = tool["parameters"]
    assert schema["type"] == "object" and schema["required"] == ["city"]
    assert schema["properties"]["limit"]["type"] == "number" and schema["properties"]["options"]["type"] == "object"
    assert "type" not in schema["properties"]["code"] and schema["properties"]["hours"]["items"]["type"] == "integer"


# -------------------------------------------------------------------------------------------------------------- files


def write(folder, category: str, cases: list, answers: list) -> None:
    (folder / "possible_answer").mkdir(exist_ok=True)
    for path, lines in ((folder, cases), (folder / "possible_answer", answers)):
        (path / f"BFCL_v4_{category}.json").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


QUESTION = {"id": "p_0", "question": [[{"role": "user", "content": "Weather in Oslo?"}]], "function": [WEATHER, TIME]}
ANSWER = {"id": "p_0", "ground_truth": [weather({})]}


def test_load_cases_and_evaluate_a_model(tmp_path):
    other = {**QUESTION, "id": "p_1", "function": WEATHER}
    write(tmp_path, "multiple", [QUESTION, other], [ANSWER, {**ANSWER, "id": "p_1"}])
    cases = load_cases(tmp_path, "multiple")
    seen = []

    def model(messages, tools):
        seen.append((messages[0]["content"], [tool["function"]["name"] for tool in tools]))
        return [call(city="Oslo" if len(seen) == 1 else "Bergen")]

    report = evaluate(cases, model, "multiple")
    assert seen == [("Weather in Oslo?", ["weather_get", "clock"]), ("Weather in Oslo?", ["weather_get"])]
    assert (report.right, report.n, report.accuracy) == (1, 2, 0.5) and "p_1" in report.problems


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ({**QUESTION, "id": 7}, ANSWER),
        (QUESTION, {**ANSWER, "id": "p_9"}),
        ({**QUESTION, "question": []}, ANSWER),
        ({**QUESTION, "question": [[{"role": "user"}]]}, ANSWER),
        ({**QUESTION, "function": [{"name": "a"}]}, ANSWER),
        ({**QUESTION, "function": [{**TIME, "parameters": {"properties": {"zone": {"type": "void"}}}}]}, ANSWER),
        (QUESTION, {"id": "p_0"}),
        (QUESTION, {"id": "p_0", "ground_truth": ["weather"]}),
        (QUESTION, {"id": "p_0", "ground_truth": [{}]}),
        (QUESTION, {"id": "p_0", "ground_truth": [{"strange": {}}]}),
        (QUESTION, {"id": "p_0", "ground_truth": [{"weather.get": {"city": "Oslo"}}]}),
    ],
)
def test_files_of_another_form_are_case_errors(tmp_path, question, answer):
    write(tmp_path, "parallel", [question], [answer])
    with pytest.raises(CaseError):
        load_cases(tmp_path, "parallel")


def test_unknown_category_is_refused(tmp_path):
    with pytest.raises(CaseError, match="no category"):
        load_cases(tmp_path, "../secret")


# --------------------------------------------------------------------------------------------------- hostile answers

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FULL = weather({
    "days": [3, ""], "hours": [[1, 2], ""], "limit": [2.5, ""], "options": [{"unit": ["C"]}, ""],
    "spans": [[{"a": [1]}], ""], "deep": [True, ""], "code": ["x", ""],
})  # fmt: skip


@given(st.lists(st.dictionaries(st.sampled_from([*WEATHER["parameters"]["properties"], "zone"]), JSON), max_size=2))
def test_no_arguments_make_the_check_raise(arguments):
    assert isinstance(check(case(FULL), [call(**found) for found in arguments]), str)


def test_calls_with_errors_are_wrong_and_not_exceptions():
    for text in ("", "[1]", "{", "[" * 100_000, '{"city": NaN}', '{"limit": ' + "9" * 4000 + ', "city": "Oslo"}'):
        message = {"tool_calls": [{"id": "a", "function": {"name": "weather_get", "arguments": text}}]}
        assert check(case(FULL), from_message(message))


@given(JSON)
def test_from_message_takes_anything(value):
    for message in ({"tool_calls": value}, {"tool_calls": [value]}, {"tool_calls": [{"function": value}]}):
        for found in from_message(message):
            assert isinstance(found, ToolCall) and (found.error or found.parsed is not None)


def test_from_message_reads_calls():
    message = {
        "tool_calls": [{"id": "functions.clock:0", "function": {"name": "clock", "arguments": '{"zone": "CET"}'}}]
    }
    assert from_message(message) == [ToolCall("functions.clock:0", "clock", '{"zone": "CET"}')]
    assert from_message({"content": "no calls"}) == []
    assert check(case({"clock": {"zone": ["CET"]}}), from_message(message)) == ""
    assert bfcl.plain_name("a.b.c") == "a_b_c"
