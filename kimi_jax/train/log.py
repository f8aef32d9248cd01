"""The files in which a run tells about itself; they outlive a kill at any point and a disk that is full for a while.

  metrics.jsonl   one row a log interval (kimi_jax.train.metrics)
  eval.jsonl      one line an evaluation: step, eval (task/metric -> score), rows (see kimi_jax.eval.runner)
  tensorboard/    the numbers of both
  *.jsonl.odd, *.jsonl.1  lines that were no rows; the rows of a part of the run of which no checkpoint was left
  quarantine.jsonl  source, index, reason, key, detail of every record that could not be used, each once
All of them may be on an object store (`gs://`), where nothing can be appended: a file is then written anew as a whole.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

from etils import epath


class Log:
    """The log of one run, continued at `start_step`; host 0 alone has one that writes (`active`).

    Rows beyond `start_step` belong to a part of the run that was lost and will be done again: they are cut off.
    What cannot be written is told to `warn` and kept for the next time.
    """

    def __init__(self, workdir: str, start_step: int, warn: Callable[[str], Any] = warnings.warn, active: bool = True):
        self._dir, self._warn, self._active = epath.Path(workdir), warn, active
        self._quarantined = 0  # records listed
        if active:
            self._dir.mkdir(parents=True, exist_ok=True)
            self._files = {name: _Lines(self._dir / name, start_step, warn) for name in ("metrics.jsonl", "eval.jsonl")}
            self._board = _Board(self._dir / "tensorboard", start_step + 1)

    def train(self, row: dict[str, Any]) -> None:
        """Appends one row of a Meter."""
        self._write("metrics.jsonl", row, [(f"train/{name}", value) for name, value in _scalars(row)])

    def evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Appends what the tasks of one evaluation scored."""
        scores = {f"{row['task']}/{row['metric']}": row["score"] for row in rows}
        named = [(f"eval/{row['task']}/{row['metric']}/{k}", row[k]) for row in rows for k in ("score", "control")]
        self._write("eval.jsonl", {"step": step, "eval": scores, "rows": rows}, named)

    def _write(self, name: str, row: dict[str, Any], scalars: list[tuple[str, float]]) -> None:
        if not self._active:
            return
        self._files[name].add(row)
        self._board.add(row["step"], scalars)
        self.flush()

    def quarantine(self, records: dict[str, dict[str, list[str]]]) -> None:
        """Writes the list of unusable records, {source: {index: [reason, key, detail]}}, if it has grown."""
        names = ("reason", "key", "detail")
        rows = [
            {"source": source, "index": int(index), **dict(zip(names, known, strict=True))}
            for source, found in records.items()
            for index, known in found.items()
        ]
        if not self._active or len(rows) == self._quarantined:
            return
        try:
            write_atomic(self._dir / "quarantine.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            self._quarantined = len(rows)
        except OSError as error:
            self._warn(f"WARNING: cannot write {self._dir / 'quarantine.jsonl'} ({error})")

    def flush(self) -> None:
        """Writes what could not be written before, if it can be now."""
        if not self._active:
            return
        files: list[_Lines | _Board] = [*self._files.values(), self._board]
        for file in files:
            try:
                file.flush()
            except OSError as error:
                self._warn(f"WARNING: cannot write {file.path} ({error}); {file.waiting()} lines wait in memory")

    def evaluated(self) -> set[int]:
        """Steps whose evaluation is in the log."""
        return {row["step"] for row in read_rows(self._dir / "eval.jsonl") if _step(row) is not None}

    def close(self) -> None:
        """Writes what is left."""
        self.flush()
        if self._active:
            self._board.close()


class _Lines:
    """A JSONL file that grows by whole lines only: the half of one that a full disk took is cut off before the next.

    Rows beyond `last_step` are cut off; if nothing would be left of them, the file is kept under another name. Lines
    that are not rows are moved to `NAME.odd`, and `warn` is told once. Everything else stays, character for character.
    """

    def __init__(self, path: epath.Path, last_step: int, warn: Callable[[str], Any]):
        self.path = path
        self._new: list[str] = []
        rows, odd = read_lines(path)
        kept = [line for line, row in rows if _step(row) is not None and row["step"] <= last_step]
        odd += [line for line, row in rows if _step(row) is None]
        if odd:
            aside = path.parent / f"{path.name}.odd"
            before = aside.read_bytes() if aside.exists() else b""
            _write_bytes(aside, before + b"".join(line + b"\n" for line in odd))
            warn(f"WARNING: {len(odd)} lines of {path} are not rows of a log; they are in {aside} now, all others stay")
        if rows and not kept:
            _set_aside(path, warn)
        whole = b"".join(line + b"\n" for line in kept)
        self._old = whole if _is_remote(path) else b""  # kept only where it must be written again
        self._size = len(whole)
        if path.exists() and path.read_bytes() != whole:
            _write_bytes(path, whole)

    def add(self, row: dict[str, Any]) -> None:
        self._new.append(json.dumps(row) + "\n")

    def waiting(self) -> int:
        return len(self._new)

    def flush(self) -> None:
        text = "".join(self._new).encode()
        if not text:
            return
        if _is_remote(self.path):
            _write_bytes(self.path, self._old + text)
            self._old += text
        else:
            with self.path.open("ab") as file:
                file.truncate(self._size)
                file.write(text)
            self._size += len(text)
        self._new = []


class _Board:
    """TensorBoard events, written at once: tensorboardX's own queue blocks for ever once its thread met an error."""

    def __init__(self, path: epath.Path, purge_step: int):
        from tensorboardX.proto import event_pb2  # a slow import, wanted by training only

        self.path = path
        self._proto = event_pb2
        self._files = 0
        self._writer: Any = None
        # a reader is to forget what was written from this step on, by the part of the run that was lost
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._new = [event_pb2.Event(wall_time=time.time(), step=purge_step, session_log=log)]

    def add(self, step: int, scalars: list[tuple[str, float]]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars])
        self._new.append(self._proto.Event(wall_time=time.time(), step=step, summary=summary))

    def waiting(self) -> int:
        return len(self._new)

    def flush(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        try:
            if self._writer is None:
                self.path.mkdir(parents=True, exist_ok=True)
                self._files += 1
                self._writer = EventsWriter(str(self.path / "events"), f".{self._files}")
            for event in self._new:
                self._writer.write_event(event)
            self._writer.flush()
        except OSError:
            self.close()  # its end is broken: a new file next time
            raise
        self._new = []

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None


def read_rows(path: Any) -> list[dict[str, Any]]:
    """The rows of a JSONL file: every line that is a JSON object, wherever others stand. Empty if there is no file."""
    return [row for _, row in read_lines(path)[0]]


def read_lines(path: Any) -> tuple[list[tuple[bytes, dict[str, Any]]], list[bytes]]:
    """(lines that are JSON objects, each with its row; other lines); a last line that a killed run left unfinished is
    neither. Both are empty if there is no file."""
    path = epath.Path(path)
    *lines, rest = (path.read_bytes() if path.exists() else b"").split(b"\n")
    rows, odd = [], []
    for number, line in enumerate([*lines, rest]):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError too
            row = None
        if isinstance(row, dict):
            rows.append((line, row))
        elif line.strip() and number < len(lines):
            odd.append(line)
    return rows, odd


def _step(row: dict[str, Any]) -> int | None:
    step = row.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _set_aside(path: epath.Path, warn: Callable[[str], Any]) -> None:
    """A copy of a log of which nothing goes on: of a run that was lost before its first checkpoint, or whose
    checkpoints somebody removed."""
    number = next(n for n in itertools.count(1) if not (path.parent / f"{path.name}.{n}").exists())
    aside = path.parent / f"{path.name}.{number}"
    _write_bytes(aside, path.read_bytes())
    warn(f"no row of {path} belongs to what this start goes on from; the old ones are kept in {aside}")


def write_atomic(path: Any, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new one, never half of it."""
    _write_bytes(epath.Path(path), text.encode())


def _write_bytes(path: epath.Path, content: bytes) -> None:
    if _is_remote(path):
        path.write_bytes(content)  # an object appears whole or not at all
        return
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_bytes(content)
    temporary.replace(path)


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _scalars(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for key, value in row.items():
        if isinstance(value, dict):
            out += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, list) and value and not isinstance(value[0], list):
            out += _scalars({f"layer_{i}": v for i, v in enumerate(value)}, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            out.append((f"{prefix}{key}", value))
    return out
