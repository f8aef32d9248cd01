"""Tools as the released model reads them: TypeScript declarations from JSON schemas.

Source: docs/released_model.md section 6.

A schema becomes a `_Type`: its comment (description and constraints) and how it is written at a given indent. All of a
function's schemas are read before any is written, because a `"$ref": "#"` anywhere changes how its parameters are
written. What the released converter refuses (an unknown reference, a value outside its declared type, ...) is refused
here too: such tools are declared as JSON, all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INDENT = "  "
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_IN_A_LIST = {
    "string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null",
    "object": "{}", "array": "Array<any>",
}  # fmt: skip
_PYTHON: dict[Any, tuple[type, ...]] = {
    "string": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,)
}  # fmt: skip


def declare_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The text of the `tool_declare` message: TypeScript, or compact JSON where TypeScript cannot say it.

    tools: OpenAI form, {"type": "function", "function": {"name", "description", "parameters": a JSON schema}}.
    """
    ordered = sort_keys(tools)
    try:
        text = typescript(ordered)
    except Exception:  # as released: whatever a schema is that the converter cannot read, the model gets it as JSON
        text = ""
    return text or json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))


def sort_keys(value: Any) -> Any:
    """A JSON value with the keys of every object in order; lists keep theirs."""
    if isinstance(value, Mapping):
        return {key: sort_keys(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [sort_keys(item) for item in value]
    return value


def typescript(tools: Sequence[Mapping[str, Any]]) -> str:
    """Declarations of all tools of type "function", keys already sorted; "" if there is none.

    Raises ValueError, or what a malformed schema runs into, if one cannot be written.
    """
    functions = [_function(t["function"]) for t in tools if t.get("type") == "function" and t.get("function")]
    if not functions:
        return ""
    return "# Tools\n\n## functions\nnamespace functions {\n" + "\n".join(functions) + "\n}\n"


@dataclass
class _Scope:
    """What the schemas of one function share: its named definitions, and whether it refers to itself."""

    definitions: dict[str, Any] = field(default_factory=dict)
    refers_to_itself: bool = False


@dataclass(frozen=True)
class _Type:
    """A schema that has been read. `write(indent)`: its TypeScript, whose later lines begin with `indent`."""

    write: Callable[[str], str]
    description: str = ""
    constraints: str = ""

    def comment(self, indent: str) -> str:
        """The lines that stand above it, each with its newline."""
        text = _comment(self.description, indent) + "\n" if self.description else ""
        return text + (f"{indent}// {self.constraints}\n" if self.constraints else "")


@dataclass(frozen=True)
class _Property:
    name: str
    type: _Type
    optional: bool
    default: Any

    def write(self, indent: str) -> str:
        text = self.type.comment(indent)
        if self.default is not None:
            number = isinstance(self.default, (int, float))  # Python's True, not JSON's true: as released
            shown = repr(self.default) if number else json.dumps(self.default, ensure_ascii=False)
            text += f"{indent}// Default: {shown}\n"
        return f"{text}{indent}{self.name}{'?' if self.optional else ''}: {self.type.write(indent)}"


def _comment(text: str, indent: str = "") -> str:
    return "\n".join(f"{indent}// {line}" if line else "" for line in text.split("\n"))


def _function(function: Mapping[str, Any]) -> str:
    scope = _Scope()
    properties, root = _object(function.get("parameters") or {}, scope)
    lines = []
    argument = root.write
    if scope.refers_to_itself:
        # written in the order of the schema, not required ones first, and without additionalProperties: as released
        body = ",\n".join(p.write(INDENT) for p in properties)
        lines.append("interface parameters {" + (f"\n{body}\n" if body else "") + "}")
        argument = _always("parameters")
    for name, schema in list(scope.definitions.items()):
        written = _read(schema, scope).write("")
        description = schema.get("description", "")
        lines += [_comment(description)] if description else []
        lines.append(f"interface {name} {written}")
    if function.get("description"):
        lines.append(_comment(function["description"]))
    lines.append(f"type {function.get('name', 'function')} = (_: {argument('')}) => any;")
    return "\n".join(lines)


def _always(text: str) -> Callable[[str], str]:
    return lambda indent: text


def _read(schema: Any, scope: _Scope) -> _Type:
    """Any schema. Raises ValueError for one without a type."""
    if isinstance(schema, bool):
        return _Type(_always("any" if schema else "null"))
    kind = schema.get("type")
    if "$ref" in schema:
        write = _reference(schema["$ref"], scope)
    elif "anyOf" in schema:
        write = _union([_read(option, scope) for option in schema["anyOf"]])
    elif "enum" in schema:
        write = _enum(schema)
    elif isinstance(kind, (list, tuple)):
        write = _always(" | ".join(_IN_A_LIST[k] for k in kind))
    elif kind == "object":
        write = _object(schema, scope)[1].write
    elif "type" in schema:
        write = _array(schema, scope) if kind == "array" else _always("number" if kind == "integer" else kind)
        bounds = sorted((key, schema[key]) for key in _CONSTRAINTS.get(kind, ()) if key in schema)
        return _Type(write, schema.get("description", ""), ", ".join(f"{key}: {value}" for key, value in bounds))
    elif schema == {}:
        write = _always("any")
    else:
        raise ValueError(f"a schema without a type: {schema}")
    return _Type(write, schema.get("description", ""))


def _reference(target: str, scope: _Scope) -> Callable[[str], str]:
    if target == "#":
        scope.refers_to_itself = True
        return _always("parameters")
    name = target.split("/")[-1]
    if not target.startswith("#/$defs/") or not isinstance(scope.definitions.get(name), Mapping):
        raise ValueError(f"a reference to {target}, which is not defined")
    return _always(name)


def _union(options: list[_Type]) -> Callable[[str], str]:
    return lambda indent: " | ".join(option.write(indent) for option in options)


def _enum(schema: Mapping[str, Any]) -> Callable[[str], str]:
    values, kind = schema["enum"], schema.get("type")
    if isinstance(kind, (list, tuple)):
        if len(kind) > 2 or (len(kind) == 2 and "null" not in kind):
            raise ValueError(f"an enum of types {kind}")
        kind = kind[1] if len(kind) == 2 and kind[0] == "null" else kind[0]
    allowed = _PYTHON.get(kind)
    if allowed is not None and any(value is not None and not isinstance(value, allowed) for value in values):
        raise ValueError(f"an enum of type {kind} with the values {values}")
    return _always(" | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values))


def _array(schema: Mapping[str, Any], scope: _Scope) -> Callable[[str], str]:
    item = _read(schema["items"], scope) if schema.get("items") else _Type(_always("any"))

    def write(indent: str) -> str:
        inner = indent + INDENT
        comment = item.comment(inner)
        if not comment:
            return f"Array<{item.write(indent)}>"
        return f"Array<\n{comment}{inner}{item.write(inner)}\n{indent}>"

    return write


def _object(schema: Mapping[str, Any], scope: _Scope) -> tuple[list[_Property], _Type]:
    """The properties in the order of the schema, and the whole."""
    scope.definitions.update(schema.get("$defs") or {})
    others = schema.get("additionalProperties")
    if isinstance(others, Mapping):
        others = _read(others, scope)
    members = schema.get("properties", {})
    optional = set(members) - set(schema.get("required", []))
    properties = [
        _Property(name, _read(one, scope), name in optional, one.get("default") if isinstance(one, Mapping) else None)
        for name, one in members.items()
    ]

    def write(indent: str) -> str:
        inner = indent + INDENT
        lines = [p.write(inner) for p in sorted(properties, key=lambda p: (p.optional, p.name))]
        if others is not None:
            lines.append(f"{inner}[k: string]: {_others(others, inner)}")
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}" if lines else "{}"

    return properties, _Type(write, schema.get("description", ""))


def _others(others: Any, indent: str) -> str:
    if isinstance(others, bool):
        return "any" if others else "never"
    if isinstance(others, _Type):
        return others.write(indent)
    raise ValueError(f"additionalProperties is {others!r}")
