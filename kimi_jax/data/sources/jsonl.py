"""JSON lines with media files beside them: the format for a user's own data, and what `build` reads.

One example a line, UTF-8, in either of two forms:

    {"id": "cat-7", "parts": [{"text": "What is this?", "loss": 0}, {"image": "img/cat.png"}, {"text": " A cat."}]}
    {"id": "cat-7", "text": "<image>A cat. <video>It runs.", "images": ["img/cat.png"], "videos": ["run.mp4"]}

`id` is optional (the file's name and line number stand in). In the first form a text has a loss weight `loss`, 1 unless
given. In the second the n-th `<image>` is the n-th file of `images`, likewise `<video>`; text there always counts in
the loss. The first form has no placeholders: `<image>` in its text is just text.

Media paths are relative to the folder of the JSONL file and stay inside it: an absolute path or one with `..` is
refused (BadRecord unsafe_path). A symbolic link in that folder is followed: it is the user's own.
Blank lines (also of spaces and tabs) are skipped, and so is a byte order mark at the start. A line has at most MAX_LINE
bytes. What makes a BadRecord: bad_json (not JSON, not one of the forms, an unknown key), placeholder_mismatch, empty,
unsafe_path, absurd_size (too long a line), and while decoding missing_file, broken_image, broken_video, absurd_size.

The index holds where each line starts (8 bytes a line, in memory; nothing is written beside the user's file).
"""

import io
import json
import re
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from etils import epath

from kimi_jax.config import ConfigError
from kimi_jax.data import BadRecord
from kimi_jax.data.example import Example, Text
from kimi_jax.data.sources.record import MEDIA_KINDS, Media, Record, decode
from kimi_jax.untrusted import open_regular

_CHUNK = 1 << 24  # bytes read at a time for the index
MAX_LINE = 1 << 28  # bytes; media stand beside the file, so that a line is text
MAX_LOSS = 1e6
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLACEHOLDER = re.compile("<(image|video)>")


