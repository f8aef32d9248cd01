"""A row of a chat data set, in any of the usual layouts, to the messages that the conversation encoder takes.

messages                OpenAI form: [{"role", "content", "reasoning_content", "tool_calls", "tool_call_id"}, ...]
conversations           ShareGPT: [{"from": "human" | "gpt" | "system" | "tool" | ..., "value": "..."}, ...];
                        `function_call` holds the JSON of one call or a list of them, `observation` a result. Either key
                        takes either form.
system                  a system message that stands before the others
tools                   OpenAI form or bare functions, as a list or as the JSON of one
images, videos          (also image, video) media for the parts of messages that name none of their own, in order: parts
                        {"type": "image"}, and `<image>` and `<video>` in texts. One line end behind such a placeholder
                        goes, because the template writes it. All of them must be used.
thinking                whether the model reasons before it answers
preserve_thinking       whether earlier answers keep their reasoning
id                      names the row

Other keys are ignored, unless one is nearly one of these. Content of the assistant that begins with <think>...</think>,
as many data sets write it, is reasoning and content.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kimi_jax.data import BadRecord
from kimi_jax.data.media_part import media_value
from kimi_jax.data.message_fields import IMAGE_TYPES, VIDEO_TYPES
from kimi_jax.data.sources.record import MEDIA_KINDS, Media

MESSAGE_KEYS = ("messages", "conversations", "conversation")
KEYS = (*MESSAGE_KEYS, "system", "tools", "images", "image", "videos", "video", "thinking", "preserve_thinking", "id")
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "observation": "tool", "function_call": "assistant",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}  # fmt: skip
_PLACEHOLDER = re.compile("<(image|video)>\n?")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


class Conversation(NamedTuple):
    """What a row holds; media stand in their parts as `Media`. None: the row does not say."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    thinking: bool | None
    preserve_thinking: bool | None


def read_row(row: Mapping[str, Any], key: str, open_media: Callable[[str, Any], Media]) -> Conversation:
    """The conversation of a row. open_media: the medium of a value ("image" or "video", value).

    Raises BadRecord: bad_messages (another form), placeholder_mismatch (media without a place or places without media),
    and what `open_media` raises.
    """
    _check_keys(row, key)
    found = next((row[name] for name in MESSAGE_KEYS if row.get(name) is not None), None)
    if not isinstance(found, list) or not found:
        raise BadRecord("bad_messages", key, f"none of {', '.join(MESSAGE_KEYS)} holds a list of messages")
    media = _Queues(row, key, open_media)
    messages = [_message(message, f"messages[{i}]", key, media) for i, message in enumerate(found)]
    media.check_all_used()
    system = row.get("system")
    if system:
        if not isinstance(system, str) or messages[0]["role"] == "system":
            raise BadRecord("bad_messages", key, "system holds a text, and no message besides is the system's")
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(
        messages, _tools(row.get("tools"), key), _flag(row, "thinking", key), _flag(row, "preserve_thinking", key)
    )


def _check_keys(row: Mapping[str, Any], key: str) -> None:
    for name in row.keys() - set(KEYS):
        close = difflib.get_close_matches(str(name)[:60], KEYS, 1, 0.85)
        if close:
            raise BadRecord("bad_messages", key, f"the key {str(name)[:60]!r} is nearly {close[0]!r}: a mistake?")


def _flag(row: Mapping[str, Any], name: str, key: str) -> bool | None:
    value = row.get(name)
    if not isinstance(value, bool | None):
        raise BadRecord("bad_messages", key, f"{name} is true or false, not {value!r:.60}")
    return value


