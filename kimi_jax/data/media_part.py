"""The media part of a message: what stands in it, and opening what it says.

  {"type": "image", "image": VALUE}     the type is image, image_url, video or video_url, the value under its name
  {"type": "image_url", "image_url": {"url": ADDRESS, "detail": ...}}

VALUE is a PIL image, an array, frames, the bytes of a file, or a URL. Data URIs are read here; any other URL
goes to a function that the caller gives, and is refused without one.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import PIL.Image

from kimi_jax.data import BadRecord
from kimi_jax.data.image import Image, open_image
from kimi_jax.data.message_fields import IMAGE_TYPES, VIDEO_TYPES
from kimi_jax.data.video import Video, as_video, read_video

MAX_HEAD = 1024  # characters of a data URI between its scheme and its comma
MAX_PERCENT_ENCODED = 1 << 20  # characters of a data URI that is not base64
_DATA_URI = re.compile(rf"data:(?P<type>[^,]{{0,{MAX_HEAD}}}),", re.IGNORECASE)
_WHITESPACE = b" \t\r\n\f\v"


def media_value(part: Mapping[str, Any]) -> Any:
    """What a media part holds: a URL in its bare form, anything else as it stands; None for nothing."""
    kind = part["type"]
    value = part.get(kind, part.get(kind.removesuffix("_url")))
    return value.get("url") if isinstance(value, Mapping) else value


def media_urls(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whatever stands as a string where a media part has its URL, in order; other parts are passed over."""
    found = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, Sequence) else ():
            if isinstance(part, Mapping) and part.get("type") in IMAGE_TYPES + VIDEO_TYPES:
                found.append(media_value(part))
    return [value for value in found if isinstance(value, str)]


def read_part(part: Mapping[str, Any], open_url: Callable[[str], bytes] | None = None) -> tuple[Any, str]:
    """(what a media part holds, URLs replaced by the bytes behind them; how messages call it).

    Raises ValueError for a part that holds nothing, and BadRecord: refused (a URL without `open_url`),
    broken_image (a malformed data URI), and what `open_url` raises.
    """
    kind, value = part["type"], media_value(part)
    if value is None:
        raise ValueError(f"a part of type {kind} has nothing under {kind!r}")
    if not isinstance(value, str):
        return value, kind
    shown = value if len(value) < 60 else value[:57] + "..."
    if value[:5].lower() == "data:":
        return read_data_uri(value, shown), shown
    if open_url is None:
        raise BadRecord("refused", shown, "only data URIs are opened here, neither files nor remote URLs")
    return open_url(value), shown


def open_part(part: Mapping[str, Any]) -> Image | Video:
    """The image or video of a media part, as a part of an `Example`; an image's pixels may still be encoded.

    Raises what `read_part` raises, and BadRecord for what is no image or video.
    """
    value, shown = read_part(part)
    if part["type"] in VIDEO_TYPES:
        return read_video(value, shown) if isinstance(value, bytes) else as_video(value)
    if isinstance(value, bytes):
        value = open_image(value, shown)
    if not isinstance(value, (PIL.Image.Image, np.ndarray)):
        raise BadRecord("broken_image", shown, f"an image is a PIL image, an array or a file, not {type(value)}")
    return Image(value)


def read_data_uri(uri: str, key: str = "data URI") -> bytes:
    """The bytes in a data URI, in time and memory linear in its length.

    Raises BadRecord(broken_image) for a malformed one: no comma within MAX_HEAD characters, what is not base64, or
    more than MAX_PERCENT_ENCODED characters in another encoding.
    """
    head = _DATA_URI.match(uri)
    if head is None:
        raise BadRecord("broken_image", key, "not a data URI: data:TYPE;base64,...")
    start = head.end()
    if head["type"].rpartition(";")[2].strip().lower() != "base64":
        if len(uri) - start > MAX_PERCENT_ENCODED:
            raise BadRecord("broken_image", key, f"more than {MAX_PERCENT_ENCODED} characters that are not base64")
        return unquote_to_bytes(uri[start:].encode("utf-8", "surrogatepass"))
    try:
        return base64.b64decode(uri[start:].encode("ascii").translate(None, _WHITESPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord("broken_image", key, f"the data URI is not base64: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why base64 failed; a UnicodeEncodeError would repeat the whole text."""
    return "a character outside ASCII" if isinstance(error, UnicodeError) else str(error)
