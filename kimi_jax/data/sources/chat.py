"""Conversations for SFT: JSON lines or parquet files, encoded by the released template, with the loss on the answers.

    SourceConfig(kind="chat", path="sft.jsonl", chat=ChatConfig(train_on="all"))
    SourceConfig(kind="chat", path="data/train-*.parquet", vision=True)

The layouts of a row are those of chat_row.py: `messages`, ShareGPT's `conversations`, tools, media. In JSON lines media
are paths beside the file or data URIs; in parquet they are bytes or the struct {bytes, path} of Hugging Face. Nested
tools and arguments of calls are safest as JSON text in parquet, because Arrow writes absent fields as null; fields that
are null are dropped.

What the loss is on: what the assistant wrote, and nothing else (`conversation.encode`). A conversation is one document:
it never sees its neighbours in a row, and it is never split. One that is longer than a row loses whole turns or is
refused (`ChatConfig.too_long`); both are counted.
Ids of tool calls are renumbered as the released model writes them. What makes a BadRecord: bad_json, bad_messages,
placeholder_mismatch, unsafe_path, damaged_file, absurd_size, too_long, and those of decoding media.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kimi_jax.config import ChatConfig, ConfigError, SourceConfig
from kimi_jax.data import BadRecord
from kimi_jax.data.conversation import encode, with_released_ids
from kimi_jax.data.example import Example, Turns
from kimi_jax.data.media_part import media_value, read_data_uri
from kimi_jax.data.sources.chat_row import KEYS, MESSAGE_KEYS, Conversation, read_row, without_nulls
from kimi_jax.data.sources.jsonl import JsonLines, media_beside, parse_object
from kimi_jax.data.sources.record import Media, Record, decode


class ChatSource:
    """Conversations as examples. `record(i)` gives one with its media still encoded."""

    def __init__(self, path: str, settings: ChatConfig) -> None:
        self._settings = settings
        self._lines = JsonLines(path) if Path(path).suffix == ".jsonl" else None
        self._rows = None if self._lines else _parquet_rows(path)

    def __len__(self) -> int:
        return len(self._lines if self._lines is not None else self._rows or ())

    def __getitem__(self, index: int) -> Example:
        """Conversation `index`. Raises BadRecord."""
        return decode(self.record(index))

    def record(self, index: int) -> Record:
        """Conversation `index` as a record; its media are not opened yet. Raises BadRecord."""
        if self._lines is not None:
            key, row = parse_object(*self._lines.line(index))
            folder = self._lines.folder
            return to_record(
                read_row(row, key, lambda kind, value: _beside(kind, value, key, folder)), key, self._settings
            )
        assert self._rows is not None
        key, row = self._rows.row(index)
        return to_record(read_row(without_nulls(row), key, lambda k, v: _inside(k, v, key)), key, self._settings)


def open_chat(path: str, config: SourceConfig) -> ChatSource:
    """The source of a `.jsonl` file or of parquet files. Raises ConfigError when there is nothing to read."""
    if Path(path).suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"a chat source reads FILE.jsonl or FILES.parquet, not {path!r}")
    return ChatSource(path, config.chat or ChatConfig())


def to_record(conversation: Conversation, key: str, settings: ChatConfig) -> Record:
    """The encoded conversation, media still closed. Raises BadRecord(bad_messages)."""
    thinking = conversation.thinking if conversation.thinking is not None else settings.thinking
    if thinking is None:
        thinking = any(m.get("reasoning_content") or m.get("reasoning") for m in conversation.messages)
    preserve = conversation.preserve_thinking
    train_on: Literal["last", "all"] = "last" if settings.train_on == "last" else "all"
    try:
        example = encode(
            with_released_ids(conversation.messages), conversation.tools, thinking=thinking, train_on=train_on,
            preserve_thinking=settings.preserve_thinking if preserve is None else preserve, media=media_value, key=key,
        )  # fmt: skip
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: an object where a text belongs
        raise BadRecord("bad_messages", key, str(error)[:300]) from error
    assert example.turns is not None
    keep: Literal["all", "first", "last"] = "all"
    if settings.too_long == "shorten":
        keep = "last" if train_on == "last" else "first"
    return Record(key, example.parts, Turns(example.turns.ends, keep))


def _beside(kind: str, value: Any, key: str, folder: Any) -> Media:
    """A medium that a JSON line names: a data URI, or a path in the folder of the file."""
    if isinstance(value, str) and value[:5].lower() == "data:":
        return Media(kind, "data URI", data=read_data_uri(value, key))
    return media_beside(kind, value, key, folder)


def _inside(kind: str, value: Any, key: str) -> Media:
    """A medium in a parquet column: bytes, {bytes, path}, or a data URI."""
    name = kind
    if isinstance(value, Mapping):
        name, value = value.get("path") or kind, value.get("bytes")
    if isinstance(value, str) and value[:5].lower() == "data:":
        value = read_data_uri(value, key)
    if not isinstance(value, bytes):
        raise BadRecord("unsafe_path", key, f"the {kind} {name!r:.60} is named but not held by its column")
    return Media(kind, name, data=value)


def _parquet_rows(path: str) -> Any:
    from kimi_jax.data.sources.parquet_rows import ParquetRows  # needs the extra [parquet]

    def columns(file: Any, where: str) -> list[str]:
        names = file.schema_arrow.names
        if not set(MESSAGE_KEYS) & set(names):
            raise ConfigError(f"{where} has none of the columns {', '.join(MESSAGE_KEYS)}; it has: {', '.join(names)}")
        return [name for name in names if name in KEYS and name != "id"]

    return ParquetRows(path, columns)
