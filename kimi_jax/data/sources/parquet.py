"""Parquet files as Hugging Face writes them: text columns and image columns, turned into examples by a template.

    SourceConfig(kind="parquet", path="nlvr_dev.parquet?template={image}{statement} True or false?{loss=1} {label}")

`path` may be a pattern (`data/train-*.parquet`, files in name order). The template is that of `template.py`. An image
column holds encoded bytes (of any binary type, dictionaries of them too), or the struct {bytes, path} of Hugging Face,
or a list of either; a path without bytes is refused (unsafe_path): such files say nothing about where the path starts.
Some writers mark text as bytes: a column of bytes whose first values are all UTF-8 is text, every other one images.
Example keys are `file.parquet#row`, or the column `id` when there is one. A row group that does not decode makes each
of its rows a BadRecord(damaged_file).

Parquet decodes whole row groups. Repeated values are kept once (`read_dictionary`), and a group that would take more
than MAX_GROUP_BYTES by the metadata is refused at the start. The source keeps the last used ones, up to CACHE_BYTES a
process; shuffled reading over more than that decodes a group for every example, and then `build` (it takes parquet too)
pays for itself.
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
from kimi_jax.data.sources.template import Column, Template, check_columns, split_path
from kimi_jax.untrusted import open_regular

CACHE_BYTES = 1 << 29
MAX_GROUP_BYTES = 1 << 30  # of the template's columns in one row group, decoded
PROBED = 16  # values of a column of bytes that decide whether it is text
EXAMPLE = "FILES.parquet?template={image}{question}{loss=1} {answer}"


class ParquetSource:
    """Rows of parquet files as examples."""

    def __init__(self, path: str, template: Template) -> None:
        self.template = template
        self._files = _matching(path)
        self._names: list[str] = []
        self._keyed = False
        self._kinds: dict[Column, str] = {}
        self._dictionaries: list[list[str]] = []  # of each file: leaves that are decoded as dictionaries
        self._groups: list[tuple[int, int]] = []  # (file, row group) of every group, and the rows up to its end
        self._unreadable: dict[int, str] = {}  # row groups whose columns the metadata does not describe, and why
        self._ends: list[int] = []
        self._file_starts: list[int] = []
        self._look_at_files()
        self._open()

    def _look_at_files(self) -> None:
        total = 0
        for i, path in enumerate(self._files):
            with _open(path) as file:
                self._check_columns(file, path)
                leaves = [file.schema.column(j) for j in range(len(file.schema))]
                chosen = [j for j, leaf in enumerate(leaves) if _of_columns(leaf.path, self._names)]
                bytes_like = [leaves[j].path for j in chosen if leaves[j].physical_type == "BYTE_ARRAY"]
                self._dictionaries.append(bytes_like)
                self._file_starts.append(total)
                for group in range(file.num_row_groups):
                    if damage := _check_group(file, group, chosen, self._names, path):
                        self._unreadable[len(self._groups)] = damage
                    total += file.metadata.row_group(group).num_rows
                    self._groups.append((i, group))
                    self._ends.append(total)

    def _check_columns(self, file: pq.ParquetFile, path: Any) -> None:
        """Settles from the first file what the columns hold, and that the others hold the same."""
        schema, where = file.schema_arrow, repr(str(path))
        check_columns(self.template, schema.names, where)
        keyed = "id" in schema.names
        names = list(dict.fromkeys([*(c.name for c in self.template.columns), *(["id"] if keyed else [])]))
        twice = [n for n in names if schema.names.count(n) > 1]
        if twice:
            raise ConfigError(f"{where} has two columns called {twice[0]!r}: rename one")
        found = {c: c.kind or _kind(file, schema.field(c.name).type, c.name) for c in self.template.columns}
        if not self._names:
            self._names, self._keyed = names, keyed
        if keyed != self._keyed:
            raise ConfigError(f"{where} and {str(self._files[0])!r}: only one of the two has a column 'id'")
        for column, kind in found.items():
            settled = self._kinds.get(column)
            if settled in (None, UNKNOWN):
                self._kinds[column] = kind
            elif kind not in (settled, UNKNOWN):
                first = repr(str(self._files[0]))
                raise ConfigError(f"column {column.name!r} holds {_say(kind)} in {where}, {_say(settled)} in {first}")

    def _open(self) -> None:
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._damaged = dict(self._unreadable)  # what was wrong with the row groups that did not decode
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_cache", "_damaged", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        """Row `index` as an example. Raises BadRecord."""
        return decode(self.record(index))

    def record(self, index: int) -> Record:
        """Row `index`, media still encoded. Raises BadRecord empty, unsafe_path or damaged_file."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        which = bisect.bisect_right(self._ends, index)
        start = self._ends[which - 1] if which else 0
        file = self._groups[which][0]
        key = f"{self._files[file].name}#{index - self._file_starts[file]}"
        try:
            with self._lock:
                row = self._table(which).slice(index - start, 1).to_pylist()[0]
        except _Damaged as e:
            raise BadRecord("damaged_file", key, str(e)) from e
        except (pa.ArrowException, ValueError, IndexError) as e:  # text that is not UTF-8, a date of the year 300,000
            raise BadRecord("damaged_file", key, f"{type(e).__name__}: {str(e)[:200]}") from e
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
        if which in self._damaged:
            raise _Damaged(self._damaged[which])
        number, group = self._groups[which]
        rows = self._ends[which] - (self._ends[which - 1] if which else 0)
        try:
            with _open(self._files[number], self._dictionaries[number]) as file:
                table = _printable(file.read_row_group(group, columns=self._names))
            if table.num_rows != rows:
                raise ValueError(f"{table.num_rows} rows instead of {rows}")
        except (pa.ArrowException, ConfigError, OSError, ValueError) as e:
            self._damaged[which] = f"row group {group} does not decode: {type(e).__name__}: {str(e)[:200]}"
            raise _Damaged(self._damaged[which]) from e
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


