"""The folder that `python -m kimi_jax.data build` writes: sharded ArrayRecord files of records, read by number.

    DST/dataset.json                         format version, counts, totals, size of every shard (below)
    DST/NAME-00000-of-00012.array_record     records (sources/record.py), one group each for random access
    DST/lengths.npy                          int32 [N, 2]: tokens (-1: unknown) and patches of every record
    DST/bad_records.jsonl                    what was left out and why

`dataset.json` is written last: without it the build is not finished.
"""

import bisect
import functools
import itertools
import json
import os
import threading
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from kimi_jax.config import ConfigError
from kimi_jax.data import BadRecord
from kimi_jax.data.example import Example
from kimi_jax.data.sources.record import StoredRecord, decode, unpack

FORMAT = "kimi_jax.records"
VERSION = 1
MANIFEST = "dataset.json"


class ShardFile(NamedTuple):
    """One file of the data set."""

    name: str
    records: int
    size: int  # bytes


class ArrayRecordSource:
    """A built folder as a source. Opens a shard when it is first read."""

    def __init__(self, path: str) -> None:
        self._folder = epath.Path(path)
        self.manifest = read_manifest(path)
        self._shards = [ShardFile(**s) for s in self.manifest["shards"]]
        self._ends = list(itertools.accumulate(s.records for s in self._shards))
        for shard in self._shards:
            _check_size(self._folder / shard.name, shard)
        self._open()

    def _open(self) -> None:
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        """Example `index`. Raises BadRecord for a damaged record and for media that do not decode (they did once)."""
        return decode(self.stored(index).record)

    def stored(self, index: int) -> StoredRecord:
        """Record `index`, media still encoded, with its token and patch lengths.

        Raises IndexError, and BadRecord(damaged_file) for bytes that are not what was built.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        which = bisect.bisect_right(self._ends, index)
        at = index - (self._ends[which - 1] if which else 0)
        key = f"{self._shards[which].name}#{at}"
        try:
            with self._lock:  # the reader is one stream
                data = self._reader(which).read([at])
        except Exception as e:  # the bindings turn a status of any kind into an exception of their own choice
            raise BadRecord("damaged_file", key, f"{type(e).__name__}: {str(e)[:200]}") from e
        if len(data) != 1:
            raise BadRecord("damaged_file", key, f"the file gives {len(data)} records for one number")
        try:
            return unpack(data[0])
        except ValueError as e:
            raise BadRecord("damaged_file", key, str(e)) from e

    def record(self, index: int) -> Any:
        """Record `index`, media still encoded."""
        return self.stored(index).record

    def _reader(self, which: int) -> Any:
        if which not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader

            path = os.fspath(self._folder / self._shards[which].name)
            self._readers[which] = ArrayRecordReader(path, options="readahead_buffer_size:0,max_parallelism:0")
        return self._readers[which]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int32 [N, 2]: token length (-1: built without a tokenizer) and patch length of every record."""
        with (self._folder / "lengths.npy").open("rb") as f:
            return np.load(f)


def open_array_record(path: str, split: str) -> ArrayRecordSource:
    """The source of a built folder; the split is in the path. Raises ConfigError."""
    del split
    return ArrayRecordSource(path)


def read_manifest(path: str) -> dict:
    """`dataset.json` of a built folder.

    Raises ConfigError when there is none, when it is not ours, or when a later version wrote it.
    """
    file = epath.Path(path) / MANIFEST
    if not file.is_file():
        raise ConfigError(f"{path!r} has no {MANIFEST}: write it with `python -m kimi_jax.data build SRC {path}`")
    try:
        manifest = json.loads(file.read_text())
        written_by, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{os.fspath(file)!r} is damaged ({e!r}): run the build again") from e
    if written_by != FORMAT or version != VERSION:
        raise ConfigError(f"{os.fspath(file)!r} is format {written_by} {version}; this code reads {FORMAT} {VERSION}")
    return manifest


def _check_size(file: Any, shard: ShardFile) -> None:
    size = file.stat().length if file.exists() else None
    if size != shard.size:
        found = "is missing" if size is None else f"has {size:,} bytes"
        raise ConfigError(
            f"{os.fspath(file)!r} {found}; {MANIFEST} says {shard.size:,}: copy it again or run the build again"
        )
