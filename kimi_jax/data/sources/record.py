"""A record: an example whose media are still the files they came as, and the bytes that stand for it on disk.

JSONL and parquet yield records, `build` stores them, ArrayRecord files hold them; `decode` turns one into an Example.
The original encoded bytes are kept (a JPEG stays that JPEG), so building loses nothing and costs no quality.

Bytes of a stored record, version 1 (little endian):

    4 bytes   n, length of the header
    n bytes   header, UTF-8 JSON: {"key": "...", "token_length": 61, "patch_length": 64, "parts": [
                  {"text": "...", "loss": 1.0}, {"image": "cat.png", "bytes": 1234}, {"video": "run.mp4", "bytes": 99}]}
    rest      the media, one behind the other, in the order of the header

token_length   tokens of the example at the released limits (media pads and end included), -1 when built without a
               tokenizer
patch_length   vision patches at the released limits
"""

import io
import json
import struct
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from kimi_jax.data import BadRecord
from kimi_jax.data.example import Example, Image, Text, Turns, Video
from kimi_jax.data.files import MAX_MEDIA_BYTES, bad_file_reason
from kimi_jax.data.image import open_image
from kimi_jax.data.video import read_video
from kimi_jax.untrusted import read_regular

MEDIA_KINDS = ("image", "video")


@dataclass(frozen=True)
class Media:
    """An encoded image or video: its bytes, or the file that holds them."""

    kind: str  # "image" or "video"
    name: str  # as the record calls it
    data: bytes | None = None
    path: PurePath | None = None  # local or a bucket

    def read(self, key: str) -> bytes:
        """The encoded bytes. Raises BadRecord missing_file or absurd_size."""
        if self.data is not None:
            return self.data
        assert self.path is not None, "Media needs data or a path"
        try:
            return read_regular(self.path, MAX_MEDIA_BYTES)
        except OSError as e:
            raise BadRecord(bad_file_reason(e), key, f"{self.kind} {self.name!r}: {e.strerror or e}") from e


@dataclass(frozen=True)
class Record:
    """One example, media encoded."""

    key: str
    parts: tuple[Text | Media, ...]
    turns: Turns | None = None  # of a conversation


class StoredRecord(NamedTuple):
    """A record and its lengths, as read back from disk."""

    record: Record
    token_length: int
    patch_length: int


def decode(record: Record) -> Example:
    """The example: videos decoded, images opened (damaged pixels show when `image.decode` reads them).

    Raises BadRecord: empty, missing_file, broken_image, broken_video, absurd_size.
    """
    if not any(isinstance(p, Media) or p.text for p in record.parts):
        raise BadRecord("empty", record.key, "the record has neither text nor media")
    return Example(tuple(_decode_part(p, record.key) for p in record.parts), record.key, record.turns)


def _decode_part(part: Text | Media, key: str) -> Text | Image | Video:
    if isinstance(part, Text):
        return part
    try:
        if part.kind == "image":
            return Image(open_image(part.read(key), key))  # pixels are decoded by whoever needs them
        return read_video(io.BytesIO(part.read(key)), key, part.name)
    except BadRecord as e:
        raise e if part.name in e.detail else BadRecord(e.reason, key, f"{part.kind} {part.name!r}: {e.detail}") from e


# ----------------------------------------------------------------------------------------------------- bytes on disk


def pack(record: Record, token_length: int, patch_length: int) -> bytes:
    """The stored form of a record. The same record gives the same bytes. Raises BadRecord missing_file."""
    parts, blobs = [], []
    for part in record.parts:
        if isinstance(part, Text):
            parts.append({"text": part.text, "loss": part.loss_weight})
        else:
            blobs.append(part.read(record.key))
            parts.append({part.kind: part.name, "bytes": len(blobs[-1])})
    header = {"key": record.key, "token_length": token_length, "patch_length": patch_length, "parts": parts}
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return b"".join([struct.pack("<I", len(head)), head, *blobs])


def unpack(data: bytes) -> StoredRecord:
    """The record of `pack`. Raises ValueError for bytes that are not one."""
    try:
        (n,) = struct.unpack_from("<I", data)
        header = json.loads(data[4 : 4 + n])
        parts: list[Text | Media] = []
        at = 4 + n
        for part in header["parts"]:
            if "text" in part:
                parts.append(Text(_typed(part["text"], str), float(part["loss"])))
                continue
            kind = next(k for k in MEDIA_KINDS if k in part)
            size = _typed(part["bytes"], int)
            if size < 0:
                raise TypeError(f"a medium of {size} bytes")
            parts.append(Media(kind, _typed(part[kind], str), data=data[at : at + size]))
            at += size
        lengths = [_typed(header[k], int) for k in ("token_length", "patch_length")]
        stored = StoredRecord(Record(_typed(header["key"], str), tuple(parts)), *lengths)
    except (struct.error, KeyError, TypeError, StopIteration, ValueError, OverflowError, RecursionError) as e:
        raise ValueError(f"these {len(data)} bytes are not a record of kimi_jax (format version 1): {e!r}") from e
    if at != len(data):
        raise ValueError(f"a record names {at} bytes but has {len(data)}")
    return stored


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r:.60} where a {kind.__name__} is stored")
    return value
