"""Stacked leaves on disk, written and read a slice at a time, in the layout that Orbax restores.

Source: docs/architecture.md section 9. A leaf is one zarr
array in a folder of its own, split into chunks that are each written once; `_METADATA` beside them makes the folder an
Orbax item. Reading also takes what Orbax itself saved (one OCDBT database for all leaves).
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from kimi_jax.hf.files import CheckpointError
from kimi_jax.untrusted import MAX_TABLE, check_inside, describe, is_remote, read_json

Place = tuple[Any, ...]  # one integer or slice for each axis that is split


class Leaves:
    """The leaves of one Orbax item. Thread-safe; every write is on disk when it returns."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = epath.Path(path)
        self._open: dict[str, ts.TensorStore] = {}

    def create(self, leaf: str, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype) -> None:
        """Makes a leaf, or opens it if it is there with this shape, chunk and dtype."""
        spec = {
            "driver": "zarr",
            "kvstore": _kvstore(self.path / leaf),
            "metadata": {"compressor": None, "shape": list(shape), "chunks": list(chunk)},
            "dtype": dtype.name,
            # A chunk that happens to be all zeros must exist too, or a journal could not be believed.
            "store_data_equal_to_fill_value": True,
        }
        self._open[leaf] = ts.open(spec, create=True, open=True, context=_context(0)).result()

    def open(self) -> dict[str, ts.TensorStore]:
        """All leaves for reading, whoever wrote them.

        Raises FileNotFoundError if this is not an Orbax item, CheckpointError for damaged metadata and for names that
        lead out of the folder.
        """
        file = self.path / "_METADATA"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: not the weights of a checkpoint")
        found = read_json(file, MAX_TABLE, CheckpointError)
        driver = "zarr3" if found.get("use_zarr3") else "zarr"
        for leaf in _leaf_names(file, found):
            check_inside(self.path, leaf, CheckpointError)
            self._open[leaf] = self._open_leaf(leaf, driver)
        return self._open

    def _open_leaf(self, leaf: str, driver: str) -> ts.TensorStore:
        kvstore: Any = _kvstore(self.path / leaf)
        if (self.path / "manifest.ocdbt").exists():
            kvstore = {"driver": "ocdbt", "base": _kvstore(self.path), "path": f"{leaf}/"}
        spec = {"driver": driver, "kvstore": kvstore}
        try:
            store = ts.open(spec, open=True, read=True, context=_context(0)).result()
        except ValueError as error:  # metadata that tensorstore cannot read, or that are not there
            raise CheckpointError(f"{self.path / leaf} cannot be opened: {error}") from error
        # Training saves a chunk for each shard, which holds many slices: keep one decoded, and read leaf by leaf.
        sizes = store.chunk_layout.read_chunk.shape or ()
        chunk = math.prod(size or 1 for size in sizes) * store.dtype.numpy_dtype.itemsize
        if chunk <= _SMALL_CHUNK:
            return store
        return ts.open(spec, open=True, read=True, context=_context(int(1.1 * chunk)), recheck_cached=False).result()

    def write(self, leaf: str, place: Place, values: np.ndarray) -> None:
        """leaf[place] = values."""
        store = self._open[leaf][place]
        store.write(
            np.ascontiguousarray(values).reshape(store.shape), can_reference_source_data_indefinitely=True
        ).result()

    def read(self, leaf: str, place: Place) -> np.ndarray:
        """leaf[place]."""
        return self._open[leaf][place].read().result()

    def finish(self) -> None:
        """Writes `_METADATA`: from now on Orbax can restore the folder."""
        tree = {}
        for leaf, store in self._open.items():
            keys = tuple(leaf.split("."))
            tree[str(keys)] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {
                    "value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(store.shape),
                },
            }  # fmt: skip
        metadata = {
            "tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }  # fmt: skip
        (self.path / "_METADATA").write_text(json.dumps(metadata), encoding="utf-8")


def _leaf_names(file: epath.Path, metadata: dict[str, Any]) -> list[str]:
    """The leaves that `_METADATA` lists. Raises CheckpointError if it is damaged."""
    entries = metadata.get("tree_metadata")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: tree_metadata must be an object, not {describe(entries)}")
    leaves = []
    for entry in entries.values():
        keys = entry.get("key_metadata") if isinstance(entry, dict) else None
        if not isinstance(keys, list) or not all(isinstance(key, dict) and "key" in key for key in keys):
            raise CheckpointError(f"{file}: tree_metadata needs key_metadata with keys, not {describe(entry)}")
        leaves.append(".".join(str(key["key"]) for key in keys))
    return leaves


def _kvstore(folder: epath.Path) -> Any:
    """What tensorstore calls a folder."""
    if is_remote(folder):
        return os.fspath(folder) + "/"
    return {"driver": "file", "path": os.path.abspath(folder) + "/"}


_SMALL_CHUNK = 1 << 26  # bytes


def _context(cache_bytes: int) -> ts.Context:
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
