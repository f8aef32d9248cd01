"""The fields that a message of a conversation may have: what has a meaning is accepted, all else refused by name.

A field that is null, false, or an empty text, list or object carries nothing and is accepted anywhere, so the official
client's own dump of an answer (`refusal: null`, `annotations: []`, `function_call: null`) can be sent back as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kimi_jax.config import nearest

IMAGE_TYPES, VIDEO_TYPES = ("image", "image_url"), ("video", "video_url")
_OF_ALL = ("role", "content", "name")
_OF_ROLE = {
    # `parsed` is what clients make of `content` and repeat beside it
    "assistant": ("reasoning_content", "reasoning", "tool_calls", "partial", "parsed"),
    "tool": ("tool_call_id",),
}
_TEXTS = ("name", "reasoning_content", "reasoning", "tool_call_id")
_OF_PART = ("type", "cache_control")  # cache_control: prefixes are cached without being asked


class MessageError(ValueError):
    """A message of another form. where: the field, for example `messages[2].tool_calls[0].id`."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where} {reason}")
        self.where = where


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises MessageError for a message of another form, or with a field that is not known here."""
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise MessageError(where, f"is no message: it needs a role, and is {message!r:.100}")
        role = message["role"]
        if role == "function":
            raise MessageError(f"{where}.role", "function is not known here: results of tool calls have the role tool")
        _only(message, (*_OF_ALL, *_OF_ROLE.get(role, ())), where)
        for key in _TEXTS:
            if not isinstance(message.get(key), str | None):
                raise MessageError(f"{where}.{key}", f"is a text, not {message[key]!r:.100}")
        names = [message[key] for key in ("reasoning_content", "reasoning") if message.get(key)]
        if len(set(names)) > 1:
            raise MessageError(f"{where}.reasoning", "differs from reasoning_content, which means the same")
        _check_calls(message.get("tool_calls"), where)
        _check_partial(message, i == len(messages) - 1, where)
        if isinstance(message.get("content"), Sequence) and not isinstance(message["content"], str):
            for j, part in enumerate(message["content"]):
                _check_part(part, f"{where}.content[{j}]")


def _check_calls(calls: Any, where: str) -> None:
    if calls is not None and (isinstance(calls, str) or not isinstance(calls, Sequence)):
        raise MessageError(f"{where}.tool_calls", f"is a list, not {calls!r:.100}")
    for j, call in enumerate(calls or ()):
        place = f"{where}.tool_calls[{j}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise MessageError(place, "needs a function with a name")
        if not isinstance(call.get("id"), str | None):
            raise MessageError(f"{place}.id", f"is a text, not {call['id']!r:.100}")
        if call.get("type") not in (None, "function"):
            raise MessageError(f"{place}.type", f"is function, not {call['type']!r:.100}")
        _only(call, ("id", "type", "function", "index"), place)
        _only(function, ("name", "arguments", "parsed_arguments"), f"{place}.function")


def _check_partial(message: Mapping[str, Any], is_last: bool, where: str) -> None:
    partial = message.get("partial")
    if not isinstance(partial, bool | None):
        raise MessageError(f"{where}.partial", f"is true or false, not {partial!r:.100}")
    if partial and not is_last:
        raise MessageError(f"{where}.partial", "is for the last message, which the answer continues")
    if partial and message.get("tool_calls"):
        raise MessageError(f"{where}.partial", "cannot continue a message with tool calls")


def _check_part(part: Any, where: str) -> None:
    """Only the fields: what a part holds is the template's matter."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in IMAGE_TYPES + VIDEO_TYPES:
        base = kind.removesuffix("_url")
        _only(part, (*_OF_PART, kind if part.get(kind) is not None else base), where)
        if isinstance(part.get(kind), Mapping):
            _only(part[kind], ("url", "detail"), f"{where}.{kind}")  # detail: images are always seen whole
    elif isinstance(part, Mapping) and kind in (None, "text"):
        _only(part, (*_OF_PART, "text"), where)
    elif isinstance(part, Mapping) and part.get("text"):
        raise MessageError(f"{where}.type", f"{kind!r:.60} is neither a text nor an image")


def _only(fields: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for name, value in fields.items():
        empty = value is None or value is False or (isinstance(value, str | Sequence | Mapping) and not value)
        if name not in known and not empty:
            raise MessageError(f"{where}.{name}", f"is not known here{nearest(str(name), known)}")
