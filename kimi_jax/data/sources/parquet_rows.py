"""The rows of parquet files: row groups that are decoded once, held in a cache, and never trusted.

Parquet decodes whole row groups. Repeated values are kept once (`read_dictionary`), and a group that would take more
than MAX_GROUP_BYTES by the metadata is refused at the start. The last used groups are kept, up to CACHE_BYTES a
process; shuffled reading over more than that decodes a group for every row, and then `build` pays for itself.
A row group that does not decode makes each of its rows a BadRecord(damaged_file).
"""

import bisect
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from kimi_jax.config import ConfigError
from kimi_jax.data import BadRecord
from kimi_jax.untrusted import open_regular

CACHE_BYTES = 1 << 29
MAX_GROUP_BYTES = 1 << 30  # of the columns that are read of one row group, decoded


class ParquetRows:
    """Random access to some columns of the rows of parquet files with one schema. Picklable.

    path:    a file, or a pattern (`data/train-*.parquet`, files in name order).
    columns: gives for an open file and its quoted name the columns to read; the same ones for every file. The column
             `id` is read besides, where there is one: it names the rows.
    Raises ConfigError for what is no such file and for row groups that are too large.
    """

    def __init__(self, path: str, columns: Callable[[pq.ParquetFile, str], list[str]]) -> None:
        self._files = _matching(path)
        self._names: list[str] = []
        self._keyed = False
        self._dictionaries: list[list[str]] = []  # of each file: leaves that are decoded as dictionaries
        self._groups: list[tuple[int, int]] = []  # (file, row group) of every group, and the rows up to its end
        self._unreadable: dict[int, str] = {}  # row groups whose columns the metadata does not describe, and why
        self._ends: list[int] = []
        self._file_starts: list[int] = []
        total = 0
        for i, file_path in enumerate(self._files):
            with _open(file_path) as file:
                self._choose_columns(file, file_path, columns)
                leaves = [file.schema.column(j) for j in range(len(file.schema))]
                chosen = [j for j, leaf in enumerate(leaves) if _of_columns(leaf.path, self._names)]
                bytes_like = [leaves[j].path for j in chosen if leaves[j].physical_type == "BYTE_ARRAY"]
                self._dictionaries.append(bytes_like)
                self._file_starts.append(total)
                for group in range(file.num_row_groups):
                    if damage := _check_group(file, group, chosen, self._names, file_path):
                        self._unreadable[len(self._groups)] = damage
                    total += file.metadata.row_group(group).num_rows
                    self._groups.append((i, group))
                    self._ends.append(total)
        self._open_cache()

    def _choose_columns(self, file: pq.ParquetFile, path: Any, columns: Callable[..., list[str]]) -> None:
        """Settles from the first file what is read, and that the others have the same."""
        schema, where = file.schema_arrow, repr(str(path))
        chosen = columns(file, where)
        keyed = "id" in schema.names
        names = list(dict.fromkeys([*chosen, *(["id"] if keyed else [])]))
        twice = [n for n in names if schema.names.count(n) > 1]
        if twice:
            raise ConfigError(f"{where} has two columns called {twice[0]!r}: rename one")
        if not self._names:
            self._names, self._keyed = names, keyed
        if keyed != self._keyed:
            raise ConfigError(f"{where} and {self.first_file}: only one of the two has a column 'id'")
        if set(names) != set(self._names):
            others = sorted(set(names) ^ set(self._names))
            raise ConfigError(f"{where} has other columns than {self.first_file}: {', '.join(others)}")

    @property
    def first_file(self) -> str:
        """The quoted name of the first file, for messages."""
        return repr(str(self._files[0]))

    def _open_cache(self) -> None:
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._damaged = dict(self._unreadable)  # what was wrong with the row groups that did not decode
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_cache", "_damaged", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open_cache()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> tuple[str, dict[str, Any]]:
        """(key, values by column) of a row; the key is its `id`, or `file.parquet#row`.

        Raises BadRecord(damaged_file).
        """
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
        return key, row

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
            f"row group {group} of {str(path)!r} takes {size:,} bytes in memory for the columns that are read; at "
            f"most {MAX_GROUP_BYTES:,} are read: write the file again with smaller groups, for example "
            "pyarrow.parquet.write_table(table, path, row_group_size=1000)"
        )
    return ""


def _width(leaf: pq.ColumnSchema) -> int:
    """Bytes that a value of a column takes in memory, beside the distinct ones of texts and bytes."""
    return {"BYTE_ARRAY": 4, "FIXED_LEN_BYTE_ARRAY": leaf.length}.get(leaf.physical_type, 12)


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
