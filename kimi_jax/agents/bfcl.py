"""Are tool calls right? The check by syntax tree of the Berkeley Function Calling Leaderboard, over its public cases.

Source: BFCL (Patil et al., ICML 2025; gorilla.cs.berkeley.edu), categories simple_python, multiple, parallel,
parallel_multiple and the same with live_: Python types only. The cases come with the package `bfcl-eval` (Apache-2.0,
folder bfcl_eval/data; unpack it, it need not be installed):

  BFCL_v4_CATEGORY.json                  a line a case: {"id", "question": [[messages]], "function": [declarations]}
  possible_answer/BFCL_v4_CATEGORY.json  {"id", "ground_truth": [{name: {parameter: [values that are right]}}]}

    python -m kimi_jax.agents.bfcl --cases=DIR --url=http://127.0.0.1:8000/v1 --model=NAME

A call is right if it names the function, has every required parameter and none that is unknown, and each value has the
type and one of the values that are right; "" among them means that the parameter may be left out. Text is compared
without case, spaces and some punctuation. Calls of a parallel case may come in any order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_jax.data.reply import ToolCall
from kimi_jax.untrusted import parse_object, read_bytes

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple",
              "live_parallel", "live_parallel_multiple")  # fmt: skip
MAX_FILE = 1 << 26  # bytes; the largest has 1.5 million
TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}  # the benchmark's names of JSON Schema's types
Model = Callable[[list[dict[str, Any]], list[dict[str, Any]]], Sequence[ToolCall]]  # (messages, tools) -> calls


class CaseError(ValueError):
    """A file of cases that is not what this module reads."""


@dataclass(frozen=True)
class Case:
    """One question. declarations: as the benchmark writes them; expected: one {name: {parameter: values}} a call."""

    id: str
    messages: tuple[dict[str, Any], ...]
    declarations: tuple[dict[str, Any], ...]
    expected: tuple[dict[str, dict[str, list[Any]]], ...]

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The declarations in OpenAI's form, names without dots, which endpoints refuse."""
        return [
            {
                "type": "function",
                "function": {
                    "name": plain_name(declaration["name"]),
                    "description": str(declaration.get("description", "")),
                    "parameters": _schema(declaration["parameters"]),
                },
            }
            for declaration in self.declarations
        ]


def plain_name(name: str) -> str:
    """A function's name as an endpoint takes it: math.sum is math_sum."""
    return name.replace(".", "_")


def _schema(value: Any) -> Any:
    """A declaration's parameters with the type names of JSON Schema; "any" has no type."""
    if isinstance(value, list):
        return [_schema(member) for member in value]
    if not isinstance(value, dict):
        return value
    known = value.get("type") if isinstance(value.get("type"), str) else None
    plain = {k: _schema(v) for k, v in value.items() if k != "type" or known is None or known != "any"}
    return {**plain, "type": JSON_TYPES.get(known, known)} if known and known != "any" else plain


# -------------------------------------------------------------------------------------------------------------- cases


def load_cases(folder: str | Path, category: str) -> list[Case]:
    """The cases of one category. Raises CaseError for a file of another form, OSError for a missing one."""
    if category not in CATEGORIES:
        raise CaseError(f"no category {category!r}; there are: {', '.join(CATEGORIES)}")
    name = f"BFCL_v4_{category}.json"
    answers = {line["id"]: line for line in _lines(Path(folder) / "possible_answer" / name)}
    cases = []
    for line in _lines(Path(folder) / name):
        if line["id"] not in answers:
            raise CaseError(f"{name}: {line['id']} has no answer")
        cases.append(_case(line, answers[line["id"]]))
    return cases


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = [
        parse_object(line, f"{path}:{i}", CaseError)
        for i, line in enumerate(read_bytes(path, MAX_FILE, CaseError).splitlines(), 1)
        if line.strip()
    ]
    for i, line in enumerate(lines, 1):
        if not isinstance(line.get("id"), str):
            raise CaseError(f"{path}:{i} has no id")
    return lines


