"""Safetensors directories, read and written a byte range at a time.

The `safetensors` library maps or allocates whole tensors; conversion needs rows of them in a fixed amount of memory, in
any order, from several threads, and files that can be continued after an interruption. The format is a length, a JSON
header and raw little-endian bytes. Reading takes any path of `epath` (`gs://bucket/model`), `Writer` a file system's.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from kimi_jax.untrusted import (
    MAX_TABLE,
    check_inside,
    describe,
    is_remote,
    open_regular,
    parse_object,
    read_json,
    refusing,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_AXES = 8  # of one tensor; released ones have at most 4
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint is not what its config.json says, or cannot be read; the message lists everything that is wrong."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes start..start+nbytes of `file`."""

    file: str
    dtype: str  # as in the header: BF16, F32, I32, ...
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Directory:
    """A directory of safetensors files opened for reading; only headers are read until `rows` is called.

    tensors: name -> StoredTensor, in the order of the files; metadata: file -> its own metadata.
    Raises CheckpointError that lists missing, truncated or damaged files.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = epath.Path(path)
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self._open: dict[str, io.BufferedIOBase] = {}
        self._lock = threading.Lock()
        names, promised = _file_names(self.path)
        problems: list[str] = []
        for name in names:
            problems += self._read_header(name)
        for name, file in promised.items():
            found = self.tensors.get(name)
            if file in self.metadata and (found is None or found.file != file):
                problems.append(f"the index names {name} in {file}, but it is not there")
        if problems:
            self.close()
            raise CheckpointError("\n  ".join([f"cannot read {self.path}:", *problems]))

    def _read_header(self, name: str) -> list[str]:
        """Takes in one file; returns what is wrong with it."""
        try:
            file = check_inside(self.path, name, CheckpointError)
            if is_remote(file):
                size = file.stat().length
                with file.open("rb") as stream:
                    header, start = _parse_header(stream.read, name, size)
            else:
                with refusing(CheckpointError), open_regular(file) as stream:
                    size = os.fstat(stream.fileno()).st_size
                    header, start = _parse_header(stream.read, name, size)
        except FileNotFoundError:
            return [f"{name} is missing"]
        except CheckpointError as error:
            return [str(error)]
        metadata = header.pop("__metadata__", {})
        if not is_text_table(metadata):
            return [f"{name}: __metadata__ must be an object of texts, not {describe(metadata)}"]
        self.metadata[name] = metadata
        problems = [problem for key, entry in header.items() if (problem := _entry_problem(name, key, entry))]
        if problems:
            return problems
        end = 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            stored = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), start + first, last - first)
            if key in self.tensors:
                problems.append(f"{key} is in {self.tensors[key].file} and in {name}")
            if stored.start + stored.nbytes > size:
                problems.append(f"{name} is truncated: {key} ends at byte {stored.start + stored.nbytes} of {size}")
            elif first != end:
                kind = "overlaps another tensor" if first < end else f"leaves {first - end} bytes unused before it"
                problems.append(f"{key} in {name}: its range {[first, last]} {kind}")
            elif stored.dtype in DTYPES and stored.nbytes != _nbytes(stored):
                problems.append(f"{key} in {name}: {stored.nbytes} bytes for {stored.dtype} {stored.shape}")
            self.tensors[key] = stored
            end = last
        if not problems and start + end != size:
            problems.append(f"{name}: {size - start - end} bytes follow the last tensor")
        return problems

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows first..last-1 of a tensor seen as a matrix [n, columns] (a vector: [n, 1]); all rows by default."""
        stored = self.tensors[name]
        dtype = DTYPES[stored.dtype]
        count = stored.shape[0] if stored.shape else 1
        last = count if last is None else last
        width = stored.nbytes // max(count, 1)
        buffer = bytearray((last - first) * width)
        if not self._read(stored.file, memoryview(buffer), stored.start + first * width):
            raise CheckpointError(f"{self.path / stored.file} ended early while reading {name}")
        return np.frombuffer(buffer, dtype).reshape(last - first, -1)

    def _read(self, file: str, view: memoryview, at: int) -> bool:
        """Fills `view` with the bytes from `at` on; False if the file ends before."""
        if is_remote(self.path):  # a stream for each piece: they are read in threads
            with (self.path / file).open("rb") as stream:
                stream.seek(at)
                data = stream.read(len(view))
            view[: len(data)] = data
            return len(data) == len(view)
        while view:  # a read returns at most 2 GB
            got = os.preadv(self._descriptor(file), [view], at)
            if not got:
                return False
            view, at = view[got:], at + got
        return True

    def whole(self, name: str) -> np.ndarray:
        """One tensor in its own shape."""
        return self.rows(name).reshape(self.tensors[name].shape)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                with refusing(CheckpointError):
                    self._open[file] = open_regular(self.path / file)
            return self._open[file].fileno()

    def close(self) -> None:
        """Lets go of the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def stamp(file: epath.Path) -> list[int]:
    """Size and time of change: what tells a file from another of its name."""
    if is_remote(file):
        found = file.stat()
        return [found.length, found.mtime]
    status = os.stat(file)
    return [status.st_size, status.st_mtime_ns]


def _nbytes(stored: StoredTensor) -> int:
    return math.prod(stored.shape) * DTYPES[stored.dtype].itemsize


def _parse_header(read: Callable[[int], bytes], name: str, size: int) -> tuple[dict[str, Any], int]:
    """The header of a file of `size` bytes and where the data begin. Raises CheckpointError."""
    start = read(8)
    if len(start) < 8:
        raise CheckpointError(f"{name}: not a safetensors file (it has {size} bytes)")
    (length,) = struct.unpack("<Q", start)
    if length > min(size - 8, MAX_TABLE):
        raise CheckpointError(f"{name}: its header says {length} bytes, the file has {size}, the limit is {MAX_TABLE}")
    return parse_object(read(length), f"{name}: the header", CheckpointError), 8 + length


def _entry_problem(file: str, key: str, entry: Any) -> str | None:
    """What is wrong with the types of one header entry."""
    where = f"{describe(key)} in {file}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return f"{where}: needs dtype, shape and data_offsets, not {describe(entry)}"
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str):
        return f"{where}: dtype must be a text, not {describe(entry['dtype'])}"
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        return f"{where}: shape must be at most {MAX_AXES} sizes, not {describe(shape)}"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"{where}: data_offsets must be [first, end], not {describe(offsets)}"
    return None


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def is_text_table(value: Any) -> bool:
    """Whether a value of parsed JSON is an object that holds texts only."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _file_names(path: epath.Path) -> tuple[list[str], dict[str, str]]:
    """The files to read, and what the index (if there is one) promises: tensor -> file."""
    if (path / INDEX).exists():
        promised = read_json(check_inside(path, INDEX, CheckpointError), MAX_TABLE, CheckpointError).get("weight_map")
        if not is_text_table(promised) or not promised:
            raise CheckpointError(f"{path / INDEX}: weight_map must be tensor -> file, not {describe(promised)}")
        return sorted(set(promised.values())), promised
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if SINGLE in found:
        return [SINGLE], {}
    if len(found) == 1:
        return found, {}
    raise CheckpointError(
        f"{path} has neither {SINGLE} nor {INDEX}; it needs one of them"
        + (f" (there are {len(found)} other safetensors files)" if found else "")
    )