class _Damaged(Exception):
    """A row group that does not decode."""


def _matching(path: str) -> list[Any]:
    pattern = epath.Path(path)
    files = sorted(pattern.parent.glob(pattern.name)) if "*" in pattern.name else [pattern]
    if not files or not files[0].exists():
        raise ConfigError(f"no parquet file at {path!r}")
    return files


def _open(path: Any, dictionaries: list[str] | None = None) -> pq.ParquetFile:
    try:
        file = open_regular(path)
        try:
            return pq.ParquetFile(file, read_dictionary=dictionaries)
        except BaseException:
            file.close()
            raise
    except (pa.ArrowException, OSError, ValueError) as e:
        raise ConfigError(f"{str(path)!r} is not a readable parquet file: {e}") from e


def _of_columns(leaf: str, names: list[str]) -> bool:
    return any(leaf == name or leaf.startswith(name + ".") for name in names)


def _check_group(file: pq.ParquetFile, group: int, chosen: list[int], names: list[str], path: Any) -> str:
    """Raises ConfigError for a row group too large for memory: encodings repeat a value for nothing.

    chosen: the leaves of the columns `names`. Returns what is wrong with metadata that describe no columns, else "".
    """
    whole = file.metadata.row_group(group)
    if whole.num_rows < 0 or whole.total_byte_size < 0:
        raise ConfigError(f"{str(path)!r} is not a readable parquet file: row group {group} has {whole.num_rows} rows")
    leaves = [file.schema.column(j) for j in chosen]
    size = whole.total_byte_size + sum(_width(leaf) * whole.num_rows for leaf in leaves)
    if size <= MAX_GROUP_BYTES and not any(leaf.max_repetition_level for leaf in leaves):
        return ""
    # A closer look, at the columns alone. pyarrow ends the process when `column` meets damaged statistics; reading
    # raises an exception for the same, so that comes first.
    try:
        next(file.iter_batches(batch_size=1, row_groups=[group], columns=names), None)
    except (pa.ArrowException, OSError, ValueError) as e:
        return f"row group {group} does not decode: {type(e).__name__}: {str(e)[:200]}"
    size = 0
    for j, leaf in zip(chosen, leaves, strict=True):
        column = whole.column(j)
        size += _width(leaf) * max(0, column.num_values)
        size += max(0, column.total_uncompressed_size) if leaf.physical_type == "BYTE_ARRAY" else 0
    if size > MAX_GROUP_BYTES:
        raise ConfigError(
            f"row group {group} of {str(path)!r} takes {size:,} bytes in memory for the columns of the template; at "
            f"most {MAX_GROUP_BYTES:,} are read: write the file again with smaller groups, for example "
            "pyarrow.parquet.write_table(table, path, row_group_size=1000)"
        )
    return ""