def _case(line: dict[str, Any], answer: dict[str, Any]) -> Case:
    try:
        messages = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in line["question"][0])
        declarations = line["function"] if isinstance(line["function"], list) else [line["function"]]
        for declaration in declarations:
            for parameter in declaration["parameters"]["properties"].values():
                _types(parameter)
            list(declaration["parameters"].get("required", []))
        names = [declaration["name"] for declaration in declarations]
        expected = tuple(answer["ground_truth"])
        for call in expected:
            ((name, parameters),) = call.items()
            if name not in names or not all(isinstance(values, list) for values in parameters.values()):
                raise CaseError(f"case {line['id']}: no function {name!r}, or its values are not lists")
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise CaseError(f"case {line['id']} is not of the form that is read: {error!r:.200}") from error
    return Case(line["id"], messages, tuple(declarations), expected)


def _types(parameter: dict[str, Any]) -> tuple[type, type | None]:
    """Type of a parameter, and of its members if it is an array or a tuple."""
    inner = parameter["items"]["type"] if parameter["type"] in ("array", "tuple") else None
    return TYPES[parameter["type"]], TYPES[inner] if inner else None


# ------------------------------------------------------------------------------------------------------------ scoring


def check(case: Case, calls: Sequence[ToolCall]) -> str:
    """What is wrong with the calls, "" if nothing. Never raises, whatever the model wrote."""
    if len(calls) != len(case.expected):
        return f"{len(calls)} calls instead of {len(case.expected)}"
    for call in calls:
        if call.parsed is None:
            return f"{call.name}: {call.error}"
    left = list(calls)
    for expected in case.expected:
        problems = [_check_call(case, call, expected) for call in left]
        if "" not in problems:
            return "; ".join(problems)[:1000] or "no call is left"
        left.pop(problems.index(""))
    return ""


def _check_call(case: Case, call: ToolCall, expected: dict[str, dict[str, list[Any]]]) -> str:
    ((name, right),) = expected.items()
    if plain_name(call.name) != plain_name(name):
        return f"{call.name} is called, not {name}"
    declaration = next(d for d in case.declarations if d["name"] == name)
    properties = declaration["parameters"]["properties"]
    given = call.parsed or {}
    for parameter in declaration["parameters"].get("required", []):
        if parameter not in given:
            return f"{name}: {parameter} is missing"
    for parameter, value in given.items():
        if parameter not in properties or parameter not in right:
            return f"{name} has no {parameter}"
        problem = _check_value(value, *_types(properties[parameter]), right[parameter])
        if problem:
            return f"{name}: {parameter} {problem}"
    for parameter, values in right.items():
        if parameter not in given and "" not in values:
            return f"{name}: {parameter} is missing"
    return ""


def _check_value(value: Any, kind: type, inner: type | None, right: list[Any]) -> str:
    """What is wrong with one value. kind, inner: of the declaration. right: the values that are right."""
    if kind is float and type(value) is int:
        value = _to_float(value)
    typed, variable = _check_type(value, kind, inner, right)
    if not typed:
        return f"is a {type(value).__name__}, not a {kind.__name__}" + (f" of {inner.__name__}" if inner else "")
    if variable:  # right as text that names a variable, whatever its declared type
        matches = value in right
    elif kind is dict:
        matches = any(_dict_matches(value, option) for option in right if isinstance(option, dict))
    elif kind is list and inner is dict:
        matches = any(
            len(value) == len(option) and all(map(_dict_matches, value, option))
            for option in right
            if isinstance(option, (list, str))
        )
    elif kind is str:
        matches = _plain(value) in [_plain(option) for option in right if isinstance(option, str)]
    elif kind is list:
        matches = list(map(_plain, value)) in [list(map(_plain, o)) for o in right if isinstance(o, (list, str))]
    else:
        matches = value in right
    return "" if matches else f"has a value that is not right: {value!r:.100}"


def _to_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _check_type(value: Any, kind: type, inner: type | None, right: list[Any]) -> tuple[bool, bool]:
    """(whether the type is right, whether the value is a variable: its type is that of the answers, not declared)."""
    answered = next((type(option) for option in right if option != ""), None)
    variable = answered is not None and answered is not kind
    members: Any = value
    if type(value) is kind:
        if inner is None:
            return True, variable
        for option in right:
            if not isinstance(option, list) or all(_check_type(v, inner, None, option)[0] for v in members):
                return True, variable
        return False, False
    return answered is not None and type(value) is answered, True


