"""Where a run's batches come from, as a protocol: a data stream, rollouts, a toy in a test.

A source hands out packed batches and can be continued: whatever it needs for that is its host state, which travels in
the run's checkpoints. The state is JSON, with NumPy arrays wherever something is large (a buffer of rollouts); a
checkpoint holds the arrays beside the JSON (`split_arrays`, `join_arrays`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kimi_jax import hosts
from kimi_jax.config import TrainConfig
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.packed_batch import PackedBatch

HostState = dict[str, Any]  # JSON values, and NumPy arrays of numbers or bools anywhere in it
ARRAY = "__array__"  # key of what stands in the JSON in an array's place: [dtype, shape]


class SourceUnavailable(RuntimeError):
    """No batch comes just now, from no fault of the settings; the run saves what it has and ends, and a later start may
    succeed. `state` of the source is still one that a run goes on from."""


@runtime_checkable
class BatchSource(Protocol):
    """An endless iterator over batches that can be continued. With several hosts all of them call every method at the
    same point, and each gets the rows of its own packs."""

    def __next__(self) -> PackedBatch:
        """The next batch of this host. What it raises ends the run; weights passed to `update` are still valid here."""

    def state(self) -> HostState:
        """What a source needs to continue behind the batch last delivered; the same on every host."""

    def report(self) -> dict[str, Any]:
        """For the log, as JSON: `batches`, delivered since the start of the run (earlier starts included), and what the
        source wants to tell; `token_fill` and `ratio` (of vision tokens) get columns of their own."""

    def update(self, params: Any, step: int) -> None:
        """Called before every batch with the weights that have learned from `step` batches (with `config.lora` the
        adapters). They are donated to the step that follows: copy what is needed after the next batch is delivered."""

    def close(self) -> None:
        """Lets go of processes, threads and files."""


# (settings, packs of the global batch that this host makes, state to continue from or None) -> source
OpenBatches = Callable[[TrainConfig, Sequence[int], HostState | None], BatchSource]


def open_stream(config: TrainConfig, packs: Sequence[int], state: HostState | None) -> BatchStream:
    """The data stream of `config.data`, the source of pre-training and SFT."""
    return BatchStream(config.data, config.model, config.steps, shards=packs, state=state, gather=hosts.gather)


# ----------------------------------------------------------------------------------------------------------- host state


def split_arrays(state: HostState) -> tuple[HostState, dict[str, np.ndarray]]:
    """(JSON with a description in each array's place, arrays by their path in it). Arrays are copied.

    Raises TypeError, naming the place, for an array that is not of numbers or bools, or a value that is no JSON.
    """
    arrays: dict[str, np.ndarray] = {}
    return _split(state, "", arrays), arrays


def _split(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, np.generic):
        return _split(value.item(), path, arrays)
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "OUSMm" or value.dtype.names:
            raise TypeError(f"host state {path}: an array of {value.dtype}; only numbers and bools can be saved")
        if value.size:  # tensorstore has no arrays without elements
            arrays[path] = np.array(value)
        return {ARRAY: [value.dtype.name, list(value.shape)]}
    if isinstance(value, dict):
        if ARRAY in value or not all(isinstance(key, str) for key in value):
            raise TypeError(f"host state {path or '.'}: keys are strings other than {ARRAY!r}, not {list(value)[:5]}")
        return {key: _split(each, f"{path}.{key}" if path else key, arrays) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_split(each, f"{path}.{i}", arrays) for i, each in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"host state {path}: {type(value).__name__} is neither JSON nor an array")


def described(json: Any) -> dict[str, np.ndarray]:
    """Arrays of zeros like those that `split_arrays` took out of this JSON, by path."""
    found: dict[str, np.ndarray] = {}

    def put(path: str, dtype: str, shape: list[int]) -> None:
        if 0 not in shape:
            found[path] = np.zeros(shape, dtype)

    _walk(json, "", put)
    return found


def join_arrays(json: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The inverse of `split_arrays`."""

    def take(path: str, dtype: str, shape: list[int]) -> np.ndarray:
        return np.zeros(shape, dtype) if 0 in shape else np.asarray(arrays[path], dtype).reshape(shape)

    return _walk(json, "", take)


def _walk(value: Any, path: str, array: Callable[[str, str, list[int]], Any]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {ARRAY}:
            return array(path, *value[ARRAY])
        return {key: _walk(each, f"{path}.{key}" if path else key, array) for key, each in value.items()}
    return [_walk(each, f"{path}.{i}", array) for i, each in enumerate(value)] if isinstance(value, list) else value