def _width(leaf: pq.ColumnSchema) -> int:
    """Bytes that a value of a column takes in memory, beside the distinct ones of texts and bytes."""
    return {"BYTE_ARRAY": 4, "FIXED_LEN_BYTE_ARRAY": leaf.length}.get(leaf.physical_type, 12)


UNKNOWN = "unknown"  # the kind of a column of nulls or of a file without rows


def _say(kind: str) -> str:
    return {"": "text", "image": "images", "video": "videos"}[kind]


def _kind(file: pq.ParquetFile, dtype: pa.DataType, name: str) -> str:
    """ "image" for bytes, {bytes, path} and lists of them; "" for what prints as text. Raises ConfigError otherwise."""
    types = pa.types
    nested = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    inner = dtype.value_type if any(is_list(dtype) for is_list in nested) else dtype
    inner = inner.value_type if types.is_dictionary(inner) else inner
    if types.is_fixed_size_binary(inner):
        return "image"
    if types.is_binary(inner) or types.is_large_binary(inner) or types.is_binary_view(inner):
        return "image" if types.is_nested(dtype) else _kind_of_bytes(file, name)
    if types.is_struct(inner) and {inner.field(i).name for i in range(inner.num_fields)} >= {"bytes"}:
        return "image"
    if types.is_null(dtype):
        return UNKNOWN
    if not types.is_nested(dtype):
        return ""
    raise ConfigError(
        f"column {name!r} holds {dtype}: a template takes text, numbers, encoded media and lists of media"
    )


def _kind_of_bytes(file: pq.ParquetFile, name: str) -> str:
    """ "" if the first values are all UTF-8 text, "image" if one is not, UNKNOWN without any."""
    try:
        batch = next(file.iter_batches(batch_size=PROBED, columns=[name]), None)
    except (pa.ArrowException, OSError, ValueError):
        return UNKNOWN  # the rows of the damaged group will say so
    values = [v for v in batch.column(0).to_pylist() if v] if batch is not None else []
    return ("" if all(_text(v) is not None for v in values) else "image") if values else UNKNOWN


def _text(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _printable(table: pa.Table) -> pa.Table:
    """The table with times of nanoseconds, which Python's own types do not hold, as text or as microseconds."""
    for i, field in enumerate(table.schema):
        if field.type in (pa.time64("ns"), pa.duration("ns")):
            coarse = pa.time64("us") if pa.types.is_time(field.type) else pa.duration("us")
            table = table.set_column(i, field.name, table.column(i).cast(coarse, safe=False))
        elif pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            naive = table.column(i).cast(pa.timestamp("ns"))  # a time zone would need its database
            table = table.set_column(i, field.name, naive.cast(pa.string()))
    return table


def _value(value: Any, kind: str, name: str, key: str) -> Any:
    if value is None:
        return None
    if kind in ("", UNKNOWN):
        text = _text(value) if isinstance(value, bytes) else str(value)
        if text is None:
            raise BadRecord("damaged_file", key, f"column {name!r} holds text, but here bytes that are not UTF-8")
        return text
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
