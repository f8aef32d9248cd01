"""Tools: what an agent may call, with a time limit and a limit on what comes back.

A tool is a name, a description, a JSON schema and an async function of the checked arguments. Whatever happens inside
becomes a text for the model; only cancellation passes. A result longer than the limit is kept in the journal, and the
model gets its beginning and a number for `read_output`.

What a tool returns is data of strangers. It goes into a message of the role `tool` and nowhere else: agents call only
tools that they were given, and budgets are no arguments of anything, so a text that asks for either gains nothing.
"""

import inspect
import json
import typing
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio

from kimi_jax.agents.events import Status
from kimi_jax.agents.model import Declaration
from kimi_jax.untrusted import parse_object

MAX_ARGUMENTS = 1 << 20  # bytes of a call's arguments
MAX_ERROR = 1000  # characters of an error that a model is told


class ToolError(ValueError):
    """A tool refuses; the message is for the model."""


@dataclass(frozen=True)
class ToolResult:
    """What a tool gives. sources: identifiers of the documents in it, which an answer may cite."""

    text: str
    sources: tuple[str, ...] = ()
    status: Status = "ok"


@dataclass(frozen=True)
class Tool:
    """parameters: JSON schema of an object. run: gets arguments that have the declared names and types.

    timeout in seconds, max_chars: of the result that the model sees.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    run: Callable[[dict[str, Any]], Awaitable[ToolResult]]
    timeout: float = 60.0
    max_chars: int = 20_000

    @property
    def declaration(self) -> Declaration:
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


@dataclass
class Toolset:
    """The tools of one agent by name. A name can be given once."""

    tools: dict[str, Tool] = field(default_factory=dict)

    @classmethod
    def of(cls, *tools: Tool) -> "Toolset":
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise ValueError(f"two tools have the same name: {sorted(n for n in set(names) if names.count(n) > 1)}")
        return cls({tool.name: tool for tool in tools})

    @property
    def declarations(self) -> list[Declaration]:
        return [tool.declaration for tool in self.tools.values()]

    async def call(self, name: str, arguments: str) -> ToolResult:
        """The result of a call as the model wrote it; never raises but for cancellation."""
        tool = self.tools.get(name)
        if tool is None:
            return ToolResult(
                f"error: there is no tool {name[:100]!r}; there are {', '.join(self.tools)}", (), "refused"
            )
        try:
            checked = check_arguments(arguments, tool.parameters)
        except ToolError as error:
            return ToolResult(f"error: {error}"[:MAX_ERROR], (), "refused")
        try:
            with anyio.move_on_after(tool.timeout):
                return await tool.run(checked)
        except ToolError as error:
            return ToolResult(f"error: {error}"[:MAX_ERROR], (), "error")
        except Exception as error:
            return ToolResult(f"error: {name} failed with {type(error).__name__}: {error}"[:MAX_ERROR], (), "error")
        return ToolResult(f"error: {name} gave no result within {tool.timeout:g} s", (), "timeout")


# ------------------------------------------------------------------------------------------------ arguments and schemas

_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


def check_arguments(text: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that have all required names, no unknown ones, and the declared types (of the top level; what is inside
    lists and objects is the tool's to check). Raises ToolError."""
    data = text.encode("utf-8", "replace")
    if len(data) > MAX_ARGUMENTS:
        raise ToolError(f"the arguments are larger than {MAX_ARGUMENTS} bytes")
    arguments = parse_object(data or b"{}", "the arguments", ToolError)
    properties = parameters.get("properties") or {}
    missing = [name for name in parameters.get("required") or () if name not in arguments]
    if missing:
        raise ToolError(f"the arguments lack {', '.join(missing)}")
    for name, value in arguments.items():
        if name not in properties:
            if parameters.get("additionalProperties"):  # a server says so of its own tool
                continue
            raise ToolError(f"there is no argument {name[:100]!r}; there are {', '.join(properties) or 'none'}")
        kind = properties[name].get("type") if isinstance(properties[name], Mapping) else None
        allowed = _KINDS.get(kind, (object,)) if isinstance(kind, str) else (object,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind in ("integer", "number")):
            raise ToolError(f"the argument {name} must be of type {kind}, not {json.dumps(value)[:60]}")
    return arguments


_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def from_function(function: Callable[..., Any], *, timeout: float = 60.0, max_chars: int = 20_000) -> Tool:
    """A plain function as a tool: name, docstring and type hints (str, int, float, bool, list of those) declare it.

    A function that is not async runs in a thread, which is left behind at a timeout. It returns a text or a Result.
    """
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        properties[name] = _schema(hints.get(name), f"{function.__name__}({name})")
        if parameter.default is inspect.Parameter.empty:
            required.append(name)

    waits = inspect.iscoroutinefunction(function)

    async def run(arguments: dict[str, Any]) -> ToolResult:
        if waits:
            value = await function(**arguments)
        else:
            value = await anyio.to_thread.run_sync(lambda: function(**arguments), abandon_on_cancel=True)
        return value if isinstance(value, ToolResult) else ToolResult(str(value))

    schema = {"type": "object", "properties": properties, "required": required}
    description = inspect.getdoc(function) or ""
    return Tool(function.__name__, description, schema, run, timeout, max_chars)


def _schema(hint: Any, where: str) -> dict[str, Any]:
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    if typing.get_origin(hint) is list and typing.get_args(hint)[0] in _TYPES:
        return {"type": "array", "items": {"type": _TYPES[typing.get_args(hint)[0]]}}
    raise TypeError(f"{where} needs a type hint: str, int, float, bool, or a list of one of them")
