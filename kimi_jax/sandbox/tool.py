"""The `ipython` tool as a model sees it: its declaration, what runs a call, and what comes back as message parts.

  tools = [IPYTHON]
  session.put(conversation_images(messages))
  message = {"role": "tool", "tool_call_id": call.id, "content": run_tool(session, call.arguments)}

Source: arXiv 2602.02276, where zero-vision SFT turns image operations into programs for this tool. The wording of the
declaration is this project's; the released weights were trained with another one, which is not public.

h, w  height and width of an image in pixels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kimi_jax.data import BadRecord
from kimi_jax.data.image import decode, open_image
from kimi_jax.data.media_part import read_data_uri
from kimi_jax.data.message_fields import IMAGE_TYPES
from kimi_jax.sandbox.limits import SandboxLimits
from kimi_jax.sandbox.session import CellResult, Session
from kimi_jax.untrusted import parse_object

IPYTHON: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "ipython",
        "description": (
            "Run Python code. Names are kept from call to call. The images of the conversation are uint8 arrays of "
            "shape [height, width, 3], named image_1, image_2, ... in their order. What the code prints and the value "
            "of its last expression come back; display(x) shows an array, a PIL image or a matplotlib figure as a "
            "image. There is no network, and no other program can be started."
        ),
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The Python code of one cell."}},
            "required": ["code"],
            "additionalProperties": False,
        },
    },
}
ESCAPED = 6  # bytes of JSON for one character, at most (\u1234); those beyond 16 bits take two


class BadArguments(ValueError):
    """The arguments of a call are not what the declaration asks for."""


def read_code(arguments: str | Mapping[str, Any], limits: SandboxLimits) -> str:
    """The code of a call. arguments: JSON as the model wrote it, or what was parsed of it. Raises BadArguments."""
    if isinstance(arguments, str):
        if len(arguments) > 2 * ESCAPED * limits.code_chars + 1000:
            raise BadArguments(f"the arguments are too long; at most {limits.code_chars} characters of code are run")
        arguments = parse_object(arguments.encode("utf-8", "replace"), "the call", BadArguments)
    code = arguments.get("code")
    if not isinstance(code, str) or len(arguments) != 1:
        raise BadArguments('the arguments are one text under "code": {"code": "print(1)"}')
    return code


def run_tool(session: Session, arguments: str | Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs one call and returns the content of the tool's message. Nothing that the model wrote raises.

    Raises SandboxError if a process that had to be replaced cannot be.
    """
    try:
        code = read_code(arguments, session.limits)
    except BadArguments as error:
        return [{"type": "text", "text": f"Error: {error}"}]
    return message_parts(session.run(code))


def message_parts(result: CellResult) -> list[dict[str, Any]]:
    """Texts and images of a result as parts of a message (`data.conversation`); images are uint8 [h, w, 3]."""
    parts: list[dict[str, Any]] = []
    for part in result.parts:
        is_text = isinstance(part, str)
        parts.append({"type": "text", "text": part} if is_text else {"type": "image", "image": part})
    return parts or [{"type": "text", "text": "(no output)"}]


def conversation_images(messages: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The images of a conversation by the names that the tool gives them: image_1, ... to uint8 [h, w, 3].

    They stand in their parts as for `data.processor.prepare`: PIL images, arrays, bytes of a file, data URIs. Videos
    are left out. Raises BadRecord for what cannot be decoded here, and for any other URL.
    """
    found: dict[str, np.ndarray] = {}
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, Mapping) and part.get("type") in IMAGE_TYPES:
                name = f"image_{len(found) + 1}"
                found[name] = np.asarray(decode(_open(part, name), name))
    return found


def _open(part: Mapping[str, Any], name: str) -> Any:
    kind = part["type"]
    value = part.get(kind, part.get(kind.removesuffix("_url")))
    value = value.get("url") if isinstance(value, Mapping) else value
    if isinstance(value, str):
        if value[:5].lower() != "data:":
            raise BadRecord("refused", name, "only data URIs are opened here, neither files nor remote URLs")
        value = read_data_uri(value, name)
    return open_image(value, name) if isinstance(value, bytes) else value