class JsonlSource:
    """A JSONL file as a source. `record(i)` gives the example with its media still encoded."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = epath.Path(path)
        # line numbers[i] (from 1) is starts[i] .. ends[i], without blank lines
        try:
            with open_regular(self._file) as f:
                self._starts, self._ends, self._numbers = _index_lines(f)
        except OSError as e:
            raise ConfigError(f"no JSONL file at {path!r}: {e.strerror or e}") from e
        if not len(self._starts):
            raise ConfigError(f"the JSONL file {path!r} has no lines")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        """Example `index`. Raises BadRecord for a line that is not one (reasons in the file's docstring)."""
        return decode(self.record(index))

    def record(self, index: int) -> Record:
        """Line `index` as a record; its media are not opened yet. Raises BadRecord."""
        start, end = int(self._starts[index]), int(self._ends[index])
        where = f"{self._file.name}:{self._numbers[index]}"
        if end - start > MAX_LINE:
            raise BadRecord("absurd_size", where, f"a line of {end - start:,} bytes; at most {MAX_LINE:,} are read")
        # a file handle of its own for each read: threads and worker processes share nothing
        try:
            with open_regular(self._file) as f:
                f.seek(start)
                line = f.read(end - start)
        except OSError as e:
            raise BadRecord("missing_file", where, e.strerror or str(e)) from e
        return parse_line(line, where, self._file.parent)


def open_jsonl(path: str, split: str) -> JsonlSource:
    """The source of a JSONL file; the split is in the path. Raises ConfigError when there is nothing to read."""
    del split
    return JsonlSource(path)


def parse_line(line: bytes, where: str, folder: Any) -> Record:
    """The record of one line; `where` is its key unless it has an id, `folder` (a path) holds its media.

    Raises BadRecord.
    """
    try:
        values = json.loads(line.decode())  # of bytes, json would guess UTF-16 and UTF-32 too
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, a number of thousands of digits
        raise BadRecord("bad_json", where, str(e)) from e
    if not isinstance(values, dict):
        raise BadRecord("bad_json", where, f"a line holds one object {{...}}, not {type(values).__name__}")
    name = values.pop("id", None)
    key = where if name is None else str(name)
    parts = _parts(values, key, folder) if "parts" in values else _compact(values, key, folder)
    if not any(isinstance(p, Media) or p.text for p in parts):
        raise BadRecord("empty", key, "the record has neither text nor media")
    return Record(key, parts)


def _parts(values: dict, key: str, folder: Any) -> tuple[Text | Media, ...]:
    parts = values.pop("parts")
    _no_more(values, key, "a record with parts")
    if not isinstance(parts, list):
        raise BadRecord("bad_json", key, f"parts holds a list, not {type(parts).__name__}")
    return tuple(_part(part, f"part {i}", key, folder) for i, part in enumerate(parts))


def _part(part: Any, where: str, key: str, folder: Any) -> Text | Media:
    if not isinstance(part, dict) or sum(k in part for k in ("text", *MEDIA_KINDS)) != 1:
        raise BadRecord("bad_json", key, f"{where} is not an object with one of text, image, video: {_short(part)}")
    part = dict(part)
    for kind in MEDIA_KINDS:
        if kind in part:
            name = part.pop(kind)
            _no_more(part, key, f"{where} ({kind})")
            return _media(kind, name, key, folder)
    text, loss = part.pop("text"), part.pop("loss", 1.0)
    _no_more(part, key, f"{where} (text)")
    if not isinstance(text, str):
        raise BadRecord("bad_json", key, f"{where}: text is {_short(text)}")
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not 0 <= loss <= MAX_LOSS:
        raise BadRecord("bad_json", key, f"{where}: loss is a number from 0 to {MAX_LOSS:g}, not {_short(loss)}")
    return Text(text, float(loss))


def _compact(values: dict, key: str, folder: Any) -> tuple[Text | Media, ...]:
    text = values.pop("text", None)
    names = {kind: values.pop(kind + "s", None) or [] for kind in MEDIA_KINDS}
    _no_more(values, key, "a record with text")
    if not isinstance(text, str):
        raise BadRecord("bad_json", key, "a record has parts: [...] or text: '...'")
    pieces = _PLACEHOLDER.split(text)  # text, kind, text, kind, ..., text
    for kind in MEDIA_KINDS:
        if not isinstance(names[kind], list):
            raise BadRecord("bad_json", key, f"{kind}s holds a list, not {_short(names[kind])}")
        asked = pieces[1::2].count(kind)
        if asked != len(names[kind]):
            raise BadRecord("placeholder_mismatch", key, f"{asked} <{kind}> in the text, {len(names[kind])} in {kind}s")
    queues = {kind: iter(names[kind]) for kind in MEDIA_KINDS}
    parts: list[Text | Media] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            parts.append(_media(piece, next(queues[piece]), key, folder))
        elif piece:
            parts.append(Text(piece, 1.0))
    return tuple(parts)


def _media(kind: str, name: Any, key: str, folder: Any) -> Media:
    if not isinstance(name, str) or not name:
        raise BadRecord("bad_json", key, f"{kind} is the path of a file, not {_short(name)}")
    pure = PurePosixPath(name.replace("\\", "/"))
    is_text = "\0" not in name and not _SURROGATE.search(name)
    if pure.is_absolute() or ".." in pure.parts or not is_text or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):
        raise BadRecord("unsafe_path", key, f"{kind} {name!r} is not a path inside the folder of the JSONL file")
    return Media(kind, name, path=folder / name)


def _no_more(rest: dict, key: str, where: str) -> None:
    if rest:
        raise BadRecord("bad_json", key, f"{where} has an unknown key {next(iter(rest))!r}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _index_lines(file: io.BufferedIOBase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the lines that are not blank start and end (int64 bytes), and their numbers from 1."""
    ends, spaced = [], []  # where newlines stand; where lines start with a space, a tab or a carriage return
    size, last = 0, 10
    while chunk := file.read(_CHUNK):
        data = np.frombuffer(chunk, np.uint8)
        found = np.flatnonzero(data == 10)
        ends.append(found + size)
        heads = np.concatenate([np.zeros(int(last == 10), np.int64), found + 1])
        heads = heads[heads < len(data)]
        spaced.append(heads[np.isin(data[heads], (9, 13, 32))] + size)
        size, last = size + len(data), int(data[-1])
    end = np.concatenate([*ends, np.array([size])]).astype(np.int64)
    start = np.concatenate([np.zeros(1, np.int64), end[:-1] + 1])
    file.seek(0)
    if file.read(len(_BOM)) == _BOM:
        start[0] = len(_BOM)
        spaced.insert(0, np.zeros(1, np.int64))  # what is behind the mark may be blank
    filled = end > start
    for i in np.searchsorted(end, np.concatenate([np.zeros(0, np.int64), *spaced])):
        if end[i] - start[i] <= MAX_LINE:
            file.seek(start[i])
            filled[i] &= bool(file.read(end[i] - start[i]).strip())
    return start[filled], end[filled], np.flatnonzero(filled) + 1
