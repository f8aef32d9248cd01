"""Parquet files as Hugging Face writes them: text columns and image columns, turned into examples by a template.

    SourceConfig(kind="parquet", path="nlvr_dev.parquet?template={image}{statement} True or false?{loss=1} {label}")

`path` may be a pattern (`data/train-*.parquet`, files in name order). The template is that of `template.py`. An image
column holds encoded bytes (of any binary type, dictionaries of them too), or the struct {bytes, path} of Hugging Face,
or a list of either; a path without bytes is refused (unsafe_path): such files say nothing about where the path starts.
Some writers mark text as bytes: a column of bytes whose first values are all UTF-8 is text, every other one images.
Example keys are `file.parquet#row`, or the column `id` when there is one.
Row groups and their cache: parquet_rows.py.
"""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kimi_jax.config import ConfigError
from kimi_jax.data import BadRecord
from kimi_jax.data.example import Example
from kimi_jax.data.sources.parquet_rows import ParquetRows
from kimi_jax.data.sources.record import Media, Record, decode
from kimi_jax.data.sources.template import Column, Template, check_columns, split_path

PROBED = 16  # values of a column of bytes that decide whether it is text
EXAMPLE = "FILES.parquet?template={image}{question}{loss=1} {answer}"


class ParquetSource:
    """Rows of parquet files as examples."""

    def __init__(self, path: str, template: Template) -> None:
        self.template = template
        self._kinds: dict[Column, str] = {}
        self._first = ""  # the file that settled the kinds
        self.rows = ParquetRows(path, self._check_columns)

    def _check_columns(self, file: pq.ParquetFile, where: str) -> list[str]:
        """Settles from the first file what the columns hold, and that the others hold the same."""
        schema = file.schema_arrow
        check_columns(self.template, schema.names, where)
        self._first = self._first or where
        twice = [c.name for c in self.template.columns if schema.names.count(c.name) > 1]
        if twice:
            raise ConfigError(f"{where} has two columns called {twice[0]!r}: rename one")
        found = {c: c.kind or _kind(file, schema.field(c.name).type, c.name) for c in self.template.columns}
        for column, kind in found.items():
            settled = self._kinds.get(column)
            if settled in (None, UNKNOWN):
                self._kinds[column] = kind
            elif kind not in (settled, UNKNOWN):
                raise ConfigError(
                    f"column {column.name!r} holds {_type_name(kind)} in {where}, {_type_name(settled)} in "
                    f"{self._first}"
                )
        return [column.name for column in self.template.columns]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Row `index` as an example. Raises BadRecord."""
        return decode(self.record(index))

    def record(self, index: int) -> Record:
        """Row `index`, media still encoded. Raises BadRecord empty, unsafe_path or damaged_file."""
        key, row = self.rows.row(index)
        values = {c: _value(row[c.name], kind, c.name, key) for c, kind in self._kinds.items()}
        parts = self.template.fill(values)
        if not any(isinstance(p, Media) or p.text.strip() for p in parts):
            raise BadRecord("empty", key, "the columns of the template are empty in this row")
        return Record(key, parts)


def open_parquet(path: str, split: str) -> ParquetSource:
    """The source of `FILES.parquet?template=...`; the split is in the path.

    Raises ConfigError without a file or a template, and for a column that is not there.
    """
    del split
    path, template = split_path(path, EXAMPLE)
    if template is None:
        raise ConfigError(f"the parquet source {path!r} needs a template that says how a row reads: {EXAMPLE}")
    return ParquetSource(path, template)


UNKNOWN = "unknown"  # the kind of a column of nulls or of a file without rows


def _type_name(kind: str) -> str:
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
