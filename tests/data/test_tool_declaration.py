"""Tool declarations: the golden texts, each rule by hand, and JSON for what TypeScript cannot say."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.data.tool_declaration import declare_tools, sort_keys, typescript
from tests.environment import FIXTURES


def tool(parameters: object, **more: object) -> dict:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **more}}


def body(**properties: object) -> str:
    """What stands between the braces of a function with these optional parameters."""
    text = declare_tools([tool({"type": "object", "properties": properties})])
    assert text.startswith("# Tools\n\n## functions\nnamespace functions {\ntype f = (_: {\n"), text
    return text.split("(_: {\n")[1].removesuffix("\n}) => any;\n}\n")


def test_goldens():
    goldens = json.loads((FIXTURES / "template_golden.json").read_text())["tools_ts"]
    assert len(goldens) == 5
    for name, golden in goldens.items():
        assert declare_tools(golden["tools"]) == golden["ts"], name


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer"}, "  a?: number"),
        ({"type": "null"}, "  a?: null"),
        ({}, "  a?: any"),
        (True, "  a?: any"),
        (False, "  a?: null"),
        ({"type": ["object", "array", "integer"]}, "  a?: {} | Array<any> | number"),
        ({"enum": [1, None, True, "x"]}, '  a?: 1 | None | True | "x"'),
        ({"type": ["null", "string"], "enum": ["x", None]}, '  a?: "x" | None'),
        ({"type": "boolean", "default": False}, "  // Default: False\n  a?: boolean"),
        ({"type": "number", "default": 0.5}, "  // Default: 0.5\n  a?: number"),
        ({"type": "array", "default": ["ü", 1]}, '  // Default: ["ü", 1]\n  a?: Array<any>'),
        (
            {"type": "string", "pattern": "^a,b$", "maxLength": 3, "description": "d\n\ne"},
            "  // d\n\n  // e\n  // maxLength: 3, pattern: ^a,b$\n  a?: string",
        ),
        ({"type": "string", "maximum": 3}, "  a?: string"),
        ({"anyOf": [{"type": "object"}, {"type": "array", "items": True}]}, "  a?: {} | Array<any>"),
        ({"type": "object", "additionalProperties": True}, "  a?: {\n    [k: string]: any\n  }"),
        (
            {"type": "array", "maxItems": 2, "items": {"type": "integer", "minimum": 0}},
            "  // maxItems: 2\n  a?: Array<\n    // minimum: 0\n    number\n  >",
        ),
    ],
)
def test_one_schema(schema, text):
    assert body(a=schema) == text


def test_required_parameters_first_each_group_by_name():
    schema = {"type": "object", "required": ["z", "b"], "properties": {n: {"type": "null"} for n in "zacb"}}
    text = declare_tools([tool(schema)])
    assert [line.strip(" ,") for line in text.splitlines()[5:9]] == ["b: null", "z: null", "a?: null", "c?: null"]


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"type": "object", "properties": {}}])
def test_no_parameters(parameters):
    assert "type f = (_: {}) => any;" in declare_tools([tool(parameters)])


@pytest.mark.parametrize(
    "bad",
    [
        {"$ref": "#/$defs/Missing"},
        {"$ref": "http://example.com/schema"},
        {"description": "no type"},
        {"type": "string", "enum": [1]},
        {"type": ["string", "number"], "enum": ["a"]},
        {"type": ["any"]},
        {"type": "object", "additionalProperties": "yes"},
        "text",
        None,
    ],
)
def test_what_cannot_be_written_is_declared_as_json(bad):
    tools = [tool({"type": "object", "properties": {"ü": bad}})]
    text = declare_tools(tools)
    assert json.loads(text) == tools
    assert text == json.dumps(sort_keys(tools), ensure_ascii=False, separators=(",", ":"))
    assert text.startswith('[{"function":{"name":"f",')


def test_only_tools_of_another_type_are_json_too():
    assert declare_tools([{"type": "builtin", "function": {"name": "x"}}]).startswith("[{")


def test_schema_nested_too_deeply_is_an_error_or_json_never_a_crash():
    schema: dict = {"type": "string"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    assert declare_tools([tool({"type": "object", "properties": {"a": schema}})]).count("Array<") == 100


schemas = st.recursive(
    st.sampled_from([{}, True, {"type": "string"}, {"type": "integer", "default": 1}, {"enum": ["a"]}, {"$ref": "#"}]),
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items}, inner),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda members, others: {"type": "object", "properties": members, "additionalProperties": others},
            st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
            st.one_of(st.booleans(), inner),
        ),
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from("abcd"), schemas, max_size=4), st.randoms())
def test_order_of_keys_does_not_matter(members, random):
    """One text for one meaning: the prompt cache of a server depends on it. Braces pair up, too."""

    def shuffled(value):
        if isinstance(value, dict):
            return {key: shuffled(value[key]) for key in random.sample(sorted(value), len(value))}
        return [shuffled(v) for v in value] if isinstance(value, list) else value

    tools = [tool({"type": "object", "properties": members})]
    text = declare_tools(tools)
    assert declare_tools(shuffled(tools)) == text == typescript(sort_keys(tools))
    assert all(text.count(a) == text.count(b) for a, b in ("{}", "[]", "()"))