# -------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Entry:
    """One tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return _nbytes(StoredTensor("", self.dtype, self.shape, 0, 0))


class Writer:
    """Safetensors files with a fixed content plan, filled in any order.

    plan: file name -> entries in order; metadata: file name -> its own metadata. Files are created at their full size
    (sparse) unless they are there already with this very header, so a later Writer continues an interrupted one.
    """

    def __init__(self, path: Path, plan: dict[str, list[Entry]], metadata: dict[str, dict[str, str]]):
        self._files: dict[str, int] = {}
        self._where: dict[str, tuple[int, int, int]] = {}  # name -> (descriptor, offset, bytes of a row)
        for name, entries in plan.items():
            header: dict[str, Any] = {"__metadata__": metadata.get(name) or {"format": "pt"}}
            offset = 0
            for entry in entries:
                header[entry.name] = {
                    "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + entry.nbytes],
                }  # fmt: skip
                offset += entry.nbytes
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            start = struct.pack("<Q", len(text)) + text
            self._files[name] = _create(path / name, start, len(start) + offset)
            offset = len(start)
            for entry in entries:
                rows = entry.shape[0] if entry.shape else 1
                self._where[entry.name] = (self._files[name], offset, entry.nbytes // max(rows, 1))
                offset += entry.nbytes

    def write(self, name: str, rows: np.ndarray, first: int = 0) -> None:
        """Writes [n, ...] as rows first..first+n-1 of a tensor, if it is in these files. Thread-safe."""
        if name not in self._where:
            return
        descriptor, offset, width = self._where[name]
        view: memoryview = np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data
        at = offset + first * width
        while view:
            done = os.pwritev(descriptor, [view], at)
            view, at = view[done:], at + done

    def sync(self) -> None:
        """Returns when everything written so far is on disk."""
        for descriptor in self._files.values():
            os.fsync(descriptor)

    def close(self) -> None:
        """Lets go of the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def _create(file: Path, start: bytes, size: int) -> int:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    if os.fstat(descriptor).st_size != size or os.pread(descriptor, len(start), 0) != start:
        os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, start, 0)
    return descriptor


def file_plan(entries: Iterable[Entry], max_bytes: int) -> dict[str, list[Entry]]:
    """Entries in order into files of at most `max_bytes` (a larger tensor has a file of its own), released names."""
    groups: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if groups[-1] and used + entry.nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(entry)
        used += entry.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):06d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_index(path: epath.Path | Path, plan: dict[str, list[Entry]]) -> None:
    """model.safetensors.index.json, if the plan is not the single file."""
    if list(plan) == [SINGLE]:
        return
    weights = {entry.name: file for file, entries in plan.items() for entry in entries}
    total = sum(entry.nbytes for entries in plan.values() for entry in entries)
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
