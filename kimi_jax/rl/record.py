"""Groups as JSON: what a rollout process sends, a replay buffer keeps, and a checkpoint stores of unfinished samples.

A record may come from another host or an old file, so its size is checked before it is parsed, every field has one
type, unknown and missing fields are refused, and what it says must satisfy `types`. Log-probabilities are float32 and
survive exactly. Images and experts are base64 of little-endian arrays.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from kimi_jax.data.example import MediaItem
from kimi_jax.rl.types import MAX_TOKENS, Group, Segment, Trajectory, TrajectoryError
from kimi_jax.untrusted import describe, parse_object

MAX_BYTES = 1 << 28  # of one group as JSON


def dump(group: Group) -> bytes:
    """The group as JSON, UTF-8. Raises TrajectoryError for one larger than MAX_BYTES."""
    record = {
        "key": group.key,
        "media": [{"grid": list(m.grid), "patches": _text(m.patches)} for m in group.media],
        "trajectories": [
            {"reward": t.reward, "finish": t.finish, "segments": [_segment(s) for s in t.segments]}
            for t in group.trajectories
        ],
    }
    data = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
    if len(data) > MAX_BYTES:
        raise TrajectoryError(f"group {group.key} takes {len(data)} bytes as JSON, more than {MAX_BYTES}")
    return data


def load(data: bytes) -> Group:
    """The group of a record. Raises TrajectoryError, which says where it is wrong."""
    if len(data) > MAX_BYTES:
        raise TrajectoryError(f"a record has {len(data)} bytes, more than {MAX_BYTES}")
    record = _fields(parse_object(data, "the record", TrajectoryError), "the record", ("key", "media", "trajectories"))
    trajectories = _each(record["trajectories"], "trajectories", _load_trajectory)
    media = _each(record["media"], "media", _load_media)
    return Group(_typed(record["key"], str, "key"), trajectories, media)


def _segment(segment: Segment) -> dict[str, Any]:
    return {
        "tokens": segment.tokens.tolist(),
        "logp": segment.logp.tolist(),
        "sampled": segment.sampled.astype(int).tolist(),
        "versions": segment.versions.tolist(),
        "parent": segment.parent,
        "frozen": segment.frozen,
        "media": list(segment.media),
        "experts": None if segment.experts is None else {
            "shape": list(segment.experts.shape),
            "data": _text(segment.experts.astype("<i2")),
        },
    }  # fmt: skip


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _load_trajectory(record: Any, where: str) -> Trajectory:
    fields = _fields(record, where, ("reward", "finish", "segments"))
    reward = fields["reward"]
    if reward is not None:
        reward = float(_numbers([reward], np.float64, f"{where}.reward")[0])
    segments = _each(fields["segments"], f"{where}.segments", _load_segment)
    return Trajectory(segments, reward, _typed(fields["finish"], str, f"{where}.finish"))


def _load_segment(record: Any, where: str) -> Segment:
    names = ("tokens", "logp", "sampled", "versions", "parent", "frozen", "media", "experts")
    fields = _fields(record, where, names)
    tokens = _numbers(fields["tokens"], np.int32, f"{where}.tokens")
    sampled = _numbers(fields["sampled"], np.int32, f"{where}.sampled")
    if ((sampled != 0) & (sampled != 1)).any():
        raise TrajectoryError(f"{where}.sampled holds 0 and 1 only")
    experts = fields["experts"]
    if experts is not None:
        inner = _fields(experts, f"{where}.experts", ("shape", "data"))
        shape = tuple(_numbers(inner["shape"], np.int32, f"{where}.experts.shape").tolist())
        experts = _array(inner["data"], np.dtype("<i2"), shape, f"{where}.experts").astype(np.int32)
    parent = fields["parent"]
    return Segment(
        tokens,
        _numbers(fields["logp"], np.float32, f"{where}.logp"),
        sampled.astype(bool),
        _numbers(fields["versions"], np.int32, f"{where}.versions"),
        None if parent is None else _typed(parent, int, f"{where}.parent"),
        _typed(fields["frozen"], bool, f"{where}.frozen"),
        tuple(_numbers(fields["media"], np.int32, f"{where}.media").tolist()),
        experts,
    )


def _load_media(record: Any, where: str) -> MediaItem:
    fields = _fields(record, where, ("grid", "patches"))
    grid = _numbers(fields["grid"], np.int32, f"{where}.grid").tolist()
    if len(grid) != 3 or min(grid) < 1 or grid[1] % 2 or grid[2] % 2 or max(grid) > 1 << 12:
        raise TrajectoryError(f"{where}.grid is t, h, w with even h and w, not {describe(grid)}")
    count = grid[0] * grid[1] * grid[2]
    text = _typed(fields["patches"], str, f"{where}.patches")
    pixels = 3 * len(text) // 4 // count  # padding of base64 is less than a patch
    return MediaItem(_array(text, np.dtype(np.uint8), (count, pixels), where), (grid[0], grid[1], grid[2]))


def _array(text: Any, dtype: np.dtype, shape: tuple[int, ...], where: str) -> np.ndarray:
    try:
        data = base64.b64decode(_typed(text, str, where), validate=True)
    except (binascii.Error, ValueError) as problem:
        raise TrajectoryError(f"{where} is not base64: {problem}") from problem
    size = dtype.itemsize
    for length in shape:  # Python's integers: nothing overflows
        size *= int(length)
    if min(shape, default=1) < 0 or size != len(data) or not data:
        raise TrajectoryError(f"{where} has {len(data)} bytes, which is not {dtype} {describe(shape)}")
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _numbers(value: Any, dtype: type[np.generic], where: str) -> np.ndarray:
    items = _typed(value, list, where)
    if len(items) > MAX_TOKENS:
        raise TrajectoryError(f"{where} has {len(items)} numbers, more than {MAX_TOKENS}")
    allowed = (int, float) if issubclass(dtype, np.floating) else (int,)
    for item in items:
        if type(item) not in allowed or not abs(item) < 1 << 31:  # True is no number
            raise TrajectoryError(f"{where} holds {describe(item)}, which is no {dtype.__name__}")
    return np.array(items, dtype)


def _each(value: Any, where: str, load_one: Callable[[Any, str], Any]) -> tuple[Any, ...]:
    return tuple(load_one(item, f"{where}[{i}]") for i, item in enumerate(_typed(value, list, where)))


def _fields(value: Any, where: str, names: tuple[str, ...]) -> dict[str, Any]:
    if set(_typed(value, dict, where)) != set(names):
        raise TrajectoryError(f"{where} has the fields {', '.join(names)}, not {describe(list(value))}")
    return value


def _typed(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:  # True is an int to isinstance
        raise TrajectoryError(f"{where} is {kind.__name__}, not {describe(value)}")
    return value