class _Queues:
    """The media of a row that stand beside its messages, handed out in order or by number."""

    def __init__(self, row: Mapping[str, Any], key: str, open_media: Callable[[str, Any], Media]):
        self._key, self._open = key, open_media
        self._values: dict[str, list[Any]] = {}
        for kind in MEDIA_KINDS:
            value = row.get(kind + "s") if row.get(kind + "s") is not None else row.get(kind)
            self._values[kind] = value if isinstance(value, list) else [] if value is None else [value]
        self._used: dict[str, set[int]] = {kind: set() for kind in MEDIA_KINDS}

    def any(self) -> bool:
        """Whether the row has such media."""
        return any(self._values.values())

    def take(self, kind: str, number: Any = None) -> Media:
        """The next one of its kind, or the one with this number. Raises BadRecord(placeholder_mismatch)."""
        number = len(self._used[kind]) if number is None else number
        if not isinstance(number, int) or not 0 <= number < len(self._values[kind]):
            raise BadRecord(
                "placeholder_mismatch",
                self._key,
                f"no {kind} number {number!r:.20}: {len(self._values[kind])} are there",
            )
        self._used[kind].add(number)
        return self._open(kind, self._values[kind][number])

    def open(self, kind: str, value: Any) -> Media:
        """The medium that a part names itself."""
        return self._open(kind, value)

    def check_all_used(self) -> None:
        """Raises BadRecord(placeholder_mismatch) for media that no message shows."""
        for kind in MEDIA_KINDS:
            if len(self._used[kind]) != len(self._values[kind]):
                detail = f"{len(self._values[kind])} {kind}s, and messages show {len(self._used[kind])} of them"
                raise BadRecord("placeholder_mismatch", self._key, detail)


def _message(message: Any, where: str, key: str, media: _Queues) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRecord("bad_messages", key, f"{where} is no object: {message!r:.60}")
    found = dict(message)
    if "from" in found or "value" in found:
        found = {"role": found.pop("from", None), "content": found.pop("value", None), **found}
    role = found.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord("bad_messages", key, f"{where}: the role is one of {', '.join(ROLES)}, not {role!r:.40}")
    found["role"] = ROLES[role]
    if role == "function_call":
        found |= {"content": "", "tool_calls": _calls(found.get("content"), where, key)}
    content = found.get("content")
    if isinstance(content, str) and media.any() and _PLACEHOLDER.search(content):
        pieces = _PLACEHOLDER.split(content)  # text, kind, text, kind, ..., text
        found["content"] = [
            {"type": piece, piece: media.take(piece)} if i % 2 else {"type": "text", "text": piece}
            for i, piece in enumerate(pieces)
            if i % 2 or piece
        ]
    elif isinstance(content, list):
        found["content"] = [_part(part, media) for part in content]
    elif isinstance(content, str) and found["role"] == "assistant" and not _has_reasoning(found):
        thought = _THOUGHT.match(content)
        if thought:
            found |= {"reasoning_content": thought[1].strip(), "content": content[thought.end() :]}
    return found


def _has_reasoning(message: Mapping[str, Any]) -> bool:
    return bool(message.get("reasoning_content") or message.get("reasoning"))


def _part(part: Any, media: _Queues) -> Any:
    """A part whose medium is opened; what is no media part is left to the encoder to judge."""
    if not isinstance(part, Mapping) or part.get("type") not in IMAGE_TYPES + VIDEO_TYPES:
        return {k: v for k, v in part.items() if k != "index" or v is not None} if isinstance(part, Mapping) else part
    kind = "video" if part["type"] in VIDEO_TYPES else "image"
    value = part.get(part["type"]) if isinstance(part.get(part["type"]), Mapping) else None
    value = value if value is not None and value.keys() & {"bytes", "path"} else media_value(part)
    medium = media.take(kind, part.get("index")) if value is None else media.open(kind, value)
    rest = {k: v for k, v in part.items() if k not in ("type", "index", kind, kind + "_url")}
    return {"type": kind, kind: medium, **rest}


def _calls(text: Any, where: str, key: str) -> list[dict[str, Any]]:
    """The tool calls of a `function_call` of ShareGPT."""
    calls = _json(text, f"{where}.value", key)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) for call in calls):
        raise BadRecord(
            "bad_messages", key, f"{where}.value holds an object with name and arguments, or a list of them"
        )
    return [{"type": "function", "function": call} for call in calls]


def _tools(tools: Any, key: str) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "tools", key)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord("bad_messages", key, f"tools holds a list of objects, not {tools!r:.60}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _json(text: Any, where: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRecord("bad_messages", key, f"{where} is not JSON: {str(error)[:100]}") from error


def without_nulls(value: Any) -> Any:
    """A value of a nested parquet column without the fields that are null: there, absent fields are."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [without_nulls(item) for item in value]
    return value
