"""Parquet files as Hugging Face writes them: text columns and image columns, turned into examples by a template.

    SourceConfig(kind="parquet", path="nlvr_dev.parquet?template={image}{statement} True or false?{loss=1} {label}")

`path` may be a pattern (`data/train-*.parquet`, files in name order). The template is that of `template.py`. An image
column holds encoded bytes, or the struct {bytes, path} of Hugging Face, or a list of either; a path without bytes is
refused (unsafe_path): such files say nothing about where the path starts. Example keys are `file.parquet#row`, or the
column `id` when there is one.

Parquet decodes whole row groups. The source keeps the last used ones, up to CACHE_BYTES a process; shuffled reading
over more than that decodes a group for every example, and then `build` (it takes parquet too) pays for itself.
"""

import bisect
import threading
from collections import OrderedDict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from kimi_jax.config import ConfigError
from kimi_jax.data import BadRecord
from kimi_jax.data.example import Example
from kimi_jax.data.sources.record import Media, Record, decode
from kimi_jax.data.sources.template import Template, check_columns, split_path

CACHE_BYTES = 1 << 29
EXAMPLE = "FILES.parquet?template={image}{question}{loss=1} {answer}"


class ParquetSource:
    """Rows of parquet files as examples."""

    def __init__(self, path: str, template: Template) -> None:
        self.template = template
        self._files = _matching(path)
        schema = _open(self._files[0]).schema_arrow
        check_columns(template, schema.names, repr(str(self._files[0])))
        self._names = list(dict.fromkeys(c.name for c in template.columns))
        if "id" in schema.names and "id" not in self._names:
            self._names.append("id")
        self._keyed = "id" in schema.names
        self._kinds = {c: c.kind or _kind(schema.field(c.name).type, c.name) for c in template.columns}
        self._groups: list[tuple[int, int]] = []  # (file, row group) of every group, and the rows up to its end
        self._ends: list[int] = []
        self._file_starts: list[int] = []
        self._count_rows(schema)
        self._open()

    def _count_rows(self, schema: pa.Schema) -> None:
        total = 0
        for i, path in enumerate(self._files):
            file = _open(path)
            if file.schema_arrow.remove_metadata() != schema.remove_metadata():
                raise ConfigError(f"{str(path)!r} has other columns than {str(self._files[0])!r}")
            self._file_starts.append(total)
            for group in range(file.num_row_groups):
                total += file.metadata.row_group(group).num_rows
                self._groups.append((i, group))
                self._ends.append(total)

    def _open(self) -> None:
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_cache", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        """Row `index` as an example. Raises BadRecord."""
        return decode(self.record(index))

    def record(self, index: int) -> Record:
        """Row `index`, media still encoded. Raises BadRecord empty or unsafe_path."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        which = bisect.bisect_right(self._ends, index)
        start = self._ends[which - 1] if which else 0
        with self._lock:
            table = self._table(which)
        row = table.slice(index - start, 1).to_pylist()[0]
        file = self._groups[which][0]
        key = f"{self._files[file].name}#{index - self._file_starts[file]}"
        if self._keyed and row["id"] is not None:
            key = str(row["id"])
        values = {c: _value(row[c.name], kind, c.name, key) for c, kind in self._kinds.items()}
        parts = self.template.fill(values)
        if not any(isinstance(p, Media) or p.text.strip() for p in parts):
            raise BadRecord("empty", key, "the columns of the template are empty in this row")
        return Record(key, parts)

    def _table(self, which: int) -> pa.Table:
        if which in self._cache:
            self._cache.move_to_end(which)
            return self._cache[which]
        file, group = self._groups[which]
        table = _open(self._files[file]).read_row_group(group, columns=self._names)
        self._cache[which] = table
        while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return table


def open_parquet(path: str, split: str) -> ParquetSource:
    """The source of `FILES.parquet?template=...`; the split is in the path.

    Raises ConfigError without a file or a template, and for a column that is not there.
    """
    del split
    path, template = split_path(path, EXAMPLE)
    if template is None:
        raise ConfigError(f"the parquet source {path!r} needs a template that says how a row reads: {EXAMPLE}")
    return ParquetSource(path, template)


def _matching(path: str) -> list[Any]:
    pattern = epath.Path(path)
    files = sorted(pattern.parent.glob(pattern.name)) if "*" in pattern.name else [pattern]
    if not files or not files[0].is_file():
        raise ConfigError(f"no parquet file at {path!r}")
    return files


def _open(path: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path.open("rb"))
    except (pa.ArrowInvalid, OSError) as e:
        raise ConfigError(f"{str(path)!r} is not a readable parquet file: {e}") from e


def _kind(dtype: pa.DataType, name: str) -> str:
    """ "image" for bytes, {bytes, path} and lists of them; "" for what prints as text. Raises ConfigError otherwise."""
    inner = dtype.value_type if pa.types.is_list(dtype) or pa.types.is_large_list(dtype) else dtype
    if pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
        return "image"
    if pa.types.is_struct(inner) and {inner.field(i).name for i in range(inner.num_fields)} >= {"bytes"}:
        return "image"
    if inner is dtype and not pa.types.is_nested(dtype):
        return ""
    raise ConfigError(
        f"column {name!r} holds {dtype}: a template takes text, numbers, encoded media and lists of media"
    )


def _value(value: Any, kind: str, name: str, key: str) -> Any:
    if value is None:
        return None
    if not kind:
        return str(value)
    if isinstance(value, list):
        return [_media(v, kind, name, key) for v in value]
    return _media(value, kind, name, key)


def _media(value: Any, kind: str, name: str, key: str) -> Media:
    if isinstance(value, dict):
        if value["bytes"] is None:
            detail = f"column {name!r} names the file {value.get('path')!r} but does not hold it"
            raise BadRecord("unsafe_path", key, detail)
        return Media(kind, value.get("path") or name, data=value["bytes"])
    if not isinstance(value, bytes):
        raise BadRecord("broken_image", key, f"column {name!r} holds {type(value).__name__}, not the bytes of a file")
    return Media(kind, name, data=value)