def _dict_matches(value: Any, option: Any) -> bool:
    """option: key -> the values that are right for it."""
    if not isinstance(value, dict) or not isinstance(option, dict):
        return False
    for key, found in value.items():
        if key not in option or _plain(found) not in [_plain(right) for right in option[key]]:
            return False
    return all(key in value or "" in right for key, right in option.items())


def _plain(value: Any) -> Any:
    """Text without case, spaces and the punctuation in which dates and names differ; anything else as it is."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value


# --------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Report:
    """right of n cases of one category; problems: id -> what was wrong."""

    category: str
    right: int
    n: int
    problems: dict[str, str]

    @property
    def accuracy(self) -> float:
        """Share of right cases."""
        return self.right / self.n if self.n else 0.0


def evaluate(cases: Sequence[Case], model: Model, category: str = "") -> Report:
    """Asks the model every case. model: (messages, tools) -> its tool calls, as `kimi_jax.data.reply` parses them."""
    problems = {}
    for case in cases:
        problem = check(case, model([dict(m) for m in case.messages], case.tools))
        if problem:
            problems[case.id] = problem
    return Report(category, len(cases) - len(problems), len(cases), problems)


def from_message(message: dict[str, Any]) -> list[ToolCall]:
    """The calls of an assistant message in OpenAI's form; what is wrong with one is in its `error`."""
    given = message.get("tool_calls")
    return [_from_message(call) for call in given] if isinstance(given, list) else []


def _from_message(call: Any) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get(key) if isinstance(function, dict) else None for key in ("name", "arguments"))
    if not isinstance(name, str) or not isinstance(arguments, str):
        return ToolCall("", "", "", "a tool call without a name or arguments")
    error = ""
    try:
        parse_object(arguments.encode("utf-8", "replace") if arguments.strip() else b"{}", "the arguments", ValueError)
    except ValueError as problem:
        error = str(problem)[:300]
    return ToolCall(str(call.get("id", "")), name, arguments, error)


def ask_endpoint(url: str, name: str, max_tokens: int = 2048, timeout: float = 600.0) -> Model:
    """A model behind an OpenAI-compatible endpoint, for `evaluate`; needs the client of the extra `agents`."""
    import openai  # costs a second

    client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=timeout)

    def ask(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[ToolCall]:
        create: Any = client.chat.completions.create
        reply = create(model=name, messages=messages, tools=tools, max_tokens=max_tokens, temperature=0.0)
        return from_message(reply.choices[0].message.model_dump()) if reply.choices else []

    return ask


def main(argv: list[str]) -> None:
    """Prints the accuracy of every category that the folder holds."""
    right = n = 0
    for category in CATEGORIES:
        if not (Path(_CASES.value) / f"BFCL_v4_{category}.json").exists():
            continue
        cases = load_cases(_CASES.value, category)[: _LIMIT.value or None]
        report = evaluate(cases, ask_endpoint(_URL.value, _MODEL.value), category)
        right, n = right + report.right, n + report.n
        print(f"{category:24} {report.accuracy:.3f}  {report.right} of {report.n}", flush=True)
        for case, problem in list(report.problems.items())[:3]:
            print(f"    {case}: {problem[:200]}")
    if not n:
        raise SystemExit(f"error: no file BFCL_v4_CATEGORY.json in {_CASES.value}")
    print(f"{'all':24} {right / n:.3f}  {right} of {n}")


if __name__ == "__main__":
    from absl import app, flags

    _CASES = flags.DEFINE_string("cases", None, "Folder with the cases, bfcl_eval/data of the package.", required=True)
    _URL = flags.DEFINE_string(
        "url", None, "Endpoint with its version, such as http://127.0.0.1:8000/v1.", required=True
    )
    _MODEL = flags.DEFINE_string("model", "kimi", "Name of the model there.")
    _LIMIT = flags.DEFINE_integer("limit", 0, "At most so many cases of a category; 0: all.", lower_bound=0)
    app.run(main)
